"""One task at a time in a thread of its own."""

import threading
from collections.abc import Callable


class Background:
    """Runs a task beside the loop. What it raises is raised by the next `wait`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, task: Callable[[], None]) -> None:
        assert self._thread is None, "wait for the task before"
        # A daemon: it must not keep a process alive whose loop has failed.
        self._thread = threading.Thread(target=self._run, args=(task,), daemon=True)
        self._thread.start()

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Wait for the task, if there is one, and raise what it has raised."""
        if self._thread is None:
            return
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            return
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def _run(self, task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            self._error = error
