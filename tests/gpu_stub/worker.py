"""Run a function of `jobs.py` on the stub: `python -m tests.gpu_stub.worker ANSWER NAME ARGS`."""

import json
import sys
from pathlib import Path

from tests.gpu_stub import jobs

if __name__ == "__main__":
    answer, name, args = sys.argv[1:]
    result = getattr(jobs, name)(*json.loads(args))
    Path(answer).write_text(json.dumps(result, default=str))
