"""Run the command line: `dtr-scale COMMAND`.

Nothing heavy is imported before a command is known, so that `--help` answers at once.
"""

import os
import sys
from collections.abc import Sequence

import dtr_scale
from dtr_scale.cli.arguments import Commands, Parser, unknown_argument
from dtr_scale.cli.bench import add_bench
from dtr_scale.cli.checkpoints import add_checkpoints
from dtr_scale.cli.completion import SHELLS, PrintCompletion
from dtr_scale.cli.experiments import add_experiments
from dtr_scale.cli.prepare import add_data, add_prepare
from dtr_scale.cli.reproduce import add_reproduce
from dtr_scale.cli.runs import add_runs
from dtr_scale.cli.status import add_status
from dtr_scale.cli.supervise import add_supervise
from dtr_scale.errors import DtrScaleError
from dtr_scale.launchers import launched_rank, srun_variables
from dtr_scale.logs import setup_logging

EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; what a user can act on has no traceback."""
    # Before anything asks for the rank: `srun` has names of its own for it.
    os.environ.update(srun_variables(os.environ))
    arguments, rest = _parser().parse_known_args(argv)
    rank = launched_rank() if arguments.on_ranks else 0
    setup_logging(rank)
    try:
        if arguments.takes_overrides:
            return arguments.run(arguments, rest)
        if rest:
            raise unknown_argument(arguments.parser, rest[0], [])
        return arguments.run(arguments)
    except DtrScaleError as error:
        # What every rank raises is told once, by rank 0; another rank's own error by itself.
        if not error.reported and (rank == 0 or not error.on_every_rank):
            for line in str(error).splitlines():  # several where a file has several mistakes
                print(f"{_mark()} {line}", file=sys.stderr, flush=True)
        return error.exit_code
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        # Python flushes stdout at its exit, and would raise the same error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED


def _mark() -> str:
    """Return what an error begins with; red on a terminal, where a launcher writes around it."""
    in_colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    return "\033[1;31merror:\033[0m" if in_colour and os.environ.get("TERM") != "dumb" else "error:"


def _parser() -> Parser:
    parser = Parser(
        prog="dtr-scale",
        usage="dtr-scale COMMAND ...",
        description="Train diffusion transformers with Denoising Task Routing.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {dtr_scale.__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SHELLS,
        help='for a shell: eval "$(dtr-scale --print-completion bash)"',
    )
    commands = Commands(parser)
    add_prepare(commands)
    add_data(commands)
    add_experiments(commands)
    add_supervise(commands)
    add_bench(commands)
    add_status(commands)
    add_runs(commands)
    add_reproduce(commands)
    add_checkpoints(commands)
    parser.epilog = (
        f"{commands.listing()}\n\n"
        "examples:\n"
        "  dtr-scale prepare digits --out data/digits\n"
        "  deepspeed launch/train.py --config configs/demo_digits.json\n"
        "  dtr-scale sample runs/demo_digits --num-samples 100\n"
        "  dtr-scale evaluate runs/demo_digits"
    )
    return parser
