"""Parse the commands on trained runs: sample, compare, plots, cka, affinity and tracking."""

import argparse
import json
import sys
from pathlib import Path

from dtr_scale.cli.arguments import (
    Commands,
    actions,
    add_run_dir,
    add_weights,
    comma_separated,
    positive_integer,
    runs,
    scales,
    whole_number,
)
from dtr_scale.cli.evaluation import add_evaluate, check_overrides
from dtr_scale.launchers import launched_rank
from dtr_scale.signals import LeaveRequest


def add_runs(commands: Commands) -> None:
    """Add the commands to their groups."""
    _add_sample(commands)
    _add_compare(commands)
    _add_plots(commands)
    _add_cka(commands)
    _add_affinity(commands)
    _add_tracking(commands)
    add_evaluate(commands)


def _add_tracking(commands: Commands) -> None:
    parser = commands.add(
        "tracking",
        "look at a run",
        "send MLflow what it has missed of a run; one that goes on does so by itself; or tell "
        "the link of its charts",
        "dtr-scale tracking sync runs/demo_digits --uri http://mlflow:5000\n"
        "  dtr-scale tracking link runs/demo_digits",
    )
    parts = actions(parser)
    for name, told, run in (
        ("sync", "send what MLflow does not have: metrics, evaluations, pictures", _sync),
        ("link", "tell where MLflow shows the runs of its experiment", _link),
    ):
        part = parts.add_parser(name, help=told)
        add_run_dir(part)
        part.add_argument(
            "--uri",
            help="MLflow's address (default: the run's, with its password from "
            "MLFLOW_TRACKING_URI or MLFLOW_TRACKING_PASSWORD)",
        )
        runs(part, run)


def _add_sample(commands: Commands) -> None:
    parser = commands.add(
        "sample",
        "look at a run",
        "draw samples from a run's newest checkpoint (averaged weights) into pictures; under "
        "torchrun, deepspeed or srun all ranks draw; started again, it goes on where it was "
        "killed; evaluation.* and data.storage_options.* can be overridden",
        "torchrun --nproc_per_node 8 launch/sample.py runs/dit_l --num-samples 50000 --out x.npz\n"
        "  dtr-scale sample runs/demo_digits --classes 3,7 --seed 1 --evaluation.cfg_scale=2\n"
        "  dtr-scale sample runs/demo_digits --guidance 1,1.5,4",
    )
    add_run_dir(parser)
    parser.add_argument(
        "--num-samples",
        type=positive_integer,
        help="samples; with --guidance of each scale (default: 64; with --guidance 8, or "
        "all classes or texts equally often)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="an .npz as ADM's, with a picture of the first samples and a manifest beside it, or a "
        ".png of all (default: RUN_DIR/samples/step_STEP_grid.png)",
    )
    parser.add_argument(
        "--folder", "--pngs", type=Path, metavar="FOLDER", help="a PNG for each sample as well"
    )
    parser.add_argument(
        "--force", action="store_true", help="overwrite what is finished, of other settings too"
    )
    parser.add_argument(
        "--classes",
        type=comma_separated,
        metavar="CLASS,...",
        help="names or numbers of classes, in turn (default: all)",
    )
    parser.add_argument(
        "--seed",
        type=whole_number,
        help="of the noise; others give other samples (default: the run's)",
    )
    parser.add_argument(
        "--guidance",
        type=scales,
        metavar="SCALE,...",
        help="draw one sheet: a row of the same samples for each scale of guidance",
    )
    parser.add_argument(
        "--latents", action="store_true", help="store latents as they are, in the .npz"
    )
    parser.add_argument("--vae", help="decodes latents (default: what encoded the data, if here)")
    add_weights(parser)
    _add_texts(parser)
    runs(parser, _sample, overrides=True, on_ranks=True)


def _add_texts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models of text")
    text = group.add_mutually_exclusive_group()
    text.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="draw this; may be given again, for several in turn",
    )
    text.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help="a caption a line; sample i is of line i (default: held-out ones, else trained)",
    )
    group.add_argument(
        "--text-encoder", metavar="NAME", help="open_clip's or a folder (default: the data's)"
    )
    group.add_argument("--text-pretrained", metavar="WEIGHTS", default="openai", help="its weights")


def _add_compare(commands: Commands) -> None:
    parser = commands.add(
        "compare",
        "look at a run",
        "compare runs: results with what their manifests differ in, losses, settings, curves and "
        "samples; tables here, and with --out one page and its plots",
        "dtr-scale compare runs/demo_digits runs/demo_digits_plain --out comparison",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run directory, the id of an MLflow run, or an MLflow experiment for all its runs",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for index.html and PNGs of its plots"
    )
    parser.add_argument(
        "--tracking-uri",
        metavar="URI",
        help="MLflow server or database (default: MLFLOW_TRACKING_URI, else runs/mlflow.db)",
    )
    runs(parser, _compare)


