"""Let all ranks agree on the step after which they leave, without waiting for each other."""

from collections.abc import Callable

from dtr_scale.engines.world import World


class LeaveVote:
    """The wishes of all ranks to leave, counted once a step.

    They are added up between the hosts while the next step is computed: no device takes part, and
    no step waits for another rank's. So the answer is that of the step before, on all ranks alike;
    in a world of one it is known at once.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._counted: Callable[[], float] | None = None

    def passed(self, wish: bool) -> bool:
        """Take this rank's wish at this step; tell whether all leave. Every rank calls it."""
        if self._world.world_size == 1:
            return wish
        before, self._counted = self._counted, self._world.begin_sum(float(wish))
        return before is not None and before() > 0
