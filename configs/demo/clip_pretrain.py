"""Eyes for the demo: two small towers on 96-pixel pictures of the picture world."""

out = "out/demo/clip_pretrain"
data = "data/demo/captions"

image_size = 96
patch_size = 16  # a place of the picture's 3 x 3 grid is 2 x 2 patches
vision_width = 128
vision_layers = 5
vision_heads = 2
text_width = 128
text_layers = 2
text_heads = 2
embed_dim = 128
context = 64

batch_pairs = 256
max_steps = 280
warmup = 0.05
cooldown = 0.6
eval_every = 140
log_every = 20