def _add_plots(commands: Commands) -> None:
    parser = commands.add(
        "plots",
        "look at a run",
        "draw a run's losses, speed and method over the timesteps: masks, clusters, loss weights; "
        "a PNG each and a sheet of all",
        "dtr-scale plots runs/demo_digits",
    )
    add_run_dir(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the PNGs (default: RUN_DIR/plots)"
    )
    runs(parser, _plots)


def _add_cka(commands: Commands) -> None:
    parser = commands.add(
        "cka",
        "look at a run",
        "show how alike a run's representations are at different timesteps, block by block",
        "dtr-scale cka runs/demo_digits --num-timesteps 30",
    )
    add_run_dir(parser)
    _add_num_samples(parser)
    _add_num_timesteps(parser)
    parser.add_argument(
        "--out", type=Path, help="PNG, and .npz beside it (default: RUN_DIR/samples/cka.png)"
    )
    parser.add_argument(
        "--biased", action="store_true", help="the plain estimator, near 1 for few samples"
    )
    runs(parser, _cka)


def _add_affinity(commands: Commands) -> None:
    parser = commands.add(
        "affinity",
        "look at a run",
        "cut a run's timesteps into clusters of alike gradients, for ant_uw; holds 4 bytes per "
        "parameter and timestep in memory",
        "dtr-scale affinity runs/demo_digits --num-clusters 8",
    )
    add_run_dir(parser)
    _add_num_samples(parser)
    _add_num_timesteps(parser)
    parser.add_argument("--num-clusters", type=positive_integer, default=8, help="clusters")
    runs(parser, _affinity)


def _add_num_samples(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-samples", type=positive_integer, default=64, help="samples")


def _add_num_timesteps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-timesteps", type=positive_integer, default=20, help="evenly spread")


def _sample(arguments: argparse.Namespace, overrides: list[str]) -> int:
    # Before torch is imported: a mistake is told at once.
    check_overrides(arguments, overrides)
    if arguments.text_encoder is not None and not (arguments.captions or arguments.prompt):
        arguments.parser.error("--text-encoder is for --prompt TEXT or --captions FILE")
    leave = LeaveRequest()
    with leave.listening():
        from dtr_scale.jobs.averages import Choice
        from dtr_scale.jobs.conditions import Wanted
        from dtr_scale.jobs.sample import sample_run

        path = sample_run(
            arguments.run_dir,
            num_samples=arguments.num_samples,
            out=arguments.out,
            folder=arguments.folder,
            latents=arguments.latents,
            vae=arguments.vae,
            choice=Choice(arguments.ema, arguments.sigma_rel, arguments.step),
            wanted=Wanted(
                arguments.classes or (),
                tuple(arguments.prompt or ()),
                arguments.captions,
                arguments.text_encoder,
                arguments.text_pretrained,
            ),
            seed=arguments.seed,
            guidance=arguments.guidance or (),
            force=arguments.force,
            overrides=overrides,
            leave=leave,
        )
    if launched_rank() == 0:
        print(path)
        _tell_mlflow(arguments.run_dir)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from dtr_scale.jobs.compare import compare_runs

    text, page = compare_runs(
        arguments.runs, out=arguments.out, tracking_uri=arguments.tracking_uri
    )
    print(text)
    print(f"\npage: {page}" if page else "\nfor curves and samples give --out DIR")
    return 0


def _plots(arguments: argparse.Namespace) -> int:
    from dtr_scale.jobs.plots import plot_run

    print(*plot_run(arguments.run_dir, out=arguments.out), sep="\n")
    _tell_mlflow(arguments.run_dir)
    return 0


def _sync(arguments: argparse.Namespace) -> int:
    from dtr_scale.jobs.tracking import sync_run

    print(sync_run(arguments.run_dir, arguments.uri))
    return 0


def _link(arguments: argparse.Namespace) -> int:
    from dtr_scale.jobs.tracking import link_of_run

    print(link_of_run(arguments.run_dir, arguments.uri))
    return 0


def _tell_mlflow(run_dir: Path) -> None:
    from dtr_scale.jobs.tracking import send_findings

    send_findings(run_dir)


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
    _tell_mlflow(arguments.run_dir)
    return 0


def _affinity(arguments: argparse.Namespace) -> int:
    from dtr_scale.jobs.analyse import affinity_run

    objective, paths = affinity_run(
        arguments.run_dir,
        num_samples=arguments.num_samples,
        num_timesteps=arguments.num_timesteps,
        num_clusters=arguments.num_clusters,
    )
    # stdout holds nothing but the JSON, so that it can be piped into a file.
    print(json.dumps({"objective": objective}))
    print(*paths, sep="\n", file=sys.stderr)
    _tell_mlflow(arguments.run_dir)
    return 0
