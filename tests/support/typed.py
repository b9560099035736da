"""The commands of a README, and a folder to type them in."""

import json
import sys
from pathlib import Path

from dtr_scale.config.load import parse_overrides
from tests.support.runs import DEMO, ROOT, SMALL


def commands_of(readme: str, after: str) -> str:
    """Return the first block of commands that follows a phrase of a README, as it stands there."""
    _, found, text = (ROOT / readme).read_text(encoding="utf-8").partition(after)
    assert found, f"{readme} says nowhere {after!r}"
    _, _, block = text.partition("```bash\n")
    return block.partition("```")[0]


def like_the_repository(place: Path) -> Path:
    """Make a folder with the repository's launchers and environment, and `brief_experiments`."""
    (place / ".venv").symlink_to(sys.prefix)
    (place / "launch").symlink_to(ROOT / "launch")
    brief_experiments(place / "configs")
    return place


def brief_experiments(folder: Path) -> None:
    """Write experiments of the repository's names that train the digits, small and on a CPU."""
    folder.mkdir(exist_ok=True)
    here = ("--engine.device=cpu", "--engine.precision=fp32", "--evaluation.every_steps=0")
    raw = json.loads(DEMO.read_text(encoding="utf-8"))
    for key, value in parse_overrides([*SMALL, *here, "--train.max_steps=20"]):
        section, _, name = key.partition(".")
        raw[section][name] = value
    for name in ("demo_digits", "dit_l_dtr_antuw"):
        (folder / f"{name}.json").write_text(json.dumps(raw))
