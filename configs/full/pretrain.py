"""The reference size: 522 M parameters, 9 B tokens of FineWeb-Edu, 8 GPUs of 80 GB."""

out = "out/full/pretrain"
data = "hf://ShallowU/FineWeb-Edu-10B-Tokens-NPY"  # or a folder of such shards

n_layer = 20
n_head = 10
n_embd = 1280
max_positions = 2048

context = 1024
batch_tokens = 524_288
micro_rows = 64
max_steps = 17_166
warmup = 0.01
cooldown = 0.5
eval_every = 250
save_every = 1000
log_every = 10
compile = True
