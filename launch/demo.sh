#!/usr/bin/env bash
# The main job on real pictures, in minutes on two CPU cores: prepare scikit-learn's handwritten
# digits, train a small DiT on them with DeepSpeed, without DTR and with it, draw samples, measure
# and compare them. Start it again after a kill and it goes on from its newest checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh prepare,eval

data=data/digits run=runs/demo_digits plain=runs/demo_digits_plain page=runs/comparison
config=configs/demo_digits.json
# The ranks checkpoint and leave when this script is gone.
export DTR_SCALE_LAUNCHER_PID=$$

[ -f $data/manifest.json ] || dtr-scale prepare digits --out $data
deepspeed --log_level error launch/train.py --config $config \
    --name=demo_digits_plain --model.routing.type=none
deepspeed --log_level error launch/train.py --config $config
dtr-scale evaluate $plain --num-samples 500 > $plain/evaluation.txt
dtr-scale evaluate $run --num-samples 500 > $run/evaluation.txt
picture=$(dtr-scale sample $run --num-samples 100 --force)
dtr-scale plots $run > /dev/null
link=$(dtr-scale tracking link $run)

echo
dtr-scale compare $plain $run --out $page
echo
echo "compared: $page/index.html"
echo "curves:   $run/plots/sheet.png"
echo "picture:  $picture"
echo "numbers:  $run/evaluation.json, $run/journal.jsonl"
echo "MLflow:   $link"
echo
echo "with DTR:"
cat $run/evaluation.txt
echo
echo "next, after source .venv/bin/activate:"
echo "  dtr-scale sample $run --classes 3,7 --guidance 1,3,8"
echo "  dtr-scale prepare imagefolder YOUR_PICTURES --out data/mine --pixels"
echo "  dtr-scale config init --data data/mine --out mine.json"
