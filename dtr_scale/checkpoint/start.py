"""Start a training from other weights: of runs and exports, official ones, or DeepSpeed's."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dtr_scale.checkpoint.convert import MASK, load_official, unwrapped
from dtr_scale.checkpoint.fit import Fit, Rows
from dtr_scale.checkpoint.inspection import find_checkpoint
from dtr_scale.checkpoint.weights import read_pickle, read_weights
from dtr_scale.engines.base import ADAM_MOMENTS, MASTER, Piece
from dtr_scale.errors import CheckpointError, ConfigError

OfficialKind = Literal["dit", "dtr", "adm"]
StartKind = OfficialKind | Literal["run", "export", "universal"]

_WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
"""Where a pipeline for diffusers has them."""


@dataclass(frozen=True)
class Start:
    """State by parameter name, mapped from files where they allow it."""

    weights: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """exp_avg and exp_avg_sq; absent for a fresh optimizer."""
    optimizer_step: int = 0
    has_null_label: bool = False
    """Whether the last row of a table of labels stands for no class."""
    fit: Fit | None = None
    """What a network takes of it; None: all that it has."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self.weights.items()}

    def fitted(self, fit: Fit) -> "Start":
        """Return this start for a network that takes of it what `fit` says."""
        if self.moments:
            raise ConfigError(
                "checkpoint.start_adapt=true is for weights, and a universal checkpoint goes on "
                "with an optimizer; set checkpoint.start_adapt=false and model as it was there"
            )
        return replace(self, fit=fit)

    def copy_to(self, state: Mapping[str, Piece]) -> None:
        """Fill a rank's pieces of masters, averages, moments and buffers.

        What the fit leaves out stays as it is. Without a fit, ConfigError where the start has no
        tensor of a piece's shape.
        """
        sources = {MASTER: self.weights, "buffer": self.weights, **self.moments}
        for key, piece in state.items():
            kind, _, name = key.partition("/")
            source = self.ema if kind.startswith("ema") else sources.get(kind)
            if source is None:
                continue
            if self.fit is None:
                piece.data.copy_(_slice(source.get(name), name, piece))
            elif rows := self.fit.taken.get(name):
                _copy_rows(source[name], rows, piece)


def read_start(
    place: str | Path, kind: StartKind, storage_options: Mapping[str, Any] | None = None
) -> Start:
    """Return what other weights hold.

    "dit", "dtr" and "adm" are files as `load_official` reads them: weights, averages, R-TR's masks,
    and no optimizer. "run" is a run directory, a checkpoint.dir or one step_* folder, local or
    s3://: weights and the first average. "export" is a safetensors file or a pipeline of `dtr-scale
    export`, whose one set of weights is both. "universal" is a folder of DeepSpeed's
    ds_to_universal: weights, moments and step; averages begin at the weights. Raises
    CheckpointError for what cannot be read.
    """
    path = Path(place)
    match kind:
        case "universal":
            return _read_universal(path)
        case "run":
            return _read_run(str(place), storage_options)
        case "export":
            return _read_export(path)
        case _:
            return _read_official(path, kind)


def kind_of_start(place: str | Path) -> StartKind:
    """Return the kind of other weights by what is there; CheckpointError where none can be read."""
    path = Path(place)
    if "://" in str(place):
        return "run"
    if path.is_dir():
        if (path / _WEIGHTS).exists():
            return "export"
        return "universal" if (path / "zero").is_dir() else "run"
    names = unwrapped(read_weights(path))
    if path.suffix == ".safetensors" and "config" in _header(path) and "pos_embed" not in names:
        return "export"
    if "input_blocks.0.0.weight" in names:
        return "adm"
    return "dtr" if MASK.format(0) in names else "dit"


def _read_official(path: Path, kind: OfficialKind) -> Start:
    averages = load_official(path, kind, "ema")
    try:
        weights = load_official(path, kind, "model")
    except CheckpointError:
        weights = averages  # the averages alone were released
    table = averages.get("y_embedder.embedding_table.weight")
    return Start(weights, averages, has_null_label=table is not None and len(table) > 1)


