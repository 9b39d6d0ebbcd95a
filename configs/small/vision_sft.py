"""Questions about pictures for the small model."""

out = "out/small/vision_sft"
init_from = "out/small/vision_pretrain"
data = "data/small/scenes"
text_data = "data/small/chats"

context = 896
batch_tokens = 7168
micro_rows = 8
max_steps = 500
muon_lr = 0.02
momentum = 0.9
lr = 3e-3
cooldown = 0.7
eval_every = 100
save_every = 250
