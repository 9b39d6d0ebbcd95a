"""Stage 0: train CLIP from nothing, on captioned pictures.

    python clip_pretrain.py configs/demo/clip_pretrain.py
    torchrun --standalone --nproc_per_node=8 clip_pretrain.py configs/full/clip_pretrain.py
    python eval.py out/demo/clip_pretrain --data=data/demo

Picture and caption of a pair are pulled together, all other pairs of the batch pushed apart, those
of every process included. Skip this stage and name openai/clip-vit-large-patch14 as --clip to start
from a trained one.
"""

from dataclasses import dataclass
from typing import Literal

from clip import CLIP, CLIPConfig, caption_choice, normalise
from common.config import TrainSettings, UserError, parse, run_main
from common.optim import make_optimizer
from common.run import Run
from data import Loader, check_tokenizer
from packing import Captions, Chats
from vision import describe


@dataclass
class Config(TrainSettings):
    data: str = "data/captions"  # folder made by prepare.py images

    image_size: int = 224  # pixels
    patch_size: int = 14  # pixels
    vision_width: int = 1024  # of the image tower
    vision_layers: int = 24
    vision_heads: int = 16
    text_width: int = 768  # of the text tower
    text_layers: int = 12
    text_heads: int = 12
    embed_dim: int = 768  # of the space they share
    context: int = 77  # longest caption in tokens
    activation: Literal["gelu", "quick_gelu"] = "gelu"  # quick_gelu is OpenAI's

    batch_pairs: int = 4096  # pairs of a step in the whole job; each is the others' negative


def main():
    cfg = parse(Config)
    if cfg.image_size % cfg.patch_size:
        raise UserError(f"--patch_size={cfg.patch_size} does not divide --image_size="
                        f"{cfg.image_size}")
    run = Run(cfg, "clip_pretrain")

    # Data: pictures with the first answer about each as its caption
    tokenizer = check_tokenizer(cfg.data)
    train = Captions(Chats(cfg.data, "train"), tokenizer, cfg.image_size, cfg.context)
    val = Captions(Chats(cfg.data, "val"), tokenizer, cfg.image_size, cfg.context)
    loader = Loader(train, cfg.batch_pairs, cfg.batch_pairs // run.ranks, run, cfg.seed)

    # Model: both towers are new
    model = CLIP(CLIPConfig(
        cfg.image_size, cfg.patch_size, cfg.vision_width, cfg.vision_layers, cfg.vision_heads,
        cfg.text_width, cfg.text_layers, cfg.text_heads, cfg.context, tokenizer.n_vocab,
        tokenizer.end, cfg.embed_dim, cfg.activation)).to(run.device)
    optimizer = make_optimizer(model, cfg)
    net = run.start(model, optimizer, tokenizer, describe(model), "img", cfg.batch_pairs,
                    model.flops_per_pair())

    for step in run.steps():
        for micro, batch in enumerate(loader.step(step)):
            with run.forward(micro):
                loss = net(normalise(batch.pixels), batch.ids, batch.keys)
            run.backward(loss)
        run.update(step)
        run.progress(step)
        if run.due(step, cfg.eval_every):
            right, loss = caption_choice(model, val, run.machine)
            run.record(step, val_loss=loss, choice32=right)
        if run.due(step, cfg.save_every):
            run.save(step)

    run.finish()


if __name__ == "__main__":
    run_main(main)
