"""Start a training from weights of others: official ones, or a DeepSpeed universal checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from dtr_scale.checkpoint.convert import load_official
from dtr_scale.checkpoint.weights import read_pickle
from dtr_scale.engines.base import ADAM_MOMENTS, MASTER, Piece
from dtr_scale.errors import CheckpointError, ConfigError

StartKind = Literal["dit", "dtr", "adm", "universal"]


@dataclass(frozen=True)
class Start:
    """State by parameter name, mapped from files where they allow it."""

    weights: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """exp_avg and exp_avg_sq; absent for a fresh optimizer."""
    optimizer_step: int = 0

    def copy_to(self, state: Mapping[str, Piece]) -> None:
        """Fill a rank's pieces of masters, averages, moments and buffers.

        ConfigError where the start has no tensor of a piece's shape.
        """
        sources = {MASTER: self.weights, "buffer": self.weights, **self.moments}
        for key, piece in state.items():
            kind, _, name = key.partition("/")
            source = self.ema if kind.startswith("ema") else sources.get(kind)
            if source is not None:
                piece.data.copy_(_slice(source.get(name), name, piece))


def read_start(path: Path, kind: StartKind) -> Start:
    """Return what official weights or a DeepSpeed universal checkpoint hold.

    "dit", "dtr" and "adm" are files as `load_official` reads them: weights, averages, R-TR's masks,
    and no optimizer. "universal" is a folder of DeepSpeed's ds_to_universal: weights, moments and
    step; averages begin at the weights. Raises CheckpointError for what cannot be read.
    """
    if kind == "universal":
        return _read_universal(path)
    averages = load_official(path, kind, "ema")
    try:
        weights = load_official(path, kind, "model")
    except CheckpointError:
        weights = averages  # the averages alone were released
    return Start(weights, averages)


def _slice(whole: Tensor | None, name: str, piece: Piece) -> Tensor:
    # ZeRO-3's universal tensors are flat.
    if whole is None or tuple(whole.shape) not in (piece.shape, (prod(piece.shape),)):
        found = "missing" if whole is None else f"of shape {tuple(whole.shape)}"
        raise ConfigError(
            f"checkpoint.start_from does not fit the network: {name} is {found}, the network's "
            f"of {piece.shape}; set model as it was there"
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
