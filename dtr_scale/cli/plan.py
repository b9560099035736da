"""Parse `plan`, which tells what a run will take before it begins."""

import argparse
import json
from pathlib import Path

from dtr_scale.cli.arguments import (
    OVERRIDES,
    Commands,
    add_config,
    positive_integer,
    positive_number,
    runs,
)
from dtr_scale.errors import ConfigError

_EXAMPLES = """dtr-scale plan --config configs/dit_l_dtr_antuw.json
  dtr-scale plan --config configs/dit_l_dtr_antuw.json --gpu a100-80gb --gpus 8 --nodes 4 --price 2
  dtr-scale plan --config configs/dit_l_dtr_antuw.json --gpu h100-80gb --apply planned.json"""
_OF_A_RUN = ("gpus", "nodes", "price", "network", "failures", "storage", "measured", "apply")


def add_plan(commands: Commands) -> None:
    """Add the command to its group."""
    parser = commands.add(
        "plan",
        "train",
        "tell what an experiment will take: parameters, GMACs, FLOPs; with --gpu memory, speed, "
        f"days, money, goodput and storage, and what to set; {OVERRIDES}",
        _EXAMPLES,
    )
    add_config(parser)
    add = parser.add_argument
    add("--per-layer", action="store_true", help="every module of the network")
    add("--gpu", metavar="NAME", help="the kind, such as a100-80gb; a wrong name lists all")
    add("--gpus", type=positive_integer, metavar="N", help="of a node (default: 8)")
    add("--nodes", type=positive_integer, metavar="N", help="how many (default: 1)")
    add("--price", type=positive_number, metavar="MONEY", help="of a GPU and hour")
    add(
        "--network",
        type=positive_number,
        metavar="GBIT_S",
        help="of a node's adapters together (default: what is usual for the GPU)",
    )
    add(
        "--failures",
        type=positive_number,
        metavar="GPU_HOURS",
        help="between two failures (default: 8090, as at Meta: 7.9 h on 1,024 GPUs)",
    )
    add(
        "--storage",
        type=positive_number,
        metavar="GB_S",
        help="that a node writes or reads (default: 1)",
    )
    add(
        "--measured",
        type=Path,
        metavar="FILE",
        help="a `bench train --json` of the same kind of GPU, which corrects the modelled step",
    )
    add(
        "--as-released",
        action="store_true",
        help="the released code's step: DDP in TF32, not compiled, with the VAE in the loop",
    )
    add("--apply", type=Path, metavar="FILE", help="write the experiment as recommended")
    add("--json", action="store_true", help="print the figures as JSON")
    runs(parser, _plan, overrides=True)


def _plan(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from dtr_scale.config.load import load_experiment

    experiment = load_experiment(arguments.config, overrides)
    if arguments.gpu is None:
        _refuse_without_gpu(arguments)
        from dtr_scale.jobs.plan.compute import plan_compute

        plan = plan_compute(experiment)
        if arguments.json:
            print(json.dumps(plan.figures(per_layer=arguments.per_layer), indent=2))
        else:
            print(plan.table(per_layer=arguments.per_layer))
        return 0
    from dtr_scale.jobs.plan.cluster import Cluster
    from dtr_scale.jobs.plan.goodput import GPU_HOURS_PER_FAILURE
    from dtr_scale.jobs.plan.gpus import find_gpu
    from dtr_scale.jobs.plan.measured import measured_factor
    from dtr_scale.jobs.plan.recommend import apply_advice, recommend
    from dtr_scale.jobs.plan.run_plan import Terms, plan_run
    from dtr_scale.jobs.plan.tables import run_table

    gpu, gpus = find_gpu(arguments.gpu), arguments.gpus or 8
    cluster = Cluster(gpu, gpus, arguments.nodes or 1, arguments.network)
    run = plan_run(
        experiment,
        cluster,
        Terms(
            price=arguments.price,
            gpu_hours_per_failure=arguments.failures or GPU_HOURS_PER_FAILURE,
            storage_gb=arguments.storage or 1.0,
        ),
        factor=measured_factor(arguments.measured, gpu, gpus) if arguments.measured else 1.0,
        as_released=arguments.as_released,
    )
    advice = recommend(run)
    if arguments.json:
        told = [each._asdict() for each in advice]
        print(json.dumps({**run.figures(), "recommended": told}, indent=2))
    else:
        print(run_table(run, advice))
    if arguments.apply:
        keys = apply_advice(Path(arguments.config), overrides, advice, arguments.apply)
        if not arguments.json:
            print(f"\nwrote {arguments.apply} with {', '.join(keys) or 'nothing changed'}")
    return 0


def _refuse_without_gpu(arguments: argparse.Namespace) -> None:
    given = [name for name in _OF_A_RUN if getattr(arguments, name) is not None]
    if arguments.as_released:
        given.append("as-released")
    if given:
        from dtr_scale.jobs.plan.gpus import GPUS

        raise ConfigError(f"--{given[0]} needs --gpu: give one of {', '.join(GPUS)}")
