"""Chat for the demo: counting, comparing and recalling, text-only."""

out = "out/demo/sft"
init_from = "out/demo/pretrain"
data = "data/demo/chats"

context = 192
batch_tokens = 6144
micro_rows = 32
max_steps = 60
muon_lr = 0.02
momentum = 0.9
lr = 3e-3
cooldown = 0.7
eval_every = 30
