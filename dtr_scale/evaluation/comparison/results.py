"""Put evaluations of several runs side by side, with what their manifests differ in.

Two numbers are comparable when their manifests differ in nothing but the checkpoint. What else
they differ in stands beside them.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dtr_scale.evaluation.comparison.record import UNKNOWN, Evaluation, RunRecord

HELD_OUT_LOSS = "eval_loss"
"""Of an evaluation; `eval_loss_cluster_3` is that of a cluster."""
_OF_A_CHECKPOINT = {
    "checkpoint",
    "checkpoints",
    "step",
    "samples_seen",
    "weights",
    "weights_sha256",
    "world_size",
    "samples.source",
    "samples.sha256",
}
"""Keys that tell which weights were measured, not how."""
_MOST_BLOCKS = 6
_HASH = re.compile(r"[0-9a-f]{32,}")  # shown by its first 12 digits


@dataclass(frozen=True)
class Block:
    """One evaluation of each run that has one, and the metrics to read off them."""

    chosen: Sequence[Evaluation | None]
    metrics: Sequence[str]
    differences: Mapping[str, Sequence[str]]
    """What the manifests differ in, by key: the value of each run. {}: they are comparable."""

    @property
    def is_comparable(self) -> bool:
        return not self.differences

    @property
    def is_of_one_step(self) -> bool:
        return len({each.step for each in self.chosen if each}) == 1


def protocol(evaluation: Evaluation) -> dict[str, Any]:
    """Return how a number was measured: its manifest without what tells the checkpoint."""
    flat = _flat(evaluation.manifest)
    return {k: v for k, v in flat.items() if k not in _OF_A_CHECKPOINT}


def result_blocks(runs: Sequence[RunRecord]) -> list[Block]:
    """Return the newest numbers of every run.

    First by the manifests that runs share, where the newest are of different steps also those of
    the last step in common. Then, of the metrics for which a run shares none, the newest number of
    each run, whatever its manifest.
    """
    shared: list[Block] = []
    seen: set[tuple[int, str]] = set()
    for by_step in _by_protocol(runs):
        newest = [max(each.items())[1] if each else None for each in by_step]
        if sum(each is not None for each in newest) < 2:
            continue
        common = set.intersection(*(set(each) for each in by_step if each))
        if common and len({each.step for each in newest if each}) > 1:
            together = [each[max(common)] if each else None for each in by_step]
            shared.append(Block(together, _metric_names(together), {}))
        shared.append(Block(newest, _metric_names(newest), {}))
        seen |= {(i, name) for i, each in enumerate(newest) if each for name in each.metrics}
    return shared[:_MOST_BLOCKS] + _different(runs, seen)


def metric_curves(runs: Sequence[RunRecord], metric: str) -> list[list[Evaluation]]:
    """Return each run's evaluations that have a metric, by one manifest: the one most runs share.

    [] for a run without any.
    """
    ranked = _ranked(runs, metric)
    series: list[list[Evaluation]] = []
    for run in runs:
        having = [each for each in run.evaluations if metric in each.metrics]
        best = min((_key(each) for each in having), key=ranked.index, default=None)
        # Of a step that was measured twice the newer number counts.
        by_step = {each.step: each for each in having if _key(each) == best}
        series.append([by_step[step] for step in sorted(by_step, key=lambda s: s or 0)])
    return series


def curve_metrics(runs: Sequence[RunRecord]) -> list[str]:
    """Return the metrics of which some run has two points or more to draw a curve through."""
    names = dict.fromkeys(n for run in runs for each in run.evaluations for n in each.metrics)
    return [n for n in names if any(len(points) > 1 for points in metric_curves(runs, n))]


def held_out_clusters(metrics: Iterable[str]) -> list[str]:
    """Return the held-out losses of the clusters among some metrics, in their order."""
    found = [name for name in metrics if name.startswith(f"{HELD_OUT_LOSS}_cluster_")]
    return sorted(found, key=lambda name: int(name.rpartition("_")[2]))


def manifest_differences(chosen: Sequence[Evaluation | None]) -> dict[str, list[str]]:
    """Return what the manifests of some evaluations differ in, the checkpoint left out.

    By key, with a value for each; "" where there is no evaluation.
    """
    protocols = [None if each is None else protocol(each) for each in chosen]
    keys = dict.fromkeys(key for each in protocols if each for key in each)
    told = {
        key: ["" if each is None else _text(each.get(key)) for each in protocols] for key in keys
    }
    if UNKNOWN in told:
        # Nothing is known of one of them, so listing all that the others tell would mislead.
        return {
            "manifest": [
                "" if e is None else "unknown" if UNKNOWN in e else "known" for e in protocols
            ]
        }
    present = [index for index, each in enumerate(protocols) if each is not None]
    return {k: v for k, v in told.items() if len({v[index] for index in present}) > 1}


def not_comparable(what: str, keys: Iterable[str]) -> str:
    """Return the sentence that stands beside numbers which differ in more than the checkpoint."""
    return f"Not comparable as they stand: {what} differ in {', '.join(keys)}."


def _different(runs: Sequence[RunRecord], seen: set[tuple[int, str]]) -> list[Block]:
    """Return blocks of the metrics that some run has under no shared manifest."""
    by_choice: dict[tuple[int, ...], Block] = {}
    for metric in _metric_names(each for run in runs for each in run.evaluations):
        series = metric_curves(runs, metric)
        having = [index for index, points in enumerate(series) if points]
        if all((index, metric) in seen for index in having):
            continue
        chosen = [points[-1] if points else None for points in series]
        key = tuple(id(each) for each in chosen)
        names = [*by_choice[key].metrics, metric] if key in by_choice else [metric]
        by_choice[key] = Block(chosen, names, manifest_differences(chosen))
    return list(by_choice.values())


def _by_protocol(runs: Sequence[RunRecord]) -> list[list[dict[int, Evaluation]]]:
    """Return each run's evaluations by step, for every manifest; that of most runs first."""
    groups: dict[str, list[dict[int, Evaluation]]] = {}
    for index, run in enumerate(runs):
        for each in run.evaluations:  # the newest of a step is the last
            group = groups.setdefault(_key(each), [{} for _ in runs])
            group[index][each.step or 0] = each
    return sorted(groups.values(), key=lambda group: sum(not each for each in group))


def _ranked(runs: Sequence[RunRecord], metric: str) -> list[str]:
    """Return the manifests' keys: those that most runs share first, then those of most points."""
    having: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        for each in run.evaluations:
            if metric in each.metrics:
                having.setdefault(_key(each), []).append(index)
    return sorted(having, key=lambda key: (len(set(having[key])), len(having[key])), reverse=True)


def _metric_names(chosen: Iterable[Evaluation | None]) -> list[str]:
    names = list(dict.fromkeys(name for each in chosen if each for name in each.metrics))
    clusters = held_out_clusters(names)
    return [name for name in names if name not in clusters]  # those have charts of their own


def _key(evaluation: Evaluation) -> str:
    return json.dumps(protocol(evaluation), sort_keys=True, default=str)


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _text(value: Any) -> str:  # noqa: ANN401
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text[:12] if _HASH.fullmatch(text) else text
