"""Text for the demo: 0.6 of the 3.5 M tokens of stories, two in five describe an image."""

out = "out/demo/pretrain"
data = "data/demo/text"

n_layer = 3
n_head = 6
n_embd = 192
max_positions = 512

context = 192
batch_tokens = 6144
micro_rows = 32
max_steps = 100
muon_lr = 0.03
momentum = 0.9
lr = 6e-3
embedding_lr = 0.1
cooldown = 0.6

eval_every = 50
