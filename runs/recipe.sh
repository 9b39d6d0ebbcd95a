#!/usr/bin/env bash
# Our pretraining recipe beside the reference's and nanoGPT's, at three sizes; about 15 hours of one
# core. Finished runs are kept in docs/recipe_runs.csv; the same command goes on with what is missing.
#
#     bash runs/recipe.sh books.jsonl          # local text
#     bash runs/recipe.sh FineWeb-Edu          # a data set of the Hugging Face Hub, or a mixture
set -euo pipefail
cd "$(dirname "$0")/.."
source=${1:?give text files, or the name of a data set}
case $source in *.txt|*.json*|*.csv|*.parquet|*.gz|*.zst) source=--files=$source ;; *) source=--dataset=$source ;; esac
[ -d data/recipe ] || python prepare.py text "$source" --max_documents="${DOCUMENTS:-20000}" \
    --vocabulary=4096 --val_share=0.03 --out=data/recipe
export OMP_NUM_THREADS=1
for size in ${SIZES:-3x128 4x192 6x256}; do
    for other in reference nanogpt; do
        python experiments/recipe.py "$size" 800 ${other}_0.002 ${other}_0.004 ${other}_0.008
        best=$(python experiments/recipe.py best "$size" 800 $other)
        python experiments/recipe.py "$size" 800 "$best" --seeds=2,3
    done
    for steps in 240 320 400; do python experiments/recipe.py "$size" $steps base --seeds=1,2,3; done
done
python experiments/recipe.py compare
