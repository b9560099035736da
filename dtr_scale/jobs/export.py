"""Write averaged weights of a run, or official ones, as a file or as a pipeline for diffusers."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dtr_scale.checkpoint.convert import Kind, from_official, official_config, unwrapped
from dtr_scale.checkpoint.export import export_dit
from dtr_scale.checkpoint.hub import check_hub_name, push_folder
from dtr_scale.checkpoint.pipeline_folder import PipelineSettings, write_pipeline
from dtr_scale.checkpoint.pipeline_network import check_pipeline
from dtr_scale.checkpoint.weights import read_weights, write_safetensors
from dtr_scale.config.load import resolved
from dtr_scale.config.schema import Experiment
from dtr_scale.data.manifest import Manifest
from dtr_scale.diffusion.schedule import beta_schedule
from dtr_scale.errors import ConfigError, DataError
from dtr_scale.evaluation.report import EVALUATIONS
from dtr_scale.jobs.averages import Averaged, Choice, find_average
from dtr_scale.jobs.build import build_network, open_samples
from dtr_scale.jobs.model_card import card, run_card
from dtr_scale.jobs.network import build_model
from dtr_scale.jobs.recorded import read_evaluations
from dtr_scale.jobs.trained import check_output
from dtr_scale.prepare.encode import decoder_of

log = logging.getLogger(__name__)

Target = Literal["safetensors", "diffusers", "official"]

_OFFICIAL_VAE = "stabilityai/sd-vae-ft-ema"
"""What the official trainings of DiT and DTR encode ImageNet by."""


class _Autoencoder(NamedTuple):
    """What decodes a pipeline's samples: a copy, a name of the hub, or nothing for pixels."""

    told: str
    name: str | None = None
    save: Callable[[Path], object] | None = None


def export_run(
    place: str,
    target: Target,
    out: Path,
    *,
    ema: str | None = None,
    sigma_rel: float | None = None,
    step: int | None = None,
    vae: str | None = None,
    push: str | None = None,
) -> list[str]:
    """Write an average of a run's weights, and return what was written, in words.

    `ema` is the decay of an average that the run keeps ("0.9999", "power_0.05"; by default the one
    that samples are drawn with), or "none" for the weights themselves; with `sigma_rel` a
    power-function average of that width is made of the stored ones. `step` is the checkpoint's, by
    default the newest whole one's: damaged ones are named and passed over.

    "safetensors" has our names, for the network of `build_model(model, num_timesteps)` of the
    config in the file's header; "official" has those of DiT or DTR. "diffusers" is the folder of a
    pipeline, with the autoencoder that made the data or `vae`; it is uploaded as `push` to the hub
    where a token is there. Raises ConfigError for an average or a step that is not there, and for a
    network that the target cannot hold.
    """
    _check(target, out, vae, push)
    found = find_average(place, Choice(ema, sigma_rel, step))
    told = [f"average: {found.average}"]
    match target:
        case "safetensors":
            header = {"layout": "dtr_scale.build_model", **_header(found)}
            write_safetensors(found.weights, out, header)
        case "official":
            model = found.experiment.model.model_dump(exclude_none=True)
            num_timesteps = found.experiment.diffusion.num_timesteps
            routed = found.experiment.model.routing.type != "none"
            header = {"layout": "byeongjun-park/DTR" if routed else "facebookresearch/DiT"}
            export_dit(found.weights, model, out, num_timesteps, header | _header(found))
        case "diffusers":
            told += _export_pipeline(found, Path(place), out, vae)
    return [*told, *(_pushed(out, push) if push else [])]


def convert_file(
    source: Path,
    kind: Kind,
    target: Literal["safetensors", "diffusers"],
    out: Path,
    num_heads: int | None = None,
) -> list[str]:
    """Convert a file of official weights, the averaged ones if it has any.

    "safetensors" writes the file `out` with the official names and masks, in fp32; "diffusers" the
    folder of a pipeline `out`, with the schedule and guidance of the official code. Returns what
    was written, in words. Errors: those of `read_weights`, `from_official` and `write_pipeline`.
    """
    _check(target, out)
    official = read_weights(source)
    header = {"layout": _LAYOUTS[kind], "source": source.name}
    if target == "safetensors":
        from_official(official, kind)  # refuses what is not of this kind
        write_safetensors(unwrapped(official), out, header)
        return []
    weights = from_official(official, kind)
    if kind == "adm":
        raise ConfigError("model.type: 'adm' has no pipeline; convert it to safetensors")
    section = official_config(official, kind, num_heads)
    network = build_model(section)
    network.load_state_dict(weights)
    # The schedule and guided channels of their code; both guide by 1.5 in 250 steps for FID.
    schedule, guided = ("linear", 3) if kind == "dit" else ("cosine", None)
    is_latent = network.in_channels == 4
    settings = PipelineSettings(
        betas=beta_schedule(schedule, 1000).tolist(),
        sampler="ddpm",
        num_sampling_steps=250,
        cfg_scale=1.5 if network.class_dropout_prob > 0 else 1.0,
        cfg_channels=guided if is_latent else None,
        vae_name=_OFFICIAL_VAE if is_latent else None,
    )
    summary = f"The weights of `{source.name}`, of {_LAYOUTS[kind]}."
    told = {"noise schedule": f"{schedule}, 1000 timesteps"}
    text = card(
        source.stem, summary, told, data="As published.", figures="As published.",
        call="class_labels=[0, 1]" if network.conditioning == "class" else "num_images=2",
    )  # fmt: skip
    write_pipeline(network, section, out, settings, card=text, header=header)
    return _loading(out)


