"""The recipe this project started from, for comparison: AdamW, one group, cosine, no clipping.

35,000 steps of 262,144 tokens, 1,000 of them warmup, PyTorch's default initial weights.
"""

out = "out/reference/pretrain"
data = "hf://ShallowU/FineWeb-Edu-10B-Tokens-NPY"

n_layer = 20
n_head = 10
n_embd = 1280
max_positions = 2048
init = "torch"

context = 1024
batch_tokens = 262_144
micro_rows = 32
max_steps = 35_000

optimizer = "adamw"
lr = 1e-3
embedding_lr = 1e-3
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.1
decay = "all"
grad_clip = 0.0
schedule = "cosine"
warmup = 0.0285714  # 1,000 of 35,000 steps
cooldown = 0.9714286
final_lr = 0.1

eval_every = 250
save_every = 1000
compile = True
