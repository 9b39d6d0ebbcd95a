"""Chats for the 89 M decoder on a T4: 65 M positions, half an hour, computed."""

out = "out/t4/sft"
init_from = "out/t4/pretrain"
data = "data/t4/chats"  # prepare.py chat --max_chats=150000 is enough

context = 1024
batch_tokens = 65_536
micro_rows = 8
max_steps = 1000
cooldown = 0.8
eval_every = 250
save_every = 250
