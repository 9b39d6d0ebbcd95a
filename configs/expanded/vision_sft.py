"""Further public instruction sets for the reference size, with their images inside.

prepare.py prints the rows, tokens, images and share of each set. What of a benchmark is in them:
`python experiments/contamination.py out/full/sft --data=data/expanded --tasks=NAME:FILE`.

    python prepare.py images --out=data/expanded --min_rating=relevance:4 --dataset='\
HuggingFaceM4/FineVision:LLaVA_Instruct_150K=4,HuggingFaceM4/FineVision:sharegpt4v(coco)=2,\
HuggingFaceM4/FineVision:cocoqa=1,HuggingFaceM4/FineVision:a_okvqa=1,\
HuggingFaceM4/the_cauldron:vqav2=2,HuggingFaceM4/the_cauldron:tallyqa=1'
"""

out = "out/expanded/vision_sft"
init_from = "out/full/vision_pretrain"
data = "data/expanded"
text_data = "data/public/chats"

context = 2048
batch_tokens = 65_536
micro_rows = 8
max_steps = 3200
text_share = 0.2
schedule = "cosine"
warmup = 0.03
cooldown = 0.97
eval_every = 100
save_every = 200
compile = True
