"""LLaVA-Instruct-150K, one epoch, projector and decoder, one GPU."""

out = "out/full/vision_sft"
init_from = "out/full/vision_pretrain"
data = "data/public/scenes"
text_data = "data/public/chats"

context = 2048
batch_tokens = 65_536
micro_rows = 8
max_steps = 1600
schedule = "cosine"
warmup = 0.03
cooldown = 0.97
eval_every = 100
save_every = 200
compile = True
