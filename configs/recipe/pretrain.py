"""Our recipe at the size of configs/recipe_reference on half its tokens; experiments/recipe.py."""

out = "out/recipe/pretrain"
data = "data/recipe"

n_layer = 6
n_head = 4
n_embd = 256
max_positions = 256

context = 256
batch_tokens = 4096
micro_rows = 16
max_steps = 400

muon_lr = 0.04
momentum = 0.9
lr = 6e-3
embedding_lr = 0.1
cooldown = 0.5

val_rows = 256
eval_every = 50
save_every = 0