def _read_run(place: str, storage_options: Mapping[str, Any] | None) -> Start:
    reader = find_checkpoint(place, storage_options=storage_options)
    found: dict[str, dict[str, Tensor]] = {MASTER: {}, "ema": {}, "buffer": {}}
    for key in reader.shapes:
        kind, _, name = key.partition("/")
        if kind in found:
            # One by one: a tensor that is not read yet takes no memory twice.
            found[kind][name] = reader.read([key])[key]
    weights = found[MASTER] | found["buffer"]
    averages = found["ema"] | found["buffer"]
    return Start(weights, averages, has_null_label=_has_null_label(reader.meta["config"]["model"]))


def _read_export(path: Path) -> Start:
    file = path / _WEIGHTS if path.is_dir() else path
    weights = read_weights(file)
    config = json.loads(_header(file).get("config", "{}")).get("model", {})
    # A pipeline has positions, the empty text and all masks beside the parameters. Masks that are
    # drawn are needed.
    for name in "pos_embed", "null_context":
        weights.pop(name, None)
    masks = weights.pop("masks", None)
    if masks is not None and len(masks) > 1:
        weights |= {f"routing.mask_{block}": mask for block, mask in enumerate(masks)}
    if path.is_dir():
        config = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))
        # A U-Net's, whose blocks differ in width; those that blocks share are windows.
        mask_of = config.get("mask_of", [])
        shared = {f"masks_{number}" for number in mask_of if mask_of.count(number) > 1}
        weights = {
            name.replace("masks_", "routing.mask_"): value
            for name, value in weights.items()
            if not (shared and name.startswith("masks_"))
        }
        return Start(weights, weights, has_null_label=config["has_null_label"])
    return Start(weights, weights, has_null_label=_has_null_label(config))


def _has_null_label(model: Mapping[str, Any]) -> bool:
    is_by_class = model.get("conditioning", "class") == "class"
    return is_by_class and model.get("class_dropout_prob", 0) > 0


def _header(path: Path) -> Mapping[str, str]:
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}  # `read_weights` tells what is wrong


def _copy_rows(source: Tensor, rows: Rows, piece: Piece) -> None:
    """Copy what a piece holds of the elements that are taken."""
    first = max(rows.target, piece.offset)
    stop = min(rows.target + rows.numel, piece.offset + piece.data.numel())
    if first < stop:
        start = rows.source + first - rows.target
        values = source.detach().reshape(-1)[start : start + stop - first]
        piece.data[first - piece.offset : stop - piece.offset].copy_(values)


def _slice(whole: Tensor | None, name: str, piece: Piece) -> Tensor:
    # ZeRO-3's universal tensors are flat.
    if whole is None or tuple(whole.shape) not in (piece.shape, (prod(piece.shape),)):
        found = "missing" if whole is None else f"of shape {tuple(whole.shape)}"
        raise ConfigError(
            f"checkpoint.start_from does not fit the network: {name} is {found}, the network's "
            f"of {piece.shape}; set model as it was there, or take what fits by "
            "--checkpoint.start_adapt=true"
        )
    return whole.detach().view(-1)[piece.offset : piece.offset + piece.data.numel()]


def _read_universal(folder: Path) -> Start:
    names = sorted(path.parent.name for path in folder.glob("zero/*/fp32.pt"))
    if not names:
        raise CheckpointError(
            f"{folder} is no universal checkpoint: it has no zero/PARAMETER/fp32.pt; make one with "
            "DeepSpeed's ds_to_universal"
        )

    def read(state: str) -> dict[str, Tensor]:
        # Mapped, not read: of each file a rank touches its own pieces alone.
        return {name: _value(folder / "zero" / name / f"{state}.pt") for name in names}

    weights = read("fp32")
    moments = {moment: read(moment) for moment in ADAM_MOMENTS}
    return Start(weights, weights, moments, _universal_step(folder / "zero", names[0]))


def _value(path: Path) -> Any:  # noqa: ANN401
    content = read_pickle(path)
    return content["param"] if isinstance(content, dict) else content


def _universal_step(folder: Path, name: str) -> int:
    if (folder / name / "step.pt").exists():
        return int(_value(folder / name / "step.pt"))
    common = read_pickle(folder / "optimizer_state.pt")  # stage 3
    return int(common["optimizer_state_dict"]["state"][0]["step"])
