#!/usr/bin/env bash
# What only a GPU can show, in one go of less than eight minutes: how fast a student is distilled, the tests marked `gpu`, and a
# job that is killed and resumed beside one that is not.
#     bash experiments/benchmarks/gpu.sh [FOLDER]     # results and logs go to FOLDER, runs/gpu by default
# A machine without this project's extras needs no more than `pip install -e .` and pytest.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/gpu}
mkdir -p "$out"
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
step sd15 200 python3 -m experiments.benchmarks.distillation --shape sd15 --batch 64 --encoders --out "$out" \
  --rows compiled "compiled, deterministic" eager
step tests 90 python3 -m pytest -q -m gpu -n 0 -p no:cacheprovider

job=(python3 train.py trainer=gpu logger=csv evaluation=none trainer.checkpoint_every=25 "paths.cache=$out/cache")
step undisturbed 100 "${job[@]}" "paths.runs=$out/undisturbed/default"
echo "== killed"
"${job[@]}" "paths.runs=$out/killed/default" > "$out/killed.log" 2>&1 &
for _ in $(seq 600); do
  compgen -G "$out/killed/default/prune/*/checkpoints/distil/step=*50.ckpt" > /dev/null && break
  sleep 0.1
done
kill -KILL $! && wait $! 2> /dev/null
step resumed 60 "${job[@]}" "paths.runs=$out/killed/default" trainer.resume=required
step same_bits 30 python3 -m experiments.tools.same_bits compare "$out/undisturbed" "$out/killed"
step sdxl 100 python3 -m experiments.benchmarks.distillation --shape sdxl_base --batch 8 --out "$out" --steps 3 --rows eager
exit $failed
