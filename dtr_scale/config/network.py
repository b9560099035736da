"""Define the `model` section of an experiment: the network and its routing."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from dtr_scale.config.fields import (
    Count,
    Fraction,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
    refuse,
)

# Repeated from models/dit.py, as the routing types below are from models/routing.py: those files
# load torch, and commands that only read an experiment answer without it.
VARIANT_SIZES = ("S", "B", "L", "XL")
VARIANT_PATCHES = (2, 4, 8)


def _variant_name(variant: str | None) -> str | None:
    names = [f"DiT-{size}/{patch}" for size in VARIANT_SIZES for patch in VARIANT_PATCHES]
    if variant is not None and variant not in names:
        raise PydanticCustomError("variant", "accepted are {names}", {"names": ", ".join(names)})
    return variant


class RoutingConfig(Section):
    type: Literal["none", "dtr", "dtr_eq4", "cdtr", "ercddt", "random", "max_roaming"] = "none"
    """`dtr` is the official code's window, `dtr_eq4` equation 4's, `random` R-TR, `none` no masks;
    `cdtr`, `ercddt` and `max_roaming` are the alternatives of appendix F."""
    alpha: PositiveFloat = 4.0
    """How the window's shift is spread over timesteps; above 1, more of it at high noise."""
    beta: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    """Share of the channels that each timestep sees."""
    num_clusters: PositiveInt = 8
    """Clusters of timesteps that share a mask (cdtr, ercddt)."""
    seed: Seed = 0
    """Of the masks of random and max_roaming."""
    update_every_steps: PositiveInt = 500
    """Training steps between two changes of max_roaming's masks."""

    # Before, since afterwards the default of `type` cannot be told from one that was given.
    @model_validator(mode="before")
    @classmethod
    def _has_type(cls, section: Any) -> Any:  # noqa: ANN401
        if isinstance(section, dict) and "type" not in section:
            given = ", ".join(f"{key} = {json.dumps(value)}" for key, value in section.items())
            effect = f", with which {given} would have no effect" if given else ""
            raise refuse(
                f"model.routing.type is missing{effect}; give "
                'model.routing.type = "dtr" (or another routing), or "none" to train without'
            )
        return section


class NetworkConfig(Section):
    """What all networks have."""

    in_channels: PositiveInt = 4
    """Channels of a sample: 4 of latents, 3 of colour pictures."""
    num_classes: PositiveInt = 1000
    """Classes of the data; labels are 0 to num_classes - 1."""
    learn_sigma: bool = True
    """Learn the variance of each step as well (improved DDPM); doubles the output's channels."""
    attention: Literal["auto", "xformers", "sdpa", "cudnn"] = "auto"
    """auto: the fastest on this GPU, which training measures. sdpa is PyTorch's own choice."""
    num_experts: PositiveInt = 1
    """Networks of equal intervals of the timesteps (multi-experts); 1: one for all."""
    expert: Count | None = None
    """Train this expert alone (0 to num_experts - 1); null: all of them together."""
    routing: RoutingConfig = RoutingConfig(type="none")

    @model_validator(mode="after")
    def _expert_exists(self) -> Self:
        if self.expert is not None and not self.expert < self.num_experts:
            raise refuse(
                f"model.expert = {self.expert} is none of model.num_experts = {self.num_experts}; "
                f"choose 0 to {self.num_experts - 1}, or null for all together"
            )
        return self


