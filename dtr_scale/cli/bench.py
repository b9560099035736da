"""Parse `bench`, which measures the parts of this trainer on this machine."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dtr_scale.cli.arguments import (
    OVERRIDES,
    Commands,
    actions,
    add_config,
    positive_integer,
    positive_number,
    runs,
    whole_number,
)
from dtr_scale.launchers import launched_rank

_EXAMPLES = """dtr-scale bench train --config configs/dit_l_dtr_antuw.json --json before.json
  torchrun --nproc_per_node 8 -m dtr_scale bench train --config configs/dit_l_dtr_antuw.json \\
      --train.micro_batch_size=64 --json after.json --compare before.json
  dtr-scale bench sample --config configs/dit_l_dtr_antuw.json --num-samples 128 --json now.json
  dtr-scale bench attention --config configs/dit_l_dtr_antuw.json
  dtr-scale bench start --config configs/demo_digits.json --launcher 'torchrun --nproc_per_node 2'
  dtr-scale bench faults --config configs/demo_digits.json --hosts 2 --num 50
  dtr-scale bench checkpoint --model DiT-B/2 --rounds 5 --dir /scratch
  dtr-scale bench data --config configs/dit_l_dtr_antuw.json --data.num_workers=8
  dtr-scale bench scale --config configs/dit_xl_dtr_antuw.json --gpu h100-80gb --nodes 128"""

_Parts = Any  # argparse names the type of its sub-parsers privately


def add_bench(commands: Commands) -> None:
    """Add the command with its parts."""
    parser = commands.add(
        "bench",
        "measure",
        "measure training, sampling, reading or saving on this machine; for several ranks, start "
        "it with their launcher",
        _EXAMPLES,
    )
    parts = actions(parser)
    _add_train(parts)
    _add_sample(parts)
    _add_attention(parts)
    _add_start(parts)
    _add_faults(parts)
    _add_checkpoint(parts)
    _add_data(parts)
    _add_scale(parts)


def _add_train(parts: _Parts) -> None:
    train = parts.add_parser(
        "train", help=f"an experiment's training step, part by part; {OVERRIDES}"
    )
    add_config(train)
    train.add_argument("--steps", type=positive_integer, default=20, help="that are measured")
    train.add_argument(
        "--warm-up", type=positive_integer, default=3, help="steps before, left out and reported"
    )
    _add_dir(train)
    _add_peer(train)
    _add_report(train)
    runs(train, _bench_train, overrides=True, on_ranks=True)


def _add_sample(parts: _Parts) -> None:
    sample = parts.add_parser(
        "sample", help=f"an experiment's sampler, of a network with random weights; {OVERRIDES}"
    )
    add_config(sample)
    sample.add_argument(
        "--num-samples", type=positive_integer, default=64, help="that are drawn, at least"
    )
    _add_peer(sample)
    _add_report(sample)
    runs(sample, _bench_sample, overrides=True, on_ranks=True)


def _add_attention(parts: _Parts) -> None:
    attention = parts.add_parser(
        "attention", help=f"each way to compute an experiment's attention; {OVERRIDES}"
    )
    add_config(attention)
    attention.add_argument("--rounds", type=positive_integer, default=20, help="of each way")
    _add_report(attention)
    runs(attention, _bench_attention, overrides=True)


def _add_start(parts: _Parts) -> None:
    start = parts.add_parser(
        "start", help=f"from the command to the first step, cold and resumed; {OVERRIDES}"
    )
    add_config(start)
    start.add_argument("--rounds", type=positive_integer, default=3, help="of resuming")
    start.add_argument(
        "--launcher", metavar="COMMAND", help="such as 'torchrun --nproc_per_node 8'"
    )
    start.add_argument("--dir", metavar="DIR", help="where (default: the temporary folder)")
    _add_report(start)
    runs(start, _bench_start, overrides=True)


def _add_faults(parts: _Parts) -> None:
    faults = parts.add_parser(
        "faults",
        help="a supervised training on two ranks that is broken at random: ranks are killed, "
        "stopped, hang or hold their GIL; on two hosts (as root) the network is cut and hosts are "
        f"lost as well; {OVERRIDES}",
    )
    add_config(faults)
    faults.add_argument("--num", type=positive_integer, default=8, help="faults, of all kinds")
    faults.add_argument("--hosts", type=int, choices=(1, 2), default=1, help="with the two ranks")
    faults.add_argument("--seed", type=whole_number, default=0, help="what the faults are drawn by")
    faults.add_argument("--dir", metavar="DIR", help="where (default: the temporary folder)")
    _add_report(faults)
    runs(faults, _bench_faults, overrides=True)


def _add_checkpoint(parts: _Parts) -> None:
    checkpoint = parts.add_parser("checkpoint", help="saving and restoring")
    add = checkpoint.add_argument
    add("--model", default="DiT-B/2", metavar="VARIANT", help="a variant of DiT")
    add("--rounds", type=positive_integer, default=5, help="of saving and restoring")
    _add_dir(checkpoint)
    runs(checkpoint, _bench_checkpoint, on_ranks=True)


def _add_data(parts: _Parts) -> None:
    data = parts.add_parser(
        "data", help=f"an experiment's samples, beside webdataset and tarfile; {OVERRIDES}"
    )
    add_config(data)
    data.add_argument("--seconds", type=positive_integer, default=5, help="of each measurement")
    data.add_argument("--shards", type=positive_integer, default=16, help="how many are read")
    runs(data, _bench_data, overrides=True, on_ranks=True)


def _add_scale(parts: _Parts) -> None:
    scale = parts.add_parser(
        "scale",
        help="a training on a thousand ranks, simulated: order of the data, layout of checkpoints, "
        f"failures; nothing is trained; {OVERRIDES}",
    )
    add_config(scale)
    add = scale.add_argument
    add("--gpu", default="h100-80gb", metavar="NAME", help="the kind, as for `plan`")
    add("--gpus", type=positive_integer, default=8, metavar="N", help="of a node")
    add("--nodes", type=positive_integer, default=128, metavar="N", help="how many")
    add("--shards", type=positive_integer, default=100_000, help="of the data set")
    add("--samples", type=positive_integer, default=10**9, help="of the data set")
    add(
        "--failures",
        type=positive_number,
        metavar="GPU_HOURS",
        help="between two (default: 8090, as at Meta: 7.9 h on 1,024 GPUs)",
    )
    add(
        "--storage",
        type=positive_number,
        default=1.0,
        metavar="GB_S",
        help="that a node writes or reads",
    )
    add("--json", type=Path, metavar="FILE", help="where to write the figures")
    runs(scale, _bench_scale, overrides=True)


def _add_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dir", metavar="DIR_OR_S3", help="where to save (default: the temporary folder)"
    )


def _add_peer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peer",
        type=Path,
        metavar="DIR",
        help="a checkout of byeongjun-park/DTR or facebookresearch/DiT, whose own code is timed in "
        "the same run, a step of it after each of ours",
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="an earlier --json, to show the ratios"
    )


def _bench_train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from dtr_scale.config.load import load_experiment

    experiment = load_experiment(arguments.config, overrides)
    from dtr_scale.jobs.bench.tables import train_table
    from dtr_scale.jobs.bench.train import bench_train

    def measure() -> dict[str, Any] | None:
        return bench_train(
            experiment,
            steps=arguments.steps,
            warm_up=arguments.warm_up,
            place=arguments.dir,
            peer=arguments.peer,
        )

    return _report(arguments, "train", measure, train_table)


def _bench_sample(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from dtr_scale.config.load import load_experiment

    experiment = load_experiment(arguments.config, overrides)
    from dtr_scale.jobs.bench.sample import bench_sample
    from dtr_scale.jobs.bench.tables import sample_table

    def measure() -> dict[str, Any] | None:
        return bench_sample(experiment, num_samples=arguments.num_samples, peer=arguments.peer)

    return _report(arguments, "sample", measure, sample_table)


def _bench_attention(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from dtr_scale.config.load import load_experiment

    experiment = load_experiment(arguments.config, overrides)
    from dtr_scale.jobs.bench.attention import attention_table, bench_attention

    def measure() -> dict[str, Any] | None:
        return bench_attention(experiment, rounds=arguments.rounds)

    return _report(arguments, "attention", measure, attention_table)


def _bench_start(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from dtr_scale.config.load import load_experiment

    experiment = load_experiment(arguments.config, overrides)
    from dtr_scale.jobs.bench.start import bench_start, start_table

    def measure() -> dict[str, Any] | None:
        return bench_start(
            experiment,
            ["--config", arguments.config, *overrides],
            rounds=arguments.rounds,
            launcher=arguments.launcher,
            place=arguments.dir,
        )

    return _report(arguments, "start", measure, start_table)


def _bench_faults(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from dtr_scale.config.load import load_experiment

    experiment = load_experiment(arguments.config, overrides)
    from dtr_scale.jobs.bench.faults import bench_faults, faults_table

    def measure() -> dict[str, Any] | None:
        return bench_faults(
            experiment,
            ["--config", arguments.config, *overrides],
            num=arguments.num,
            num_hosts=arguments.hosts,
            seed=arguments.seed,
            place=arguments.dir,
        )

    return _report(arguments, "faults", measure, faults_table)


def _report(
    arguments: argparse.Namespace,
    bench: str,
    measure: Callable[[], dict[str, Any] | None],
    table: Callable[[dict[str, Any]], str],
) -> int:
    """Measure, print the table, write the JSON, and compare; on rank 0."""
    from dtr_scale.jobs.bench.report import compared, read_report, write_report
    from dtr_scale.jobs.trained import check_output

    # Before the measurement, which takes the time.
    before = read_report(arguments.compare, bench) if arguments.compare else None
    if arguments.json and launched_rank() == 0:
        check_output(arguments.json, ".json", "--json")
    report = measure()
    if report is None:
        return 0
    if arguments.json:
        write_report(arguments.json, report)
    print(table(report))
    if before:
        print("", *compared(report, before), sep="\n")
    return 0


def _bench_checkpoint(arguments: argparse.Namespace) -> int:
    from dtr_scale.jobs.bench.checkpoint import bench_checkpoint

    table = bench_checkpoint(arguments.model, rounds=arguments.rounds, place=arguments.dir)
    # Every rank measures, the first prints.
    if launched_rank() == 0:
        print(table)
    return 0


def _bench_data(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from dtr_scale.config.load import load_experiment
    from dtr_scale.jobs.bench.data import bench_data

    experiment = load_experiment(arguments.config, overrides)
    print(bench_data(experiment, arguments.seconds, arguments.shards))
    return 0


def _bench_scale(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from dtr_scale.config.load import load_experiment

    experiment = load_experiment(arguments.config, overrides)
    from dtr_scale.jobs.bench.report import write_report
    from dtr_scale.jobs.plan.cluster import Cluster
    from dtr_scale.jobs.plan.goodput import GPU_HOURS_PER_FAILURE
    from dtr_scale.jobs.plan.gpus import find_gpu
    from dtr_scale.jobs.plan.run_plan import Terms
    from dtr_scale.jobs.scale.simulate import Scale, scale_table, simulate

    failures = arguments.failures or GPU_HOURS_PER_FAILURE
    found = simulate(
        experiment,
        Cluster(find_gpu(arguments.gpu), arguments.gpus, arguments.nodes),
        Scale(arguments.shards, arguments.samples),
        Terms(gpu_hours_per_failure=failures, storage_gb=arguments.storage),
    )
    print(scale_table(found))
    if arguments.json:
        write_report(arguments.json, {"bench": "scale", **found})
    return 0
