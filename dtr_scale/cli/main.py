"""The command line: `dtr-scale COMMAND`, where a command is a pair `_add_*` and `_*` below.

Nothing heavy is imported before a command is known, so that `--help` answers at once.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dtr_scale.cli.arguments import positive_integer
from dtr_scale.cli.prepare import PREPARE_EXAMPLES, add_prepare
from dtr_scale.errors import ConfigError, DtrScaleError
from dtr_scale.launchers import launched_rank, srun_variables
from dtr_scale.logs import setup_logging

EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130

_OVERRIDES = "any key of the experiment can be overridden: --train.lr=2e-4 or --train.lr 2e-4"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; what a user can act on has no traceback."""
    os.environ.update(srun_variables(os.environ))
    arguments, rest = _parser().parse_known_args(argv)
    rank = launched_rank() if arguments.command in ("train", "bench", "prepare") else 0
    setup_logging(rank)
    try:
        if arguments.takes_overrides:
            return arguments.run(arguments, rest)
        if rest:
            raise ConfigError(f"unknown argument {rest[0]!r}; see dtr-scale {arguments.command} -h")
        return arguments.run(arguments)
    except DtrScaleError as error:
        if not error.reported and (rank == 0 or not error.on_every_rank):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Tell what is wrong and how to call it right, once for all ranks."""
        if launched_rank() == 0:
            super().error(message)
        sys.exit(EXIT_USER_ERROR)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dtr-scale",
        description="Train diffusion transformers with Denoising Task Routing.",
        epilog="examples:\n"
        "  dtr-scale prepare digits --out data/digits\n"
        "  deepspeed launch/train.py --config configs/demo_digits.json\n"
        "  dtr-scale sample runs/demo_digits --num 100\n"
        "  dtr-scale evaluate runs/demo_digits",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(takes_overrides=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_train,
        _add_sample,
        _add_evaluate,
        _add_cka,
        _add_affinity,
        _add_prepare,
        _add_convert,
        _add_checkpoint,
        _add_ema,
        _add_bench,
        _add_plan,
        _add_config,
    ):
        add(commands)
    return parser


def _command(
    commands: "argparse._SubParsersAction[_Parser]",
    name: str,
    summary: str,
    example: str,
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_train(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(
        commands,
        "train",
        f"train an experiment, or go on with it; {_OVERRIDES}",
        "deepspeed launch/train.py --config configs/dit_l_dtr_antuw.json --train.max_steps=400000",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the experiment's JSON")
    # The deepspeed launcher passes it; the rank is taken from the environment.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(run=_train, takes_overrides=True)


def _add_sample(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(
        commands,
        "sample",
        "draw samples from a run's newest checkpoint (averaged weights) into a picture; "
        "evaluation.* can be overridden",
        "dtr-scale sample runs/demo_digits --num 100 --evaluation.cfg_scale=2",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--num", type=positive_integer, default=64, help="samples (default 64)")
    parser.add_argument(
        "--out", type=Path, help="PNG, .npz of latents (default RUN_DIR/samples/grid.png)"
    )
    parser.add_argument("--vae", help="decodes latents (default: what encoded the data, if here)")
    parser.set_defaults(run=_sample, takes_overrides=True)


def _add_evaluate(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(
        commands,
        "evaluate",
        "measure samples of a run's newest checkpoint against the held-out split; "
        "evaluation.* can be overridden",
        "dtr-scale evaluate runs/demo_digits --num-samples 500 --evaluation.sampler=dpm_solver",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--num-samples", type=positive_integer, help="default: evaluation.num_samples"
    )
    parser.set_defaults(run=_evaluate, takes_overrides=True)


def _add_cka(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(
        commands,
        "cka",
        "show how alike a run's representations are at different timesteps, block by block",
        "dtr-scale cka runs/demo_digits --num-timesteps 30",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    _add_measured(parser)
    parser.add_argument(
        "--out", type=Path, help="PNG, and .npz beside it (default RUN_DIR/samples/cka.png)"
    )
    parser.add_argument(
        "--biased", action="store_true", help="the plain estimator, near 1 for few samples"
    )
    parser.set_defaults(run=_cka)


def _add_affinity(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(
        commands,
        "affinity",
        "cut a run's timesteps into clusters of alike gradients, for ant_uw; holds 4 bytes per "
        "parameter and timestep in memory",
        "dtr-scale affinity runs/demo_digits --num-clusters 8",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    _add_measured(parser)
    parser.add_argument("--num-clusters", type=positive_integer, default=8, help="default 8")
    parser.set_defaults(run=_affinity)


def _add_measured(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-samples", type=positive_integer, default=64, help="default 64")
    parser.add_argument(
        "--num-timesteps", type=positive_integer, default=20, help="evenly spread (default 20)"
    )


def _add_prepare(commands: "argparse._SubParsersAction[_Parser]") -> None:
    add_prepare(
        _command(
            commands,
            "prepare",
            "write a data set as webdataset shards with a manifest, or look into one",
            PREPARE_EXAMPLES,
        )
    )


def _add_plan(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(
        commands,
        "plan",
        f"tell what an experiment will cost; {_OVERRIDES}",
        "dtr-scale plan --config configs/dit_l_dtr_antuw.json --flops --model.variant=DiT-XL/2",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the experiment's JSON")
    parser.add_argument(
        "--flops",
        action="store_true",
        required=True,
        help="parameters, GMACs per forward, and training FLOPs",
    )
    parser.add_argument("--per-layer", action="store_true", help="every module of the network")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(run=_plan, takes_overrides=True)


def _add_convert(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(
        commands,
        "convert",
        "bring weights of official DiT, DTR and ADM checkpoints, or a run's averaged ones, into "
        "another form",
        "dtr-scale convert DiT-XL-2-256x256.pt --from dit --to diffusers --out dit-xl-2",
    )
    parser.add_argument(
        "source", type=Path, metavar="SRC", help=".pt or .safetensors file, or a run's directory"
    )
    parser.add_argument(
        "--from",
        dest="kind",
        required=True,
        choices=["dit", "dtr", "adm", "run"],
        help="facebookresearch/DiT, byeongjun-park/DTR, openai/guided-diffusion, or a run of ours",
    )
    parser.add_argument(
        "--to",
        dest="target",
        required=True,
        choices=["safetensors", "diffusers"],
        help="a file with the official names, or a folder for DiTTransformer2DModel",
    )
    parser.add_argument("--out", required=True, type=Path, help="the file or folder to write")
    parser.add_argument(
        "--num-heads", type=positive_integer, help="needed for a file of no DiT-S, B, L or XL"
    )
    parser.set_defaults(run=_convert)


def _add_checkpoint(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(
        commands,
        "checkpoint",
        "look into checkpoints: a step_* folder, a run directory (its newest) or s3://",
        "dtr-scale checkpoint inspect runs/demo_digits\n"
        "  dtr-scale checkpoint export runs/demo_digits --ema 0.995 --out model.safetensors",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    inspect = actions.add_parser("inspect", help="position, sizes, tree", allow_abbrev=False)
    verify = actions.add_parser("verify", help="read and check every byte", allow_abbrev=False)
    export = actions.add_parser("export", help="averaged weights as a file", allow_abbrev=False)
    for action, run in ((inspect, _inspect), (verify, _verify), (export, _export)):
        action.add_argument("place", metavar="PATH")
        action.set_defaults(run=run)
    inspect.add_argument("--config", metavar="FILE", help="also tell what differs from this file")
    export.add_argument("--ema", default="ema", help="a decay, power_<width>, or none for weights")
    export.add_argument("--out", type=Path, required=True, help="safetensors")
    diff = actions.add_parser("diff", help="what differs between two", allow_abbrev=False)
    diff.add_argument("a", metavar="A")
    diff.add_argument("b", metavar="B")
    diff.set_defaults(run=_diff)


def _add_ema(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(
        commands,
        "ema",
        "make an average of any width of those in a run's kept checkpoints (train.ema_sigma_rel)",
        "dtr-scale ema reconstruct runs/NAME --sigma-rel 0.15 --out model.safetensors",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    make = actions.add_parser("reconstruct", help="write it as a file", allow_abbrev=False)
    make.add_argument("place", metavar="RUN_DIR")
    make.add_argument("--sigma-rel", type=float, required=True, help="relative width, 0.01 to 0.28")
    make.add_argument("--step", type=positive_integer, help="default: the newest checkpoint's")
    make.add_argument("--out", type=Path, required=True, help="safetensors")
    make.set_defaults(run=_reconstruct)


def _add_config(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(
        commands,
        "config",
        "show an experiment with every default filled in, or the JSON Schema of all experiments",
        "dtr-scale config show configs/dit_l_dtr_antuw.json",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="print the resolved experiment", allow_abbrev=False)
    show.add_argument("file", metavar="FILE")
    show.set_defaults(run=_config_show, takes_overrides=True)
    schema = actions.add_parser("schema", help="print the JSON Schema", allow_abbrev=False)
    schema.set_defaults(run=_config_schema)


def _add_bench(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(
        commands,
        "bench",
        "measure saving and restoring, or reading samples, on this machine",
        "dtr-scale bench checkpoint --model DiT-B/2 --rounds 5 --dir /scratch\n"
        "  dtr-scale bench data --config configs/dit_l_dtr_antuw.json --data.num_workers=8",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    checkpoint = actions.add_parser(
        "checkpoint",
        help="saving and restoring; for several ranks, start it with a launcher",
        allow_abbrev=False,
    )
    checkpoint.add_argument("--model", default="DiT-B/2", metavar="VARIANT")
    checkpoint.add_argument("--rounds", type=positive_integer, default=5)
    checkpoint.add_argument(
        "--dir", metavar="DIR_OR_S3", help="where to save (default: the temporary folder)"
    )
    checkpoint.set_defaults(run=_bench_checkpoint)
    data = actions.add_parser(
        "data",
        help=f"an experiment's samples, beside webdataset and tarfile; {_OVERRIDES}",
        allow_abbrev=False,
    )
    data.add_argument("--config", required=True, metavar="FILE", help="the experiment's JSON")
    data.add_argument("--seconds", type=positive_integer, default=5, help="of each measurement")
    data.add_argument("--shards", type=positive_integer, default=16, help="how many are read")
    data.set_defaults(run=_bench_data, takes_overrides=True)


def _train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from dtr_scale.config.load import load_experiment

    experiment = load_experiment(arguments.config, overrides)
    from dtr_scale.jobs.train import train_experiment

    return train_experiment(experiment)


def _sample(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from dtr_scale.jobs.sample import sample_run

    path = sample_run(
        arguments.run_dir,
        num=arguments.num,
        out=arguments.out,
        vae=arguments.vae,
        overrides=overrides,
    )
    print(path)
    return 0


def _evaluate(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from dtr_scale.jobs.evaluate import evaluate_run

    metrics, path = evaluate_run(
        arguments.run_dir, num_samples=arguments.num_samples, overrides=overrides
    )
    for name, value in metrics.items():
        print(f"{name}: {value:.1%}" if name == "legibility" else f"{name}: {value:.3f}")
    print(f"report: {path}")
    return 0


def _cka(arguments: argparse.Namespace) -> int:
    from dtr_scale.jobs.analyse import cka_run

    paths = cka_run(
        arguments.run_dir,
        num_samples=arguments.num_samples,
        num_timesteps=arguments.num_timesteps,
        out=arguments.out,
        debiased=not arguments.biased,
    )
    print(*paths, sep="\n")
    return 0


def _affinity(arguments: argparse.Namespace) -> int:
    from dtr_scale.jobs.analyse import affinity_run

    objective, paths = affinity_run(
        arguments.run_dir,
        num_samples=arguments.num_samples,
        num_timesteps=arguments.num_timesteps,
        num_clusters=arguments.num_clusters,
    )
    print(json.dumps({"objective": objective}))
    print(*paths, sep="\n", file=sys.stderr)
    return 0


def _plan(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from dtr_scale.config.load import load_experiment

    experiment = load_experiment(arguments.config, overrides)
    from dtr_scale.jobs.plan import plan_compute

    plan = plan_compute(experiment)
    if arguments.json:
        print(json.dumps(plan.figures(per_layer=arguments.per_layer), indent=2))
    else:
        print(plan.table(per_layer=arguments.per_layer))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from dtr_scale.checkpoint.convert import convert_file, convert_network

    source, target, out = arguments.source, arguments.target, arguments.out
    if arguments.kind == "run":
        from dtr_scale.jobs.trained import load_run

        run = load_run(source)
        convert_network(
            run.network.state_dict(),
            run.experiment.model.model_dump(exclude_none=True),
            target,
            out,
            run.experiment.diffusion.num_timesteps,
        )
    else:
        convert_file(source, arguments.kind, target, out, arguments.num_heads)
    print(out)
    if target == "diffusers":
        print(f"before use, set the timestep frequencies as {out / 'README.md'} says")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from dtr_scale.checkpoint.inspection import describe, find_checkpoint
    from dtr_scale.config.changes import changes
    from dtr_scale.config.load import load_experiment, resolved

    reader = find_checkpoint(arguments.place)
    print(describe(reader))
    if arguments.config:
        wanted = resolved(load_experiment(arguments.config))
        found = changes(reader.meta["config"], wanted, source=reader.url)
        print("", f"against {arguments.config}", *found or ["no difference"], sep="\n")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from dtr_scale.checkpoint.inspection import find_checkpoint, verify

    reader = find_checkpoint(arguments.place)
    damaged = 0
    for name, problem in verify(reader):
        damaged += problem is not None
        print(f"{name}: {problem or 'ok'}")
    print(f"{reader.url}: {f'{damaged} damaged' if damaged else 'complete and as written'}")
    return 1 if damaged else 0


def _export(arguments: argparse.Namespace) -> int:
    from dtr_scale.jobs.export import export_checkpoint

    export_checkpoint(arguments.place, arguments.ema, arguments.out)
    print(arguments.out)
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from dtr_scale.checkpoint.inspection import differences, find_checkpoint
    from dtr_scale.config.changes import changes

    a, b = find_checkpoint(arguments.a), find_checkpoint(arguments.b)
    told, kinds = differences(a, b)
    for line in (*told, *changes(a.meta["config"], b.meta["config"], source=a.url)):
        print(line)
    for kind in kinds:
        print(
            f"{kind.kind}: {kind.differing} of {kind.total} tensors differ, relative "
            f"{kind.relative:.3g}, at most {kind.largest:.3g} {kind.largest_in}".rstrip()
        )
    return 0


def _reconstruct(arguments: argparse.Namespace) -> int:
    from dtr_scale.jobs.export import reconstruct_run

    if not 0.01 <= arguments.sigma_rel < 0.28:
        raise ConfigError(f"--sigma-rel={arguments.sigma_rel} is not accepted; give 0.01 to 0.28")
    count, distance = reconstruct_run(
        arguments.place, arguments.sigma_rel, arguments.out, arguments.step
    )
    print(arguments.out)
    print(f"made of {count} averages; its profile is {distance:.1%} from the one asked for")
    return 0


def _config_show(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from dtr_scale.config.load import load_experiment, resolved

    print(json.dumps(resolved(load_experiment(arguments.file, overrides)), indent=2))
    return 0


def _config_schema(arguments: argparse.Namespace) -> int:
    from dtr_scale.config.schema import experiment_schema

    print(experiment_schema(), end="")
    return 0


def _bench_checkpoint(arguments: argparse.Namespace) -> int:
    from dtr_scale.jobs.bench_checkpoint import bench_checkpoint

    table = bench_checkpoint(arguments.model, rounds=arguments.rounds, place=arguments.dir)
    if launched_rank() == 0:
        print(table)
    return 0


def _bench_data(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from dtr_scale.config.load import load_experiment
    from dtr_scale.jobs.bench_data import bench_data

    experiment = load_experiment(arguments.config, overrides)
    print(bench_data(experiment, arguments.seconds, arguments.shards))
    return 0
