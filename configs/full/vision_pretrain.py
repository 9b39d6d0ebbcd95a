"""The projector on 521 K or 595 K captions, one epoch, one GPU."""

out = "out/full/vision_pretrain"
init_from = "out/full/sft"
clip = "openai/clip-vit-large-patch14"
data = "data/public/captions"

context = 2048  # seven captions of 290 positions; 1024 would hold three and waste a sixth
batch_tokens = 131_072
micro_rows = 16
max_steps = 1300
optimizer = "adamw"
lr = 1e-3
schedule = "cosine"
warmup = 0.03
cooldown = 0.97
eval_every = 100
save_every = 200
compile = True
