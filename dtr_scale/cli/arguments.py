"""Declare commands: their parsers, what they say of themselves, and the values they accept."""

import argparse
import difflib
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from dtr_scale.errors import ConfigError
from dtr_scale.launchers import launched_rank

EXIT_USER_ERROR = 2
GROUPS = ("prepare data", "train", "look at a run", "export", "measure")
OVERRIDES = "any key of the experiment can be overridden: --train.lr=2e-4 or --train.lr 2e-4"

Run = Callable[..., int]
"""Called with the parsed arguments, and with the overrides if the command takes them."""


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Wraps what a command does, keeps the lines of examples, and tells every default."""

    # Two private methods of argparse, which its own formatters override.
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        # Examples and lists are indented, and are as they should be.
        lines = (
            line if line.startswith(" ") else textwrap.fill(line, width, break_on_hyphens=False)
            for line in text.splitlines()
        )
        return textwrap.indent("\n".join(lines), indent)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action.default, bool):  # the option says what it switches on
            return action.help
        if action.default is not None:
            return super()._get_help_string(action)
        is_told = action.required or not action.option_strings or "default:" in (action.help or "")
        return action.help if is_told else f"{action.help or ''} (default: none)".lstrip()


class _Parts(argparse._SubParsersAction):
    """The parts of a command, whose help says what the command's does, with its own examples."""

    examples = ""

    def add_parser(self, name: str, **options: Any) -> Any:  # noqa: ANN401
        if told := options.get("help"):
            options.setdefault("description", f"{told[0].upper()}{told[1:]}.")
        # A line that goes on in the next one is one example with it.
        lines = self.examples.replace("\\\n", "\0").splitlines()
        own = [line.strip().replace("\0", "\\\n") for line in lines if f" {name} " in f"{line} "]
        if own:
            options.setdefault("epilog", "\n  ".join(["example:", *own]))
        return super().add_parser(name, **options)


class Parser(argparse.ArgumentParser):
    """Tells what cannot be understood once for all ranks."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401
        # No abbreviations: what the parser does not know are overrides, which must not be taken for
        # the beginning of an option.
        super().__init__(**{"formatter_class": _Help, "allow_abbrev": False} | options)

    def error(self, message: str) -> NoReturn:
        if launched_rank() == 0:
            super().error(message)
        raise SystemExit(EXIT_USER_ERROR)

    def options(self) -> list[str]:
        """Return the options, as `--out`, that a user can give."""
        # Private to argparse, which has no public list of its options.
        shown = [a for a in self._actions if a.help is not argparse.SUPPRESS]
        return [option for action in shown for option in action.option_strings if option != "-h"]


class Commands:
    """The commands of the top level, told in the groups of what a user does."""

    def __init__(self, parser: Parser) -> None:
        self._parsers = parser.add_subparsers(
            dest="command",
            required=True,
            metavar="COMMAND",
            help=argparse.SUPPRESS,
            prog=parser.prog,  # else it is made of the usage's words
        )
        self._groups: dict[str, list[str]] = {group: [] for group in GROUPS}

    def add(self, name: str, group: str, summary: str, example: str) -> Parser:
        """Return the parser of a new command; `summary` opens its help, `example` closes it."""
        short = re.split("[;:]", summary)[0]
        told = textwrap.fill(f"  {name:<11} {short}", 79, subsequent_indent=14 * " ")
        self._groups[group].append(told)
        return self._parsers.add_parser(name, description=summary, epilog=f"example:\n  {example}")

    def listing(self) -> str:
        """Return all commands by group, a line each."""
        return "\n\n".join(
            "\n".join([f"{group}:", *lines]) for group, lines in self._groups.items() if lines
        )


def actions(parser: Parser, name: str = "action") -> "argparse._SubParsersAction[Parser]":
    """Return where a command's own sub-commands are added."""
    parts = parser.add_subparsers(
        dest=name, required=True, metavar=name.upper(), action=_Parts, parser_class=Parser
    )
    assert isinstance(parts, _Parts)
    parts.examples = parser.epilog or ""
    return parts


