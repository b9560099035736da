"""Measure a run on many GPUs: `torchrun --nproc_per_node 8 launch/evaluate.py RUN_DIR ...`."""

import sys

from dtr_scale.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
