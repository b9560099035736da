"""Name, check and write the files of samples: arrays, a grid, single pictures, their manifest."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dtr_scale.errors import ConfigError
from dtr_scale.evaluation.grid import num_shown, save_level_grid
from dtr_scale.evaluation.pictures import ARRAY, rgb, write_npz, write_pngs
from dtr_scale.evaluation.stored import StoredBatches, differences
from dtr_scale.jobs.drawing import Drawing, checked
from dtr_scale.jobs.ranks import Ranks
from dtr_scale.jobs.trained import check_output
from dtr_scale.storage.folder import open_folder
from dtr_scale.storage.local import replacing

_SINGLE = re.compile(r"\d{6,}\.png")  # of `write_pngs`
_LONGEST_NAME = 100


class Asked(NamedTuple):
    """The files that a user asks for."""

    out: Path | None = None
    """An .npz or a .png; None: a name that tells the step, in the run."""
    folder: Path | None = None
    """For a PNG of each sample."""
    latents: bool = False
    force: bool = False
    """Overwrite what is finished."""

    @property
    def needs_pictures(self) -> bool:
        return (self.out is not None and not self.latents) or self.folder is not None

    def check(self, guidance: Sequence[float]) -> None:
        """Raise ConfigError for what cannot be written, before samples are drawn."""
        out, folder = self.out, self.folder
        if out is not None:
            if out.suffix not in (".png", ".npz"):
                raise ConfigError(
                    f"--out={out} is not accepted; give a file that ends in .npz or .png"
                )
            check_output(out, out.suffix)
        if self.latents and (folder is not None or (out is not None and out.suffix != ".npz")):
            raise ConfigError("--latents are no pictures; give --out FILE.npz, and no --folder")
        if guidance and (self.latents or folder is not None or (out and out.suffix != ".png")):
            raise ConfigError(
                "--guidance makes one sheet; give --out FILE.png or none, and neither --folder "
                "nor --latents"
            )
        if folder is not None and folder.exists() and not self._may_replace(folder):
            fix = "a folder with nothing but samples in it" if self.force else "--force"
            raise ConfigError(
                f"--folder={folder} is there and not empty; give a new folder, or {fix}"
            )

    def _may_replace(self, folder: Path) -> bool:
        if not folder.is_dir():
            return False
        names = [path.name for path in folder.iterdir()]
        # By force as well, nothing but samples is removed.
        return not names or (self.force and all(_SINGLE.fullmatch(name) for name in names))

    def is_finished(self, path: Path, manifest: dict[str, Any]) -> bool:
        """Tell whether all that is asked for is there; ConfigError where `path` is of others."""
        if self.force or not path.exists():
            return False
        try:
            found = json.loads(path.with_suffix(".json").read_bytes())
            differing = differences(found, json.loads(json.dumps(manifest)))
        except (OSError, ValueError, AttributeError):
            differing = "what it was made with is not known"
        if differing:
            raise ConfigError(
                f"{path} is finished, and of other settings: {differing}; give --out another "
                "name, or --force to overwrite it"
            )
        return self.folder is None


def default_name(kind: str, step: int, told: Sequence[str]) -> str:
    """Return the name of a file without its ending, which tells the step and what was asked for."""
    # MLflow shows step_N_KIND as a picture KIND of step N.
    name = "_".join([f"step_{step:08d}", kind, *told])
    return re.sub(r"\W+", "_", name)[:_LONGEST_NAME].rstrip("_")


def write_files(
    drawing: Drawing,
    stored: StoredBatches,
    path: Path,
    folder: Path | None,
    manifest: dict[str, Any],
    ranks: Ranks,
) -> None:
    """Write all files whole or not at all, then remove the stored batches."""
    if path.suffix == ".npz":
        _write_arrays(drawing, stored, path, ranks)
    if drawing.decoder is not None:
        _write_grid(drawing, stored, path.with_suffix(".png"), is_all=path.suffix == ".png")
    if folder is not None:
        _write_folder(folder, stored, ranks)
    # Last: it tells that the others are finished.
    content = json.dumps(manifest, indent=2) + "\n"
    open_folder(path.parent).write_bytes(path.with_suffix(".json").name, content.encode())
    stored.remove()


def _write_arrays(drawing: Drawing, stored: StoredBatches, path: Path, ranks: Ranks) -> None:
    count, labels = stored.num_samples, None
    if drawing.run.network.conditioning == "class" and drawing.conditions.of_samples:
        labels = drawing.conditions.of_samples(range(count)).numpy()
    shape = next(iter(stored)).shape[1:]
    batches = checked(stored, ranks)
    with replacing(path) as temporary, temporary.open("wb") as file:
        if drawing.decoder is None:
            write_npz(file, batches, (count, *shape), "float32", labels, name="latents")
        else:
            pictures = (rgb(batch) for batch in batches)
            write_npz(file, pictures, (count, *shape[:2], 3), "uint8", labels, name=ARRAY)
        file.flush()
        os.fsync(file.fileno())


def _write_grid(drawing: Drawing, stored: StoredBatches, path: Path, *, is_all: bool) -> None:
    titles, shown = drawing.conditions.titles, stored.num_samples
    if not is_all:  # an .npz may hold 50,000
        shown = num_shown(next(iter(stored)).shape[1], titles.period if titles else 0)
    levels = torch.from_numpy(stored.first(shown)).permute(0, 3, 1, 2)
    rows = [f"cfg {scale:g}" for scale in drawing.guidance]
    with replacing(path) as temporary, temporary.open("wb") as file:
        save_level_grid(file, levels, titles=titles, rows=rows)


def _write_folder(folder: Path, stored: StoredBatches, ranks: Ranks) -> None:
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_pngs(unfinished, checked(stored, ranks))
    if folder.exists():
        for path in folder.iterdir():  # samples, as was looked at first
            path.unlink()
        folder.rmdir()
    unfinished.rename(folder)