class DitConfig(NetworkConfig):
    type: Literal["dit"]
    """A diffusion transformer."""
    variant: Annotated[str | None, AfterValidator(_variant_name)] = None
    """`DiT-S/2` to `DiT-XL/8`; or give hidden_size, depth, num_heads and patch_size instead."""
    hidden_size: PositiveInt | None = None
    """Width of a token; a multiple of num_heads and of 4."""
    depth: PositiveInt | None = None
    """How many blocks."""
    num_heads: PositiveInt | None = None
    """Attention heads of a block."""
    patch_size: PositiveInt | None = None
    """Side of the square that becomes a token; divides input_size."""
    input_size: PositiveInt = 32
    """Height and width of a sample (latents of a 256x256 picture: 32)."""
    conditioning: Literal["class", "none", "text"] = "class"
    """What steers samples: a class, nothing, or the tokens of a caption."""
    class_dropout_prob: Fraction = 0.1
    """How often a label or text is dropped in training, for guidance."""
    qk_norm: bool = False
    """Normalise queries and keys (RMSNorm with a learned scale): attention that cannot overflow,
    against NaN after many steps in bf16. Official weights have none."""
    context_length: PositiveInt = 77
    """Tokens of a text (CLIP: 77)."""
    context_dim: PositiveInt = 768
    """Width of a text token (CLIP ViT-L/14: 768)."""

    @property
    def title(self) -> str:
        return self.variant or f"DiT {self.hidden_size}x{self.depth}"

    @property
    def num_tokens(self) -> int:
        """Tokens of a sample."""
        return (self.input_size // (self._patch or 1)) ** 2

    @property
    def _patch(self) -> int | None:
        return int(self.variant.split("/")[1]) if self.variant else self.patch_size

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        free = {k: getattr(self, k) for k in ("hidden_size", "depth", "num_heads", "patch_size")}
        given = [k for k, v in free.items() if v is not None]
        missing = [k for k, v in free.items() if v is None]
        if self.variant and given:
            raise refuse(
                f"model.variant = {self.variant!r} and model.{given[0]} = {free[given[0]]} exclude "
                f"each other; remove one (a variant sets {', '.join(free)})"
            )
        if not self.variant and missing:
            raise refuse(
                f"model.{missing[0]} is missing; set model.variant (for example 'DiT-L/2') "
                f"or all of {', '.join(free)}"
            )
        if self.hidden_size and self.num_heads and self.hidden_size % self.num_heads:
            raise refuse(
                f"model.hidden_size = {self.hidden_size} is not divisible by "
                f"model.num_heads = {self.num_heads}; choose a multiple of {self.num_heads}"
            )
        if self.hidden_size and self.hidden_size % 4:
            raise refuse(
                f"model.hidden_size = {self.hidden_size}: give a multiple of 4 "
                "(sine and cosine positions for two axes)"
            )
        patch = self._patch
        if patch and self.input_size % patch:
            raise refuse(
                f"model.input_size = {self.input_size} is not divisible by the patch size {patch}; "
                f"choose a multiple of {patch} or another patch size"
            )
        return self


class AdmConfig(NetworkConfig):
    """guided-diffusion's U-Net; its argument names."""

    type: Literal["adm"]
    """guided-diffusion's U-Net."""
    image_size: PositiveInt = 64
    """Height and width of a sample."""
    in_channels: PositiveInt = 3
    """Channels of a sample: 3 of colour pictures."""
    model_channels: PositiveInt
    """Channels of the first level; each level has channel_mult times as many."""
    num_res_blocks: PositiveInt
    """Residual blocks of each level."""
    attention_resolutions: list[PositiveInt]
    """Downsampling rates at which there is attention."""
    channel_mult: Annotated[list[PositiveInt | PositiveFloat], Field(min_length=1)] = Field(
        default=[1, 2, 4, 8]
    )
    """Width of each level, in model_channels."""
    num_heads: PositiveInt = 1
    """Attention heads where num_head_channels says nothing."""
    num_head_channels: PositiveInt | Literal[-1] | None = None
    """Width of an attention head; null or -1: num_heads heads of any width."""
    use_scale_shift_norm: bool = False
    """Let the timestep scale and shift each norm (adaptive group norm)."""
    resblock_updown: bool = False
    """Change the resolution by residual blocks."""
    conv_resample: bool = True
    """Change it by convolutions, where resblock_updown is false."""
    use_new_attention_order: bool = False
    """Order of query, key and value in the weights: by kind, or by head (false)."""
    conditioning: Literal["class", "none"] = "class"
    """What steers samples: a class, or nothing."""
    class_dropout_prob: Fraction = 0.0
    """How often a label is dropped in training, for guidance."""

    @property
    def input_size(self) -> int:
        return self.image_size

    @property
    def title(self) -> str:
        return f"ADM {self.image_size}x{self.image_size}, {self.model_channels} channels"


ModelConfig = Annotated[DitConfig | AdmConfig, Field(discriminator="type")]
