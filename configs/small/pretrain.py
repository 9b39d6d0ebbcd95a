"""A decoder of 30 M parameters with GPT-2's vocabulary, for real text on one GPU or a CPU."""

out = "out/small/pretrain"
data = "data/small/text"

n_layer = 5
n_head = 4
n_embd = 256
max_positions = 1024

context = 512
batch_tokens = 8192
micro_rows = 16
max_steps = 600
cooldown = 0.6
eval_every = 150
save_every = 150
