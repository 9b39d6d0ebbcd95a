"""A CLIP small enough to train from scratch: 112 pixels, 64 patches, GPT-2's vocabulary."""

out = "out/small/clip_pretrain"
data = "data/small/captions"

image_size = 112
patch_size = 14
vision_width = 192
vision_layers = 6
vision_heads = 3
text_width = 192
text_layers = 3
text_heads = 3
embed_dim = 192
context = 48

batch_pairs = 256
max_steps = 600
warmup = 0.05
cooldown = 0.6
eval_every = 100
save_every = 200
