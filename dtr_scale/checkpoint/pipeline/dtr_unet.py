"""Compute guided-diffusion's U-Net (Dhariwal & Nichol, 2021) with task routing, for diffusers.

Denoising Task Routing (Park et al., ICLR 2024) shows each block the channels of its timestep alone.
Written by dtr-scale; licensed under the Apache License 2.0.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from os import PathLike
from typing import Any, NamedTuple

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

    def __init__(
        self,
        channels: int,
        num_heads: int,
        num_head_channels: int | None,
        use_new_attention_order: bool,
    ) -> None:
        super().__init__()
        self.channels = channels
        by_width = num_head_channels not in (None, -1)
        self.num_heads = channels // int(num_head_channels or 1) if by_width else num_heads
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
        parts = _Parts(
            num_res_blocks,
            attention_resolutions,
            resblock_updown,
            conv_resample,
            partial(ResBlock, emb_channels=emb_channels, use_scale_shift_norm=use_scale_shift_norm),
            partial(
                AttentionBlock,
                num_heads=num_heads,
                num_head_channels=num_head_channels,
                use_new_attention_order=use_new_attention_order,
            ),
        )
        # In forward order, in which `_mask_widths` finds them.
        widths = [int(mult * model_channels) for mult in channel_mult]
        self.input_blocks, skip_widths = parts.input_blocks(in_channels, widths)
        self.middle_block = parts.middle_block(skip_widths[-1])
        self.output_blocks = parts.output_blocks(skip_widths, widths)
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


class _Parts(NamedTuple):
    """Make the parts of one network, numbered as in guided-diffusion."""

    num_res_blocks: int
    attention_resolutions: Sequence[int]
    resblock_updown: bool
    conv_resample: bool
    res_block: Callable[..., ResBlock]
    attention_block: Callable[[int], AttentionBlock]

    def input_blocks(self, in_channels: int, widths: list[int]) -> tuple[nn.ModuleList, list[int]]:
        """Return the way down, and the width of what each of its steps leaves to the way up."""
        steps = [nn.ModuleList([_conv3x3(in_channels, widths[0])])]
        skip_widths = [widths[0]]
        for level, width in enumerate(widths):
            for _ in range(self.num_res_blocks):
                steps.append(nn.ModuleList(self._stage(skip_widths[-1], width, level)))
                skip_widths.append(width)
            if level < len(widths) - 1:
                steps.append(nn.ModuleList([self._resample(Downsample, width)]))
                skip_widths.append(width)
        return nn.ModuleList(steps), skip_widths

    def middle_block(self, width: int) -> nn.ModuleList:
        first, between = self.res_block(width, width), self.attention_block(width)
        return nn.ModuleList([first, between, self.res_block(width, width)])

    def output_blocks(self, skip_widths: list[int], widths: list[int]) -> nn.ModuleList:
        """Return the way up, whose steps take what the way down left, the last first."""
        steps, channels, skips = [], skip_widths[-1], reversed(skip_widths)
        for level, width in reversed(list(enumerate(widths))):
            # One more than on the way down, whose first convolution and Downsamples left one, too.
            for i in range(self.num_res_blocks + 1):
                layers = self._stage(channels + next(skips), width, level)
                if level > 0 and i == self.num_res_blocks:
                    layers.append(self._resample(Upsample, width))
                steps.append(nn.ModuleList(layers))
                channels = width
        return nn.ModuleList(steps)

    def _stage(self, channels: int, width: int, level: int) -> list[nn.Module]:
        layers: list[nn.Module] = [self.res_block(channels, width)]
        if 2**level in self.attention_resolutions:
            layers.append(self.attention_block(width))
        return layers

    def _resample(self, kind: type[Downsample | Upsample], width: int) -> nn.Module:
        if self.resblock_updown:
            return self.res_block(width, width, resample=kind(width, use_conv=False))
        return kind(width, use_conv=self.conv_resample)


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
