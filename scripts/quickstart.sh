#!/usr/bin/env bash
# The main job, end to end, on text and images that Python and scikit-learn carry: train, specialise, merge, look.
#
#   bash scripts/quickstart.sh [OUT]      OUT is runs/quickstart unless named; 5 to 6 minutes on two CPU cores
#
# Eight virtual devices stand in for a pod; on real ones: EXTRAS=tpu JAX_PLATFORMS=tpu (or EXTRAS=cuda13 JAX_PLATFORMS=cuda).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/quickstart}
bash scripts/setup.sh "train,viz${EXTRAS:+,$EXTRAS}"
export PATH="$PWD/.venv/bin:$PATH" JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=8"

step() { printf '\n\033[1m%s\033[0m\n' "$*"; }

step "1. A byte-level MrT5 from scratch, then two experts from it: prose and code"
python -m scripts.train_mrt5 --out "$out"

step "2. Four merges of the sharded checkpoints, on the mesh, without gathering"
merge() { jaxmerge merge "$1" --base "$out/base" --models "$out/prose" "$out/code" --out "$out/$1" --overwrite "${@:2}"; }
jaxmerge merge linear --models "$out/prose" "$out/code" --out "$out/linear" --overwrite
merge task-arithmetic --scale 0.6
merge ties --density 0.5 --scale 0.7
merge dare-linear --density 0.5 --scale 0.5 --seed 0

step "3. Held-out bits per hidden byte, with soft and with hard deletion"
python -m scripts.evaluate --out "$out" --checkpoints \
  base="$out/base" prose="$out/prose" code="$out/code" \
  linear="$out/linear" task-arithmetic="$out/task-arithmetic" ties="$out/ties" dare="$out/dare-linear"

step "4. What was deleted from a page of text"
python -m scripts.show_bytes --checkpoint "$out/ties" --out "$out/deletions.html"

step "5. Token merging: a small ViT on digits, accuracy and speed against r"
python -m scripts.train_vit --out "$out"

step "Pictures and tables are in $out:"
ls -1 "$out"/*.png "$out"/*.html "$out"/*.json*