_LAYOUTS: dict[Kind, str] = {
    "dit": "facebookresearch/DiT",
    "dtr": "byeongjun-park/DTR",
    "adm": "openai/guided-diffusion",
}


def _check(target: Target, out: Path, vae: str | None = None, push: str | None = None) -> None:
    """Raise ConfigError for what cannot be written, before anything is read."""
    if target == "diffusers":
        check_output(out, "")
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"--out={out} is there and not empty; give a new folder")
    else:
        check_output(out, ".safetensors")
        for option, value in ("--vae", vae), ("--push", push):
            if value is not None:
                raise ConfigError(f"{option}={value} is for --to diffusers; leave it out")
    if push is not None:
        check_hub_name(push)


def _export_pipeline(found: Averaged, place: Path, out: Path, vae: str | None) -> list[str]:
    experiment, meta = found.experiment, found.readers[0].meta
    if experiment.model.expert is not None:
        raise ConfigError(
            f"expert {experiment.model.expert} of {experiment.model.num_experts} cannot sample "
            "alone; export it to safetensors"
        )
    network = build_network(experiment)
    check_pipeline(network)
    network.load_state_dict(found.weights)
    manifest, null_context = _data(experiment)
    autoencoder = _autoencoder(experiment, manifest, vae)
    write_pipeline(
        network,
        experiment.model.model_dump(),
        out,
        _settings(experiment, manifest, autoencoder),
        card=run_card(
            experiment,
            meta,
            found.average,
            manifest,
            read_evaluations(_run_of(place) / EVALUATIONS),
        ),
        header=_header(found),
        mask_step=max(meta["step"] - 1, 0),  # the masks that were trained last
        save_vae=autoencoder.save,
        null_context=null_context,
    )
    return [f"decoder: {autoencoder.told}", *_loading(out)]


def _settings(
    experiment: Experiment, manifest: Manifest | None, autoencoder: _Autoencoder
) -> PipelineSettings:
    evaluation, diffusion = experiment.evaluation, experiment.diffusion
    names = manifest.class_names if manifest else ()
    return PipelineSettings(
        betas=beta_schedule(diffusion.noise_schedule, diffusion.num_timesteps).tolist(),
        sampler=evaluation.sampler,
        num_sampling_steps=evaluation.num_sampling_steps,
        eta=evaluation.eta,
        clip_denoised=evaluation.clip_denoised,
        cfg_scale=evaluation.cfg_scale,
        cfg_channels=evaluation.cfg_channels,
        cfg_interval=evaluation.cfg_interval,
        id2label=dict(enumerate(names)),
        vae_name=autoencoder.name,
    )


def _run_of(place: Path) -> Path:
    """Return the run directory of a run or of a step_* folder in its checkpoints."""
    return place.parent.parent if place.name.startswith("step_") else place


def _data(experiment: Experiment) -> tuple[Manifest | None, Tensor | None]:
    """Return what describes a run's data, and the text that stands for none.

    None where the data is made up or cannot be read, and without texts; ConfigError for texts that
    cannot be read.
    """
    has_texts = experiment.model.conditioning == "text"
    try:
        samples = open_samples(experiment)
        null_context = torch.from_numpy(samples.null_condition()) if has_texts else None
    except DataError as error:
        if has_texts:
            raise ConfigError(
                f"the empty text is not known without the data ({error}); bring data.shards back"
            ) from None
        log.warning("the data is not described: %s", error)
        return None, None
    samples.close()
    return None if experiment.data.type == "synthetic" else samples.manifest, null_context


def _autoencoder(
    experiment: Experiment, manifest: Manifest | None, vae: str | None
) -> _Autoencoder:
    """Return what decodes a run's samples; ConfigError where that is not known."""
    vae = vae or experiment.evaluation.vae
    if manifest is None:
        if vae is None and experiment.data.type != "synthetic":
            raise ConfigError(
                "what decodes this run's samples is not known without its data; give --vae "
                "NAME_OR_FOLDER, or bring data.shards back"
            )
        return _Autoencoder("none, samples are pixels") if vae is None else _Autoencoder(vae, vae)
    if manifest.encoding == "pixels":
        if vae is not None:
            raise ConfigError(f"--vae={vae} decodes latents, these are pixels; leave it out")
        return _Autoencoder("none, samples are pixels")
    encoder = manifest.encoder
    try:
        decoder: Any = decoder_of(manifest, vae, torch.device("cpu"))
    except ConfigError:
        if vae is not None or encoder is None or Path(encoder.name).is_absolute():
            raise
        return _Autoencoder(f"{encoder.name}, fetched from the hub when needed", encoder.name)
    if vae is None and encoder and decoder.record.sha256 != encoder.sha256:
        raise ConfigError(
            f"{encoder.name} has weights {decoder.record.sha256[:12]}, the data was encoded with "
            f"{encoder.sha256[:12]}; give those by --vae NAME_OR_FOLDER"
        )
    return _Autoencoder(f"a copy of {decoder.record.name}", save=decoder.save)


def _loading(out: Path) -> list[str]:
    load = f'DiffusionPipeline.from_pretrained("{out}", trust_remote_code=True)'
    return [f"load it: {load}"]


def _pushed(out: Path, name: str) -> list[str]:
    if address := push_folder(out, name):
        return [f"pushed: {address}"]
    return [
        f"not pushed: there is no token of the hub (HF_TOKEN, or `hf auth login`); with one: "
        f"hf upload {name} {out}"
    ]


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
