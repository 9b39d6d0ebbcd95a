"""Chats about images for the demo: four questions per image, and some text-only chats."""

out = "out/demo/vision_sft"
init_from = "out/demo/vision_pretrain"
data = "data/demo/scenes"
text_data = "data/demo/chats"

context = 192
batch_tokens = 6144
micro_rows = 32
max_steps = 640
muon_lr = 0.02
momentum = 0.9
lr = 3e-3
projector_lr = 4.0
cooldown = 0.7
eval_every = 214
text_share = 0.3
log_every = 10
