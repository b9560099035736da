"""Read files of weights by name without trusting them, and write ours whole or not at all.

A pickle is read by PyTorch's restricted unpickler alone, which makes tensors, plain containers and
the stand-ins below: nothing that a file names is imported or called.
"""

import os
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dtr_scale.errors import CheckpointError


class _Inert:
    """Stands for an object of a class that is not loaded: it takes anything and does nothing."""

    def __new__(cls, *_: object) -> "_Inert":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass


# What checkpoints of DiT ("args"), DTR ("config", by hydra) and DeepSpeed name beside tensors.
_STAND_INS = [
    "argparse.Namespace",
    "collections.defaultdict",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "typing.Any",
    # Pickles of Python 3.11.0 to 3.11.3 name an enum's member by it: DeepSpeed's stage of ZeRO.
    "builtins.getattr",
    *(f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "str")),
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata", "UnionNode")),
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
    *(
        f"omegaconf.nodes.{name}Node"
        for name in ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path", "String")
    ),
]


def read_weights(path: Path, weights: Literal["ema", "model"] = "ema") -> dict[str, Tensor]:
    """Return the state dict in a `.pt` or `.safetensors` file, on the CPU, with the file's names.

    The file holds it bare, or as a training checkpoint under "ema" and "model"; without averaged
    weights "ema" gives the model's. Raises CheckpointError for a file that cannot be read, holds no
    weights, or names a class that is no part of weights; none of its code is run.
    """
    read = _read_safetensors if path.suffix == ".safetensors" else read_pickle
    content: Any = read(path)
    if isinstance(content, Mapping) and ("ema" in content or "model" in content):
        key = weights if weights == "model" or "ema" in content else "model"
        if key not in content:
            raise CheckpointError(f"{path} holds no {key!r}, only averaged weights; take 'ema'")
        content = content[key]
    if odd := _oddity(content):
        raise CheckpointError(
            f"{path} holds no weights by name: {odd}; accepted: a state dict of tensors, bare or "
            "under 'ema' or 'model'"
        )
    return dict(content)


def write_safetensors(
    weights: Mapping[str, Tensor], path: Path, header: Mapping[str, str] | None = None
) -> None:
    """Write weights by name, whole or not at all; CheckpointError if `path` cannot be written.

    `header` is kept as the file's metadata.
    """
    # Clones: safetensors refuses tensors that share memory, as the masks of a file may do.
    own = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in weights.items()
    }
    with written_whole(path) as temporary:
        save_file(own, temporary, metadata={"format": "pt", **(header or {})})


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a file in a folder beside `path`, which takes its place after a clean exit."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target: only within a file system is a rename whole or not at all.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".convert-") as directory:
            temporary = Path(directory) / path.name
            # For the mode that the umask gives to a new file.
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors makes files that their owner alone can read
            temporary.replace(path)
    except (OSError, SafetensorError) as error:  # the latter for a full disk
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} cannot be written: {reason}; choose another place") from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file ({error}); fetch it again"
        ) from None


def read_pickle(path: Path) -> Any:  # noqa: ANN401
    """Return what torch.save wrote, on the CPU, without running anything that it names.

    Tensors are mapped from the file where its format allows it. Raises CheckpointError.
    """
    # As (object, name): the unpickler takes the object wherever a file names the class.
    stand_ins = torch.serialization.safe_globals([(_Inert, name) for name in _STAND_INS])
    try:
        mmap = zipfile.is_zipfile(path)  # files of PyTorch before 1.6 are none
        with stand_ins, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        if path.is_file() and os.access(path, os.R_OK):  # mapping a file that was cut fails so
            raise CheckpointError(f"{path} is damaged or cut off; fetch it again") from None
        raise _unreadable(path, error) from None
    except Exception as error:  # whatever a damaged pickle leads to
        # PyTorch's own message advises to load the file unsafely.
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise CheckpointError(
            f"{path} names {named[1]}, which is no part of weights, and was not loaded; if you "
            "trust it, save its weights alone where it was made: torch.save(checkpoint['ema'], ...)"
            if named
            else f"{path} is damaged, cut off or not written by torch.save; fetch it again"
        ) from None


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot read {path}: {error.strerror or error}; give a .pt or .safetensors file of weights"
    )


def _oddity(content: Any) -> str | None:  # noqa: ANN401
    """Return what keeps the content from being named tensors, None if it is."""
    if not isinstance(content, Mapping) or not content:
        return f"a {type(content).__name__}" + (" of nothing" if content == {} else "")
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            return f"{name!r} is a {type(value).__name__}"
    return None
