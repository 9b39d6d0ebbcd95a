"""Projector for the demo: captions of 48-pixel images, 9 image tokens each."""

out = "out/demo/vision_pretrain"
init_from = "out/demo/sft"
clip = "out/demo/clip_pretrain"
data = "data/demo/captions"

context = 192
batch_tokens = 6144
micro_rows = 32
max_steps = 30
cooldown = 0.7
eval_every = 30
muon_lr = 0.06
momentum = 0.95
lr = 0.01
