"""Turn official weights into ours: those of DiT, DTR and guided-diffusion."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dtr_scale.checkpoint.weights import read_weights
from dtr_scale.errors import CheckpointError, ConfigError
from dtr_scale.models.build import build_network
from dtr_scale.models.dit import VARIANTS
from dtr_scale.models.embedders import sincos_position_table
from dtr_scale.models.routing import routing_mask

Kind = Literal["dit", "dtr", "adm"]

MASK = "blocks.{}.routing._unit_mapping"
"""Name of a block's mask in DTR's weights."""

_WRAPPERS = {"module", "_orig_mod"}  # DistributedDataParallel, torch.compile
_ADM_PARTS = {"time_embed", "label_emb", "input_blocks", "middle_block", "output_blocks", "out"}
_SIZED_BY = {
    "x_embedder.proj.weight": 4,
    "y_embedder.embedding_table.weight": 2,
    "final_layer.linear.weight": 2,
    "pos_embed": 3,
}
# DTR's code averages this constant too: decay d lets rounding move it by up to 2^-24 / (1 - d).
_POSITION_TOLERANCE = 2e-3


def load_official(
    path: Path, kind: Kind, weights: Literal["ema", "model"] = "ema"
) -> dict[str, Tensor]:
    """Return the weights of `read_weights` as `from_official` does."""
    return from_official(read_weights(path, weights), kind)


def from_official(state_dict: Mapping[str, Tensor], kind: Kind = "dit") -> dict[str, Tensor]:
    """Return official weights for our network's `load_state_dict` (strict), floats as fp32.

    "dit" is facebookresearch/DiT, "dtr" byeongjun-park/DTR, "adm" openai/guided-diffusion. Dropped
    are wrappers' prefixes, DiT's fixed positions and DTR's masks where `official_config` names the
    alpha and beta that make them; other masks go to a network with routing "random". Raises
    ConfigError for a wrong kind, CheckpointError for missing, unexpected or misshapen weights (for
    "adm": unexpected alone) and for other positions.
    """
    weights = unwrapped(state_dict)
    _check_kind(weights, kind)
    if kind == "adm":
        return weights
    config = official_config(weights, kind, num_heads=1)  # heads do not show in shapes
    masks = _pop_masks(weights, config["depth"])
    weights.pop("pos_embed")
    # For names and shapes alone: no memory, no initialisation.
    with torch.device("meta"):
        expected = build_network(**{**config, "routing": None}).state_dict()
    _check_weights(weights, expected)
    if config["routing"]["type"] == "random":
        weights |= {f"routing.mask_{block}": mask for block, mask in enumerate(masks)}
    return weights


def official_config(
    state_dict: Mapping[str, Tensor], kind: Kind = "dit", num_heads: int | None = None
) -> dict[str, Any]:
    """Return the `model` section of an official DiT or DTR, as `build_model` takes it.

    Everything is read from shapes and masks but the number of heads, which a DiT variant's hidden
    size tells; else give `num_heads`. The routing is "dtr" with the alpha and beta that make
    exactly the masks of all blocks, or "random". Raises CheckpointError where the shapes are those
    of no DiT, ConfigError for another kind or number of heads.
    """
    weights = unwrapped(state_dict)
    _check_kind(weights, kind)
    for name, num_axes in _SIZED_BY.items():
        if name not in weights or weights[name].ndim != num_axes:
            found = list(weights[name].shape) if name in weights else "missing"
            raise CheckpointError(f"{name} is {found}, a DiT's has {num_axes} axes; wrong kind?")
    hidden_size, in_channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
    out_channels = len(weights["final_layer.linear.weight"]) // patch_size**2
    num_rows = len(weights["y_embedder.embedding_table.weight"])
    # The last row is the null label. Alone it is that of a network that was trained without labels.
    conditions = {"num_classes": num_rows - 1} if num_rows > 1 else {"conditioning": "none"}
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    return {
        "type": "dit",
        "hidden_size": hidden_size,
        "depth": depth,
        "num_heads": _num_heads(hidden_size, num_heads),
        "patch_size": patch_size,
        "input_size": patch_size * _grid_size(weights["pos_embed"]),
        "in_channels": in_channels,
        "learn_sigma": out_channels == 2 * in_channels,
        **conditions,
        "routing": _described(_pop_masks(weights, depth)),
    }


def unwrapped(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights without the names of wrappers, floats as fp32."""
    return {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): (
            value.detach().float() if value.is_floating_point() else value
        )
        for name, value in state_dict.items()
    }


