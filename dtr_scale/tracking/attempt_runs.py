"""Show each attempt of a run, a job from its start to its end, as a run of its own in MLflow."""

from collections.abc import Iterable
from typing import Any

from dtr_scale.tracking.attempts import Attempt
from dtr_scale.tracking.mlflow import Server
from dtr_scale.tracking.names import GOODPUT
from dtr_scale.tracking.points import RunPoints

TRAINING, ATTEMPT = "dtr_scale.training", "dtr_scale.attempt"
PARENT = "mlflow.parentRunId"
_STATUS = {"finished": "FINISHED", "preempted": "KILLED", "killed": "KILLED", "failed": "FAILED"}


class AttemptRuns:
    """The runs of a training's attempts, below its own run.

    `last_sign_ms` is the time of the newest figure that the server had of the training.
    """

    def __init__(
        self,
        server: Server,
        experiment_id: str,
        run_id: str,
        training: str,
        points: RunPoints,
        last_sign_ms: int | None,
    ) -> None:
        self._server = server
        self._experiment_id = experiment_id
        self._run_id = run_id
        self._training = training
        self._points = points
        self._last_sign_ms = last_sign_ms
        self._sent: list[Attempt] | None = None

    def send(self, attempts: list[Attempt]) -> None:
        """Let there be a run for each attempt, and let the training's stand as the last does."""
        if attempts == self._sent or not attempts:
            return
        found = self._server.runs(self._experiment_id, (TRAINING, self._training))
        sent = {r.data.tags[ATTEMPT]: r for r in found if ATTEMPT in r.data.tags}
        local = {attempt.id for attempt in attempts}
        elsewhere = [run for name, run in sent.items() if name not in local]
        for number, attempt in enumerate(attempts, len(elsewhere) + 1):
            self._send_one(attempt, number, sent.get(attempt.id))
            if attempt.end and attempt.run_goodput is not None:
                named = {GOODPUT: attempt.run_goodput}
                self._points.send(named, attempt.end_step or attempt.step, attempt.end)
        last = attempts[-1]
        for run in elsewhere:
            self._put_below(run)
            # A job on another host that was killed, since the run is ours by now.
            if run.info.status == "RUNNING" and not last.end:
                reason = {"reason": "it ended without a word"}
                self._server.log_tags(run.info.run_id, reason)
                self._server.terminate(run.info.run_id, "KILLED", self._last_sign_ms)
        if last.end:
            self._end(self._run_id, last)
        else:
            # The job before may have ended it, and a kill leaves it RUNNING for ever.
            self._server.set_running(self._run_id)
        self._sent = attempts

    def _send_one(self, attempt: Attempt, number: int, run: Any) -> None:  # noqa: ANN401
        server = self._server
        if run is None:
            facts = {k: _as_text(v) for k, v in attempt.facts.items() if v is not None}
            tags = {TRAINING: self._training, ATTEMPT: attempt.id, PARENT: self._run_id}
            tags |= {"from_step": str(attempt.step), **facts}
            start_ms = int(attempt.start.timestamp() * 1000)
            name = f"attempt {number}"
            run_id = server.create_run(self._experiment_id, name, tags, start_ms)
        else:
            run_id = run.info.run_id
            self._put_below(run)
            if run.info.status != "RUNNING":
                return
        if attempt.end:
            told = {"outcome": attempt.outcome, "reason": attempt.reason or attempt.outcome}
            server.log_tags(run_id, told | {"to_step": str(attempt.end_step)})
            if attempt.goodput is not None:
                server.log_metrics(run_id, [({GOODPUT: attempt.goodput}, attempt.end_step or 0)])
            # Last: one that has ended is not looked at again.
            self._end(run_id, attempt)

    def _end(self, run_id: str, attempt: Attempt) -> None:
        assert attempt.end is not None
        status = _STATUS.get(attempt.outcome, "FAILED")
        self._server.terminate(run_id, status, int(attempt.end.timestamp() * 1000))

    def _put_below(self, run: Any) -> None:  # noqa: ANN401
        # Another run may have taken the place of the one that it was below.
        if run.data.tags.get(PARENT) != self._run_id:
            self._server.log_tags(run.info.run_id, {PARENT: self._run_id})


def _as_text(value: Any) -> str:  # noqa: ANN401
    is_list = isinstance(value, Iterable) and not isinstance(value, str)
    return ", ".join(map(str, value)) if is_list else str(value)
