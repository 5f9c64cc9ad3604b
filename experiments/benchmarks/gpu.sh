#!/usr/bin/env bash
# What only a GPU can show: how fast a student is distilled, the tests marked `gpu`, and a job that is killed and resumed beside one
# that is not. The limits of the steps add up to eight minutes; not run on a GPU so far.
#     bash experiments/benchmarks/gpu.sh [FOLDER]     # tables and logs go to FOLDER, runs/gpu by default
# It needs this project's packages without its extras, pytest and pytest-xdist.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/gpu}
mkdir -p "$out"
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
export WANDB_MODE=offline PYTHONUNBUFFERED=1
failed=0
step() { # NAME SECONDS COMMAND...: run a command with a limit; its output goes to the terminal and to a log
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  echo "== $name"
  timeout "$limit" "$@" 2>&1 | tee "$out/$name.log" || { echo "$name: failed or ran past $limit s"; failed=1; }
  echo "$name: $((SECONDS - start)) s"
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$out/machine.txt"
python3 -c "import sys, torch; print('python', sys.version.split()[0], 'torch', torch.__version__)" | tee -a "$out/machine.txt"
date -u +%F | tee -a "$out/machine.txt"
step sd15 180 python3 -m experiments.benchmarks.distillation --shape sd15 --batch 64 --encoders --out "$out" \
  --rows compiled eager "compiled, deterministic"
step tests 80 python3 -m pytest -q -m gpu -n 0 -p no:cacheprovider tests/lightning_modules/test_gpu.py

job=(python3 train.py trainer=gpu logger=csv evaluation=none trainer.checkpoint_every=25 "paths.cache=$runs/cache")
step undisturbed 60 "${job[@]}" "paths.runs=$runs/undisturbed/default"
echo "== killed"
"${job[@]}" "paths.runs=$runs/killed/default" > "$out/killed.log" 2>&1 &
killed=$!
for _ in $(seq 400); do
  compgen -G "$runs/killed/default/prune/*/checkpoints/distil/step=0000050.ckpt" > /dev/null && break
  sleep 0.1
done
kill -KILL $killed || { echo "the job ended before it could be killed"; failed=1; }
wait $killed 2> /dev/null
step resumed 40 "${job[@]}" "paths.runs=$runs/killed/default" trainer.resume=required
grep -q "resuming from step" "$out/resumed.log" || { echo "nothing was resumed"; failed=1; }
step same_bits 20 python3 -m experiments.tools.same_bits compare "$runs/undisturbed" "$runs/killed"
step sdxl 60 python3 -m experiments.benchmarks.distillation --shape sdxl_base --batch 8 --out "$out" --steps 3 --rows eager
exit $failed
