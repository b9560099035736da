"""Diffusion transformer (Peebles & Xie, 2023) with Denoising Task Routing around its blocks.

Parameters carry the names of the official DiT state dict.
"""

from typing import NamedTuple

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dtr_scale.models.attention import attention
from dtr_scale.models.embedders import (
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    sincos_position_table,
)
from dtr_scale.models.routing import routing_windows, window_mask


class DiTSize(NamedTuple):
    hidden_size: int
    depth: int
    num_heads: int
    patch_size: int


_WIDTHS = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
VARIANTS = {
    f"DiT-{name}/{patch_size}": DiTSize(*widths, patch_size)
    for name, widths in _WIDTHS.items()
    for patch_size in (2, 4, 8)
}


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of [N, L, D]."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, backend: str) -> Tensor:
        n, length, width = x.shape
        qkv = self.qkv(x).view(n, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.unbind(2)
        return self.proj(attention(q, k, v, backend).reshape(n, length, width))


class Mlp(nn.Module):
    """Pointwise feed-forward layer of a block."""

    def __init__(self, hidden_size: int, mlp_ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning, routed by a mask of channels."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = _layer_norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = _layer_norm(hidden_size)
        self.mlp = Mlp(hidden_size, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, z: Tensor, c: Tensor, mask: Tensor | None, backend: str) -> Tensor:
        """Return [N, L, D] from tokens z [N, L, D], condition c [N, D] and mask bool [N, 1, D]."""
        if mask is None:
            return self._block(z, c, backend)
        return ~mask * z + self._block(mask * z, c, backend)  # eq. 8

    def _block(self, z: Tensor, c: Tensor, backend: str) -> Tensor:
        modulation = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        z = z + gate_msa * self.attn(_modulate(self.norm1(z), shift_msa, scale_msa), backend)
        return z + gate_mlp * self.mlp(_modulate(self.norm2(z), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Modulate the tokens once more and project each to its patch."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = _layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(_modulate(self.norm_final(z), shift, scale))


class DiT(nn.Module):
    """Predict the noise in a latent and, with `learn_sigma`, where its variance lies.

    `routing` is a kind of `routing_windows` over `num_timesteps` timesteps. An unconditional model
    has num_classes=1 and class_dropout_prob=0. `attention_backend` (see `resolve_backend`) and
    `activation_checkpointing` may be set at any time.
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
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        routing: str = "none",
        alpha: float = 4.0,
        beta: float = 0.8,
        num_timesteps: int = 1000,
        attention_backend: str = "sdpa",
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.patch_size = patch_size
        self.input_size = input_size
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.learn_sigma = learn_sigma
        self.num_classes = num_classes
        self.null_label = num_classes
        self.class_dropout_prob = class_dropout_prob
        self.routing = routing
        self.attention_backend = attention_backend
        self.activation_checkpointing = False

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)

        self.pos_embed: Tensor
        self.mask_start: Tensor
        self.mask_stop: Tensor
        positions = sincos_position_table(hidden_size, input_size // patch_size)
        start, stop = routing_windows(
            routing, num_timesteps=num_timesteps, num_channels=hidden_size, alpha=alpha, beta=beta
        )
        self.register_buffer("pos_embed", positions[None], persistent=False)
        self.register_buffer("mask_start", start, persistent=False)
        self.register_buffer("mask_stop", stop, persistent=False)
        self.initialize_weights()

    def forward(self, x: Tensor, t: Tensor, y: Tensor, step: int | None = None) -> Tensor:
        """Return [N, 2C or C, H, W] in the weights' dtype.

        x [N, C, H, W] is a noised latent, t int [N] its original timestep, y int [N] its label
        (`null_label` for none). `step` is the training step, for masks that change with it.
        """
        x = x.to(self.x_embedder.proj.weight.dtype)
        z = self.x_embedder(x)
        z = z + self.pos_embed.to(z.dtype)
        c = self.t_embedder(t) + self.y_embedder(y)
        mask = self._routing_mask(t)
        for block in self.blocks:
            if self.activation_checkpointing:
                z = checkpoint(
                    block, z, c, mask, self.attention_backend,
                    use_reentrant=False, preserve_rng_state=False,
                )  # fmt: skip
            else:
                z = block(z, c, mask, self.attention_backend)
        return self._unpatchify(self.final_layer(z, c))

    def initialize_weights(self) -> None:
        """Initialise as DiT does: every block starts as the identity, the output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # The patch projection is a linear layer that happens to be written as a convolution.
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        if self.x_embedder.proj.bias is not None:
            nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.startswith("t_embedder.") and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            elif "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)

    def _routing_mask(self, t: Tensor) -> Tensor | None:
        if self.routing == "none":
            return None
        return window_mask(self.mask_start[t], self.mask_stop[t], self.hidden_size)[:, None]

    def _unpatchify(self, patches: Tensor) -> Tensor:
        p, grid = self.patch_size, self.input_size // self.patch_size
        patches = patches.view(-1, grid, grid, p, p, self.out_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(
            -1, self.out_channels, self.input_size, self.input_size
        )


def _layer_norm(hidden_size: int) -> nn.LayerNorm:
    return nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift
