"""Define guided-diffusion's U-Net (Dhariwal & Nichol, 2021), with task routing in its blocks.

Parameters carry the names of guided-diffusion's state dict.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtr_scale.errors import ConfigError
from dtr_scale.models.attention import AttentionModule, attention
from dtr_scale.models.denoiser import Denoiser
from dtr_scale.models.embedders import timestep_embedding
from dtr_scale.models.routing import RoutingSpec, build_routing

_NUM_GROUPS = 32


class GroupNorm(nn.GroupNorm):
    """Group norm over 32 groups, computed in fp32 and returned in the dtype of its input."""

    def __init__(self, channels: int) -> None:
        super().__init__(_NUM_GROUPS, channels)

    def forward(self, input: Tensor) -> Tensor:
        # guided-diffusion's GroupNorm32: official weights were trained with fp32 statistics.
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(input.float(), _NUM_GROUPS, weight, bias, self.eps).to(input.dtype)


class Downsample(nn.Module):
    """Halve the height and width of [N, C, H, W] by a strided convolution or by averaging."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.op = _conv3x3(channels, channels, stride=2) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Double the height and width of [N, C, H, W] by repetition, then maybe by a convolution."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.conv = _conv3x3(channels, channels) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class ResBlock(nn.Module):
    """Two convolutions beside a skip connection, conditioned on an embedding (pseudo code 2).

    `channels` is the width of the input and so of the routing mask. `resample`, a layer without
    weights, halves or doubles height and width on both ways.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        emb_channels: int,
        use_scale_shift_norm: bool = False,
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
            GroupNorm(out_channels),
            nn.SiLU(),
            nn.Identity(),  # the place of guided-diffusion's dropout: the convolution is number 3
            _zeroed(_conv3x3(out_channels, out_channels)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor, mask: Tensor | None) -> Tensor:
        """Return [N, C', H', W'] from x [N, C, H, W], emb [N, E] and mask bool [N, C]."""
        # A Sequential for its parameters' names alone: mask and resampling go between its layers.
        norm, act, conv = self.in_layers
        h = act(norm(x))
        if mask is not None:
            h = mask[:, :, None, None] * h  # after the norm, whose statistics are of all channels
        h = conv(self.resample(h))
        modulation = self.emb_layers(emb)[:, :, None, None]  # [N, C' or 2 C', 1, 1]
        norm, act, _, conv = self.out_layers
        if self.use_scale_shift_norm:
            # Scale first, unlike DiT: guided-diffusion's order.
            scale, shift = modulation.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + modulation)
        return self.skip_connection(self.resample(x)) + conv(act(h))


class AttentionBlock(AttentionModule):
    """Multi-head self-attention over the positions of [N, C, H, W], beside a skip connection.

    The rows of `qkv` are ordered (qkv, head, channel) with `use_new_attention_order`, else
    (head, qkv, channel).
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int = 1,
        num_head_channels: int | None = None,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__(channels, _num_heads(channels, num_heads, num_head_channels))
        self.channels = channels
        self.use_new_attention_order = use_new_attention_order
        self.norm = GroupNorm(channels)
        # Conv1d, not Linear, for the shape of official weights: [3 C, C, 1].
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return [N, C, H, W] from x of that shape and mask bool [N, C]."""
        h = self.norm(x).flatten(2)  # [N, C, L]
        if mask is not None:
            h = mask[:, :, None] * h
        qkv = self.qkv(h).transpose(1, 2)  # [N, L, 3 C]
        if self.use_new_attention_order:
            qkv = qkv.unflatten(2, (3, self.num_heads, -1))
        else:
            qkv = qkv.unflatten(2, (self.num_heads, 3, -1)).transpose(2, 3)
        # Fused kernels need the channels of a head side by side in memory. The heads, too: where
        # q, k and v alternate, the compiler is promised gradients that alternate, and the backward
        # of xformers returns others.
        q, k, v = qkv.contiguous().unbind(2)
        h = attention(q, k, v, self.attention_backend).flatten(2)  # [N, L, C]
        return x + self.proj_out(h.transpose(1, 2)).reshape(x.shape)


