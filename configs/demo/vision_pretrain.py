"""Projector for the demo: captions of 96-pixel pictures, 36 image tokens each."""

out = "out/demo/vision_pretrain"
init_from = "out/demo/sft"
clip = "out/demo/clip_pretrain"
data = "data/demo/captions"

context = 192
batch_tokens = 12288
micro_rows = 64
max_steps = 80
cooldown = 0.7
eval_every = 40
muon_lr = 0.06
lr = 0.01
