#!/usr/bin/env bash
# The reference run: 8 GPUs of 80 GB for the text, one of them for the images.
#   COCO=train2017.zip bash runs/full.sh
# Text comes from the hub while it trains; chats and images are prepared first, the images of
# the captions from the hub (7 GB). COCO: the folder or zip of COCO's train2017, from cocodataset.org.
set -euo pipefail
cd "$(dirname "$0")/.."
gpus=${GPUS:-8}
source runs/images.sh
[ -d data/magpie ] ||
    python prepare.py chat --dataset=Magpie-Align/Magpie-Phi3-Pro-1M-v0.1 --out=data/magpie
# A process that dies is restarted from the newest checkpoint, up to three times, for which torchrun
# needs its own store. A job that is asked to stop has 240 seconds to save, not 30.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
launch="torchrun --standalone --nproc_per_node=$gpus --max-restarts=3"
$launch pretrain.py configs/full/pretrain.py
$launch sft.py configs/full/sft.py
python vision_pretrain.py configs/full/vision_pretrain.py
python vision_sft.py configs/full/vision_sft.py
