"""Define the diffusion transformer (Peebles & Xie, 2023), with task routing around its blocks.

Parameters carry the names of the official DiT state dict. Text conditioning is that of the DTR
paper (appendix C, figure 8).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dtr_scale.models.attention import AttentionModule
from dtr_scale.models.denoiser import Denoiser
from dtr_scale.models.embedders import (
    LabelEmbedder,
    PatchEmbed,
    TextEmbedder,
    TimestepEmbedder,
    sincos_position_table,
)
from dtr_scale.models.routing import RoutingSpec, build_routing


class DiTSize(NamedTuple):
    """The sizes of a DiT; `hidden_size` is the width of a token, `depth` in blocks."""

    hidden_size: int
    depth: int
    num_heads: int
    patch_size: int


# hidden_size, depth and num_heads (Peebles & Xie, 2023, table 1).
_WIDTHS = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
VARIANTS = {
    f"DiT-{name}/{patch_size}": DiTSize(*widths, patch_size)
    for name, widths in _WIDTHS.items()
    for patch_size in (2, 4, 8)
}


class Attention(AttentionModule):
    """Multi-head self-attention over the tokens of [N, L, D]."""

    def __init__(self, hidden_size: int, num_heads: int, *, qk_norm: bool = False) -> None:
        super().__init__(hidden_size, num_heads, qk_norm=qk_norm)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        # The rows of qkv are ordered (qkv, head, channel), as in official weights.
        qkv = self.qkv(x).view(n, length, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.unbind(2)
        out = self.attend(q, k, v)
        return self.proj(out.reshape(n, length, width))


class CrossAttention(AttentionModule):
    """Multi-head attention from tokens [N, L, D] to text tokens [N, M, context_dim]."""

    def __init__(
        self, hidden_size: int, num_heads: int, context_dim: int, *, qk_norm: bool = False
    ) -> None:
        super().__init__(hidden_size, num_heads, qk_norm=qk_norm)
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(context_dim, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        n, length, width = x.shape
        heads = self.num_heads, self.head_dim
        q = self.q(x).view(n, length, *heads)
        k, v = self.kv(context).view(n, context.shape[1], 2, *heads).unbind(2)
        out = self.attend(q, k, v)
        return self.proj(out.reshape(n, length, width))


class Mlp(nn.Module):
    """Pointwise feed-forward layer of a block, four times as wide inside."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = _GELULinear(hidden_size, 4 * hidden_size)
        self.fc2 = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


