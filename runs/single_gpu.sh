#!/usr/bin/env bash
# Everything on one GPU of 24 to 80 GB: the largest decoder that a budget pays for, by the rules of
# docs/recipe.md. Stopped or killed, the same command goes on.
#   BUDGET=10 GPU='RTX 4090' bash runs/single_gpu.sh    # dollars; GPU: an entry of benchmarks/gpus.json
#   BUDGET=8h bash runs/single_gpu.sh                   # hours; other settings: runs/common.sh
run=single_gpu configs=configs/full GPU=${GPU:-A100 40 GB}
source "$(dirname "$0")/common.sh"
run_all --budget="${BUDGET:-10}"