def runs(
    parser: argparse.ArgumentParser, run: Run, *, overrides: bool = False, on_ranks: bool = False
) -> None:
    """Declare what a command calls.

    With `overrides` it is given the arguments that the parser does not know. With `on_ranks` it may
    be one of several processes of a launcher, of which the first alone speaks.
    """
    parser.set_defaults(run=run, takes_overrides=overrides, on_ranks=on_ranks, parser=parser)
    if on_ranks:
        # The deepspeed launcher passes it; the rank is taken from the environment.
        parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the experiment's file."""
    parser.add_argument("--config", required=True, metavar="FILE", help="the experiment's JSON")


def add_run_dir(parser: argparse.ArgumentParser) -> None:
    """Add the directory of a run."""
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="what train wrote")


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add which weights of a run are wanted."""
    average = parser.add_mutually_exclusive_group()
    average.add_argument(
        "--ema",
        metavar="DECAY",
        help="a decay that was kept, power_WIDTH, or none for the weights themselves (default: "
        "train.ema_decay)",
    )
    average.add_argument("--sigma-rel", type=width, help="relative width to make, 0.01 to 0.28")
    parser.add_argument(
        "--step", type=positive_integer, help="of the checkpoint (default: the newest)"
    )


def unknown_argument(parser: Parser, argument: str, accepted: list[str]) -> ConfigError:
    """Return the error for an argument that a command does not have, naming what was meant."""
    name = argument.partition("=")[0]
    known = [*parser.options(), *accepted]
    # `--sampler` is meant for `--evaluation.sampler`, `--num` for `--num-samples`.
    by_part = {option.lstrip("-").rpartition(".")[2]: option for option in known}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    near += [by_part[p] for p in difflib.get_close_matches(name.lstrip("-"), by_part, 1, 0.75)]
    # `--nmu` is meant for the beginning of `--num-samples`.
    by_start = {option[: len(name)]: option for option in reversed(known)}
    near += [by_start[s] for s in difflib.get_close_matches(name, by_start, 1, 0.75)]
    meant = f"; did you mean {near[0]}?" if near and name.startswith("-") else ""
    return ConfigError(f"unknown argument {name!r}{meant}; see {parser.prog} -h")


def positive_integer(text: str) -> int:
    """Return a whole number from 1, also of 1e3."""
    number = int(text) if text.isdecimal() else _number(text)
    if not 1 <= number < float("inf") or number != int(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; give a whole number from 1")
    return int(number)


def whole_number(text: str) -> int:
    """Return a whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; give a whole number from 0")
    return int(text)


def comma_separated(text: str) -> tuple[str, ...]:
    """Return what stands between commas."""
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; give values, as in 3,7")
    return parts


def scales(text: str) -> tuple[float, ...]:
    """Return scales of guidance, numbers from 1, between commas."""
    found = tuple(_number(part) for part in text.split(","))
    if not all(1 <= scale < float("inf") for scale in found):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not accepted; give numbers from 1, as in 1,1.5,4"
        )
    return found


def positive_number(text: str) -> float:
    """Return a number above 0."""
    number = _number(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; give a number above 0")
    return number


def fraction(text: str) -> float:
    """Return a number from 0 to 1."""
    number = _number(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; give a number from 0 to 1")
    return number


def width(text: str) -> float:
    """Return the relative width of a power-function average, 0.01 to 0.28."""
    number = _number(text)
    if not 0.01 <= number < 0.28:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; give 0.01 to 0.28")
    return number


def split_name(text: str) -> str:
    """Return a name that can begin a shard's name."""
    if not text.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; give a name such as train")
    return text


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        # No comparison with it holds, so each caller refuses it in its own words.
        return float("nan")
