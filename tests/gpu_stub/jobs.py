"""Functions that run on the stub, in a process of their own; arguments and results are JSON."""

import ctypes
import gc
import re
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch._inductor.graph import GraphLowering

from dtr_scale.config.load import load_experiment
from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import join_world
from dtr_scale.engines.wrap import compile_blocks
from dtr_scale.errors import EngineError
from dtr_scale.jobs import build
from dtr_scale.jobs.build import build_trainer
from dtr_scale.jobs.sample import sample_run
from dtr_scale.jobs.train import train_experiment
from dtr_scale.models.dit import DiTBlock, Mlp
from dtr_scale.signals import LeaveRequest
from dtr_scale.train.trainer import Trainer
from tests.gpu_stub import pretend
from tests.support.runs import ROOT

_stub = ctypes.CDLL(None)  # preloaded
SMALL = (
    "--data.type=synthetic", "--data.num_workers=0", "--tracking.type=none", "--train.log_every=1",
    "--evaluation.every_steps=0", "--checkpoint.every_steps=1000",
)  # fmt: skip
EVALUATED = (
    "--evaluation.every_steps=2", "--evaluation.num_samples=2", "--evaluation.batch_size=2",
    "--evaluation.num_sampling_steps=2",
)  # fmt: skip
_WAIT = "called a synchronizing CUDA operation"
PARTS = ("engine.forward", "engine.backward", "engine.step", "objective.update")


def record_step(
    log: str,
    overrides: list[str],
    gpu: int,
    world_size: int,
    steps: int = 5,
    others: Sequence[tuple[int, str]] = (),
) -> dict[str, Any]:
    """Train some steps, the last but one of them with a log, marked by its parts.

    `others` are steps that have a log as well.
    """
    _pretend()
    experiment = _experiment(Path(log).with_suffix(""), overrides, steps)
    counters.clear()
    with pretend.pretend_world(gpu, world_size), warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        world = join_world(needs_process_group=experiment.engine.type != "single")
        trainer = build_trainer(experiment, world)
        _log_steps(trainer, {**dict(others), steps - 1: log})
        records: list[Any] = []
        trainer.run(LeaveRequest(), log=records.append)
        trainer.loader.close()
    return {
        "steps": [record["step"] for record in records],
        "parameters": sum(p.numel() for p in trainer.engine.network.parameters()),
        "waits": [f"{w.filename}:{w.lineno}" for w in waits if _WAIT in str(w.message)],
        **_compilations(),
    }


def measure_memory(place: str, cases: list[list[str]], gpu: int, world: int) -> list[list[int]]:
    """Return the bytes that PyTorch has handed out and has reserved at most in a case's third step.

    A case is overrides of an experiment.
    """
    _pretend()
    return [_peaks(Path(place) / str(n), case, gpu, world) for n, case in enumerate(cases)]


def _peaks(place: Path, overrides: list[str], gpu: int, world_size: int) -> list[int]:
    with pretend.pretend_world(gpu, world_size):
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(gpu)
        world = join_world(needs_process_group=True)
        trainer = build_trainer(_experiment(place, overrides, 3), world)
        batches = iter(trainer.loader)
        for _ in range(3):
            torch.cuda.reset_peak_memory_stats(gpu)
            trainer._train_step(batches)
        trainer.loader.close()
        trainer.checkpoints.close()
    peaks = torch.cuda.max_memory_allocated(gpu), torch.cuda.max_memory_reserved(gpu)
    return [peak - before for peak in peaks]


def record_update(log: str, overrides: list[str], gpu: int, world_size: int) -> dict[str, Any]:
    """Record a step whose update is compiled, and tell the bytes that its kernels move."""
    replaced: Any = build
    replaced.compile_blocks = lambda blocks: None  # which takes longer, and is recorded elsewhere
    codes = _kept_codes()
    figures = record_step(log, overrides, gpu, world_size)
    # The update's is the last: the loss is compiled before it.
    return {**figures, "gigabytes": [_gigabytes(code) for code in codes]}


def capture_a_wait(place: str, overrides: list[str], gpu: int) -> str:
    """Return what is told where the host wants a number of a micro-step that is captured."""
    _pretend()
    with pretend.pretend_world(gpu, 1):
        world = join_world(needs_process_group=True)
        trainer = build_trainer(_experiment(Path(place), overrides, 5), world)
        objective: Any = trainer.objective
        loss = objective.loss
        objective.loss = lambda mse, *args, **kwargs: loss(mse, *args, **kwargs) + float(mse[0])
        try:
            trainer.run(LeaveRequest(), log=lambda record: None)
        except EngineError as error:
            return f"step {trainer.step + 1}: {error}"
    return "no error"


