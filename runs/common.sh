# What full.sh, single_gpu.sh and t4.sh share. Settings are environment variables:
#   OUT, DATA                     folders of the results and of the prepared data
#   GPUS                          GPUs of stages 1 and 2 (the others take one); DEVICE=cpu without
#   GPU, BUDGET                   entry of benchmarks/gpus.json to plan for; single_gpu.sh: dollars, 8h
#   ONLY=pretrain                 end after stage 1, the one that needs many GPUs
#   TEXT                          token shards: hf://OWNER/NAME, or a folder
#   CHATS, CAPTIONS, QUESTIONS    data sets of the hub; CAPTIONS also 595K or 521K, QUESTIONS also
#                                 coco, LLaVA's own file, with COCO=train2017.zip
#   MAX_CHATS, MAX_CAPTIONS, MAX_QUESTIONS   use only the first ones
#   CLIP                          of the hub, or a folder
#   PLAN, PREPARE, PRETRAIN, SFT, VISION_PRETRAIN, VISION_SFT, EVAL   further flags of a program
#   TASKS, IMAGES                 benchmarks to score at the end, for eval.py
#   ORIGINAL                      checkpoint of the original project, to be scored beside ours, also
#                                 on the benchmarks TEXT_TASKS, such as hellaswag:FILE
#   UPLOAD=NAME/MODEL, OPEN=1     push the result to the hub; open the page
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
script=${BASH_SOURCE[1]} doing=start child=
OUT=${OUT:-out/$run} DATA=${DATA:-data/public} GPUS=${GPUS:-1} DEVICE=${DEVICE:-auto}
TEXT=${TEXT:-hf://ShallowU/FineWeb-Edu-10B-Tokens-NPY}
CHATS=${CHATS:-Magpie-Align/Magpie-Phi3-Pro-1M-v0.1} CAPTIONS=${CAPTIONS:-595K}
QUESTIONS=${QUESTIONS:-HuggingFaceM4/FineVision:LLaVA_Instruct_150K}
trap 'status=$?; [ $status = 0 ] || echo "$run ended with status $status at: $doing
The same command with the same settings goes on from there: bash $script" >&2' EXIT

# Run a program and wait; a request to stop this script is passed on to it, and it saves.
do_() { doing="$*"; printf '\n== %s\n' "$doing"; "$@" & child=$!; wait "$child"; }
trap 'kill -TERM "$child" 2> /dev/null || :; wait "$child" || :; exit 75' TERM INT
fail() { echo "error: $1" >&2; exit 1; }

check_machine() {
    python -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "Python 3.10 or newer is needed; python is $(python --version 2>&1)"
    python - 2> /dev/null << 'END' || do_ python -m pip install --quiet -r requirements.txt
from importlib.metadata import version
from packaging.requirements import Requirement
for wanted in (Requirement(line.split("#")[0]) for line in open("requirements.txt")):
    assert wanted.specifier.contains(version(wanted.name), prereleases=True)
END
    [ "$DEVICE" != cpu ] || GPUS=1
    local gpus
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    [ "$DEVICE" = cpu ] || [ "$gpus" -ge "$GPUS" ] ||
        fail "this machine has $gpus CUDA GPUs, not $GPUS: set GPUS=$gpus, or DEVICE=cpu for a try in small"
    [ -z "${ORIGINAL:-}" ] || [ -e "$ORIGINAL" ] || fail "there is no ORIGINAL=$ORIGINAL"
    [ -z "${UPLOAD:-}" ] || hf auth whoami > /dev/null 2>&1 ||
        fail "UPLOAD=$UPLOAD needs an access token that may write: export HF_TOKEN=hf_... or run hf auth login"
}

# Size, time and price of all stages, and the micro-batches that fit the GPU; made again when GPU or
# BUDGET change, but never the size of a decoder whose training has begun.
make_plan() {
    local wanted="$configs $GPU $* ${PLAN:-}" name flags
    [ -f "$OUT/plan.json" ] && [ "$(cat "$OUT/plan.args" 2> /dev/null)" = "$wanted" ] || {
        [ $# = 0 ] || ! compgen -G "$OUT/pretrain/step_*" > /dev/null ||
            fail "$OUT/pretrain was planned for '$(cat "$OUT/plan.args")', not '$wanted': go on with those settings, or set OUT for a new run"
        rm -f "$OUT/plan.args"
        do_ python bench.py plan "$configs" --gpu="$GPU" --out="$OUT" "$@" ${PLAN:-}
        echo "$wanted" > "$OUT/plan.args"
    }
    for name in pretrain sft vision_pretrain vision_sft; do
        flags=$(planned "$name")  # alone: set -e does not see it fail inside an argument
        [ -f "$OUT/$name/report.md" ] || [ "$flags" != "does not fit" ] ||
            fail "$name does not fit GPU='$GPU', even row by row; $OUT/plan.md shows what it fits"
    done
}
planned() { python -c 'import json, sys; print(json.load(open(sys.argv[1]))["flags"][sys.argv[2]])' "$OUT/plan.json" "$1"; }

prepare() {  # FOLDER, kind and flags of prepare.py
    local folder=$DATA/$1 kind=$2
    shift 2
    local wanted="$* ${PREPARE:-}"
    if [ -d "$folder" ]; then
        [ ! -f "$folder.args" ] || [ "$(cat "$folder.args")" = "$wanted" ] ||
            fail "$folder was prepared with '$(cat "$folder.args")', not '$wanted': delete it, or set DATA to another folder"
        return
    fi
    mkdir -p "$DATA"
    echo "$wanted" > "$folder.args"
    do_ python prepare.py "$kind" --out="$folder" "$@" ${PREPARE:-}
}

prepare_all() {
    local hub=hf://HayatoHongo/LLaVA-CC3M-Pretrain-521K
    prepare chats chat --dataset="$CHATS" --max_chats="${MAX_CHATS:-0}"
    case $CAPTIONS in
        595K) hub=hf://liuhaotian/LLaVA-CC3M-Pretrain-595K
              set -- --files=$hub/chat.json --image_root=$hub/images.zip ;;
        521K) set -- --files=$hub/ImageStoriesTrain.jsonl --image_root=$hub/images.tar.zst ;;
        *) set -- --dataset="$CAPTIONS" ;;
    esac
    prepare captions images "$@" --max_chats="${MAX_CAPTIONS:-0}"
    case $QUESTIONS in
        coco) set -- --files=hf://liuhaotian/LLaVA-Instruct-150K/llava_instruct_150k.json \
                  --image_root="${COCO:?QUESTIONS=coco needs COCO, the folder or zip of train2017}" ;;
        *) set -- --dataset="$QUESTIONS" ;;
    esac
    prepare scenes images "$@" --max_chats="${MAX_QUESTIONS:-0}"
}

