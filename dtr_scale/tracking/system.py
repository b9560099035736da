"""Show in MLflow how busy each node is: CPU, memory, disk, network and, with NVML, GPUs."""

import logging
import re
import socket
import threading
from typing import Any

from dtr_scale.tracking.description import RunInfo

log = logging.getLogger(__name__)

_SAMPLE_SECONDS = 10.0
# A point a minute: ten thousand in a week, of each figure of each node.
_SAMPLES_PER_POINT = 6
_RETRY_SECONDS = 60.0


class SystemMetrics:
    """Samples this node from a thread. What a server that is away misses is not kept."""

    def __init__(self, info: RunInfo) -> None:
        self._info = info
        self._node = re.sub(r"[^A-Za-z0-9_\-.]", "_", socket.gethostname()) or "node"
        self._closing = threading.Event()
        threading.Thread(target=self._run, name="system-metrics", daemon=True).start()

    def close(self) -> None:
        self._closing.set()

    def _run(self) -> None:
        pause = 1.0
        while not self._closing.wait(pause):
            try:
                pause = self._sample_while_it_lasts()
            except Exception as error:  # rank 0's mirror tells of an outage
                log.debug("system metrics: %s", error)
                pause = _RETRY_SECONDS

    def _sample_while_it_lasts(self) -> float:
        """Send points for as long as the run's MLflow run stays the same."""
        run_id = self._find()
        if run_id is None:
            return _SAMPLE_SECONDS
        from dtr_scale.tracking.mlflow import system_monitor

        monitor = system_monitor(self._info.uri, run_id, self._node)
        # The first reading is of no time at all.
        monitor.collect_metrics()
        for part in monitor.monitors:
            part.clear_metrics()
        self._send(monitor, samples=1)  # so that a short run has a point, too
        while not self._closing.is_set() and self._find() == run_id:
            self._send(monitor, _SAMPLES_PER_POINT)
        return 0.0

    def _send(self, monitor: Any, samples: int) -> None:  # noqa: ANN401
        for _ in range(samples):
            if self._closing.wait(_SAMPLE_SECONDS):
                return
            monitor.collect_metrics()
        monitor.publish_metrics(monitor.aggregate_metrics())

    def _find(self) -> str | None:
        from dtr_scale.tracking.mlflow import Server
        from dtr_scale.tracking.run import find_run

        server, told = Server(self._info.uri, self._info.home), self._info.description
        run = find_run(server, server.experiment(told.experiment), told.training)
        return run.info.run_id if run else None
