"""Stage 0: train CLIP from nothing, on captioned pictures.

    python clip_pretrain.py configs/demo/clip_pretrain.py
    torchrun --standalone --nproc_per_node=8 clip_pretrain.py configs/full/clip_pretrain.py
    python eval.py out/demo/clip_pretrain --data=data/demo

Picture and caption of a pair are pulled together, all other pairs of the batch pushed apart, those
of every process and of every micro-batch included. Skip this stage and name
openai/clip-vit-large-patch14 as --clip to start from a trained one.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image

from clip import CLIP, CLIPConfig, feature_pulls, normalise
from common.config import TrainSettings, UserError, parse, run_main
from common.report import Sample
from data import Chats, check_tokenizer
from evals.zero_shot import Labelled, caption_choice, zero_shot
from train.loader import Loader
from train.optim import make_optimizer
from train.packing import Captions
from train.run import Run
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
    fit: Literal["pad", "crop"] = "pad"  # how pictures become squares: padded, or their middle

    batch_pairs: int = 4096  # pairs of a step in the whole job; each is the others' negative
    micro_pairs: int = 0  # most pairs a GPU takes at once, for its memory; 0 for all of its share
    workers: int = -1  # processes that decode pictures; -1 for the cores that a GPU leaves over

    zero_shot: str = ""  # folder of pictures, a subfolder a class, to tell apart; empty for none
    prompt: str = "a photo of a {}."  # the caption of a class there
    val_pairs: int = 2048  # most validation pairs, always the same ones

    def clip(self, tokenizer):
        """The CLIPConfig that these settings and a vocabulary make."""
        if self.image_size % self.patch_size:
            raise UserError(f"--patch_size={self.patch_size} does not divide --image_size="
                            f"{self.image_size}")
        return CLIPConfig(
            self.image_size, self.patch_size, self.vision_width, self.vision_layers,
            self.vision_heads, self.text_width, self.text_layers, self.text_heads, self.context,
            tokenizer.n_vocab, tokenizer.end, self.embed_dim, self.activation, self.fit)


def main():
    cfg = parse(Config)
    run = Run(cfg, "clip_pretrain")

    # Data: pictures with the first answer about each as its caption
    tokenizer = check_tokenizer(cfg.data)
    train, val = (Captions(Chats(cfg.data, split), tokenizer, cfg.image_size, cfg.context, cfg.fit)
                  for split in ("train", "val"))
    labelled = Labelled(cfg.zero_shot, cfg.prompt) if cfg.zero_shot else None
    micro_pairs = cfg.micro_pairs or cfg.batch_pairs // run.ranks
    loader = Loader(train, cfg.batch_pairs, micro_pairs, run, cfg.seed, run.workers())

    # Model: both towers are new
    model = CLIP(cfg.clip(tokenizer)).to(run.device)
    optimizer = make_optimizer(model, cfg)
    net = run.start(model, optimizer, tokenizer, describe(model), "img", cfg.batch_pairs,
                    model.flops_per_pair())

    for step in run.steps():
        batches = list(loader.step(step))  # on a GPU all its pixels at once, in bytes
        pulls = feature_pulls(model, batches, run.machine)
        for micro, (batch, pull) in enumerate(zip(batches, pulls, strict=True)):
            with run.forward(micro):
                loss = pull(net(normalise(batch.pixels), batch.ids))
            run.backward(loss)
        run.update(step)
        run.progress(step)
        if run.due(step, cfg.eval_every):
            right, loss = caption_choice(model, val, run.machine, cfg.val_pairs)
            figures = {"val_loss": loss, "choice32": right}
            if labelled:
                figures["zero_shot"] = zero_shot(model, tokenizer, labelled, run.machine)
            run.record(step, **figures)
        if run.due(step, cfg.save_every):
            run.save(step)

    run.finish(sample_choices(model, tokenizer, val, run.machine), [cfg.data])


@torch.no_grad()
def sample_choices(model, tokenizer, pairs, machine, n=8, choices=32):
    """The first n pictures of a packing.Captions, each with the caption that the model finds
    nearest among the first `choices`: for a report."""
    batch = pairs.batch(range(min(choices, len(pairs)))).to(machine.device)
    pixels = batch.pixels[:n]
    with machine.autocast():
        images, texts = model.image_features(normalise(pixels)), model.text_features(batch.ids)
    nearest = (images @ texts.T).argmax(-1).tolist()
    captions = [tokenizer.decode([i for i in ids if i < tokenizer.end_of_text])
                for ids in batch.ids.tolist()]
    label = f"model, choosing among {len(set(captions))} captions"
    shown = [Image.fromarray(picture) for picture in pixels.cpu().numpy()]
    return [Sample([(label, captions[i]), ("reference", right)], [picture])
            for i, right, picture in zip(nearest, captions[:n], shown, strict=True)]


if __name__ == "__main__":
    run_main(main)
