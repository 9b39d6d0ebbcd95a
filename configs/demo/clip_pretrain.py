"""CLIP for the demo: two small towers on images of 48 pixels."""

out = "out/demo/clip_pretrain"
data = "data/demo/captions"

image_size = 48
patch_size = 16  # a cell of the image's 3 x 3 grid is one patch
vision_width = 128
vision_layers = 4
vision_heads = 2
text_width = 128
text_layers = 2
text_heads = 2
embed_dim = 128
context = 40  # the longest caption has 35 tokens

batch_pairs = 256
max_steps = 220
warmup = 0.05
cooldown = 0.6
eval_every = 110
log_every = 10
