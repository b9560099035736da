#!/usr/bin/env bash
# Install and run the tests; arguments go to pytest: bash launch/test.sh -m 'not slow'
#
# Some tests need servers (Ceph, SLURM, sshd), which root on Debian gets from tests/debian-packages.txt.
# Elsewhere these tests are left out, and the last line says so.
set -euo pipefail
cd "$(dirname "$0")/.."
mapfile -t packages < tests/debian-packages.txt
options=()
if [ "$(id -u)" != 0 ]; then
    options=("--leave-out-services=the servers are started by root only")
elif ! dpkg -s "${packages[@]}" > /dev/null 2>&1; then
    if command -v apt-get > /dev/null; then
        echo "installing Debian's packages ${packages[*]}"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends \
            "${packages[@]}" > /dev/null
    else
        options=("--leave-out-services=without apt-get install by hand: ${packages[*]}")
    fi
fi
source launch/environment.sh test
# More threads than cores make small networks ten times slower.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m pytest "${options[@]}" "$@"
