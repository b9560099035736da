"""Find the folder of the paper's experiments."""

from pathlib import Path

import dtr_scale
from dtr_scale.errors import ConfigError

_KNOWN = "dit_l_dtr_antuw.json"


def find_configs(given: Path | None) -> Path:
    """Return the folder `given`, or configs/ of the current folder or beside the package."""
    beside = Path(dtr_scale.__file__).parents[1] / "configs"
    places = [given] if given else [Path("configs"), beside]
    for place in places:
        if (place / _KNOWN).exists():
            return place
    raise ConfigError(
        f"{' and '.join(map(str, places))}: no experiments of the paper are there; give the "
        "folder configs/ of the repository with --configs=DIR"
    )
