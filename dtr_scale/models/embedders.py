"""Embed what enters a diffusion transformer: patches, positions, timesteps and labels."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from dtr_scale.errors import ConfigError


class PatchEmbed(nn.Module):
    """Cut [N, C, H, W] into patches and project each: [N, L, D], row by row."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = _PatchProjection(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class _PatchProjection(nn.Conv2d):
    """The convolution of DiT's patches, with its parameters, as a matrix product over them."""

    def forward(self, input: Tensor) -> Tensor:
        # A convolution returns the channels of a token L numbers apart, and the whole residual
        # stream takes its strides over: each block then reads its tokens across memory.
        p = self.kernel_size[0]
        patches = input.unflatten(2, (-1, p)).unflatten(4, (-1, p))  # [N, C, H/p, p, W/p, p]
        # [N, L, C p p]; the channel first within a patch, as in the convolution's weight.
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return nn.functional.linear(patches, self.weight.flatten(1), self.bias)


class TimestepEmbedder(nn.Module):
    """Embed timesteps [N] as [N, D]: sinusoids, then a two-layer MLP."""

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256) -> None:
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, t: Tensor) -> Tensor:
        # fp32 up to here: in bf16, 998 and 999 are one timestep.
        frequencies = timestep_embedding(t, self.frequency_embedding_size)
        return self.mlp(frequencies.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Embed labels [N] as [N, D]; with label dropout, row `num_classes` is the null label.

    Labels arrive with the null label already put in by the data pipeline.
    """

    def __init__(self, num_classes: int, hidden_size: int, class_dropout_prob: float) -> None:
        super().__init__()
        # DiT and ADM have no row without dropout: official weights load strictly.
        num_rows = num_classes + (class_dropout_prob > 0)
        self.embedding_table = nn.Embedding(num_rows, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class TextEmbedder(nn.Module):
    """Put the learned null text [L, D] in the place of tokens that are all zero.

    The data pipeline drops a text by sending zeros, which no text encoder returns. Without label
    dropout there is no null text and tokens [N, L, D] pass as they are.
    """

    def __init__(self, context_length: int, context_dim: int, class_dropout_prob: float) -> None:
        super().__init__()
        self.null_tokens = None
        if class_dropout_prob > 0:
            # Filled by `DiT.initialize_weights`, with all of its `y_embedder`.
            self.null_tokens = nn.Parameter(torch.empty(context_length, context_dim))

    def forward(self, y: Tensor) -> Tensor:
        if self.null_tokens is None:
            return y
        if y.shape[1:] != self.null_tokens.shape:
            raise ConfigError(
                f"texts of shape {list(y.shape[1:])} do not fit model.context_length and "
                f"model.context_dim = {list(self.null_tokens.shape)}"
            )
        return torch.where(y.any(dim=(1, 2), keepdim=True), y, self.null_tokens)


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Return [cos(t w_i), sin(t w_i)], fp32 [N, dim], with w_i = max_period^(-2i/dim)."""
    half = dim // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    # In fp32 exp differs by one unit in the last place between CPUs; t = 999 makes it a thousand.
    frequencies = (-math.log(max_period) * i / half).double().exp().float()
    angles = t[:, None].float() * frequencies
    # Cosines first, as in DiT and guided-diffusion; their weights depend on it.
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_position_table(hidden_size: int, grid_size: int) -> Tensor:
    """Return the fixed 2-D positions of MAE and DiT, fp32 [grid_size**2, hidden_size].

    The first half of the channels encodes the column, the second half the row, each as
    [sin(p w_i), cos(p w_i)] with w_i = 10000^(-4i/hidden_size).
    """
    # fp64 until the end, as MAE and DiT make the table that official weights were trained with.
    quarter = hidden_size // 4
    omega = 10_000.0 ** (-np.arange(quarter, dtype=np.float64) / quarter)
    angles = np.arange(grid_size, dtype=np.float64)[:, None] * omega
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    # [L, D/2] each: patches go row by row, so the column changes fastest.
    columns, rows = np.tile(axis, (grid_size, 1)), np.repeat(axis, grid_size, axis=0)
    return torch.tensor(np.concatenate([columns, rows], axis=1), dtype=torch.float32)
