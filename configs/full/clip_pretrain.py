"""CLIP ViT-L/14 from scratch. In most cases OpenAI's weights are the better start."""

out = "out/full/clip_pretrain"
data = "data/public/captions"

image_size = 224
patch_size = 14
vision_width = 1024
vision_layers = 24
vision_heads = 16
text_width = 768
text_layers = 12
text_heads = 12
embed_dim = 768
context = 77

batch_pairs = 4096
micro_pairs = 128  # activations take 0.23 GB per pair: with weights and optimizer about 40 GB
max_steps = 20_000
warmup = 0.05
cooldown = 0.6
eval_every = 500
save_every = 1000
compile = True
