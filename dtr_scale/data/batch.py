"""Put together micro-batches: samples decoded, with every draw made.

All of it is a function of (seed, position, salt), position = samples seen before the global batch +
place in it: the same at any world size, micro-batch size and number of workers.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dtr_scale.data.order import GlobalOrder
from dtr_scale.data.reader import Samples
from dtr_scale.randomness import KeyedStream


class MicroBatch(NamedTuple):
    """The n samples of one micro-step of training, with their draws."""

    x_start: Tensor  # float32 [n, C, H, W]
    noise: Tensor  # float32 [n, C, H, W]
    t: Tensor  # int64 [n], timestep
    cluster: Tensor  # int64 [n], cluster of the timestep
    y: Tensor  # int64 [n], class index (num_classes: none); or tokens float32 [n, L, D]

    def to(self, device: torch.device) -> "MicroBatch":
        """Return it on a device; the host waits for no copy to a GPU."""
        # Only page-locked memory is copied while the host goes on. What is so already stays.
        tensors = (t.pin_memory() for t in self) if device.type == "cuda" else self
        return MicroBatch(*(tensor.to(device, non_blocking=True) for tensor in tensors))


class TimestepDraw(Protocol):
    """Timesteps of places in the global batch; picklable."""

    def draw(self, samples_seen: int, places: np.ndarray | range, salt: int = 0) -> tuple[Any, Any]:
        """Return (t, cluster), each int64 [len(places)]."""
        ...


class BatchAssembler:
    """Puts together what places of a global batch hold. With `conditioning` "none" labels are 0.

    `stream_prefix` makes the draws others than those of training at the same positions.
    """

    def __init__(
        self,
        samples: Samples,
        order: GlobalOrder,
        *,
        seed: int,
        global_batch_size: int,
        draw_timesteps: TimestepDraw,
        conditioning: str = "class",
        class_dropout_prob: float = 0.0,
        horizontal_flip: bool = False,
        stream_prefix: str = "",
    ) -> None:
        assert order.shard_samples == samples.shard_samples
        self.samples = samples
        self.order = order
        self.global_batch_size = global_batch_size
        self._draw_timesteps = draw_timesteps
        self._conditioning = conditioning
        self._drop_prob = class_dropout_prob
        self._flip_prob = 0.5 if horizontal_flip else 0.0
        streams = ("flip", "caption", "label_drop", "posterior", "noise")
        self._streams = {name: KeyedStream(seed, stream_prefix + name) for name in streams}
        self._null: np.ndarray | int | None = None

    def empty(self, *size: int) -> MicroBatch:
        """Return a micro-batch of any numbers; all its tensors begin with `size`."""
        manifest = self.samples.manifest
        x_start, noise = (torch.empty(*size, *manifest.shape) for _ in range(2))
        t, cluster, y = (torch.empty(size, dtype=torch.int64) for _ in range(3))
        if self._is_text:
            y = torch.empty(*size, *(manifest.context_shape or ()))
        return MicroBatch(x_start, noise, t, cluster, y)

    def assemble(
        self, samples_seen: int, places: np.ndarray, salt: int, out: MicroBatch | None = None
    ) -> MicroBatch:
        """Return what `places` int [n] of a global batch hold, in `out` if given."""
        out = out or self.empty(len(places))
        positions = samples_seen + places
        # Most of the time goes into two fields of normals, which numpy draws outside Python's lock:
        # the noise here, the posterior's in `_decode` at the same time.
        noise = self._beside.submit(self._normals, "noise", positions, salt, out.noise)
        mirrored = self._chosen("flip", self._flip_prob, positions, salt)
        caption = np.zeros(len(places))
        if self._is_text:
            caption = self._streams["caption"].uniform(positions, salt)
        # The mirror comes before the reading: of two stored views the drawn one alone is read.
        located = self.order.samples(positions)
        stored, y = self.samples.read_views(located, mirrored, caption)
        if self._conditioning == "none":
            y = np.zeros(len(places), np.int64)
        else:
            y[self._chosen("label_drop", self._drop_prob, positions, salt)] = self._null_condition()
        # In place, here and below: `out` may be memory that is shared with the main process.
        out.y.copy_(torch.from_numpy(y))
        self._decode(stored, mirrored, positions, salt, out.x_start)
        t, cluster = self._draw_timesteps.draw(samples_seen, places, salt)
        out.t.copy_(torch.from_numpy(t))
        out.cluster.copy_(torch.from_numpy(cluster))
        noise.result()
        return out

    @functools.cached_property
    def _beside(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="noise")

    def __getstate__(self) -> dict[str, Any]:
        # Threads do not travel to a worker, which makes its own.
        return {name: value for name, value in self.__dict__.items() if name != "_beside"}

    @property
    def _is_text(self) -> bool:
        return self._conditioning == "text"

    def _null_condition(self) -> np.ndarray | int:
        if self._null is None:
            is_text, manifest = self._is_text, self.samples.manifest
            self._null = self.samples.null_condition() if is_text else manifest.num_classes
        return self._null

    def _decode(
        self,
        stored: np.ndarray,
        mirrored: np.ndarray,
        positions: np.ndarray,
        salt: int,
        x_start: Tensor,
    ) -> None:
        """Fill x_start: stored * scale_factor + shift, of a posterior mean + std * eps."""
        manifest = self.samples.manifest
        numbers = torch.from_numpy(stored)
        if manifest.encoding == "posterior":
            # Both [n, C, H, W]. eps is drawn into x_start itself, so no further field is needed.
            mean, std = numbers.unbind(1)
            self._normals("posterior", positions, salt, x_start)
            x_start.mul_(std.float()).add_(mean.float())
        else:
            x_start.copy_(numbers)
            # Pixels alone are mirrored here: the latent of a mirror image is no mirrored latent.
            flipped = torch.from_numpy(mirrored)
            x_start[flipped] = x_start[flipped].flip(-1)
        x_start.mul_(manifest.scale_factor).add_(manifest.shift)

    def _normals(self, stream: str, positions: np.ndarray, salt: int, out: Tensor) -> None:
        """Fill out float32 [n, ...] with each position's own numbers."""
        keyed = self._streams[stream]
        # A generator per position: a sample's numbers do not depend on who else is in the batch.
        for numbers, position in zip(out.numpy(), positions.tolist(), strict=True):
            keyed.at(position, salt).standard_normal(out=numbers, dtype=np.float32)

    def _chosen(self, stream: str, prob: float, positions: np.ndarray, salt: int) -> np.ndarray:
        """Return whether each position is chosen with probability `prob`, bool [n]."""
        # Nothing is drawn. Other streams do not move by that: each is keyed by its own name.
        if not prob:
            return np.zeros(len(positions), bool)
        return self._streams[stream].uniform(positions, salt) < prob
