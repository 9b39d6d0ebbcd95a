"""Projector for the demo: captions of 64-pixel pictures, 64 image tokens each."""

out = "out/demo/vision_pretrain"
init_from = "out/demo/sft"
clip = "out/demo/clip_pretrain"
data = "data/demo/captions"

context = 400
batch_tokens = 12800
micro_rows = 32
max_steps = 60
cooldown = 0.7
eval_every = 60
