"""Which chart and step a picture of a run belongs to."""

import json

from dtr_scale.tracking.attempts import read_attempts
from dtr_scale.tracking.findings import read_pictures


def test_pictures_are_known_by_their_names_and_manifests(tmp_path):
    samples = tmp_path / "samples"
    samples.mkdir()
    for name in ("step_00000004", "step_00000004_grid_seed_1", "cka", "affinity"):
        (samples / f"{name}.png").write_bytes(b"")
    (samples / "cka.json").write_text(json.dumps({"step": 2}))
    found = read_pictures(tmp_path, read_attempts(tmp_path), last_step=6)
    told = {picture.key: (picture.step, picture.is_remade) for picture in found}
    # What training drew is drawn once for a step, what a command drew may be drawn again.
    assert told == {
        "samples": (4, False), "grid_seed_1": (4, True), "cka": (2, True), "affinity": (6, True),
    }  # fmt: skip
