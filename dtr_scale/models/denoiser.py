"""Define what all networks have in common: their sizes, conditions and blocks."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from dtr_scale.models.attention import AttentionModule


class Denoiser(nn.Module):
    """A network that predicts the noise in x_t and, with `learn_sigma`, where its variance lies.

    It takes samples [N, in_channels, input_size, input_size]. `conditioning` is "class"; "none",
    which means one class and no label dropout; or "text". With a `class_dropout_prob` above 0 it
    knows a null condition, for guidance.
    """

    def __init__(
        self,
        *,
        input_size: int,
        in_channels: int,
        num_classes: int,
        conditioning: str,
        class_dropout_prob: float,
        learn_sigma: bool,
    ) -> None:
        super().__init__()
        if conditioning == "none":
            num_classes, class_dropout_prob = 1, 0.0
        self.input_size = input_size
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.learn_sigma = learn_sigma
        self.conditioning = conditioning
        self.num_classes = num_classes
        # The row after the last class, as in the official label tables.
        self.null_label = num_classes
        self.class_dropout_prob = class_dropout_prob

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, y: Tensor, step: int | None = None) -> Tensor:
        """Return [N, out_channels, H, W] in the weights' dtype.

        x [N, C, H, W] is a noised sample, t int [N] its original timestep, or [1] that of all, y
        its label int [N] or its text tokens [N, context_length, context_dim] (see `null_like` for
        none). `step` is the training step, for masks that change with it.
        """

    @abstractmethod
    def routed_blocks(self) -> list[nn.Module]:
        """Return the blocks in forward order: each is routed, compiled and sharded by itself."""

    def null_like(self, y: Tensor) -> Tensor:
        """Return conditions like y that say nothing: the null label, or tokens of zeros."""
        return torch.full_like(y, 0 if self.conditioning == "text" else self.null_label)

    def attention_shapes(self) -> set[tuple[int, int]]:
        """Return (heads, channels of a head) of every layer of attention."""
        modules = (module for module in self.modules() if isinstance(module, AttentionModule))
        return {(module.num_heads, module.head_dim) for module in modules}

    def use_attention(self, backend: str) -> None:
        """Compute attention by another backend of `resolve_backend`, from before the first step."""
        for module in self.modules():
            if isinstance(module, AttentionModule):
                module.attention_backend = backend
