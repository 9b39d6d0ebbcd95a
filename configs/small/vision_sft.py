"""Questions about images for the small model."""

out = "out/small/vision_sft"
init_from = "out/small/vision_pretrain"
data = "data/small/scenes"
text_data = "data/small/chats"

context = 896
batch_tokens = 7168
micro_rows = 8
max_steps = 500
replay = "data/small/text"
replay_share = 0.1
text_share = 0.5  # with a tenth and twice the rates chats lost 0.5 nats (docs/log.md)
cooldown = 0.7
eval_every = 100
save_every = 200
