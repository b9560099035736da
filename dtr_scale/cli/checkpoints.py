"""Parse the commands on checkpoints and weights: checkpoint, export and convert."""

import argparse
from pathlib import Path

from dtr_scale.cli.arguments import Commands, actions, add_weights, positive_integer, runs


def add_checkpoints(commands: Commands) -> None:
    """Add the commands to their groups."""
    _add_checkpoint(commands)
    _add_export(commands)
    _add_convert(commands)


def _add_checkpoint(commands: Commands) -> None:
    parser = commands.add(
        "checkpoint",
        "look at a run",
        "look into checkpoints: a step_* folder, a run directory (its newest) or s3://",
        "dtr-scale checkpoint diff runs/dtr runs/plain\n"
        "  dtr-scale checkpoint verify runs/demo_digits\n"
        "  dtr-scale checkpoint list runs/demo_digits\n"
        "  dtr-scale checkpoint inspect runs/demo_digits",
    )
    parts = actions(parser)
    listed = parts.add_parser("list", help="steps and sizes, and which is the best")
    listed.add_argument("place", metavar="PATH", help="a run, or a checkpoint.dir")
    runs(listed, _list)
    inspect = parts.add_parser("inspect", help="position, sizes, tree")
    inspect.add_argument("place", metavar="PATH", help="a checkpoint, or a run: its newest")
    inspect.add_argument("--config", metavar="FILE", help="also tell what differs from this file")
    runs(inspect, _inspect)
    verify = parts.add_parser(
        "verify", help="read and check every byte; exit with 1 if any is damaged"
    )
    verify.add_argument("place", metavar="PATH", help="a checkpoint, or a run: all it has kept")
    runs(verify, _verify)
    diff = parts.add_parser("diff", help="what differs between two")
    diff.add_argument("a", metavar="A", help="a checkpoint, or a run: its newest")
    diff.add_argument("b", metavar="B", help="another")
    runs(diff, _diff)


def _add_export(commands: Commands) -> None:
    parser = commands.add(
        "export",
        "export",
        "write a run's averaged weights as a file, or as a pipeline for diffusers; with "
        "--sigma-rel an average of any width is made of those kept by train.ema_sigma_rel",
        "dtr-scale export runs/NAME --to diffusers --out my-model\n"
        "  dtr-scale export runs/NAME --sigma-rel 0.15 --to safetensors --out model.safetensors\n"
        "  dtr-scale export runs/NAME --ema 0.9999 --to safetensors --out model.safetensors",
    )
    parser.add_argument(
        "place", metavar="RUN", help="a run directory, a checkpoint.dir or one step_* folder"
    )
    add_weights(parser)
    parser.add_argument(
        "--to",
        dest="target",
        required=True,
        choices=["safetensors", "diffusers", "official"],
        help="a file that build_model's network loads, the folder of a pipeline that draws our "
        "samples, or a file with the positions and masks of the official code",
    )
    parser.add_argument("--out", required=True, type=Path, help="the file or folder to write")
    parser.add_argument(
        "--vae",
        metavar="NAME_OR_FOLDER",
        help="the pipeline's autoencoder (default: what encoded the data: a copy if it is on this "
        "disk, else by its name on the hub)",
    )
    parser.add_argument(
        "--push",
        metavar="NAME",
        help="upload the pipeline to the hub as ORGANISATION/NAME, private, with the token of "
        "HF_TOKEN or `hf auth login`; without one the folder is written alone",
    )
    runs(parser, _export)


def _add_convert(commands: Commands) -> None:
    parser = commands.add(
        "convert",
        "export",
        "bring weights of official DiT, DTR and ADM checkpoints into another form",
        "dtr-scale convert DiT-XL-2-256x256.pt --from dit --to diffusers --out dit-xl-2",
    )
    parser.add_argument("source", type=Path, metavar="SRC", help=".pt or .safetensors file")
    parser.add_argument(
        "--from",
        dest="kind",
        required=True,
        choices=["dit", "dtr", "adm"],
        help="facebookresearch/DiT, byeongjun-park/DTR or openai/guided-diffusion",
    )
    parser.add_argument(
        "--to",
        dest="target",
        required=True,
        choices=["safetensors", "diffusers"],
        help="a file with the official names, or the folder of a pipeline",
    )
    parser.add_argument("--out", required=True, type=Path, help="the file or folder to write")
    parser.add_argument(
        "--num-heads", type=positive_integer, help="needed for a file of no DiT-S, B, L or XL"
    )
    runs(parser, _convert)


def _list(arguments: argparse.Namespace) -> int:
    from dtr_scale.jobs.checkpoints import list_checkpoints

    for line in list_checkpoints(arguments.place):
        print(line)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from dtr_scale.jobs.checkpoints import inspect_checkpoint

    print(inspect_checkpoint(arguments.place, arguments.config))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from dtr_scale.jobs.checkpoints import verify_checkpoints

    damaged = False
    for line, is_whole in verify_checkpoints(arguments.place):
        print(line, flush=True)
        damaged |= not is_whole
    return 1 if damaged else 0


def _diff(arguments: argparse.Namespace) -> int:
    from dtr_scale.jobs.checkpoints import diff_checkpoints

    for line in diff_checkpoints(arguments.a, arguments.b):
        print(line)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from dtr_scale.jobs.export import export_run

    told = export_run(
        arguments.place,
        arguments.target,
        arguments.out,
        ema=arguments.ema,
        sigma_rel=arguments.sigma_rel,
        step=arguments.step,
        vae=arguments.vae,
        push=arguments.push,
    )
    print(arguments.out, *told, sep="\n")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from dtr_scale.jobs.export import convert_file

    told = convert_file(
        arguments.source, arguments.kind, arguments.target, arguments.out, arguments.num_heads
    )
    print(arguments.out, *told, sep="\n")
    return 0
