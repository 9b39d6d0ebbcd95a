#!/usr/bin/env bash
# The whole road on one small machine: data, CLIP, text, chat, projector, pictures, scores.
# Started again after an interruption it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$(date +%s)

[ -f data/demo/manifest.json ] || python prepare.py demo
for stage in clip_pretrain pretrain sft vision_pretrain vision_sft; do
    echo && echo "== python $stage.py configs/demo/$stage.py"
    python $stage.py configs/demo/$stage.py
done

echo && echo "== python eval.py out/demo/vision_sft --data=data/demo --report=out/demo"
python eval.py out/demo/vision_sft --data=data/demo --report=out/demo --started="$started"

picture=data/demo/pictures/0.png
echo && echo "== python sample.py out/demo/vision_sft --image=$picture"
python sample.py out/demo/vision_sft --image=$picture <<'QUESTIONS'
What do you see?
How many things are there?
Is there a red thing?
QUESTIONS
echo "Go on yourself (after source .venv/bin/activate):"
echo "    python sample.py out/demo/vision_sft --image=$picture"
