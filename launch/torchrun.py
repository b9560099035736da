"""Start ranks as `torchrun` does, give them time to checkpoint, and end with their exit code.

    python launch/torchrun.py --nproc_per_node 8 launch/train.py --config FILE

torchrun kills its ranks 30 s after a SIGTERM, and turns any exit code into 1. This hands signals on
and waits, and whatever is above can tell a run that has checkpointed (75) from a mistake of the
user's (2). Neither is started again by `--max-restarts`, on any node. Options and PET_* variables
are torchrun's.
"""

import logging
import sys

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api
from torch.distributed.run import main

from dtr_scale.jobs.supervise.signals import START_AGAIN, hand_signals_on

MISTAKE = 2


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


if __name__ == "__main__":
    hand_signals_on()
    # It tells of each rank that ended what the table below tells again.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    api.LocalElasticAgent = Agent  # pyright: ignore[reportPrivateImportUsage]
    try:
        # torchrun itself handles those that are named here.
        main(["--signals-to-handle=SIGHUP,SIGQUIT", *sys.argv[1:]])
    except ChildFailedError as error:
        # The first rank that failed; a signal's number is negative, as in `subprocess`.
        code = error.get_first_failure()[1].exitcode
        if code not in (START_AGAIN, MISTAKE):  # which the ranks have told in their own words
            print(error, file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)
