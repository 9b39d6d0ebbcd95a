#!/usr/bin/env bash
# The reference run: 8 GPUs of 80 GB for the text, one of them for the pictures.
#   data/fineweb: the .npy shards of ShallowU/FineWeb-Edu-10B-Tokens-NPY
#   data/magpie, data/llava_captions, data/llava_instruct: made by prepare.py chat and images
set -euo pipefail
cd "$(dirname "$0")/.."
gpus=${GPUS:-8}
torchrun --standalone --nproc_per_node="$gpus" pretrain.py configs/full/pretrain.py
torchrun --standalone --nproc_per_node="$gpus" sft.py configs/full/sft.py
python vision_pretrain.py configs/full/vision_pretrain.py
python vision_sft.py configs/full/vision_sft.py
