#!/usr/bin/env bash
# The complete pipeline on one small machine: estimate, data, CLIP, text, chat, projector, images,
# scores. Run again after an interruption, it resumes. STEPS=0.2 takes a fifth of the steps.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$(date +%s)
steps() { awk -v share="${STEPS:-1}" '/^max_steps/ {print int($3 * share + 0.5)}' "configs/demo/$1.py"; }

if [ "$(cat out/demo/steps 2> /dev/null || echo "${STEPS:-1}")" != "${STEPS:-1}" ]; then
    echo "error: out/demo was trained with STEPS=$(cat out/demo/steps), not ${STEPS:-1}; delete or rename it to begin again" >&2
    exit 2
fi
mkdir -p out/demo && echo "${STEPS:-1}" > out/demo/steps

echo "== python bench.py plan configs/demo --check=True"
python bench.py plan configs/demo --vocabulary=1024 --check=True
[ -f data/demo/manifest.json ] || { echo && echo "== python prepare.py demo" && python prepare.py demo; }
for stage in clip_pretrain pretrain sft vision_pretrain vision_sft; do
    echo && echo "== python $stage.py configs/demo/$stage.py"
    python $stage.py configs/demo/$stage.py --max_steps="$(steps $stage)"
done

echo && echo "== python eval.py out/demo/vision_sft --data=data/demo --report=out/demo"
python eval.py out/demo/vision_sft --data=data/demo --report=out/demo --started="$started"

image=data/demo/images/0.png
echo && echo "== python sample.py out/demo/vision_sft --image=$image"
python sample.py out/demo/vision_sft --image=$image <<'QUESTIONS'
What do you see?
How many things are there?
Is there a red thing?
QUESTIONS
echo "Try it yourself (after source .venv/bin/activate):"
echo "    python sample.py out/demo/vision_sft --image=$image"
