"""LLaVA-Instruct for the 89 M model on a T4: one epoch, half an hour, computed."""

out = "out/t4/vision_sft"
init_from = "out/t4/vision_pretrain"
data = "data/t4/scenes"
text_data = "data/t4/chats"

context = 1024
batch_tokens = 32_768
micro_rows = 8
max_steps = 1600
schedule = "cosine"
warmup = 0.03
cooldown = 0.97
eval_every = 200
save_every = 200
