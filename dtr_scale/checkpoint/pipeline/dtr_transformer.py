"""Compute a diffusion transformer (Peebles & Xie, 2023) with task routing, for diffusers.

Denoising Task Routing (Park et al., ICLR 2024) shows each block the channels of its timestep alone.
Written by dtr-scale; licensed under the Apache License 2.0.
"""

import math
from os import PathLike
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention

_FREQUENCIES = 256


class PatchEmbed(nn.Module):
    """Cut [N, C, H, W] into patches and project each: [N, L, D], row by row."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # The convolution as a matrix product.
        p = self.patch_size
        patches = x.unflatten(2, (-1, p)).unflatten(4, (-1, p))  # [N, C, H/p, p, W/p, p]
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    """Embed timesteps [N] as [N, D]: sinusoids, then a two-layer MLP."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        # fp32: in bf16, 998 and 999 are one timestep. Frequencies 10000^(-i / half), as DiT's; on
        # the CPU, for not every device has fp64.
        half = _FREQUENCIES // 2
        i = torch.arange(half, dtype=torch.float32, device="cpu")
        frequencies = (-math.log(10_000) * i / half).double().exp().float().to(t.device)
        angles = t[:, None].float() * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype))


class LabelEmbedder(nn.Module):
    """Embed labels [N] as [N, D]."""

    def __init__(self, num_rows: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_rows, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class TextEmbedder(nn.Module):
    """Put the learned null text in the place of tokens [N, M, context_dim] that are all zero."""

    def __init__(self, context_length: int, context_dim: int, has_null: bool) -> None:
        super().__init__()
        self.null_tokens = None
        if has_null:
            self.null_tokens = nn.Parameter(torch.zeros(context_length, context_dim))

    def forward(self, y: Tensor) -> Tensor:
        if self.null_tokens is None:
            return y
        return torch.where(y.any(dim=(1, 2), keepdim=True), y, self.null_tokens)


class HeadNorm(nn.RMSNorm):
    """Divide each query or key [..., D / heads] by its root mean square, in its own dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class HeadNorms(nn.Module):
    """A base of attention, with norms of queries and keys where there are any."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_norm, self.k_norm = (
            HeadNorm(hidden_size // num_heads, eps=1e-6) if qk_norm else nn.Identity()
            for _ in range(2)
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [N, L, D] of three of [N, heads, L or M, D / heads]."""
        x = scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return x.transpose(1, 2).flatten(2)


class Attention(HeadNorms):
    """Multi-head self-attention over tokens [N, L, D]."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__(hidden_size, num_heads, qk_norm)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        # [N, L, 3, heads, D / heads] to three of [N, heads, L, D / heads].
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)
        return self.proj(self.attend(q, k, v))


class CrossAttention(HeadNorms):
    """Multi-head attention from tokens [N, L, D] to text tokens [N, M, context_dim]."""

    def __init__(self, hidden_size: int, num_heads: int, context_dim: int, qk_norm: bool) -> None:
        super().__init__(hidden_size, num_heads, qk_norm)
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(context_dim, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(context).unflatten(2, (2, self.num_heads, -1)).transpose(1, 3).unbind(2)
        return self.proj(self.attend(q, k, v))


class Mlp(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A block with adaLN-Zero that sees the channels of its mask; the others bypass it whole.

    With a `context_dim` it attends to text tokens between self-attention and MLP.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, context_dim: int | None, qk_norm: bool
    ) -> None:
        super().__init__()
        self.norm1 = _layer_norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        self.cross_attn = None
        if context_dim is not None:
            self.norm_cross = _layer_norm(hidden_size)
            self.cross_attn = CrossAttention(hidden_size, num_heads, context_dim, qk_norm)
        self.norm2 = _layer_norm(hidden_size)
        self.mlp = Mlp(hidden_size)
        # Shift, scale and gate of each layer.
        self.num_modulations = 6 if context_dim is None else 9
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(hidden_size, self.num_modulations * hidden_size)
        )

    def forward(self, z: Tensor, c: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return tokens [N, L, D] of z [N, L, D], the condition c [N, D], texts and mask [N, D]."""
        if mask is None:
            return self._block(z, c, context)
        mask = mask[:, None]
        return ~mask * z + self._block(mask * z, c, context)  # eq. 8

    def _block(self, z: Tensor, c: Tensor, context: Tensor | None) -> Tensor:
        modulation = self.adaLN_modulation(c)[:, None].chunk(self.num_modulations, dim=-1)
        shift, scale, gate = modulation[:3]
        z = z + gate * self.attn(_modulate(self.norm1(z), shift, scale))
        if self.cross_attn is not None and context is not None:
            shift, scale, gate = modulation[3:6]
            z = z + gate * self.cross_attn(_modulate(self.norm_cross(z), shift, scale), context)
        shift, scale, gate = modulation[-3:]
        return z + gate * self.mlp(_modulate(self.norm2(z), shift, scale))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, num_outputs: int) -> None:
        super().__init__()
        self.norm_final = _layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, num_outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(_modulate(self.norm_final(z), shift, scale))


class DTRTransformer2DModel(ModelMixin, ConfigMixin):
    """Predict the noise in samples [N, in_channels, sample_size, sample_size].

    `num_masks` is 0 without routing, 1 where all blocks share the masks, else `depth`. The first
    `in_channels` of `out_channels` are the noise; twice as many mean a learned variance. With
    `has_null_label` the label `num_classes` stands for no class, for guidance. With a `context_dim`
    conditions are texts, and `null_context` is the one that stands for none. Of `num_experts` each
    is a network of its own, for an equal part of the timesteps, the first for the lowest.
    """

    _no_split_modules = ["Block"]  # noqa: RUF012  diffusers' own form

    @register_to_config
    def __init__(
        self,
        hidden_size: int,
        depth: int,
        num_heads: int,
        patch_size: int,
        sample_size: int,
        in_channels: int,
        out_channels: int,
        num_classes: int,
        has_null_label: bool,
        num_timesteps: int,
        num_masks: int,
        context_length: int | None = None,
        context_dim: int | None = None,
        qk_norm: bool = False,
        num_experts: int = 1,
    ) -> None:
        super().__init__()
        text = None
        if context_length is not None and context_dim is not None:
            text = context_length, context_dim
        self.null_context: Tensor | None
        self.register_buffer("null_context", torch.zeros(text) if text else None)
        self.experts = nn.ModuleList()
        if num_experts > 1:
            own = {k: v for k, v in self.config.items() if not k.startswith("_")}
            for _ in range(num_experts):
                self.experts.append(type(self)(**{**own, "num_experts": 1}))
            return
        self.patch_size, self.grid_size = patch_size, sample_size // patch_size
        self.out_channels = out_channels
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = (
            TextEmbedder(*text, has_null_label)
            if text
            else LabelEmbedder(num_classes + has_null_label, hidden_size)
        )
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, context_dim, qk_norm) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * out_channels)
        # Both in the file, so that nothing depends on how a library rebuilds them.
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", torch.zeros(1, self.grid_size**2, hidden_size))
        self.masks: Tensor | None
        shape = num_masks, num_timesteps, hidden_size
        self.register_buffer("masks", torch.ones(shape, dtype=torch.bool) if num_masks else None)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str] | None,
        **options: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Load as diffusers does, but refuse weights that are not exactly this network's."""
        wants_info = options.pop("output_loading_info", False)
        place: Any = pretrained_model_name_or_path
        loaded: Any = super().from_pretrained(place, output_loading_info=True, **options)
        model, info = loaded
        if found := {what: names for what, names in info.items() if names}:
            raise ValueError(f"{place} does not hold the weights of its config.json: {found}")
        return (model, info) if wants_info else model

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        condition: Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Return [N, out_channels, H, W] for original timesteps [N] or [1].

        `condition` are labels [N], or text tokens [N, context_length, context_dim].
        """
        t = timestep.long()
        if len(self.experts):
            sample = self._by_experts(hidden_states, t, condition)
        else:
            sample = self._by_itself(hidden_states, t, condition)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _by_experts(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Return each sample's output of the expert of its timestep."""
        t, num_timesteps = t.expand(len(x)), self.config["num_timesteps"]
        samples: list[Tensor] = []
        places: list[Tensor] = []
        for number, expert in enumerate(self.experts):
            start, stop = (k * num_timesteps // len(self.experts) for k in (number, number + 1))
            mine = ((t >= start) & (t < stop)).nonzero().flatten()
            if len(mine):
                samples.append(expert(x[mine], t[mine], condition[mine]).sample)
                places.append(mine)
        return torch.cat(samples)[torch.cat(places).argsort()]

    def _by_itself(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        dtype = self.final_layer.linear.weight.dtype
        z = self.x_embedder(x.to(dtype)) + self.pos_embed.to(dtype)
        c, context = self.t_embedder(t.expand(len(z)), dtype), None
        if self.null_context is None:
            c = c + self.y_embedder(condition.long())
        else:
            context = self.y_embedder(condition.to(dtype))
        for number, block in enumerate(self.blocks):
            z = block(z, c, context, self._mask(number, t))
        return self._unpatchified(self.final_layer(z, c))

    def _mask(self, block: int, t: Tensor) -> Tensor | None:
        """Return the channels that a block sees at timesteps [N], bool [N, D]; None for all."""
        return None if self.masks is None else self.masks[min(block, len(self.masks) - 1)][t]

    def _unpatchified(self, patches: Tensor) -> Tensor:
        p, grid = self.patch_size, self.grid_size
        patches = patches.view(-1, grid, grid, p, p, self.out_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def _layer_norm(hidden_size: int) -> nn.LayerNorm:
    return nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift
