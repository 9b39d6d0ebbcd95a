#!/usr/bin/env bash
# The reference run: 8 GPUs of 80 GB for the text, one of them for the pictures.
#   COCO=train2017.zip bash runs/full.sh
# Text comes from the hub while it trains; chats and pictures are prepared first, pictures of the
# captions from the hub (7 GB). COCO: the folder or zip of COCO's train2017, from cocodataset.org.
set -euo pipefail
cd "$(dirname "$0")/.."
gpus=${GPUS:-8}
source runs/pictures.sh
[ -d data/magpie ] ||
    python prepare.py chat --dataset=Magpie-Align/Magpie-Phi3-Pro-1M-v0.1 --out=data/magpie
torchrun --standalone --nproc_per_node="$gpus" pretrain.py configs/full/pretrain.py
torchrun --standalone --nproc_per_node="$gpus" sft.py configs/full/sft.py
python vision_pretrain.py configs/full/vision_pretrain.py
python vision_sft.py configs/full/vision_sft.py
