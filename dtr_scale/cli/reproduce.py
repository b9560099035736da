"""Parse `reproduce`: the tables and figures of the paper, and a small reproduction."""

import argparse
import json
from pathlib import Path

from dtr_scale.cli.arguments import OVERRIDES, Commands, positive_integer, runs, unknown_argument

MICRO = "micro"
TABLES = (
    "table1", "table2", "table3", "table4", "table5", "table6", "table7", "table8",
    "fig3", "fig4", "fig5", "fig6",
)  # fmt: skip
_FASHION = "/usr/share/datasets/fashion-mnist"
_MICRO_RUNS = "runs/micro"


def add_reproduce(commands: Commands) -> None:
    """Add the command to its group."""
    parser = commands.add(
        "reproduce",
        "measure",
        "make a table of the paper: its runs, how far they are, and its figures beside ours; or "
        f"micro, the comparison in small; {OVERRIDES}",
        "dtr-scale reproduce table5\n"
        "  dtr-scale reproduce table5 --run --references refs --data-root=s3://bucket/\n"
        "  dtr-scale reproduce micro --run --out runs/micro",
    )
    parser.add_argument(
        "what",
        choices=[*TABLES, MICRO],
        metavar="WHAT",
        help="table1 to table8, fig3 to fig6, micro",
    )
    # `run` is what the command calls.
    parser.add_argument(
        "--run", dest="launch", action="store_true", help="train and measure what is missing"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--configs", type=Path, metavar="DIR", help="the experiments (default: configs/ here)"
    )
    _add_tables(parser)
    _add_micro(parser)
    runs(parser, _reproduce, overrides=True)


def _add_tables(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tables and figures")
    add = group.add_argument
    add("--dry-run", action="store_true", help="print the commands instead of running them")
    add(
        "--slurm",
        nargs="?",
        const="",
        metavar="OPTIONS",
        help="with --run: submit the trainings as a job array, by --slurm='--nodes=1 -p a100'",
    )
    add("--runs", type=Path, default="runs", metavar="DIR", help="the folder of all runs")
    add(
        "--references",
        type=Path,
        metavar="DIR",
        help="references by the data's name, such as imagenet-256.npz (default: held-out splits)",
    )
    add("--tracking-uri", metavar="URI", help="collect the runs that this MLflow has, too")
    add("--data-root", metavar="DIR_OR_S3", help="prepared data (default: s3://dtr-latents/)")


def _add_micro(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("micro")
    add = group.add_argument
    add("--out", type=Path, default=_MICRO_RUNS, metavar="DIR", help="runs, numbers and figure")
    add("--source", type=Path, default=_FASHION, metavar="DIR", help="IDX files")
    add("--seeds", type=positive_integer, default=3, help="runs of each condition")
    add("--conditions", nargs="+", metavar="NAME", help="some of the six (default: all)")
    add("--parallel", type=positive_integer, default=2, help="runs at a time, a core each")
    add("--only", metavar="RUN", help="one run, such as dtr_vanilla_s0, in this process")


def _reproduce(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from dtr_scale.config.load import parse_overrides

    for key, _ in parse_overrides(overrides):
        if "." not in key:
            raise unknown_argument(arguments.parser, f"--{key}", [])
    if arguments.what == MICRO:
        return _micro(arguments, overrides)
    return _table(arguments, overrides)


def _table(arguments: argparse.Namespace, overrides: list[str]) -> int:
    import shlex

    from dtr_scale.jobs.configs import find_configs
    from dtr_scale.jobs.paper.launches import Places, start
    from dtr_scale.jobs.paper.reproduce import Reproduction
    from dtr_scale.jobs.paper.tables import TABLES as TABLES_OF
    from dtr_scale.jobs.paper.tracked import tracked_runs

    configs = find_configs(arguments.configs)
    with tracked_runs(arguments.tracking_uri, TABLES_OF[arguments.what], configs) as tracked:
        places = Places(
            configs=configs,
            runs=Path(arguments.runs),
            references=arguments.references,
            data_root=arguments.data_root,
            tracked=tracked,
        )
        reproduction = Reproduction(arguments.what, places, overrides)
        if arguments.slurm is not None and (arguments.launch or arguments.dry_run):
            command = reproduction.slurm_command(arguments.slurm)
            print(shlex.join(command), flush=True)
            return 0 if arguments.dry_run else start(command)
        if arguments.dry_run:
            for label, command in reproduction.commands():
                print(f"{shlex.join(command)}  # {label}")
            return 0
        code = reproduction.run() if arguments.launch else 0
        if arguments.json:
            print(json.dumps(reproduction.as_json(), indent=2))
        else:
            print(reproduction.text())
        return code


def _micro(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from dtr_scale.jobs.configs import find_configs
    from dtr_scale.jobs.micro import comparison as job

    conditions = arguments.conditions or list(job.CONDITIONS)
    micro = job.Micro(
        config=find_configs(arguments.configs) / job.CONFIG,
        out=Path(arguments.out),
        source=Path(arguments.source),
        conditions=job.check_conditions(conditions),
        num_seeds=arguments.seeds,
        overrides=overrides,
    )
    micro.base.model_dump()  # a mistake is told before torch is imported
    if arguments.only:
        return job.run_one(micro, job.find_run(micro, arguments.only))
    from dtr_scale.jobs.micro import launch, report

    code = 0
    if arguments.launch:
        again = [
            "reproduce", MICRO, "--run", f"--configs={micro.config.parent}", f"--out={micro.out}",
            f"--source={micro.source}", f"--seeds={micro.num_seeds}",
            "--conditions", *conditions, *overrides,
        ]  # fmt: skip
        code = launch.run_all(micro, parallel=arguments.parallel, arguments=again)
    if arguments.json:
        print(json.dumps(report.results(micro), indent=2))
        return code
    print(report.table(micro), report.verdicts(micro), sep="\n\n")
    for path in report.write_report(micro) if micro.out.exists() else []:
        print(path)
    return code