def compile_block(log: str, attention: str, gpu: int) -> dict[str, Any]:
    """Compile a block of DiT-L/2 and run it on 32 samples; return the bytes its kernels move.

    Forward, backward, and forward without gradients, as sampling does.
    """
    codes = _kept_codes()
    torch.cuda.set_device(gpu)
    torch.set_default_device("cuda")
    blocks = [DiTBlock(1024, 16).bfloat16() for _ in range(2)]
    for block in blocks:
        block.attn.attention_backend = attention
    compile_blocks(blocks)
    z = torch.empty(32, 256, 1024, dtype=torch.bfloat16, requires_grad=True)
    c = torch.empty(32, 1024, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.empty(32, 1024, dtype=torch.bool)
    for step in range(2):
        _stub.stub_open_log(log.encode() if step else b"")
        _stub.stub_mark(b"forward")
        out = blocks[1](blocks[0](z, c, None, mask), c, None, mask)
        _stub.stub_mark(b"backward")
        out.backward(torch.empty_like(out))
        _stub.stub_mark(b"sampling")
        with torch.no_grad():
            drawn, condition = z.detach(), c.detach()
            blocks[1](blocks[0](drawn, condition, None, mask), condition, None, mask)
    _stub.stub_open_log(b"")
    return {"gigabytes": [_gigabytes(code) for code in codes], **_compilations()}


def _kept_codes() -> list[str]:
    """Return a list that each graph's code is added to, once it is compiled."""
    # What is taken from the cache has no code to read.
    inductor.fx_graph_cache = False
    functorch.enable_autograd_cache = False
    inductor.benchmark_kernel = True  # which writes the bytes beside each kernel
    codes: list[str] = []
    lowering: Any = GraphLowering
    lowering.save_output_code = staticmethod(codes.append)
    return codes


def dtype_of_mlp(gpu: int) -> str:
    """Return the dtype of what fp32 weights make without gradients, under autocast to bf16."""
    with torch.device("cuda", gpu), torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        return str(Mlp(64).fc1(torch.empty(2, 4, 64)).dtype)


def _gigabytes(code: str) -> float:
    """Return what Inductor counts that its own kernels of a graph read and write."""
    kernels = re.findall(
        r"^(triton_\w+) = async_compile\.triton\(.*?'kernel_num_gb': ([\d.e-]+)", code, re.S | re.M
    )
    sizes = {name: float(size) for name, size in kernels}
    # Before it, each kernel runs once more, to be timed.
    graph = code[code.index("class Runner") :]
    return sum(sizes[name] for name in re.findall(r"(triton_\w+)\.run\(", graph))


def live(place: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run cases one after the other, each from its first step to its samples."""
    _pretend()
    return [_live(Path(place) / str(number), **case) for number, case in enumerate(cases)]


def _live(
    place: Path,
    config: str,
    overrides: list[str],
    gpu: int,
    world_size: int,
    num_experts: int,
    steps: tuple[int, int] = (2, 3),
) -> dict[str, Any]:
    counters.clear()
    torch.compiler.reset()
    error, num_graphs = None, _stub.stub_num_graphs()
    try:
        with pretend.pretend_partition(num_experts):
            if world_size == 1:
                _alone(place, config, overrides, gpu, steps)
            else:
                _among(place, config, overrides, gpu, world_size)
    except Exception:  # the others are tried as well
        error = traceback.format_exc()
    return {"error": error, "replays": _stub.stub_num_graphs() - num_graphs, **_compilations()}


def _alone(
    place: Path, config: str, overrides: list[str], gpu: int, until: tuple[int, int]
) -> None:
    """Train, save and evaluate; resume, and draw samples, by the commands' own functions."""
    with pretend.pretend_world(gpu, 1):
        for steps in until:
            experiment = _experiment(place, [*overrides, *EVALUATED], steps, config)
            assert train_experiment(experiment) == 0
        sample_run(place, num_samples=2, latents=True, out=place / "latents.npz")


def _among(place: Path, config: str, overrides: list[str], gpu: int, world_size: int) -> None:
    """Go on from a checkpoint as one of several ranks, whose own nobody could complete."""
    with pretend.pretend_world(gpu, 1):
        begun = [*overrides, "--engine.type=single", "--engine.compile=false"]
        assert train_experiment(_experiment(place, begun, 1, config)) == 0
    with pretend.pretend_world(gpu, world_size):
        world = join_world(needs_process_group=True)
        trainer = build_trainer(_experiment(place, overrides, 3, config), world)
        assert trainer.resume() is not None
        assert trainer.run(LeaveRequest(), log=lambda record: None) is None
        assert trainer.saved_step == trainer.step == 3
        trainer.loader.close()
        trainer.checkpoints.close()


def _pretend() -> None:
    pretend.pretend_numbers()
    pretend.pretend_answers()
    pretend.pretend_parts()
    pretend.pretend_zero3()


def _experiment(
    place: Path, overrides: list[str], steps: int, config: str = "dit_l_dtr_antuw"
) -> Experiment:
    own = [f"--run_dir={place}", f"--train.max_steps={steps}"]
    return load_experiment(ROOT / "configs" / f"{config}.json", [*SMALL, *own, *overrides])


def _compilations() -> dict[str, Any]:
    """Return what the compiler has counted since the counters were cleared."""
    return {
        "graphs": counters["stats"].get("unique_graphs", 0),
        "breaks": sum(counters["graph_break"].values()),
        "cache": {**counters["inductor"], **counters["aot_autograd"]},
    }


def _log_steps(trainer: Trainer, logs: dict[int, str]) -> None:
    """Log steps by their numbers, each from its first batch to that of the next."""
    marked: Any = trainer
    for name in PARTS:
        owner, method = name.split(".")
        _mark(getattr(trainer, owner), method, name)
    train_step = trainer._train_step

    def logged(*args: Any) -> Any:
        log = logs.get(trainer.step + 1, "")
        # PyTorch warns where the host waits, and names the line.
        torch.cuda.set_sync_debug_mode("warn" if log else "default")
        _stub.stub_open_log(log.encode())
        return train_step(*args)

    marked._train_step = logged
    marked._save_for_certain = lambda *args: None


def _mark(owner: Any, method: str, name: str) -> None:
    """Tell the log where a part of the step begins and ends."""
    call = getattr(owner, method)

    def marked(*args: Any, **kwargs: Any) -> Any:
        _stub.stub_mark(name.encode())
        try:
            return call(*args, **kwargs)
        finally:
            _stub.stub_mark(f"after_{name}".encode())

    setattr(owner, method, marked)
