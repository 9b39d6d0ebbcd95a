#!/usr/bin/env bash
# The reference size, 522 M parameters: 8 GPUs of 80 GB for text and chats, one of them for images.
#   bash runs/full.sh                                # all settings: runs/common.sh
#   GPUS=1 GPU='A100 40 GB' bash runs/full.sh        # stages 2 to 4, with stage 1 in out/full
# Text comes from the hub while it trains. Stopped or killed, the same command goes on.
run=full configs=configs/full GPUS=${GPUS:-8} GPU=${GPU:-8 x A100 80 GB}
source "$(dirname "$0")/common.sh"
run_all
