"""Start ranks as `torchrun` does, give them time to checkpoint, and end with their exit code.

    python launch/torchrun.py --nproc_per_node 8 launch/train.py --config FILE

torchrun kills its ranks 30 s after a SIGTERM, and turns any exit code into 1. This hands signals on
and waits, and whatever is above can tell a run that has checkpointed (75) from a mistake of the
user's (2). Neither is started again by `--max-restarts`, on any node. Options and PET_* variables
are torchrun's.
"""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from threading import Thread

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api
from torch.distributed.run import main

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
START_AGAIN, MISTAKE = 75, 2


class Agent(LocalElasticAgent):
    """Starts ranks again, `--max-restarts` times, but not those that left or would fail again."""

    def _monitor_workers(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, worker_group: WorkerGroup
    ) -> RunResult:
        result = super()._monitor_workers(worker_group)  # pyright: ignore[reportCallIssue]
        # All ranks end with one of these codes together, so that no node waits for another's.
        if any(rank.exitcode in (START_AGAIN, MISTAKE) for rank in result.failures.values()):
            self._remaining_restarts = 0
        return result


def hand_on(signals: int) -> None:
    """Give each signal that comes out of a pipe to the ranks."""
    ranks = Path(f"/proc/self/task/{os.getpid()}/children")  # the main thread has no others
    while number := os.read(signals, 1)[0]:
        if number in SIGNALS:
            for rank in ranks.read_text().split():
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(int(rank), number)
            if not ranks.read_text():  # the nodes still look for each other: nothing to save
                os._exit(START_AGAIN)


if __name__ == "__main__":
    signals, writer = os.pipe()
    os.set_blocking(writer, False)
    # Python's own handlers would wait with the main thread, which may be looking for other nodes.
    signal.set_wakeup_fd(writer)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    Thread(target=hand_on, args=(signals,), daemon=True).start()
    api.LocalElasticAgent = Agent  # pyright: ignore[reportPrivateImportUsage]
    try:
        # torchrun itself handles those that are named here.
        main(["--signals-to-handle=SIGHUP,SIGQUIT", *sys.argv[1:]])
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        # The first rank that failed; a signal's number is negative, as in `subprocess`.
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code > 0 else 128 - code)
