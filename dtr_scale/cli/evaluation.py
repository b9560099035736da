"""Parse `evaluate`: a run, anybody's pictures, and references."""

import argparse
from pathlib import Path
from typing import Any

from dtr_scale.cli.arguments import (
    Commands,
    Parser,
    add_weights,
    positive_integer,
    runs,
    split_name,
    unknown_argument,
)
from dtr_scale.launchers import launched_rank

FEATURES = ("efficientnet", "inception", "dinov2")  # of `dtr_scale.evaluation.features`
REFERENCE = "reference"


def add_evaluate(commands: Commands) -> None:
    """Add the command to its group."""
    parser = commands.add(
        "evaluate",
        "measure",
        "measure samples of a run's newest checkpoint, or anybody's pictures, against real ones; "
        "of a run evaluation.* and data.storage_options.* can be overridden; under torchrun, "
        "deepspeed or srun all ranks draw its samples, and what was killed goes on",
        "dtr-scale evaluate runs/demo_digits --num-samples 500 --evaluation.sampler=dpm_solver",
    )
    parser.usage = (
        "dtr-scale evaluate RUN_DIR [--reference FILE.npz] [options]\n"
        "       dtr-scale evaluate --samples FILE.npz|DIR --reference FILE.npz [options]\n"
        "       dtr-scale evaluate reference FOLDER|URL --out FILE.npz [options]"
    )
    parser.add_argument("what", nargs="*", help=argparse.SUPPRESS)
    _add_measuring(parser)
    _add_samples(parser)
    add_weights(parser)
    _add_reference(parser)
    runs(parser, _evaluate, overrides=True, on_ranks=True)


def _add_measuring(parser: Parser) -> None:
    parser.add_argument(
        "--features",
        action="append",
        choices=FEATURES,
        help="network to measure by, may be given again: inception makes FID, sFID, IS, precision "
        "and recall; efficientnet needs no download and makes fd_efficientnet (default: of a run "
        "what its evaluation says, else inception if its weights are here, else efficientnet; of "
        "a run of the smallest pixels its pixels)",
    )
    parser.add_argument(
        "--inception-weights",
        type=Path,
        metavar="FILE",
        help="torch-fidelity's .pth (default: its download)",
    )
    parser.add_argument(
        "--dinov2-weights", type=Path, metavar="FILE", help="DINOv2's .pth or .safetensors"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write numbers and manifest here")
    parser.add_argument("--vae", help="decodes latents (default: what encoded the data, if here)")
    parser.add_argument("--split", type=split_name, default="train", help="of prepared data")


def _add_samples(parser: Parser) -> None:
    of_run = parser.add_argument_group("a run or anybody's pictures")
    of_run.add_argument(
        "--num-samples",
        type=positive_integer,
        help="samples of a run (default: its evaluation.num_samples)",
    )
    of_run.add_argument(
        "--samples", metavar="FILE.npz|DIR", help="pictures to measure; or prepared data"
    )
    of_run.add_argument(
        "--reference",
        type=Path,
        metavar="FILE.npz",
        help="ADM's or one's own (default: of a run its evaluation.reference, else its held-out "
        "split)",
    )


def _add_reference(parser: Parser) -> None:
    of_reference = parser.add_argument_group("evaluate reference")
    of_reference.add_argument("--out", type=Path, metavar="FILE.npz", help="file to write")
    of_reference.add_argument(
        "--size", type=positive_integer, help="crop and scale a folder's pictures as ADM does"
    )
    of_reference.add_argument(
        "--num-pictures",
        type=positive_integer,
        default=10_000,
        help="pictures to keep for precision and recall; moments are of all",
    )


def _evaluate(arguments: argparse.Namespace, overrides: list[str]) -> int:
    parser, what = arguments.parser, arguments.what
    if what[:1] == [REFERENCE]:
        if len(what) != 2 or arguments.out is None:
            parser.error("evaluate reference needs FOLDER|URL and --out FILE.npz")
        return _reference(arguments, overrides)
    if arguments.out is not None:
        parser.error("--out is for evaluate reference; give --json FILE to store numbers")
    if arguments.samples is not None:
        if what or arguments.reference is None:
            parser.error("--samples needs --reference FILE.npz, and no RUN_DIR")
        return _samples(arguments, overrides)
    if not what:
        parser.error("give RUN_DIR, --samples or reference")
    return _run(arguments, [*what[1:], *overrides])


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    # Before torch is imported: a mistake is told at once.
    check_overrides(arguments, overrides)
    from dtr_scale.jobs.averages import Choice
    from dtr_scale.jobs.evaluate import evaluate_run
    from dtr_scale.jobs.tracking import send_findings

    report, path = evaluate_run(
        Path(arguments.what[0]),
        num_samples=arguments.num_samples,
        reference=arguments.reference,
        features=arguments.features or (),
        weights=_weights(arguments),
        vae=arguments.vae,
        choice=Choice(arguments.ema, arguments.sigma_rel, arguments.step),
        overrides=overrides,
    )
    if launched_rank() == 0:  # which alone has measured
        _tell(arguments, report)
        print(f"report: {path}")
        send_findings(Path(arguments.what[0]))
    return 0


def _samples(arguments: argparse.Namespace, overrides: list[str]) -> int:
    _no_overrides(arguments, overrides)
    from dtr_scale.jobs.measure import measure_pictures

    report = measure_pictures(
        arguments.samples,
        arguments.reference,
        features=arguments.features or FEATURES[:1],
        weights=_weights(arguments),
        split=arguments.split,
        vae=arguments.vae,
    )
    _tell(arguments, report)
    return 0


def _reference(arguments: argparse.Namespace, overrides: list[str]) -> int:
    _no_overrides(arguments, overrides)
    from dtr_scale.jobs.measure import make_reference

    path = make_reference(
        arguments.what[1],
        arguments.out,
        features=arguments.features or FEATURES[:1],
        weights=_weights(arguments),
        size=arguments.size,
        split=arguments.split,
        vae=arguments.vae,
        num_pictures=arguments.num_pictures,
    )
    print(path)
    return 0


def _weights(arguments: argparse.Namespace) -> dict[str, Path | None]:
    return {"inception": arguments.inception_weights, "dinov2": arguments.dinov2_weights}


def _tell(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    for name, value in report["metrics"].items():
        print(f"{name}: {value:.1%}" if name == "legibility" else f"{name}: {value:.3f}")
    if arguments.json is not None:
        from dtr_scale.jobs.measure import write_json

        write_json(arguments.json, report)
        print(f"json: {arguments.json}")


def _no_overrides(arguments: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise unknown_argument(arguments.parser, overrides[0], [])


def check_overrides(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Refuse what is neither an option nor one of the run's keys that may be overridden."""
    from dtr_scale.config.load import parse_overrides
    from dtr_scale.config.schema import EvaluationConfig

    for key, _ in parse_overrides(overrides):
        if not key.startswith(("evaluation.", "data.storage_options")):
            accepted = [f"--evaluation.{name}" for name in EvaluationConfig.model_fields]
            raise unknown_argument(arguments.parser, f"--{key}", accepted)
