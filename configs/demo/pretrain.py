"""Text for the demo: 2.2 of the 3.2 M tokens of the picture world's stories."""

out = "out/demo/pretrain"
data = "data/demo/text"

n_layer = 4
n_head = 4
n_embd = 256
max_positions = 512

context = 192
batch_tokens = 12288
micro_rows = 64
max_steps = 180
muon_lr = 0.03
momentum = 0.9
lr = 6e-3
embedding_lr = 0.1
cooldown = 0.6

eval_every = 90
