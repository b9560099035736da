"""Encode pictures and captions as the numbers that shards store, and decode them.

The only module that knows diffusers and open_clip.
"""

import hashlib
import logging
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dtr_scale.data.manifest import Encoder, Manifest, one_line
from dtr_scale.errors import ConfigError
from dtr_scale.logs import telling

_QUIET_SECONDS = 2.0  # a hub out of reach is asked for half a minute


class PictureEncoder(Protocol):
    """Turns pictures into stored arrays, and says what a manifest must tell of them."""

    size: int
    """Of the square pictures that it takes."""
    encoding: Literal["pixels", "posterior"]
    shape: tuple[int, int, int]
    dtype: Literal["uint8", "float16"]
    scale_factor: float
    shift: float
    record: Encoder | None

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """Return stored arrays [N, ...] of pictures uint8 [N, C, size, size]."""
        ...

    def means(self, stored: np.ndarray) -> np.ndarray:
        """Return what x_start is made of without draws and mirrors, [N, C, H, W]."""
        ...

    def decode(self, x_start: Tensor) -> Tensor:
        """Return pictures [N, 3, size, size] in [-1, 1] of x_start [N, C, H, W]."""
        ...


class PixelEncoder(PictureEncoder):
    """Stores pictures as they are, or arrays of other channels than three."""

    encoding = "pixels"
    dtype = "uint8"
    shift = -1.0
    record = None

    def __init__(self, size: int, channels: int = 3, scale_factor: float = 1 / 127.5) -> None:
        self.size = size
        self.shape = (channels, size, size)
        self.scale_factor = scale_factor

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        return pictures

    def means(self, stored: np.ndarray) -> np.ndarray:
        return stored

    def decode(self, x_start: Tensor) -> Tensor:
        return x_start


