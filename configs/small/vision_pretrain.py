"""The projector between the small CLIP and the small decoder."""

out = "out/small/vision_pretrain"
init_from = "out/small/sft"
clip = "out/small/clip_pretrain"
data = "data/small/captions"

context = 896  # ten captions of 86 positions; 512 would leave a twentieth empty
batch_tokens = 7168
micro_rows = 8
max_steps = 300
cooldown = 0.7
eval_every = 100
save_every = 100