class _GELULinear(nn.Linear):
    """A linear layer with its GELU by tanh, which on a GPU is part of the matrix product."""

    def forward(self, input: Tensor) -> Tensor:
        # A backward needs what enters the GELU, which cuBLASLt's epilogue drops. And autocast takes
        # this for no matrix product: it would be computed in fp32.
        apart = torch.is_grad_enabled() or torch.is_autocast_enabled("cuda")
        if apart or not input.is_cuda:
            return nn.functional.gelu(super().forward(input), approximate="tanh")
        rows, weight = input.flatten(0, -2), self.weight.t()
        out = torch.ops.aten._addmm_activation(self.bias, rows, weight, use_gelu=True)
        return out.view(*input.shape[:-1], -1)


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning, routed by a mask of channels.

    With a `context_dim` it attends to text tokens between self-attention and MLP.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        context_dim: int | None = None,
        *,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = _layer_norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, qk_norm=qk_norm)
        self.cross_attn = None
        if context_dim is not None:
            self.norm_cross = _layer_norm(hidden_size)
            self.cross_attn = CrossAttention(hidden_size, num_heads, context_dim, qk_norm=qk_norm)
        self.norm2 = _layer_norm(hidden_size)
        self.mlp = Mlp(hidden_size)
        # Shift, scale and gate of each layer that is modulated.
        self.num_modulations = 6 if context_dim is None else 9
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(hidden_size, self.num_modulations * hidden_size)
        )

    def forward(
        self, z: Tensor, c: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return [N, L, D] from tokens z [N, L, D].

        c [N, D] is the condition of adaLN, context [N, M, context_dim] the text's tokens, mask
        bool [N, D] the channels that the block sees (None: all).
        """
        if mask is None:
            return self._block(z, c, context)
        # [N, 1, D]: one mask for all tokens of a sample.
        mask = mask[:, None]
        # The channels it does not see bypass the block whole.
        return ~mask * z + self._block(mask * z, c, context)  # eq. 8

    def _block(self, z: Tensor, c: Tensor, context: Tensor | None) -> Tensor:
        # Each [N, 1, D]. Official weights have them in the order shift, scale, gate.
        modulation = self.adaLN_modulation(c)[:, None].chunk(self.num_modulations, dim=-1)
        shift, scale, gate = modulation[:3]
        z = z + gate * self.attn(_modulate(self.norm1(z), shift, scale))
        if self.cross_attn is not None:
            assert context is not None
            shift, scale, gate = modulation[3:6]
            normed = _modulate(self.norm_cross(z), shift, scale)
            z = z + gate * self.cross_attn(normed, context)
        # The last three, with and without text: its own three stand in the middle.
        shift, scale, gate = modulation[-3:]
        return z + gate * self.mlp(_modulate(self.norm2(z), shift, scale))


class FinalLayer(nn.Module):
    """Modulate the tokens once more and project each to its patch."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = _layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """Return patches [N, L, p * p * C_out] from tokens z [N, L, D] and condition c [N, D]."""
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(_modulate(self.norm_final(z), shift, scale))


class DiT(Denoiser):
    """A transformer over the patches of a latent.

    With conditioning "text", y are the tokens [N, context_length, context_dim] of a text encoder
    (CLIP ViT-L/14's by default). `routing` is over `num_timesteps`; None is no routing.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        depth: int,
        num_heads: int,
        patch_size: int,
        input_size: int,
        in_channels: int = 4,
        num_classes: int = 1000,
        conditioning: str = "class",
        class_dropout_prob: float = 0.1,
        context_length: int = 77,
        context_dim: int = 768,
        qk_norm: bool = False,
        learn_sigma: bool = True,
        routing: RoutingSpec | None = None,
        num_timesteps: int = 1000,
    ) -> None:
        super().__init__(
            input_size=input_size,
            in_channels=in_channels,
            num_classes=num_classes,
            conditioning=conditioning,
            class_dropout_prob=class_dropout_prob,
            learn_sigma=learn_sigma,
        )
        self.hidden_size = hidden_size
        self.patch_size = patch_size
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        by_text = conditioning == "text"
        if by_text:
            self.y_embedder = TextEmbedder(context_length, context_dim, class_dropout_prob)
        else:
            self.y_embedder = LabelEmbedder(self.num_classes, hidden_size, self.class_dropout_prob)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, context_dim if by_text else None, qk_norm=qk_norm)
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.routing = build_routing(routing or RoutingSpec(), num_timesteps, [hidden_size] * depth)
        self.pos_embed: Tensor
        positions = sincos_position_table(hidden_size, input_size // patch_size)
        # A function of the sizes: official files have it, checkpoints need not.
        self.register_buffer("pos_embed", positions[None], persistent=False)
        self.initialize_weights()

    def forward(self, x: Tensor, t: Tensor, y: Tensor, step: int | None = None) -> Tensor:
        # Noised samples are fp32, weights may be bf16.
        x, t = x.to(self.x_embedder.proj.weight.dtype), t.long()
        z = self.x_embedder(x)
        z = z + self.pos_embed.to(z.dtype)
        # By sample, even of one timestep: a product of one row would round apart from one of N.
        c, context = self.t_embedder(t.expand(len(x))), None
        # Text enters by cross-attention; adaLN is regressed from the timestep alone (appendix C).
        if self.conditioning == "text":
            context = self.y_embedder(y.to(z.dtype))
        else:
            c = c + self.y_embedder(y.long())
        for block, mask in zip(self.blocks, self.routing(t, step), strict=True):
            z = block(z, c, context, mask)
        return self._unpatchify(self.final_layer(z, c))

    def routed_blocks(self) -> list[nn.Module]:
        return list(self.blocks)

    def initialize_weights(self) -> None:
        """Initialise as DiT does: every block starts as the identity, the output as zero."""
        # All linear layers first: the loops below overwrite some of them.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # The patch projection is a linear layer that happens to be written as a convolution.
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        if self.x_embedder.proj.bias is not None:
            nn.init.zeros_(self.x_embedder.proj.bias)
        for parameter in self.y_embedder.parameters():
            nn.init.normal_(parameter, std=0.02)
        for name, parameter in self.named_parameters():
            if name.startswith("t_embedder.") and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            elif "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)

    def _unpatchify(self, patches: Tensor) -> Tensor:
        p, grid = self.patch_size, self.input_size // self.patch_size
        # The channel is the fastest index of a patch, as in official weights.
        patches = patches.view(-1, grid, grid, p, p, self.out_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(
            -1, self.out_channels, self.input_size, self.input_size
        )


def _layer_norm(hidden_size: int) -> nn.LayerNorm:
    # adaLN is its scale and shift. DiT's eps, not PyTorch's 1e-5: official weights were trained
    # with it.
    return nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    # 1 +: zero-initialised layers leave the norm as it is (adaLN-Zero).
    return x * (1 + scale) + shift