class ADM(Denoiser):
    """A U-Net over the pixels of an image.

    The keywords are those of guided-diffusion's `UNetModel`, with its defaults:

    attention_resolutions   the rates of downsampling that have attention; the middle always has
    conv_resample           learn to resample between levels, if not `resblock_updown`, which
                            resamples inside of residual blocks
    num_head_channels       width of an attention head; None or -1: use `num_heads`

    There is no dropout: its draws would depend on how a batch is split. Without conditioning there
    is no label embedding and y has no effect. `routing` is over `num_timesteps`; None is no
    routing. Raises ConfigError for sizes that do not fit.
    """

    def __init__(
        self,
        *,
        image_size: int,
        model_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        in_channels: int = 3,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        num_classes: int = 1000,
        conditioning: str = "class",
        class_dropout_prob: float = 0.0,
        learn_sigma: bool = True,
        num_heads: int = 1,
        num_head_channels: int | None = None,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        routing: RoutingSpec | None = None,
        num_timesteps: int = 1000,
    ) -> None:
        widths = _level_widths(model_channels, channel_mult)
        _check_resolutions(image_size, attention_resolutions, num_levels=len(widths))
        super().__init__(
            input_size=image_size,
            in_channels=in_channels,
            num_classes=num_classes,
            conditioning=conditioning,
            class_dropout_prob=class_dropout_prob,
            learn_sigma=learn_sigma,
        )
        self.model_channels = model_channels
        emb_channels = 4 * model_channels
        parts = _Parts(
            num_res_blocks=num_res_blocks,
            attention_resolutions=attention_resolutions,
            resblock_updown=resblock_updown,
            conv_resample=conv_resample,
            res_block=partial(
                ResBlock, emb_channels=emb_channels, use_scale_shift_norm=use_scale_shift_norm
            ),
            attention_block=partial(
                AttentionBlock,
                num_heads=num_heads,
                num_head_channels=num_head_channels,
                use_new_attention_order=use_new_attention_order,
            ),
        )
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels),
            nn.SiLU(),
            nn.Linear(emb_channels, emb_channels),
        )
        if conditioning == "class":
            self.label_emb = nn.Embedding(num_classes + (class_dropout_prob > 0), emb_channels)
        self.input_blocks, skip_widths = parts.input_blocks(in_channels, widths)
        self.middle_block = parts.middle_block(skip_widths[-1])
        self.output_blocks = parts.output_blocks(skip_widths, widths)
        self.out = nn.Sequential(
            GroupNorm(widths[0]), nn.SiLU(), _zeroed(_conv3x3(widths[0], self.out_channels))
        )
        widths = [block.channels for block in self.blocks]
        self.routing = build_routing(routing or RoutingSpec(), num_timesteps, widths)

    @property
    def blocks(self) -> list[ResBlock | AttentionBlock]:
        """The residual and attention blocks in forward order."""
        # modules() follows the order in which __init__ registers: way down, middle, way up, as
        # forward goes. Masks are dealt out by it, so a part that is registered earlier shifts all.
        return [m for m in self.modules() if isinstance(m, ResBlock | AttentionBlock)]

    def forward(self, x: Tensor, t: Tensor, y: Tensor, step: int | None = None) -> Tensor:
        h, t = x.to(next(self.parameters()).dtype), t.long()
        # By sample, even of one timestep: a product of one row would round apart from one of N.
        sinusoids = timestep_embedding(t.expand(len(x)), self.model_channels)
        emb = self.time_embed(sinusoids.to(h.dtype))
        if self.conditioning == "class":
            emb = emb + self.label_emb(y.long())
        masks = iter(self.routing(t, step))  # taken in the order of `blocks`
        skips = []
        for layers in self.input_blocks:
            h = self._run(layers, h, emb, masks)
            skips.append(h)
        h = self._run(self.middle_block, h, emb, masks)
        for layers in self.output_blocks:
            h = self._run(layers, torch.cat([h, skips.pop()], dim=1), emb, masks)
        return self.out(h)

    def routed_blocks(self) -> list[nn.Module]:
        return list(self.blocks)

    def _run(
        self, layers: nn.Module, h: Tensor, emb: Tensor, masks: Iterator[Tensor | None]
    ) -> Tensor:
        for layer in layers.children():
            if isinstance(layer, ResBlock):
                h = layer(h, emb, next(masks))
            elif isinstance(layer, AttentionBlock):
                h = layer(h, next(masks))
            else:
                h = layer(h)
        return h


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


def _num_heads(channels: int, num_heads: int, num_head_channels: int | None) -> int:
    by_width = num_head_channels not in (None, -1)
    key, divisor = (
        ("num_head_channels", num_head_channels) if by_width else ("num_heads", num_heads)
    )
    if divisor < 1 or channels % divisor:
        raise ConfigError(
            f"model.{key} = {divisor}: does not divide the {channels} channels of a level with "
            f"attention; give a divisor of {channels}, or change model.channel_mult"
        )
    return channels // divisor if by_width else divisor


def _level_widths(model_channels: int, channel_mult: Sequence[float]) -> list[int]:
    if model_channels % 2:
        raise ConfigError(
            f"model.model_channels = {model_channels}: sine and cosine of the timestep come in "
            "pairs; give an even number"
        )
    widths = [int(mult * model_channels) for mult in channel_mult]
    for mult, width in zip(channel_mult, widths, strict=True):
        if width < 1 or width % _NUM_GROUPS:
            raise ConfigError(
                f"model.model_channels = {model_channels}: times {mult} of model.channel_mult is "
                f"{width} channels, no multiple of group norm's {_NUM_GROUPS}; change either"
            )
    return widths


def _check_resolutions(
    image_size: int, attention_resolutions: Sequence[int], *, num_levels: int
) -> None:
    lowest = 2 ** (num_levels - 1)
    if image_size % lowest:
        raise ConfigError(
            f"model.image_size = {image_size}: cannot be halved {num_levels - 1} times, as "
            f"{num_levels} levels of model.channel_mult do; give a multiple of {lowest}"
        )
    rates = [2**level for level in range(num_levels)]
    for rate in attention_resolutions:
        if rate not in rates:
            raise ConfigError(
                f"model.attention_resolutions = {list(attention_resolutions)}: {rate} is not "
                f"the downsampling rate of a level; give some of {', '.join(map(str, rates))}"
            )


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)


def _zeroed(conv: nn.Module) -> nn.Module:
    """Make a convolution start as zero, and so a residual block as its skip connection."""
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv
