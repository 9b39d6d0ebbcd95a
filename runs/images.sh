# The public images of LLaVA's two stages, for runs/full.sh and runs/t4.sh.
: "${COCO:?say where COCO train2017 is, a folder or a zip: COCO=train2017.zip bash runs/...}"
hub=hf://liuhaotian
[ -d data/llava_captions ] || python prepare.py images --out=data/llava_captions \
    --files=$hub/LLaVA-CC3M-Pretrain-595K/chat.json \
    --image_root=$hub/LLaVA-CC3M-Pretrain-595K/images.zip
[ -d data/llava_instruct ] || python prepare.py images --out=data/llava_instruct \
    --files=$hub/LLaVA-Instruct-150K/llava_instruct_150k.json --image_root="$COCO"
