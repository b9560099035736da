"""What a checkpoint holds of a run besides its position."""

from torch import Tensor, nn

from dtr_scale.checkpoint.layout import Piece
from dtr_scale.engines.base import ADAM_MOMENTS, Engine
from dtr_scale.objectives.objective import Objective
from dtr_scale.train.ema import Ema


class TrainingState:
    """This rank's part of it, as pieces to save or to restore into.

    Fragments are views of the live tensors. Objective and buffers are small and copied: after a
    restore `take_over` hands them back.
    """

    def __init__(self, engine: Engine, ema: Ema, objective: Objective) -> None:
        self._engine = engine
        self._ema = ema
        self._objective = objective
        self._objective_state: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}

    def pieces(self) -> dict[str, Piece]:
        state = self._ema.pieces()
        for part in self._engine.fragments():
            state[f"master/{part.name}"] = Piece(part.shape, part.offset, part.master)
            for moment in ADAM_MOMENTS:
                state[f"{moment}/{part.name}"] = Piece(
                    part.shape, part.offset, getattr(part, moment)
                )
        self._objective_state = self._objective.state_dict()
        buffers = persistent_buffers(self._engine.network)
        self._buffers = {name: buffer.float() for name, buffer in buffers.items()}
        for kind, tensors in (("objective", self._objective_state), ("buffer", self._buffers)):
            for name, tensor in tensors.items():
                state[f"{kind}/{name}"] = Piece(tuple(tensor.shape), 0, tensor.view(-1))
        return state

    def take_over(self) -> None:
        """Bring engine and objective up to date with the pieces, which were written to."""
        self._engine.push_masters()
        self._objective.load_state_dict(self._objective_state)
        for name, buffer in persistent_buffers(self._engine.network).items():
            buffer.copy_(self._buffers[name])


def persistent_buffers(network: nn.Module) -> dict[str, Tensor]:
    """Return the network's own tensors that are neither learned nor made from its settings.

    Such as the masks of an R-TR checkpoint. Flags and small numbers: fp32 holds them exactly.
    """
    learned = dict(network.named_parameters(remove_duplicate=False))
    state = network.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if name not in learned}
