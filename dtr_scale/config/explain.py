"""Explain the keys of an experiment: what each does and accepts, and which commands read it."""

import json
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from dtr_scale.config.messages import suggestion
from dtr_scale.config.schema import Experiment
from dtr_scale.errors import ConfigError

_OF_A_RUN = "of a run: sample, evaluate, cka, affinity, plots, export"
# By the longest beginning of a key. What a run's commands read is in its config.json, and stays.
_READ_BY = {
    "$schema": "editors",
    "name": "train",
    "run_dir": "train",
    "description": "train, for MLflow",
    "expected": "reproduce; train, for MLflow",
    "model.": f"train, plan, bench; {_OF_A_RUN}",
    "diffusion.": f"train, plan, bench; {_OF_A_RUN}",
    "objective.": "train, bench train",
    "data.": "train, bench data, bench train; of a run: sample, evaluate, cka, affinity",
    "data.storage_options": "train, bench data; sample and evaluate, as an override",
    "train.": "train, bench train",
    "train.max_steps": "train, plan",
    "train.global_batch_size": "train, plan, bench train",
    "train.seed": "train, bench; of a run: sample, evaluate, cka, affinity",
    "engine.": "train, bench train",
    "engine.compile": "train, bench train; of a run: sample, evaluate",
    "checkpoint.": "train",
    "checkpoint.dir": "train, and all commands on a run",
    "tracking.": "train; of a run: tracking sync, and what sends its findings",
    "evaluation.": "train, at its evaluations; bench sample; sample and evaluate, as an override",
    "evaluation.every_steps": "train",
    "evaluation.loss_samples": "train, at its evaluations",
    "evaluation.precision": "sample and evaluate, as an override",
}
_BOUNDS = {
    "minimum": "from",
    "exclusiveMinimum": "above",
    "maximum": "to",
    "exclusiveMaximum": "below",
}
_TYPES = {"string": "text", "boolean": "true or false"}


class Setting(NamedTuple):
    """A key of an experiment. Networks may share one, with defaults of their own."""

    key: str
    owner: str
    """The type of network that it is of, "" where all have it."""
    accepts: str
    default: str
    told: str

    @property
    def read_by(self) -> str:
        """Which commands read it."""
        beginnings = (start for start in _READ_BY if self.key.startswith(start))
        return _READ_BY[max(beginnings, key=len)]

    def __str__(self) -> str:
        lines = [f"{self.key}  (of {self.owner})" if self.owner else self.key]
        told = {
            "does": " ".join(self.told.split()),
            "accepts": self.accepts,
            "default": self.default,
            "read by": self.read_by,
        }
        for label, text in told.items():
            # In columns: further lines stand below the first one's text.
            wrapped = textwrap.wrap(text, width=87, break_on_hyphens=False)
            lines.append(f"  {label:<8} " + f"\n{'':11}".join(wrapped))
        return "\n".join(lines)


def settings() -> list[Setting]:
    """Return every key of an experiment, as its file may have them."""
    schema = Experiment.model_json_schema(by_alias=True)
    found = list(_settings(schema, schema, ""))
    # What all networks have alike stands once.
    alike = {s._replace(owner="") for s in found if s.owner}
    shared = [s for s in alike if sum(s == f._replace(owner="") for f in found) > 1]
    once = [s._replace(owner="") if s._replace(owner="") in shared else s for s in found]
    return list(dict.fromkeys(once))


def explain_key(key: str) -> str:
    """Return what is to know of a key, or of each key of a section; ConfigError for another."""
    known = settings()
    asked = [s for s in known if s.key == key] or [s for s in known if s.key.startswith(f"{key}.")]
    if not asked:
        raise ConfigError(f"unknown key {key}{suggestion(key)}")
    return "\n\n".join(map(str, asked))


def list_keys() -> str:
    """Return every key with its default, a line each, by section."""
    lines, section = [], ""
    for setting in settings():
        if (parent := setting.key.rpartition(".")[0].partition(".")[0]) != section:
            section = parent
            lines.append("")
        owner = f"  ({setting.owner})" if setting.owner else ""
        lines.append(f"{setting.key:<36} {setting.default}{owner}")
    return "\n".join(lines)


def _settings(
    node: dict[str, Any], schema: dict[str, Any], prefix: str, owner: str = ""
) -> Iterator[Setting]:
    for name, told in node["properties"].items():
        key = f"{prefix}{name}"
        sections = {"": told} if "$ref" in told else {}
        if "discriminator" in told:
            kinds = {place: kind for kind, place in told["discriminator"]["mapping"].items()}
            sections = {kinds[option["$ref"]]: option for option in told["oneOf"]}
        for kind, section in sections.items():
            inner = schema["$defs"][section["$ref"].rpartition("/")[2]]
            yield from _settings(inner, schema, f"{key}.", kind or owner)
        if not sections:
            default = "none, it must be given"
            if name not in node.get("required", ()):
                default = json.dumps(told["default"])
            yield Setting(key, owner, _accepted(told), default, told.get("description", ""))


def _accepted(node: dict[str, Any]) -> str:
    """Return what a key accepts, of its JSON Schema."""
    if options := node.get("anyOf"):
        return " or ".join(map(_accepted, options))
    if "const" in node or "enum" in node:
        return ", ".join(json.dumps(value) for value in node.get("enum", [node.get("const")]))
    if items := node.get("prefixItems"):
        return f"[{', '.join(map(_accepted, items))}]"
    if node["type"] == "array":
        return f"list of: {_accepted(node['items'])}"
    kinds = [node["type"]] if isinstance(node["type"], str) else node["type"]
    bounds = [
        f"{word} {node[bound]}".removesuffix(".0")
        for bound, word in _BOUNDS.items()
        if bound in node
    ]
    return " ".join([" or ".join(_TYPES.get(kind, kind) for kind in kinds), *bounds])
