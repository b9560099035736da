"""Prepare data on many GPUs: `torchrun --nproc_per_node 8 launch/prepare.py imagefolder ...`."""

import sys

from dtr_scale.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
