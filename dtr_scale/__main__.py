"""`python -m dtr_scale` is `dtr-scale`."""

import sys

from dtr_scale.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
