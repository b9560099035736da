"""Write averaged weights of a run, or official ones, as a file or for diffusers."""

import json
from pathlib import Path
from typing import Literal

from dtr_scale.checkpoint.convert import Kind, from_official, official_config, unwrapped
from dtr_scale.checkpoint.export import export_diffusers, export_dit
from dtr_scale.checkpoint.weights import read_weights, write_safetensors
from dtr_scale.config.load import resolved
from dtr_scale.jobs.averages import Averaged, Choice, find_average
from dtr_scale.jobs.trained import check_output

Target = Literal["safetensors", "diffusers", "official"]


def export_run(
    place: str,
    target: Target,
    out: Path,
    *,
    ema: str | None = None,
    sigma_rel: float | None = None,
    step: int | None = None,
) -> str:
    """Write an average of a run's weights, and return it in words.

    `ema` is the decay of an average that the run keeps ("0.9999", "power_0.05"; by default the one
    that samples are drawn with), or "none" for the weights themselves; with `sigma_rel` a
    power-function average of that width is made of the stored ones. `step` is the checkpoint's, by
    default the newest whole one's: damaged ones are named and passed over.

    "safetensors" has our names, for the network of `build_model(model, num_timesteps)` of the
    config in the file's header; "official" has those of DiT or DTR, and "diffusers" is a folder.
    Raises ConfigError for an average or a step that is not there, and for a network that the
    target cannot hold.
    """
    check_output(out, "" if target == "diffusers" else ".safetensors")
    found = find_average(place, Choice(ema, sigma_rel, step))
    model = found.experiment.model.model_dump(exclude_none=True)
    header = _header(found)
    match target:
        case "safetensors":
            write_safetensors(found.weights, out, header)
        case "official":
            num_timesteps = found.experiment.diffusion.num_timesteps
            export_dit(found.weights, model, out, num_timesteps, header)
        case "diffusers":
            export_diffusers(found.weights, model, out, header)
    return found.average


def convert_file(
    source: Path,
    kind: Kind,
    target: Literal["safetensors", "diffusers"],
    out: Path,
    num_heads: int | None = None,
) -> None:
    """Convert a file of official weights, the averaged ones if it has any.

    "safetensors" writes the file `out` with the official names and masks, in fp32, "diffusers" the
    folder `out`. Errors: those of `read_weights`, `from_official` and `export_diffusers`.
    """
    check_output(out, "" if target == "diffusers" else ".safetensors")
    official = read_weights(source)
    weights = from_official(official, kind)
    if target == "safetensors":
        write_safetensors(unwrapped(official), out)
    else:
        config = {"type": "adm"} if kind == "adm" else official_config(official, kind, num_heads)
        export_diffusers(weights, config, out)


def _header(found: Averaged) -> dict[str, str]:
    """Return what a file of weights says of itself, as safetensors' metadata."""
    meta, config = found.readers[0].meta, resolved(found.experiment)
    return {
        "config": json.dumps(config),
        "step": str(meta["step"]),
        "average": found.average,
        "run": config["run_dir"],
        "checkpoint": found.readers[0].url,
        "dtr_scale": meta["version"],
    }
