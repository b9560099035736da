#!/usr/bin/env bash
# Measure this machine's first GPU in ten minutes: bash launch/bench_gpu.sh [OUT] [--KEY=VALUE ...]
#
# tests/gpu, DiT-L/2 and XL/2 by several engines and micro-batches, sampling, attention and a checkpoint.
# It needs no network and no data, in an environment that has dtr-scale. The last table sets each
# step beside what `dtr-scale plan` expects. OUT (default: runs/bench_gpu) keeps the logs and figures.
# What the time does not reach is left out and named; SECONDS_AT_MOST=1200 gives it more. Overrides
# are for all: --engine.device=cpu --model.variant=DiT-S/2 tries the script without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=runs/bench_gpu
if [ $# -gt 0 ] && [[ $1 != --* ]]; then
    out=$1
    shift
fi
overrides=("$@")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}
python - "${overrides[@]}" << 'PYTHON' || exit 2
import sys, torch
if torch.cuda.is_available():
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)
elif "--engine.device=cpu" not in sys.argv:
    sys.exit("error: PyTorch finds no GPU here; check nvidia-smi, or give --engine.device=cpu")
PYTHON
mkdir -p "$out"
rm -f "$out"/*.json "$out"/*.log

# measure NAME SECONDS COMMAND...: run it if about so many seconds are left, and show its end.
measure() {
    local name=$1 needed=$2 left=$((${SECONDS_AT_MOST:-570} - SECONDS)) began=$SECONDS
    shift 2
    if [ "$left" -lt "$needed" ]; then
        echo "== $name: left out, $left s are left and about $needed are needed"
        return
    fi
    timeout --kill-after=5 "$left" "$@" > "$out/$name.log" 2>&1
    local code=$?
    echo "== $name: exit code $code after $((SECONDS - began)) s"
    tail -n 16 "$out/$name.log"
}

# train NAME SECONDS CONFIG ENGINE MICRO_BATCH [--KEY=VALUE ...]: a step of one micro-batch
train() {
    measure "$1" "$2" dtr-scale bench train --config "configs/$3.json" --json "$out/$1.json" \
        --data.type=synthetic --tracking.type=none "--engine.type=$4" \
        "--train.global_batch_size=$5" "--train.micro_batch_size=$5" "${@:6}" "${overrides[@]}"
}

train l_zero1_64 90 dit_l_dtr_antuw deepspeed 64
train l_flat_64 90 dit_l_dtr_antuw flat 64
train l_fsdp2_64 60 dit_l_dtr_antuw fsdp2 64
train l_flat_32 60 dit_l_dtr_antuw flat 32
train l_flat_128 60 dit_l_dtr_antuw flat 128
train xl_flat_64 90 dit_xl_dtr_antuw flat 64
train s_flat_32 45 dit_l_dtr_antuw flat 32 --model.variant=DiT-S/2
train s_graphs_32 45 dit_l_dtr_antuw flat 32 --model.variant=DiT-S/2 --engine.cuda_graphs=true
measure sample 60 dtr-scale bench sample --config configs/dit_l_dtr_antuw.json --json "$out/sample.json" \
    --num-samples 64 --data.type=synthetic --evaluation.num_sampling_steps=20 "${overrides[@]}"
measure attention 20 dtr-scale bench attention --config configs/dit_l_dtr_antuw.json \
    --json "$out/attention.json" --data.type=synthetic "${overrides[@]}"
measure checkpoint 30 dtr-scale bench checkpoint --model DiT-L/2 --rounds 2
for test in attention snapshot graphs engines training; do
    measure "test_$test" 45 python -m pytest -q -m gpu "tests/gpu/test_$test.py"
done
train xl_zero1_32 90 dit_xl_dtr_antuw deepspeed 32

python - "$out" << 'PYTHON'
import json, subprocess, sys
from pathlib import Path
from dtr_scale.jobs.plan.gpus import GPUS

print(f"\n{'':12}{'images/s':>9}{'planned':>9}{'TFLOP/s':>9}{'of product':>11}{'GB':>7}{'planned':>9}")
for path in sorted(Path(sys.argv[1]).glob("*_*.json")):
    found = json.loads(path.read_text())
    settings, device = found["config"], found["machine"]["device"]
    known = [gpu.name for gpu in GPUS.values() if gpu.title in device]
    rate = memory = "-"
    if known:
        config = "dit_xl_dtr_antuw" if path.stem.startswith("xl") else "dit_l_dtr_antuw"
        keys = ("engine.type", "train.global_batch_size", "train.micro_batch_size", "model.variant")
        told = subprocess.run(
            ["dtr-scale", "plan", "--config", f"configs/{config}.json", "--gpus", "1", "--json",
             "--gpu", known[0], *(f"--{key}={settings[key]}" for key in keys)],
            check=True, capture_output=True, text=True,
        )
        plan = json.loads(told.stdout)
        rate = f"{plan['samples_per_second']:.0f}"
        memory = f"{plan['engines'][plan['engine']]['memory']['total'] / 1e9:.1f}"
    print(
        f"{path.stem:12}{found['samples_per_second']:9.1f}{rate:>9}"
        f"{found['model_flops_per_second'] / 1e12:9.1f}{found['mfu']:11.1%}"
        f"{found['memory_peak_bytes'] / 1e9:7.1f}{memory:>9}"
    )
print(f"{device}; logs and figures are in {sys.argv[1]}")
PYTHON
