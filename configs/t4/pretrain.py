"""An 89 M decoder for one free 16 GB GPU (T4): 400 M tokens of FineWeb-Edu in about 3.7
hours, computed (docs/performance.md)."""

out = "out/t4/pretrain"
data = "hf://ShallowU/FineWeb-Edu-10B-Tokens-NPY"  # downloads while it trains

n_layer = 12
n_head = 8
n_embd = 512
max_positions = 1024

context = 512
batch_tokens = 65_536
micro_rows = 16
max_steps = 6000
cooldown = 0.6
eval_every = 250
save_every = 250  # a free machine may be taken away: the same command resumes
