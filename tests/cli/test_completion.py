"""Completion in real shells: what a user would be offered."""

import shutil
import subprocess

import pytest

from dtr_scale.cli.main import main

OFFERED = [
    ("co", {"compare", "config", "convert"}),
    ("config e", {"explain"}),
    ("sample runs/mine --num", {"--num-samples"}),
    ("train --config mine.json --train.lr", {"--train.lr"}),
    ("train --train.max_s", {"--train.max_steps"}),
    ("sample runs/mine --evaluation.samp", {"--evaluation.sampler"}),
    ("sample runs/mine --train.l", set()),
    ("prepare imagefolder pictures --max", {"--max-unreadable"}),
]


@pytest.fixture
def script(capsys):
    """Return what a shell evaluates."""

    def printed(shell):
        with pytest.raises(SystemExit) as caught:
            main(["--print-completion", shell])
        assert caught.value.code == 0
        return capsys.readouterr().out

    return printed


def test_bash_offers_commands_options_and_keys(script):
    bash = script("bash")
    for typed, offered in OFFERED:
        words = f"COMP_WORDS=(dtr-scale {typed}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))"
        asked = f'{bash}\n{words}; _dtr_scale; echo "${{COMPREPLY[*]}}"'
        told = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
        assert (set(told.stdout.split()), told.stderr) == (offered, ""), typed


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh here")
def test_zsh_offers_the_same(script):
    # Outside of an editor zsh has no `compadd`: this one filters as it does.
    stand_ins = (
        "compdef() { }; _files() { }\n"
        "compadd() { shift; for one; do [[ $one == ${words[-1]}* ]] && print -r -- $one; done }"
    )
    zsh = f"{stand_ins}\n{script('zsh')}"
    for typed, offered in OFFERED:
        words = f"words=(dtr-scale {typed}); CURRENT=$#words"
        asked = f"{zsh}\n{words}; _dtr_scale; true"
        told = subprocess.run(["zsh", "-fc", asked], capture_output=True, text=True, check=True)
        assert (set(told.stdout.split()), told.stderr) == (offered, ""), typed
