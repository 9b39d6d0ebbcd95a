#!/usr/bin/env bash
# An 89 M model on one free 16 GB GPU, in an evening. Stopped, killed or preempted, the same command
# goes on.
#   bash runs/t4.sh                                     # settings: runs/common.sh
run=t4 configs=configs/t4 GPU=${GPU:-T4}
MAX_CHATS=${MAX_CHATS:-150000} DATA=${DATA:-data/t4}
source "$(dirname "$0")/common.sh"
run_all
