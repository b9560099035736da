"""Print what completes `dtr-scale` in a shell, made of the parsers themselves."""

import argparse
from collections.abc import Iterator

from dtr_scale.cli.arguments import Parser

SHELLS = ("bash", "zsh")
_OF_A_RUN = (" sample", " evaluate")  # whose experiment stays as it was trained

# "default" lets the shell complete files where no word fits.
_BASH = """\
_dtr_scale() {{
    local command="" word words
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$command $word" in {commands}) command="$command $word" ;; esac
    done
    case "$command" in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _dtr_scale dtr-scale
"""
_ZSH = """\
#compdef dtr-scale
_dtr_scale() {{
    local command="" word words_
    for word in "${{(@)words[2,CURRENT-1]}}"; do
        case "$command $word" in {commands}) command="$command $word" ;; esac
    done
    case "$command" in
{cases}
    esac
    compadd -- ${{=words_}}
    _files
}}
compdef _dtr_scale dtr-scale
"""


class PrintCompletion(argparse.Action):
    """Print a shell's completion and leave, as --help does."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(parser, Parser)
        print(completion(parser, str(values)), end="")
        parser.exit()


def completion(parser: Parser, shell: str) -> str:
    """Return the script that completes commands, options and the keys of an experiment."""
    from dtr_scale.config.explain import settings

    # In single quotes, no word with a "$".
    keys = [s.key for s in settings() if s.key != "$schema"]
    words = dict(_words(parser, [f"--{key}" for key in dict.fromkeys(keys)]))
    name = "words" if shell == "bash" else "words_"  # zsh's own `words` is what was typed
    cases = [f"        \"{command}\") {name}='{' '.join(of)}' ;;" for command, of in words.items()]
    template = _BASH if shell == "bash" else _ZSH
    commands = "|".join(f'"{command}"' for command in words if command)
    return template.format(commands=commands, cases="\n".join(cases))


def _words(parser: Parser, keys: list[str], command: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield each command with the words that may follow it."""
    # Private to argparse, which has no public list of a parser's commands.
    parts = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    named = {name: part for action in parts for name, part in action.choices.items()}
    overrides = keys if parser.get_default("takes_overrides") else []
    if command in _OF_A_RUN:
        overrides = [key for key in keys if key.startswith("--evaluation.")]
    yield command, [*named, *parser.options(), *overrides]
    for name, part in named.items():
        yield from _words(part, keys, f"{command} {name}")
