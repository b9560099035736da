"""The READMEs: their links lead to files, and their commands parse."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from dtr_scale.cli.main import _parser
from dtr_scale.config.load import load_experiment

ROOT = Path(__file__).parents[1]
NAMES = subprocess.run(
    ["git", "ls-files", "README.md", "*/README.md"],
    cwd=ROOT, check=True, capture_output=True, text=True,
).stdout.split()  # fmt: skip
READMES = [ROOT / name for name in NAMES]


def commands(path):
    """Yield the command lines of a README's bash blocks, comments and line ends joined."""
    for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line.partition(">")[0], comments=True):
                yield words


def own_arguments(words):
    """Return what a command line gives to `dtr-scale`, or None if it starts something else."""
    if words[0] == "dtr-scale":
        return words[1:]
    for script in ("train", "prepare", "sample", "evaluate"):
        if f"launch/{script}.py" in words:
            return [script, *words[words.index(f"launch/{script}.py") + 1 :]]
    return None


OWN = {
    " ".join(arguments): arguments
    for path in READMES
    for words in commands(path)
    if (arguments := own_arguments(words)) and "$" not in " ".join(arguments)
}


@pytest.mark.parametrize("arguments", OWN.values(), ids=OWN)
def test_the_commands_of_the_readmes_parse(arguments):
    parsed, rest = _parser().parse_known_args(arguments)
    assert parsed.takes_overrides or not rest
    config = getattr(parsed, "config", None)
    if config is not None and (ROOT / config).exists():
        load_experiment(ROOT / config, rest)


@pytest.mark.parametrize("path", READMES, ids=NAMES)
def test_links_lead_to_files(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if "://" not in link:
            assert (path.parent / link.partition("#")[0]).exists(), link


def test_the_readme_opens_every_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert name == "README.md" or f"({name})" in text, name
