"""Parse `config`, which shows, compares and explains experiments' files."""

import argparse
import json
import shlex
from pathlib import Path

from dtr_scale.cli.arguments import OVERRIDES, Commands, actions, runs


def add_config_commands(commands: Commands) -> None:
    """Add the command with its parts."""
    parser = commands.add(
        "config",
        "train",
        "make, show, compare or explain experiments' files",
        "dtr-scale config init --data data/mine --out mine.json\n"
        "  dtr-scale config explain train.lr\n"
        "  dtr-scale config schema > experiment.schema.json\n"
        "  dtr-scale config diff configs/dit_l_dtr_antuw.json runs/mine\n"
        "  dtr-scale config show configs/dit_l_dtr_antuw.json",
    )
    parts = actions(parser)
    init = parts.add_parser(
        "init", help="write an experiment for prepared data that fits this machine; asks nothing"
    )
    init.add_argument("--data", required=True, metavar="DIR_OR_S3", help="what prepare wrote")
    init.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON to write")
    init.add_argument("--force", action="store_true", help="replace a file that is there")
    runs(init, _init)
    show = parts.add_parser("show", help=f"print the resolved experiment; {OVERRIDES}")
    show.add_argument("file", metavar="FILE", help="the experiment's JSON, or a run directory")
    runs(show, _show, overrides=True)
    explain = parts.add_parser(
        "explain", help="tell what a key does and accepts, and which commands read it"
    )
    explain.add_argument(
        "key", nargs="?", metavar="KEY", help="as train.lr, or a section (default: list all keys)"
    )
    runs(explain, _explain)
    diff = parts.add_parser("diff", help="print the settings in which two experiments differ")
    diff.add_argument("a", metavar="A", help="an experiment's JSON, or a run directory")
    diff.add_argument("b", metavar="B", help="another")
    runs(diff, _diff)
    schema = parts.add_parser("schema", help="print the JSON Schema of all experiments")
    runs(schema, _schema)


def _init(arguments: argparse.Namespace) -> int:
    from dtr_scale.jobs.propose import propose, write_proposal

    proposal = propose(arguments.data, arguments.out)
    write_proposal(proposal, arguments.out, force=arguments.force)
    print(f"{arguments.out}: {proposal.told}")
    print(f"next: deepspeed launch/train.py --config {shlex.quote(str(arguments.out))}")
    return 0


def _file(place: str) -> Path:
    """Return an experiment's file, which a run has kept."""
    path = Path(place)
    return path / "config.json" if path.is_dir() else path


def _show(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from dtr_scale.config.load import load_experiment, resolved

    print(json.dumps(resolved(load_experiment(_file(arguments.file), overrides)), indent=2))
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    from dtr_scale.config.explain import explain_key, list_keys

    print(explain_key(arguments.key) if arguments.key else list_keys())
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from dtr_scale.config.changes import changes
    from dtr_scale.config.load import filled_in, load_experiment

    a, b = (filled_in(load_experiment(_file(place))) for place in (arguments.a, arguments.b))
    found = changes(a, b, arguments.a)
    for change in found:
        before, after = json.dumps(change.before), json.dumps(change.after)
        print(f"{change.key}: {before} -> {after}{'  (another run)' if change.identity else ''}")
    if not found:
        print("no setting differs")
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    from dtr_scale.config.schema import experiment_schema

    print(experiment_schema(), end="")
    return 0
