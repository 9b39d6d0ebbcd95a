"""The recipe this project started from, scaled down to minutes on a CPU (experiments/recipe.py).

3.3 M tokens with the best learning rate of 2e-3, 4e-3 and 8e-3 (docs/recipe.md).
"""

out = "out/recipe_reference/pretrain"
data = "data/recipe"

n_layer = 6
n_head = 4
n_embd = 256
max_positions = 256
init = "torch"

context = 256
batch_tokens = 4096
micro_rows = 16
max_steps = 800

optimizer = "adamw"
lr = 4e-3
embedding_lr = 4e-3
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.1
decay = "all"
grad_clip = 0.0
schedule = "cosine"
warmup = 0.0285714  # as 1,000 of 35,000 steps
cooldown = 0.9714286
final_lr = 0.1

val_rows = 256
eval_every = 50
save_every = 0
