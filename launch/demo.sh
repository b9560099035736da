#!/usr/bin/env bash
# The main job on real pictures, in minutes on two CPU cores: prepare scikit-learn's handwritten
# digits, train a small DTR-DiT on them with DeepSpeed, draw samples, measure them. Start it again
# after a kill and it goes on from its newest checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh prepare,eval

data=data/digits run=runs/demo_digits
# The ranks checkpoint and leave when this script is gone.
export DTR_SCALE_LAUNCHER_PID=$$

[ -f $data/manifest.json ] || dtr-scale prepare digits --out $data
deepspeed --log_level error launch/train.py --config configs/demo_digits.json
dtr-scale sample $run --num-samples 100
dtr-scale evaluate $run --num-samples 500

echo
echo "commands: source .venv/bin/activate"
echo "picture:  $run/samples/grid.png"
echo "numbers:  $run/evaluation.json, $run/journal.jsonl"
echo "MLflow:   cd runs && mlflow server"
