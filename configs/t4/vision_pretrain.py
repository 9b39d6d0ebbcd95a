"""The projector between CLIP ViT-B/32 (49 image tokens) and the 89 M decoder, on a T4."""

out = "out/t4/vision_pretrain"
init_from = "out/t4/sft"
clip = "openai/clip-vit-base-patch32"
data = "data/t4/captions"

context = 1024
batch_tokens = 32_768
micro_rows = 8
max_steps = 1200
optimizer = "adamw"
lr = 1e-3
schedule = "cosine"
warmup = 0.03
cooldown = 0.97
eval_every = 200
save_every = 200
