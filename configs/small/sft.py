"""Chats for the 30 M decoder."""

out = "out/small/sft"
init_from = "out/small/pretrain"
data = "data/small/chats"

context = 512
batch_tokens = 8192
micro_rows = 16
max_steps = 300
cooldown = 0.7
eval_every = 100
save_every = 100
