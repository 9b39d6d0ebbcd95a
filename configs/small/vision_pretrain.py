"""The projector between the small CLIP and the small decoder."""

out = "out/small/vision_pretrain"
init_from = "out/small/sft"
clip = "out/small/clip_pretrain"
data = "data/small/captions"

context = 512
batch_tokens = 16384
micro_rows = 16
max_steps = 300
cooldown = 0.7
eval_every = 100
save_every = 100
