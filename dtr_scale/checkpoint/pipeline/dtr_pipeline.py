"""Draw pictures by a diffusion transformer with task routing, for diffusers.

Written by dtr-scale; licensed under the Apache License 2.0.
"""

import inspect
import json
import shutil
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class DTRPipeline(DiffusionPipeline):
    """From class labels, or from the tokens of texts, to pictures.

    Latents are decoded by `vae`; without one, by the autoencoder `vae_name` of the hub, which is
    fetched when it is first needed; where both are None samples are pixels. `id2label` maps labels
    to names. `guidance_scale`, `guidance_channels` (None: all), `guidance_interval` (None: all
    timesteps) and `num_inference_steps` are those of the training's own evaluation.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012  diffusers' own form
    transformer: Any  # what `register_modules` sets
    scheduler: Any
    vae: Any

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        vae_name: str | None = None,
        id2label: dict[str, str] | None = None,
        guidance_scale: float = 1.0,
        guidance_channels: int | None = None,
        guidance_interval: Sequence[int] | None = None,
        num_inference_steps: int | str = 250,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(
            vae_name=vae_name,
            id2label=id2label,
            guidance_scale=guidance_scale,
            guidance_channels=guidance_channels,
            guidance_interval=guidance_interval,
            num_inference_steps=num_inference_steps,
        )
        self.labels = {name: int(label) for label, name in (id2label or {}).items()}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str] | Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        num_images: int = 1,
        num_inference_steps: int | str | None = None,
        guidance_scale: float | None = None,
        guidance_channels: int | None = None,
        guidance_interval: Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        step_noise: Sequence[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Return one picture per label, a number or a name, or per text, or `num_images` of none.

        `prompt_embeds` [N, context_length, context_dim] are texts as the training's encoder makes
        them, which the model card names.

        What is not given is as the training's evaluation had it. `latents` [N, C, H, W] is the
        noise to begin with and `step_noise[i]` that of the i-th step, else `generator` draws them.
        `output_type` is "pil", "np", "pt" ([N, C, H, W] in [0, 1]) or "latent" (x_0 as it is).
        """
        network = self.transformer
        device = self._execution_device
        y = self._conditions(class_labels, prompt_embeds, num_images).to(device)
        shape = (len(y), network.config.in_channels, *[network.config.sample_size] * 2)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents are {list(latents.shape)}, {list(shape)} are wanted")
        x = latents.to(device, torch.float32)
        guidance = self._guidance(guidance_scale, guidance_channels, guidance_interval)
        self.scheduler.set_timesteps(
            num_inference_steps or self.config["num_inference_steps"], device=device
        )
        x = x * self.scheduler.init_noise_sigma
        bar: Any = self.progress_bar
        for i, t in enumerate(bar(self.scheduler.timesteps)):
            output = self._predict(self.scheduler.scale_model_input(x, t), t, y, *guidance)
            given: dict[str, Any] = {"generator": generator}
            if step_noise is not None and i < len(step_noise):
                given["variance_noise"] = step_noise[i]
            x = self._step(output, t, x, given)
        images = self._images(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def get_label_ids(self, names: Sequence[str]) -> list[int]:
        """Return the numbers of classes by their names."""
        if unknown := [name for name in names if name not in self.labels]:
            raise ValueError(f"unknown classes {unknown}; give some of {sorted(self.labels)}")
        return [self.labels[name] for name in names]

    # diffusers' own takes its options by position as well.
    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        save_directory: str | PathLike[str],
        **options: Any,  # noqa: ANN401
    ) -> None:
        """Save as diffusers does, with the code of this pipeline and its components."""
        if options.pop("push_to_hub", False):
            raise ValueError("push_to_hub is not accepted; save, then `hf upload NAME FOLDER`")
        super().save_pretrained(save_directory, **options)
        folder = Path(save_directory)
        index = json.loads((folder / self.config_name).read_text(encoding="utf-8"))
        index["_class_name"] = _copied(type(self), folder)
        for name, component in self.components.items():
            # Others are classes of diffusers.
            if type(component).__module__.startswith(type(self).__module__.rpartition(".")[0]):
                index[name] = _copied(type(component), folder / name)
        (folder / self.config_name).write_text(json.dumps(index, indent=2), encoding="utf-8")

    def _conditions(
        self,
        labels: Sequence[int | str] | Tensor | None,
        prompt_embeds: Tensor | None,
        num_images: int,
    ) -> Tensor:
        config = self.transformer.config
        if config.context_dim is None:
            if prompt_embeds is not None:
                raise ValueError("prompt_embeds are for models of texts; give class_labels")
            return self._labels(labels, num_images)
        wanted = (config.context_length, config.context_dim)
        if labels is not None or prompt_embeds is None or prompt_embeds.shape[1:] != wanted:
            raise ValueError(
                f"this model draws texts; give prompt_embeds [N, {wanted[0]}, {wanted[1]}]"
            )
        return prompt_embeds

    def _labels(self, given: Sequence[int | str] | Tensor | None, num_images: int) -> Tensor:
        num_classes = self.transformer.config.num_classes
        if given is None and num_classes > 1:
            raise ValueError(f"class_labels are missing; give numbers of 0 to {num_classes - 1}")
        if given is None:
            return torch.zeros(num_images, dtype=torch.int64)
        known = [self.get_label_ids([y])[0] if isinstance(y, str) else int(y) for y in given]
        if odd := [label for label in known if not 0 <= label < num_classes]:
            raise ValueError(f"class_labels {odd} do not exist; give 0 to {num_classes - 1}")
        return torch.tensor(known)

    def _guidance(
        self, scale: float | None, channels: int | None, interval: Sequence[int] | None
    ) -> tuple[float, int, Sequence[float]]:
        network, config = self.transformer.config, self.config
        scale = float(config["guidance_scale"] if scale is None else scale)
        if scale != 1.0 and not network.has_null_label:
            raise ValueError(f"guidance_scale {scale}: the network knows no null label; give 1.0")
        channels = int(channels or config["guidance_channels"] or network.in_channels)
        if not 1 <= channels <= network.in_channels:
            raise ValueError(f"guidance_channels {channels}: give 1 to {network.in_channels}")
        interval = interval or config["guidance_interval"]
        return scale, channels, interval or (0, float("inf"))

    def _predict(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        scale: float,
        channels: int,
        interval: Sequence[float],
    ) -> Tensor:
        """Return the network's output, guided in the first `channels` of the noise."""
        # One timestep for the batch, which shares one mask.
        timestep = t.reshape(1).to(x.device)
        if scale == 1.0 or not interval[0] <= int(t) < interval[1]:
            return self.transformer(x, timestep, y).sample.float()
        null = self.transformer.null_context
        if null is None:
            null = torch.full_like(y, self.transformer.config.num_classes)
        conditions = torch.cat([y, null.expand_as(y).to(y)])
        both = self.transformer(torch.cat([x, x]), timestep, conditions).sample.float()
        conditional, null = both.chunk(2)
        eps, eps_null = conditional[:, :channels], null[:, :channels]
        return torch.cat([eps_null + scale * (eps - eps_null), conditional[:, channels:]], dim=1)

    def _step(self, output: Tensor, t: Tensor, x: Tensor, given: dict[str, Any]) -> Tensor:
        scheduler = self.scheduler
        # Schedulers of diffusers take the predicted noise alone, and not all take one's own noise.
        # By the signature: a config keeps what it was made from.
        if "learn_sigma" not in inspect.signature(type(scheduler).__init__).parameters:
            output = output[:, : x.shape[1]]
        accepted = inspect.signature(scheduler.step).parameters
        if "variance_noise" in given and "variance_noise" not in accepted:
            raise ValueError(f"{type(scheduler).__name__} takes no step_noise; leave it out")
        known = {name: value for name, value in given.items() if name in accepted}
        return scheduler.step(output, t, x, **known).prev_sample

    def _images(self, x: Tensor, output_type: str) -> Any:  # noqa: ANN401
        if output_type == "latent":
            return x
        pictures = (self._decoded(x) / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return pictures
        arrays = pictures.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(arrays) if output_type == "pil" else arrays

    def _decoded(self, x: Tensor) -> Tensor:
        if self.vae is None and self.config["vae_name"] is None:
            return x
        vae: Any = self.vae
        if vae is None:
            vae = AutoencoderKL.from_pretrained(self.config["vae_name"])
            self.register_modules(vae=vae)
            vae.to(device=x.device)
        settings = vae.config
        x = x / settings["scaling_factor"] + (settings["shift_factor"] or 0.0)
        # Eight at a time bound the memory of the decoder.
        return torch.cat([vae.decode(part).sample for part in x.to(vae.dtype).split(8)])


def _copied(component: type, folder: Path) -> list[str]:
    """Copy the file that defines a class, and return the class as model_index.json names it."""
    source = Path(inspect.getfile(component))
    shutil.copyfile(source, folder / source.name)
    return [source.stem, component.__name__]
