#!/usr/bin/env bash
# Train on several nodes without ssh between them: type the same line on each, within ten minutes.
# When a rank dies, torchrun starts all of them again, from the newest checkpoint.
#
#   NODES=2 RENDEZVOUS=node1:29400 bash launch/torchrun.sh configs/dit_l_dtr_antuw.json
#
# RENDEZVOUS is one of the nodes, by a name or an address that all reach, and a free port there.
# GPUS is how many each node has, by default all that are found. RESTARTS is how often ranks are
# started again, by default 3 times. Further arguments are overrides, as in --train.lr=2e-4.
# The exit code is the ranks': 0 finished, 75 checkpointed on request, 2 a mistake, 1 a failure.
set -euo pipefail
export PATH="$PWD/.venv/bin:$PATH"
# torchrun's own store keeps the addresses of ranks that are gone, and new ranks connect to those.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec python launch/torchrun.py --nnodes="${NODES:?how many nodes}" --nproc-per-node="${GPUS:-auto}" \
    --max-restarts="${RESTARTS:-3}" --rdzv-backend=c10d --rdzv-id=dtr-scale \
    --rdzv-endpoint="${RENDEZVOUS:?one of the nodes and a port, as in node1:29400}" \
    launch/train.py --config "${@:?an experiment, as in configs/dit_l_dtr_antuw.json}"
