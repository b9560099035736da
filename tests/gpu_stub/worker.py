"""Run a function of `jobs.py` on the stub: `python -m tests.gpu_stub.worker ANSWER NAME ARGS`."""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    # Here, since data workers import this module, too.
    from tests.gpu_stub import jobs

    answer, name, args = sys.argv[1:]
    result = getattr(jobs, name)(*json.loads(args))
    Path(answer).write_text(json.dumps(result, default=str))