stage() {  # NAME and flags; a finished stage is left as it is
    local name=$1 more launch=python flags
    shift
    [ ! -f "$OUT/$name/report.md" ] || { echo "$OUT/$name is finished"; return; }
    more=$(tr '[:lower:]' '[:upper:]' <<< "$name")
    # A process that dies is restarted from the newest checkpoint, up to three times, for which
    # torchrun needs its own store. A job that is asked to stop has 240 seconds to save, not 30.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
    case $name in pretrain | sft) [ "$GPUS" -le 1 ] ||
        launch="torchrun --standalone --nproc_per_node=$GPUS --max-restarts=3" ;; esac
    flags=$(planned "$name")
    # shellcheck disable=SC2086
    do_ $launch $name.py "$configs/$name.py" --out="$OUT/$name" --device="$DEVICE" \
        $flags "$@" ${!more:-}
}

train_all() {
    stage pretrain --data="$TEXT"
    stage sft --data="$DATA/chats" --init_from="$OUT/pretrain"
    stage vision_pretrain --data="$DATA/captions" --init_from="$OUT/sft" ${CLIP:+--clip="$CLIP"}
    stage vision_sft --data="$DATA/scenes" --text_data="$DATA/chats" --init_from="$OUT/vision_pretrain"
}

finish() {
    local text=$TEXT beside=()
    case $TEXT in hf://*)  # the validation text is missing where stage 1 came from another machine
        text=${TEXT#hf://} text=${text#datasets/} text=${text%/}
        local folder=data/hub/${text//\//--}
        compgen -G "$folder/*val*" > /dev/null ||
            do_ hf download "$text" --repo-type=dataset --include='*val*' --local-dir="$folder"
        text=$folder ;;
    esac
    [ -e "$DATA/text" ] || [ ! -d "$text" ] || ln -sfn "$(realpath "$text")" "$DATA/text"
    if [ -n "${ORIGINAL:-}" ]; then
        compgen -G "$OUT/original/step_*/manifest.json" > /dev/null || do_ python \
            experiments/import_original.py "$ORIGINAL" --out="$OUT/original" --overwrite=True
        beside=(--original="$OUT/original" --tasks="${TEXT_TASKS:-}")
    fi
    do_ python eval.py "$OUT/vision_sft" --data="$DATA" --report="$OUT" --device="$DEVICE" ${EVAL:-} ${beside[@]+"${beside[@]}"}
    [ -z "${TASKS:-}" ] ||
        do_ python eval.py "$OUT/vision_sft" --tasks="$TASKS" --image_root="${IMAGES:-}" --out="$OUT" --device="$DEVICE"
    [ -z "${UPLOAD:-}" ] || [ "$(cat "$OUT/uploaded" 2> /dev/null)" = "$UPLOAD" ] || {
        do_ python upload.py "$OUT/vision_sft" --repo="$UPLOAD"
        echo "$UPLOAD" > "$OUT/uploaded"
    }
    echo "done: $OUT/report.html; to talk to it: python sample.py $OUT/vision_sft"
    [ -z "${OPEN:-}" ] || do_ python app.py "$OUT/vision_sft"
}

run_all() {  # flags of the plan
    check_machine
    make_plan "$@"
    if [ "${ONLY:-}" = pretrain ]; then
        stage pretrain --data="$TEXT"
        echo "done: stage 1 is in $OUT/pretrain; without ONLY the same command goes on from there"
        return
    fi
    prepare_all
    train_all
    finish
}
