"""Stage 0: train CLIP on captioned images, from scratch.

    python clip_pretrain.py configs/demo/clip_pretrain.py
    torchrun --standalone --nproc_per_node=8 clip_pretrain.py configs/full/clip_pretrain.py
    python eval.py out/demo/clip_pretrain --data=data/demo

Every pair of the batch is a negative for every other, across micro-batches and processes. To start
from a trained CLIP instead, skip this stage and pass --clip=openai/clip-vit-large-patch14 to
vision_pretrain.py.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image

from clip import CLIP, CLIPConfig, feature_pulls, normalise
from common.config import TrainSettings, UserError, parse, run_main
from data import Chats, check_kind, check_tokenizer
from evals.zero_shot import Labelled, caption_choice, contrastive_loss, features_of, zero_shot
from train.optim import make_optimizer
from train.packing import Captions
from train.run import Run
from vision import describe, image_spec


@dataclass
class Config(TrainSettings):
    # --- data
    data: str = "data/captions"  # folder made by prepare.py images

    # --- model
    image_size: int = 224  # pixels
    patch_size: int = 14  # pixels
    vision_width: int = 1024  # of the image encoder
    vision_layers: int = 24
    vision_heads: int = 16
    text_width: int = 768  # of the text encoder
    text_layers: int = 12
    text_heads: int = 12
    embed_dim: int = 768  # of the shared embedding
    context: int = 77  # tokens of the longest caption
    activation: Literal["gelu", "quick_gelu"] = "gelu"  # quick_gelu is OpenAI's
    fit: Literal["pad", "crop"] = "pad"  # how images become square

    # --- optimization
    # the rates by rule are those of decoders, too high for a CLIP (docs/recipe.md)
    muon_lr: float = 0.02  # Muon's peak learning rate
    momentum: float = 0.95  # Muon's momentum
    lr: float = 3e-3  # AdamW's peak learning rate
    batch_pairs: int = 4096  # pairs of a step, in all processes together
    micro_pairs: int = 0  # pairs of a forward pass on one GPU, for its memory; 0 for its share

    # --- run
    zero_shot: str = ""  # folder of images to classify, one subfolder per class; empty for none
    prompt: str = "a photo of a {}."  # caption of a class for --zero_shot
    val_pairs: int = 4096  # validation pairs at most, always the same ones

    # --- hardware
    workers: int = -1  # processes that decode images; -1: as many as there are spare cores

    def clip(self, tokenizer):
        """The CLIPConfig for these settings and a tokenizer."""
        for part, whole in (("patch_size", "image_size"), ("vision_heads", "vision_width"),
                            ("text_heads", "text_width")):
            if getattr(self, whole) % getattr(self, part):
                raise UserError(f"--{part}={getattr(self, part)} does not divide --{whole}="
                                f"{getattr(self, whole)}")
        return CLIPConfig(
            self.image_size, self.patch_size, self.vision_width, self.vision_layers,
            self.vision_heads, self.text_width, self.text_layers, self.text_heads, self.context,
            tokenizer.n_vocab, tokenizer.end, self.embed_dim, self.activation, self.fit)


def main():
    cfg = parse(Config)
    check_kind(cfg.data, "images")
    run = Run(cfg, "clip_pretrain")

    # Data: images with the first answer about each as its caption
    tokenizer = check_tokenizer(cfg.data)
    config = cfg.clip(tokenizer)
    train, val = (Captions(Chats(cfg.data, split), tokenizer, image_spec(config), cfg.context)
                  for split in ("train", "val"))
    if (n := min(len(val), cfg.val_pairs)) < cfg.batch_pairs:
        run.note(f"the validation loss chooses among {n} pairs, the training loss among "
                 f"{cfg.batch_pairs}: compare only validation losses")
    labelled = Labelled(cfg.zero_shot, cfg.prompt) if cfg.zero_shot else None
    loader = run.loader(train, cfg.batch_pairs, cfg.micro_pairs or cfg.batch_pairs // run.ranks)

    # Model: both encoders are new and trained
    model = CLIP(config).to(run.device)
    optimizer = make_optimizer(model, cfg)
    net = run.start(model, optimizer, tokenizer, describe(model))

    for step in run.steps():
        batches = list(loader.step(step))  # the pixels of a step fit a GPU as uint8
        pulls = feature_pulls(model, batches, run.machine)
        for batch, pull in zip(batches, pulls, strict=True):
            with run.forward(batch):
                loss = pull(net(normalise(batch.pixels), batch.ids))  # contrastive, in nats
            run.backward(loss)
        run.optimizer_step(step)
        model.limit_scale()
        run.progress(step)
        if run.due(step, cfg.eval_every):
            run.record(step, **evaluate(model, tokenizer, val, labelled, cfg, run.machine))
        if run.due(step, cfg.save_every):
            run.save(step)

    run.finish(lambda model: sample_choices(model, tokenizer, val, run.machine), [cfg.data])


def evaluate(model, tokenizer, val, labelled, cfg, machine):
    """{name: figure} of validation pairs and, if any, of a Labelled."""
    features = features_of(model, val, machine, cfg.val_pairs)
    marks = caption_choice(*features)
    figures = {"val_loss": contrastive_loss(model, *features, cfg.batch_pairs),
               "choice32": sum(marks) / len(marks)}
    if labelled:
        correct, n = zero_shot(model, tokenizer, labelled, machine)
        figures["zero_shot"] = correct / n
    return figures


@torch.no_grad()
def sample_choices(model, tokenizer, pairs, machine, n=8, choices=32):
    """For the report: the first n images of a packing.Captions, each with the caption that the
    model ranks first among the first `choices`."""
    batch = pairs.batch(range(min(choices, len(pairs)))).to(machine.device)
    pixels = batch.pixels[:n]
    with machine.autocast():
        images, texts = model.image_features(normalise(pixels)), model.text_features(batch.ids)
    nearest = (images @ texts.T).argmax(-1).tolist()
    captions = [tokenizer.decode([i for i in ids if i < tokenizer.end_of_text])
                for ids in batch.ids.tolist()]
    label = f"model, choosing among {len(set(captions))} captions"
    shown = [Image.fromarray(image) for image in pixels.cpu().numpy()]
    return [([(label, captions[i]), ("reference", reference)], [image])
            for i, reference, image in zip(nearest, captions[:n], shown, strict=True)]


if __name__ == "__main__":
    run_main(main)