def _check_kind(weights: Mapping[str, Tensor], kind: Kind) -> None:
    found = None
    if "input_blocks.0.0.weight" in weights:
        found = "adm"
    elif "x_embedder.proj.weight" in weights:
        found = "dtr" if MASK.format(0) in weights else "dit"
    # DTR's window follows from alpha and beta: its weights may come without masks.
    fitting = (None, kind, "dit") if kind == "dtr" else (None, kind)
    if kind not in ("dit", "dtr", "adm") or found not in fitting:
        raise ConfigError(
            f"kind {kind!r} does not fit these weights, which are {found or 'unknown'}; "
            f"accepted: dit, dtr (whose blocks have masks), adm"
        )
    odd = [name for name in weights if name.split(".")[0] not in _ADM_PARTS]
    if found is None or (kind == "adm" and odd):
        raise CheckpointError(
            f"unexpected {_some(odd or weights)}: not the names of {kind!r}; wrong kind or file?"
        )


def _check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    problems = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "misshapen": [
            f"{name} {list(value.shape)} (expected {list(expected[name].shape)})"
            for name, value in weights.items()
            if name in expected and value.shape != expected[name].shape
        ],
    }
    found = [f"{what} {_some(names)}" for what, names in problems.items() if names]
    if found:
        raise CheckpointError(f"not the weights of a DiT: {'; '.join(found)}; wrong kind or file?")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _num_heads(hidden_size: int, num_heads: int | None) -> int:
    known = {size.hidden_size: size.num_heads for size in VARIANTS.values()}
    num_heads = num_heads or known.get(hidden_size)
    if num_heads is None or hidden_size % num_heads:
        found = "is not in the weights" if num_heads is None else f"= {num_heads} is no divisor"
        raise ConfigError(
            f"the number of heads {found} (hidden size {hidden_size}); give it by --num-heads"
        )
    return num_heads


def _grid_size(pos_embed: Tensor) -> int:
    """Return the height and width of the grid that has these positions [1, L, D]."""
    _, length, hidden_size = pos_embed.shape
    grid_size = math.isqrt(length)
    if grid_size**2 != length or hidden_size % 4:
        raise CheckpointError(f"pos_embed {list(pos_embed.shape)} belongs to no square grid")
    difference = (pos_embed[0] - sincos_position_table(hidden_size, grid_size)).abs().max().item()
    if not difference <= _POSITION_TOLERANCE:
        raise CheckpointError(
            f"pos_embed {list(pos_embed.shape)} is not DiT's fixed table of a {grid_size}x"
            f"{grid_size} grid (it differs by {difference:.2g}); other positions are not supported"
        )
    return grid_size


def _pop_masks(weights: dict[str, Tensor], depth: int) -> list[Tensor]:
    """Take the masks of all blocks out of the weights, bool [T, C] each; [] without routing."""
    if MASK.format(0) not in weights:
        return []
    num_channels = len(weights["x_embedder.proj.weight"])
    shape, masks = (*weights[MASK.format(0)].shape[:1], num_channels), []
    for name in map(MASK.format, range(depth)):
        mask = weights.pop(name, None)
        if mask is None or mask.shape != shape or not ((mask == 0) | (mask == 1)).all():
            raise CheckpointError(f"{name} is no mask of zeros and ones {list(shape)}")
        masks.append(mask.bool())
    return masks


def _described(masks: list[Tensor]) -> dict[str, Any]:
    """Return the routing that has these masks: none, dtr by its formula, random for any other."""
    if not masks:
        return {"type": "none"}
    num_timesteps, num_channels = masks[0].shape
    width = int(masks[0][0].sum())
    num_idle = num_channels - width
    if not width or any(not torch.equal(mask, masks[0]) for mask in masks):
        return {"type": "random"}
    beta = _shortest(width / num_channels, lambda beta: int(beta * num_channels) == width)
    # start = round(num_idle time^alpha), so alpha >= log((start + 1/2) / num_idle) / log(time).
    # Where every channel is on, every alpha makes the same mask: the default is as good as any.
    alpha, starts = 4.0, masks[0].int().argmax(dim=1).double()
    if num_idle and num_timesteps > 2:
        time = torch.linspace(0, 1, num_timesteps, dtype=torch.float64)
        bounds = ((starts + 0.5) / num_idle).log() / time.log()
        # At both ends of time the logarithm is -inf or 0, and any alpha fits.
        alpha = float(bounds[1:-1].max())

    def makes_these(alpha: float) -> bool:
        made = routing_mask("dtr", num_timesteps, num_channels, alpha, beta or 1.0)
        return torch.equal(made, masks[0])

    alpha = _shortest(alpha, makes_these)
    return {"type": "dtr", "alpha": alpha, "beta": beta} if alpha and beta else {"type": "random"}


def _shortest(bound: float, accepted: Callable[[float], bool]) -> float | None:
    """Return the number of fewest digits at or just above `bound` that is accepted."""
    for scale in (10**digits for digits in range(9)):
        first = max(math.ceil(bound * scale), 1)
        for value in (first / scale, (first + 1) / scale):
            if accepted(value):
                return value
    return None
