"""CLIP ViT-B/32 from scratch, for training every weight; about eight hours on a T4, computed."""

out = "out/t4/clip_pretrain"
data = "data/t4/captions"

image_size = 224
patch_size = 32
vision_width = 768
vision_layers = 12
vision_heads = 12
text_width = 512
text_layers = 12
text_heads = 8
embed_dim = 512
context = 77

batch_pairs = 2048
micro_pairs = 64
max_steps = 4000
warmup = 0.05
cooldown = 0.6
eval_every = 200
save_every = 200
