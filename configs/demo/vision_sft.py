"""Talking about pictures for the demo: seven questions a picture."""

out = "out/demo/vision_sft"
init_from = "out/demo/vision_pretrain"
data = "data/demo/scenes"
text_data = "data/demo/chats"

context = 192
batch_tokens = 6144
micro_rows = 32
max_steps = 800
muon_lr = 0.02
momentum = 0.9
lr = 3e-3
cooldown = 0.7
eval_every = 100
text_share = 0.3
log_every = 20
