"""Send single numbers of a run to MLflow, each once."""

import math
from collections.abc import Mapping
from datetime import datetime

from dtr_scale.tracking.mlflow import DataSet, Point, Server


class RunPoints:
    """The points of a run that are no figures of the journal."""

    def __init__(self, server: Server, run_id: str) -> None:
        self._server = server
        self._run_id = run_id
        self._found: dict[str, list[Point]] = {}

    def send(
        self,
        named: Mapping[str, float],
        step: int,
        time: datetime,
        model_id: str | None = None,
        dataset: DataSet | None = None,
    ) -> None:
        """Send the numbers that the run does not have: of one step a value stands there once."""
        points = []
        for name, value in named.items():
            if name not in self._found:
                self._found[name] = self._server.history(self._run_id, name)
            known = self._found[name]
            if not any(point.step == step and is_same(point.value, value) for point in known):
                points.append((name, Point(step, value, int(time.timestamp() * 1000))))
        if points:
            self._server.log_points(self._run_id, points, model_id=model_id, dataset=dataset)
        for name, point in points:
            self._found[name].append(point)


def is_same(stored: float, value: float) -> bool:
    """Tell whether a server's number is the journal's: databases may round its last digits."""
    if math.isinf(value):  # MLflow stores the largest number in its place
        return math.copysign(1, value) * stored > 1e308
    return math.isclose(stored, value, rel_tol=1e-12) or (stored != stored and value != value)
