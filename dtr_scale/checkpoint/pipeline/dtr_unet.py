"""Compute guided-diffusion's U-Net (Dhariwal & Nichol, 2021) with task routing, for diffusers.

Denoising Task Routing (Park et al., ICLR 2024) shows each block the channels of its timestep alone.
Written by dtr-scale; licensed under the Apache License 2.0.
"""

import math
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.nn import functional as F

_NUM_GROUPS = 32


class GroupNorm(nn.GroupNorm):
    """Group norm over 32 groups, computed in fp32."""

    def __init__(self, channels: int) -> None:
        super().__init__(_NUM_GROUPS, channels)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(input.float(), _NUM_GROUPS, weight, bias, self.eps).to(input.dtype)


class Downsample(nn.Module):
    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.op = _conv3x3(channels, channels, stride=2) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.conv = _conv3x3(channels, channels) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class ResBlock(nn.Module):
    """Two convolutions beside a skip connection; the first sees the channels of its mask."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        emb_channels: int,
        use_scale_shift_norm: bool,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(
            GroupNorm(channels), nn.SiLU(), _conv3x3(channels, out_channels)
        )
        self.resample = resample or nn.Identity()
        modulation = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, modulation))
        self.out_layers = nn.Sequential(
            GroupNorm(out_channels), nn.SiLU(), nn.Identity(), _conv3x3(out_channels, out_channels)
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor, mask: Tensor | None) -> Tensor:
        norm, act, conv = self.in_layers
        h = act(norm(x))
        if mask is not None:
            h = mask[:, :, None, None] * h  # after the norm, whose statistics are of all channels
        h = conv(self.resample(h))
        modulation = self.emb_layers(emb)[:, :, None, None]
        norm, act, _, conv = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = modulation.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + modulation)
        return self.skip_connection(self.resample(x)) + conv(act(h))


class AttentionBlock(nn.Module):
    """Self-attention over the positions of [N, C, H, W] that sees the channels of its mask."""

    def __init__(self, channels: int, num_heads: int, use_new_attention_order: bool) -> None:
        super().__init__()
        self.channels, self.num_heads = channels, num_heads
        self.use_new_attention_order = use_new_attention_order
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        h = self.norm(x).flatten(2)
        if mask is not None:
            h = mask[:, :, None] * h
        qkv = self.qkv(h).transpose(1, 2)
        if self.use_new_attention_order:
            qkv = qkv.unflatten(2, (3, self.num_heads, -1))
        else:
            qkv = qkv.unflatten(2, (self.num_heads, 3, -1)).transpose(2, 3)
        # [N, L, 3, heads, C / heads] to three of [N, heads, L, C / heads].
        q, k, v = (part.transpose(1, 2) for part in qkv.contiguous().unbind(2))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.proj_out(h.transpose(1, 2)).reshape(x.shape)


class DTRUNet2DModel(ModelMixin, ConfigMixin):
    """Predict the noise in samples [N, in_channels, sample_size, sample_size].

    The arguments are those of guided-diffusion's `UNetModel`. Block number i has the mask
    `mask_of[i]`, none where that is empty. The first `in_channels` of `out_channels` are the noise;
    twice as many mean a learned variance. With `has_null_label` the label `num_classes` stands for
    no class, for guidance; without `has_classes` there are no labels.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        channel_mult: Sequence[float],
        conv_resample: bool,
        num_heads: int,
        num_head_channels: int | None,
        use_scale_shift_norm: bool,
        resblock_updown: bool,
        use_new_attention_order: bool,
        num_classes: int,
        has_classes: bool,
        has_null_label: bool,
        num_timesteps: int,
        mask_of: Sequence[int] = (),
        context_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.null_context = None  # of texts, which this network does not take
        emb_channels = 4 * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels),
            nn.SiLU(),
            nn.Linear(emb_channels, emb_channels),
        )
        if has_classes:
            self.label_emb = nn.Embedding(num_classes + has_null_label, emb_channels)

        def res_block(width: int, out: int, resample: nn.Module | None = None) -> ResBlock:
            return ResBlock(width, out, emb_channels, use_scale_shift_norm, resample)

        def attention_block(width: int) -> AttentionBlock:
            by_width = num_head_channels not in (None, -1)
            heads = width // int(num_head_channels or 1) if by_width else num_heads
            return AttentionBlock(width, heads, use_new_attention_order)

        def stage(width: int, out: int, level: int) -> list[nn.Module]:
            attends = 2**level in attention_resolutions
            return [res_block(width, out), *([attention_block(out)] if attends else [])]

        def resampled(kind: type[Downsample | Upsample], width: int) -> nn.Module:
            if resblock_updown:
                return res_block(width, width, kind(width, use_conv=False))
            return kind(width, use_conv=conv_resample)

        widths = [int(mult * model_channels) for mult in channel_mult]
        steps: list[nn.Module] = [nn.ModuleList([_conv3x3(in_channels, widths[0])])]
        skips = [widths[0]]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                steps.append(nn.ModuleList(stage(skips[-1], width, level)))
                skips.append(width)
            if level < len(widths) - 1:
                steps.append(nn.ModuleList([resampled(Downsample, width)]))
                skips.append(width)
        self.input_blocks = nn.ModuleList(steps)
        width = channels = skips[-1]
        self.middle_block = nn.ModuleList(
            [res_block(width, width), attention_block(width), res_block(width, width)]
        )
        steps = []
        for level, width in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                layers = stage(channels + skips.pop(), width, level)
                if level > 0 and i == num_res_blocks:
                    layers.append(resampled(Upsample, width))
                steps.append(nn.ModuleList(layers))
                channels = width
        self.output_blocks = nn.ModuleList(steps)
        self.out = nn.Sequential(GroupNorm(widths[0]), nn.SiLU(), _conv3x3(widths[0], out_channels))
        self.mask_of = list(mask_of)
        for number, width in self._mask_widths().items():
            mask = torch.ones(num_timesteps, width, dtype=torch.bool)
            self.register_buffer(f"masks_{number}", mask)

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
    ) -> UNet2DOutput | tuple[Tensor]:
        """Return [N, out_channels, H, W] for original timesteps [N] or [1] and labels [N]."""
        h, t = hidden_states.to(next(self.parameters()).dtype), timestep.long()
        emb = self.time_embed(self._sinusoids(t.expand(len(h))).to(h.dtype))
        if self.config["has_classes"]:
            emb = emb + self.label_emb(condition.long())
        masks = self._masks(t)
        skips = []
        for layers in self.input_blocks:
            h = _run(layers, h, emb, masks)
            skips.append(h)
        h = _run(self.middle_block, h, emb, masks)
        for layers in self.output_blocks:
            h = _run(layers, torch.cat([h, skips.pop()], dim=1), emb, masks)
        sample = self.out(h)
        return UNet2DOutput(sample=sample) if return_dict else (sample,)

    def _sinusoids(self, t: Tensor) -> Tensor:
        # On the CPU, for not every device has fp64.
        half = self.config["model_channels"] // 2
        i = torch.arange(half, dtype=torch.float32, device="cpu")
        frequencies = (-math.log(10_000) * i / half).double().exp().float().to(t.device)
        angles = t[:, None].float() * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def _masks(self, t: Tensor) -> Iterator[Tensor | None]:
        """Yield the mask of each block in forward order, bool [N, C]."""
        if not self.mask_of:
            while True:
                yield None
        for number in self.mask_of:
            yield self.get_buffer(f"masks_{number}")[t]

    def _mask_widths(self) -> dict[int, int]:
        # Registered in forward order, and so `modules` yields them.
        blocks = [m for m in self.modules() if isinstance(m, ResBlock | AttentionBlock)]
        return {number: blocks[i].channels for i, number in enumerate(self.mask_of)}


def _run(layers: Any, h: Tensor, emb: Tensor, masks: Iterator[Tensor | None]) -> Tensor:  # noqa: ANN401
    for layer in layers:
        if isinstance(layer, ResBlock):
            h = layer(h, emb, next(masks))
        elif isinstance(layer, AttentionBlock):
            h = layer(h, next(masks))
        else:
            h = layer(h)
    return h


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)
