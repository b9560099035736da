"""Turn any key into a name that MLflow takes for a metric, a param or a tag."""

import posixpath
import re
from collections.abc import Mapping
from typing import Any

_MOST_CHARACTERS = 250  # MLflow's own limit


def valid_names(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return `entries` by names that MLflow takes: other characters become `_`.

    MLflow takes letters, digits and `_-. :/`, and no name that is another one read as a path
    (`a//b`, `../a`). Names that become the same are numbered.
    """
    valid: dict[str, Any] = {}
    for key, value in entries.items():
        name = re.sub(r"[^A-Za-z0-9_\-. :/]", "_", key)[:_MOST_CHARACTERS]
        # One such name would make MLflow refuse the whole call.
        if posixpath.normpath(name) != name or name.startswith((".", "/")):
            name = name.replace("/", "_").replace(".", "_") or "_"
        unique, number = name, 2
        while unique in valid:
            unique, number = f"{name[: _MOST_CHARACTERS - 4]}_{number}", number + 1
        valid[unique] = value
    return valid
