"""Send a run's pictures and files to MLflow: to another store than its figures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtr_scale.tracking.attempts import ATTEMPTS, Attempt
from dtr_scale.tracking.findings import EVALUATIONS, arrays_of, read_pictures
from dtr_scale.tracking.mlflow import Server

_FILES = ("config.json", ATTEMPTS, EVALUATIONS)
_PLOTS = "plots"


class RunArtifacts:
    """The pictures and files of a run's directory."""

    def __init__(self, server: Server, run_id: str, run_dir: Path) -> None:
        self._server = server
        self._run_id = run_id
        self._run_dir = run_dir
        self._images: set[tuple[str, int, int]] | None = None
        self._files: dict[Path, float] = {}
        self._has_data = False

    def send_pictures(self, attempts: list[Attempt], last_step: int) -> None:
        """Send the pictures that the server does not have, up to a step."""
        # Asked here and not at the start: the store may be away while the server answers.
        if self._images is None:
            self._images = self._server.images(self._run_id)
        of_steps = {(key, step) for key, step, _ in self._images}
        for picture in read_pictures(self._run_dir, attempts, last_step):
            place = (picture.key, picture.step, picture.time_ms)
            # A step that is repeated after a kill makes the same picture again.
            if place in self._images or (not picture.is_remade and place[:2] in of_steps):
                continue
            self._server.log_image(self._run_id, picture.path, *place)
            self._images.add(place)
            if arrays := arrays_of(picture):
                self.send_file(arrays, "arrays")

    def send_files(self, data: Mapping[str, Any] | None) -> None:
        """Send what says how the run was made and went, and what it trains on."""
        for name in _FILES:
            self.send_file(self._run_dir / name)
        for path in sorted((self._run_dir / _PLOTS).glob("*.*")):
            self.send_file(path, _PLOTS)
        if data and not self._has_data:
            self._server.log_text(self._run_id, "data.json", json.dumps(data, indent=2))
            self._has_data = True

    def send_file(self, path: Path, folder: str | None = None) -> None:
        """Send a file if it is there and has changed."""
        try:
            changed = path.stat().st_mtime
        except OSError:
            return
        if self._files.get(path) != changed:
            self._server.log_file(self._run_id, path, folder)
            self._files[path] = changed
