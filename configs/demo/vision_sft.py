"""Talking about pictures for the demo: seven questions a picture."""

out = "out/demo/vision_sft"
init_from = "out/demo/vision_pretrain"
data = "data/demo/scenes"
text_data = "data/demo/chats"

context = 400
batch_tokens = 12800
micro_rows = 32
max_steps = 250
muon_lr = 0.01
lr = 2e-3
cooldown = 0.7
eval_every = 50
