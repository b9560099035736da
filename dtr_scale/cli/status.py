"""Parse `dtr-scale status`, and show it again every few seconds."""

import argparse
import json
import sys
import time

from dtr_scale.cli.arguments import Commands, positive_number, runs

_CLEARED = "\x1b[H\x1b[2J"


def add_status(commands: Commands) -> None:
    """Add the command to its group."""
    parser = commands.add(
        "status",
        "look at a run",
        "show how runs stand, by their files alone: alive or dead, step, time left, loss, speed, "
        "checkpoint, goodput, attempts and what went wrong; several runs as a table",
        "dtr-scale status runs/demo_digits --watch 5\n"
        "  dtr-scale status runs s3://bucket/other_run/",
    )
    parser.add_argument(
        "places",
        nargs="+",
        metavar="RUN_DIR",
        help="what train wrote, a folder of such, or a checkpoint.dir, also s3://",
    )
    parser.add_argument(
        "--watch",
        type=positive_number,
        metavar="SECONDS",
        help="show it again so often, until Ctrl-C",
    )
    parser.add_argument("--json", action="store_true", help="a JSON object a run, one a line")
    runs(parser, _status)


def _status(arguments: argparse.Namespace) -> int:
    shown = _shown(arguments)
    if not arguments.watch:
        print(shown)
        return 0
    try:
        while True:
            # In one write: a screen that is cleared first would flicker.
            clears = sys.stdout.isatty() and not arguments.json
            print(_CLEARED * clears + shown, flush=True)
            time.sleep(arguments.watch)
            shown = _shown(arguments)
    except KeyboardInterrupt:
        return 0


def _shown(arguments: argparse.Namespace) -> str:
    from dtr_scale.jobs.status.read import read_status
    from dtr_scale.jobs.status.text import status_text

    found = read_status(arguments.places)
    if arguments.json:
        return "\n".join(json.dumps(run.as_json()) for run in found)
    return status_text(found)
