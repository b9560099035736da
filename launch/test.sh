#!/usr/bin/env bash
# Install and run the tests; arguments go to pytest: bash launch/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh test
# More threads than cores make small networks ten times slower.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m pytest "$@"
