"""Chat for the demo: counting, comparing and recalling, in text alone."""

out = "out/demo/sft"
init_from = "out/demo/pretrain"
data = "data/demo/chats"

context = 192
batch_tokens = 9216
micro_rows = 48
max_steps = 180
muon_lr = 0.01
lr = 2e-3
cooldown = 0.7
eval_every = 75
