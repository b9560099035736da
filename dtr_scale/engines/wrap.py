"""Wrap a network's blocks from outside: compile them, and recompute their activations.

Neither changes a module or a parameter's name. Both come before an engine shards the blocks.
"""

import os
import re
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.utils.checkpoint import checkpoint

from dtr_scale.engines.bias_gradients import SUM_BY_SAMPLE
from dtr_scale.engines.cpu_products import TRANSPOSE_BEFORE
from dtr_scale.errors import EngineError

_CACHE_DIR = "TORCHINDUCTOR_CACHE_DIR"
_OPTIONS: dict[str, Any] = {
    "post_grad_custom_pre_pass": SUM_BY_SAMPLE,
    "post_grad_custom_post_pass": TRANSPOSE_BEFORE,
    # On a CPU, tanh by one exponential: GELU and its gradient take 7 ms for 4,096 tokens of
    # DiT-S/2, by PyTorch's tanh 16. Near 0 its relative error is larger, which GELU's 1 + tanh
    # does not see.
    "cpp.use_decompose_tanh": True,
}


def is_compiled(setting: bool | str, device: torch.device) -> bool:
    """Tell whether `engine.compile` (true, false or "auto") compiles blocks that run on `device`.

    "auto" does so on a GPU if this machine has what Triton compiles its launcher with. On a CPU the
    first step would take a minute longer, and the others a tenth less.
    """
    if isinstance(setting, bool):
        return setting
    return device.type == "cuda" and _has_compiler()


def _has_compiler() -> bool:
    # Where Triton looks. A file of the user's own name counts as it is: its failure is told.
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return bool(compiler) and Path(sysconfig.get_path("include"), "Python.h").is_file()


def compile_blocks(blocks: Sequence[nn.Module], *, dynamic: bool | None = None) -> None:
    """Compile each block by itself: one graph per block shape, no breaks.

    `dynamic` is torch.compile's: None makes a graph for any batch size when a second one comes.
    EngineError where another user of this machine holds the compiler's cache.
    """
    make_cache_private()
    # The blocks of an ADM have 26 shapes; the compiler gives up after 8 unless it is told.
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 2 * len(blocks))
    for block in blocks:
        # In place: torch.compile(block) would put `_orig_mod` into every parameter's name.
        block.compile(dynamic=dynamic, options=_OPTIONS)
        wrap_call(block, _compiled)


def make_cache_private() -> None:
    """Make the folder of compiled code this user's alone; EngineError if it is somebody else's.

    It holds pickles and libraries that PyTorch loads unseen, in /tmp/torchinductor_USER, which any
    user of a node can make first. A folder that TORCHINDUCTOR_CACHE_DIR names is trusted.
    """
    if _CACHE_DIR in os.environ:
        return
    path = Path(default_cache_dir())
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Of a link and of what it leads to: either may be another user's.
    if {path.lstat().st_uid, path.stat().st_uid} != {os.geteuid()}:
        raise EngineError(
            f"{path}, where PyTorch keeps compiled code, belongs to another user, who could have "
            f"this one run anything; set {_CACHE_DIR} to a folder of your own, or "
            "engine.compile=false"
        )
    path.chmod(path.stat().st_mode & ~0o022)


def _compiled(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """Call a compiled block; EngineError where this machine lacks what compiling needs."""
    try:
        return call(*args, **kwargs)
    except BackendCompilerFailed as error:
        # The words of Inductor, of Triton and of the C compiler that Triton calls.
        if not re.search(r"C(\+\+)? compiler|Python\.h|libcuda", str(error)):
            raise
        reason = str(error).strip().splitlines()[0]
        raise EngineError(
            f"engine.compile = true: the blocks cannot be compiled here ({reason}); install gcc, "
            "g++ and Python's headers (Debian: python3-dev), or give engine.compile=false"
        ) from error


def checkpoint_activations(blocks: Sequence[nn.Module]) -> None:
    """Keep a block's inputs alone until the backward, which computes the block again."""
    for block in blocks:
        # The recomputation so takes all of the call, FSDP's hooks and a compiled graph included.
        # No random state to preserve: blocks have no dropout.
        wrap_call(block, partial(checkpoint, use_reentrant=False, preserve_rng_state=False))


def wrap_call(module: nn.Module, wrapper: Callable[..., Any]) -> None:
    """Let each call of a module be one of `wrapper(call, *args, **kwargs)`."""
    # The field that nn.Module.compile() fills, which a module's call prefers. A module around it
    # would put its own name into every parameter's, and checkpoints go by these names.
    module._compiled_call_impl = partial(wrapper, module._compiled_call_impl or module._call_impl)
