"""Draw samples on many GPUs: `torchrun --nproc_per_node 8 launch/sample.py RUN_DIR ...`."""

import sys

from dtr_scale.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
