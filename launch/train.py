"""Train an experiment: `deepspeed launch/train.py --config configs/dit_l_dtr_antuw.json`."""

import sys

from dtr_scale.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