class PosteriorEncoder(PictureEncoder):
    """An autoencoder of diffusers: mean and standard deviation of its posterior, both views.

    `name` is a hub's ("stabilityai/sd-vae-ft-ema") or a local folder. Stored are float16
    [2, 2, C, size/f, size/f]: for the picture and its mirror image, mean and deviation.
    """

    encoding = "posterior"
    dtype = "float16"

    def __init__(
        self, name: str, size: int | None, device: torch.device, *, local_only: bool = False
    ) -> None:
        """Without a `size` it decodes alone."""
        _must_exist_if_a_path(name)
        with _loading("the autoencoder", name, "a name of the hub, or a folder of save_pretrained"):
            from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

            # Safetensors alone: a pickle from a hub may run code.
            self._vae: Any = AutoencoderKL.from_pretrained(
                name, use_safetensors=True, low_cpu_mem_usage=False, local_files_only=local_only
            )
        config = self._vae.config
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        side = size or factor
        if side % factor:
            raise ConfigError(
                f"--size={side} is not accepted by {name}; give a multiple of {factor}"
            )
        self.size = side
        self.shape = (config["latent_channels"], side // factor, side // factor)
        self.scale_factor = float(config["scaling_factor"])
        # x_start = (stored - shift_factor) * scaling_factor. From 0.0: without a shift, a mere sign
        # would put -0.0 into the manifest.
        self.shift = 0.0 - self.scale_factor * float(config["shift_factor"] or 0.0)
        self._device = device
        self.record = Encoder(
            name=name, sha256=weights_sha256(self._vae.state_dict()), precision=_precision(device)
        )
        self._vae.requires_grad_(False).eval().to(device)

    @torch.inference_mode()
    def encode(self, pictures: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(pictures).to(self._device).float() / 127.5 - 1
        with _autocast(self._device):
            # The mirror image is encoded: the latent of it is no mirrored latent.
            posterior = self._vae.encode(torch.cat([x, x.flip(-1)])).latent_dist
        moments = torch.stack([posterior.mean, posterior.std], dim=1)  # [2N, 2, C, H, W]
        views = moments.unflatten(0, (2, len(pictures))).transpose(0, 1)  # [N, 2, 2, C, H, W]
        return views.half().cpu().numpy()

    def means(self, stored: np.ndarray) -> np.ndarray:
        # [N, 2, 2, C, H, W]: of the picture itself, the mean.
        return stored[:, 0, 0]

    @torch.inference_mode()
    def decode(self, x_start: Tensor) -> Tensor:
        latents = (x_start.to(self._device) - self.shift) / self.scale_factor
        with _autocast(self._device):
            # Eight pictures at a time bound the memory of the decoder.
            parts = [self._vae.decode(part).sample.float() for part in latents.split(8)]
        return torch.cat(parts).cpu()

    def save(self, folder: Path) -> None:
        """Write the autoencoder as `name` may be: a folder of save_pretrained."""
        self._vae.save_pretrained(folder)


def decoder_of(manifest: Manifest, vae: str | None, device: torch.device) -> PictureEncoder:
    """Return what decodes x_start: the encoder of the data, or the autoencoder `vae` in its place.

    ConfigError if it cannot be loaded; without a `vae` nothing is downloaded.
    """
    channels, height, _ = manifest.shape
    if manifest.encoding == "pixels":
        if vae is not None:
            raise ConfigError(f"--vae={vae} decodes latents, these are pixels; leave it out")
        return PixelEncoder(height)
    if vae is not None:
        return autoencoder(vae, channels, device)
    if manifest.encoder is None:
        raise ConfigError("the manifest names no encoder; give --vae NAME_OR_FOLDER")
    try:
        return autoencoder(manifest.encoder.name, channels, device, local_only=True)
    except ConfigError as error:
        raise ConfigError(f"{error}; give --vae NAME_OR_FOLDER") from None


def autoencoder(
    name: str, channels: int, device: torch.device, *, local_only: bool = False
) -> PosteriorEncoder:
    """Return an autoencoder to decode latents of so many channels; ConfigError if it has others."""
    found = PosteriorEncoder(name, None, device, local_only=local_only)
    if found.shape[0] != channels:
        raise ConfigError(
            f"--vae={name} decodes latents of {found.shape[0]} channels, these have {channels}; "
            "give the one that encoded them"
        )
    return found


class TextEncoder:
    """A text tower of open_clip: the last hidden states after the final norm, before pooling.

    As Stable Diffusion uses them. `name` is an architecture with `pretrained` weights (a tag of
    open_clip, or a file), or a local folder with open_clip_config.json and weights.
    """

    def __init__(self, name: str, pretrained: str, device: torch.device) -> None:
        local = Path(name).is_dir()
        known_as = name if local else f"{name}/{pretrained}"
        accepted = "a name and weights that open_clip lists, a file of weights, or a local folder"
        with _loading("the text encoder", known_as, accepted):
            import open_clip
            from open_clip.pretrained import get_pretrained_cfg

            full_name = f"local-dir:{name}" if local else name
            # OpenAI's weights want the activation they were trained with; open_clip only warns.
            tag = {} if local else get_pretrained_cfg(name, pretrained)
            if not (local or tag or Path(pretrained).is_file()):
                tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
                raise ValueError(f"{pretrained} is no file, and the known weights are: {tags}")
            model: Any = open_clip.create_model(
                full_name,
                pretrained=None if local else pretrained,
                require_pretrained=True,
                force_quick_gelu=bool(tag.get("quick_gelu")),
            )
            self._tokenizer = open_clip.get_tokenizer(full_name)
        if not isinstance(model, open_clip.CLIP):
            raise ConfigError(f"--text-encoder={name} is no plain CLIP; accepted: such as ViT-L-14")
        self._model: Any = model.requires_grad_(False).eval()
        # The tower of pictures would only take memory.
        del self._model.visual
        self._model.to(device)
        self._device = device
        self.context_shape: tuple[int, int] = tuple(self._model.positional_embedding.shape)
        # The record names what made the numbers, so it hashes no weights that were not used.
        used = ("token_embedding", "positional_embedding", "transformer", "ln_final")
        weights = {n: t for n, t in self._model.state_dict().items() if n.startswith(used)}
        self.record = Encoder(
            name=known_as, sha256=weights_sha256(weights), precision=_precision(device)
        )

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """Return the tokens of captions, float16 [N, L, D]."""
        model = self._model
        with _autocast(self._device):
            x = model.token_embedding(self.tokenize(captions).to(self._device))
            x = model.transformer(x + model.positional_embedding, attn_mask=model.attn_mask)
            return model.ln_final(x).half().cpu().numpy()

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Return token ids, int64 [N, L].

        Filled up with the end token, as Stable Diffusion's tokenizer does (open_clip's uses 0).
        """
        ids = self._tokenizer(list(captions))
        # The end token is the last of CLIP's vocabulary. What follows the first one is filling.
        end = self._model.vocab_size - 1
        ended = (ids == end).cumsum(dim=1) > 0
        return torch.where(ended, end, ids)


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """Return the hash of names, shapes, types and numbers, in whatever file they came."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _precision(device: torch.device) -> Literal["fp32", "bf16"]:
    return "bf16" if device.type == "cuda" else "fp32"


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=_precision(device) == "bf16")


def _must_exist_if_a_path(name: str) -> None:
    """Refuse what can be no name of the hub (ORGANISATION/NAME), and no folder is there."""
    if (name.startswith(("/", ".", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise ConfigError(
            f"the autoencoder {name!r} cannot be loaded: there is no such folder; "
            "accepted: a name of the hub, or a folder of save_pretrained"
        )


@contextmanager
def _loading(what: str, name: str, accepted: str) -> Iterator[None]:
    """Turn whatever a library raises while it loads a network into one line.

    Libraries log their failures too, and warn of what they call in each other: both are silenced.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), telling(f"loading {what} {name!r}", _QUIET_SECONDS):
            warnings.simplefilter("ignore")
            yield
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{what} needs {error.name}, which is missing; fix: pip install dtr-scale[prepare]"
        ) from error
    except Exception as error:  # hubs, files and formats fail in many ways
        reason = textwrap.shorten(one_line(error), 240)
        if isinstance(error, OSError) and name.count("/") == 1 and not Path(name).exists():
            # The hub's libraries tell of a missing config.json where nothing was found at all.
            reason = "it is not in the cache, and the hub is out of reach or does not have it"
        raise ConfigError(
            f"{what} {name!r} cannot be loaded ({reason}); accepted: {accepted}"
        ) from error
    finally:
        logging.disable(disabled)
