"""Chats for the reference size, such as Magpie-Phi3-Pro-1M."""

out = "out/full/sft"
init_from = "out/full/pretrain"
data = "data/public/chats"

context = 1024
batch_tokens = 131_072
micro_rows = 32
max_steps = 4000
cooldown = 0.8
eval_every = 250
save_every = 1000
compile = True
