#!/usr/bin/env bash
# An 89 M model on one 16 GB GPU, in an evening; after a preemption the same command resumes.
#   COCO=train2017.zip bash runs/t4.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/images.sh
[ -d data/magpie ] || python prepare.py chat --max_chats=150000 --out=data/magpie \
    --dataset=Magpie-Align/Magpie-Phi3-Pro-1M-v0.1
for stage in pretrain sft vision_pretrain vision_sft; do
    python $stage.py configs/t4/$stage.py
done
python sample.py out/t4/vision_sft
