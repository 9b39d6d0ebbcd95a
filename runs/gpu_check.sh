#!/usr/bin/env bash
# The first minutes on a rented GPU or in Colab: are results right, which kernels work, how fast are
# the steps? At most 12 minutes on one GPU; ends with a table and out/gpu_check.json.
#   bash runs/gpu_check.sh              # configs/full, or configs/t4 on a GPU before Ampere
#   bash runs/gpu_check.sh --dry_run    # small shapes, also on a CPU
set -euo pipefail
cd "$(dirname "$0")/.."
[ "${1:-}" = --dry_run ] && set -- --dry_run=True "${@:2}"
exec python experiments/gpu_check.py "$@"
