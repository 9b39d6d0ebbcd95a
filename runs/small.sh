#!/usr/bin/env bash
# A real-data model of 30 M parameters: one GPU for minutes, or a CPU for hours.
#   TEXT=books.jsonl CHATS=chats.jsonl CAPTIONS=captions.json CAPTION_IMAGES=images.zip \
#   QUESTIONS=vqa.json QUESTION_IMAGES=vqa.zip bash runs/small.sh
set -euo pipefail
cd "$(dirname "$0")/.."
: "${TEXT:?}" "${CHATS:?}" "${CAPTIONS:?}" "${CAPTION_IMAGES:?}" "${QUESTIONS:?}" "${QUESTION_IMAGES:?}"

[ -d data/small/text ] || python prepare.py text --files="$TEXT" --out=data/small/text
[ -d data/small/chats ] || python prepare.py chat --files="$CHATS" --out=data/small/chats
[ -d data/small/captions ] || python prepare.py images --files="$CAPTIONS" \
    --image_root="$CAPTION_IMAGES" --image_size=112 --out=data/small/captions
[ -d data/small/scenes ] || python prepare.py images --files="$QUESTIONS" \
    --image_root="$QUESTION_IMAGES" --image_size=112 --out=data/small/scenes
for stage in clip_pretrain pretrain sft vision_pretrain vision_sft; do
    python $stage.py configs/small/$stage.py
done
python eval.py out/small/vision_sft --data=data/small --report=out/small
