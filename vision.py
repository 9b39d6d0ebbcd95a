"""The vision-language model: image -> CLIP features -> projector -> image tokens in the text.

As in LLaVA, the projector is Linear, GELU, Linear and its input every patch of the second-last
layer, without the class token. With the decoder and CLIP this is `LlavaForConditionalGeneration` of
`transformers` under other names.

Shapes: B rows, T positions, C the decoder's width, M images, P patches, S pixels.
"""

import dataclasses

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import tokenizer as tokenizers
from clip import CLIP, CLIPConfig, VisionTower, encoder_flops, normalise, patch_flops
from common import checkpoint
from common.config import UserError, read_json
from data import ImageSpec
from model import GPT, GPTConfig


class Projector(nn.Module):
    """Maps patch features (..., CLIP width) to token embeddings (..., C)."""

    def __init__(self, clip_width, width):
        super().__init__()
        self.linear_1 = nn.Linear(clip_width, width)
        self.linear_2 = nn.Linear(width, width)
        for linear in (self.linear_1, self.linear_2):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, x):
        return self.linear_2(F.gelu(self.linear_1(x)))


class VisionLanguageModel(nn.Module):
    """A decoder with frozen CLIP. tokenizer.render puts one <|image|> id for an image into a chat,
    train.packing.Packed repeats it P times, and embed replaces the embeddings there."""

    def __init__(self, decoder_config, clip_config):
        super().__init__()
        self.config, self.clip_config = decoder_config, clip_config
        self.decoder = GPT(decoder_config)
        self.vision_tower = VisionTower(clip_config).requires_grad_(False)
        self.projector = Projector(clip_config.vision_width, decoder_config.n_embd)
        self.image_spec = image_spec(clip_config)

    def forward(self, batch):
        """Cross-entropy of a data.Batch in nats, summed over its supervised positions."""
        return self.decoder(batch, self.embed(batch.ids, batch.pixels, batch.image_positions))

    def embed(self, ids, pixels=None, image_positions=None):
        """Ids (B, T) -> embeddings (B, T, C), with image tokens replaced by projected features.

        pixels: uint8 (M, S, S, 3) or None; image_positions: the (M * P) flat positions, into
        B * T, of the <|image|> ids, image by image.
        """
        x = self.decoder.token_embedding(ids)
        if pixels is None:  # keep the projector in the graph, or DDP hangs
            return x + 0 * sum(p.sum() for p in self.projector.parameters()).to(x.dtype)
        features = self.image_tokens(pixels).flatten(0, 1).to(x.dtype)
        return x.flatten(0, 1).index_copy(0, image_positions, features).view_as(x)

    def image_tokens(self, pixels):
        """uint8 pixels (M, S, S, 3) -> the images' token embeddings (M, P, C)."""
        with torch.inference_mode():
            pixels = normalise(pixels).to(self.projector.linear_1.weight.dtype)
            features = self.vision_tower.patches(pixels)
        return self.projector(features.clone())  # inference tensors cannot be saved for backward

    def flops(self, batch):
        """FLOP of training on a data.Batch: as GPT.flops, CLIP forward and the projector."""
        c, C = self.clip_config, self.config.n_embd
        clip = patch_flops(c) + encoder_flops(c.vision_layers - 1, c.vision_width, c.n_patches + 1)
        projector = c.n_patches * (4 * c.vision_width + 6 * C) * C  # its input has no gradient
        n_images = 0 if batch.pixels is None else len(batch.pixels)
        return self.decoder.flops(batch) + n_images * (clip + projector)


def image_spec(clip_config):
    """The data.ImageSpec of images for a CLIP with this configuration."""
    return ImageSpec(clip_config.n_patches, clip_config.image_size, clip_config.fit)


def open_model(name, device="cpu", kinds=("decoder", "vision", "clip")):
    """(model, tokenizer, info) of any checkpoint, in eval mode; info from checkpoint.read."""
    info, weights, _ = checkpoint.read(name, kinds)
    parts = {"decoder": GPTConfig, "clip": CLIPConfig}
    configs = [config(**info[part]) for part, config in parts.items() if part in info]
    model = {"vision": VisionLanguageModel, "decoder": GPT, "clip": CLIP}[info["kind"]](*configs)
    checkpoint.load_weights(model, weights, info["folder"])
    return model.to(device).eval(), tokenizer_of(info), info


def tokenizer_of(info):
    """The tokenizer of a checkpoint; UserError if its files do not match the training's."""
    name = info["tokenizer_name"]
    found = tokenizers.load("gpt2" if name == "gpt2" else info["folder"])
    if found.fingerprint != info["tokenizer"]:
        raise UserError(f"{info['folder']} does not hold the tokenizer it was trained with")
    return found


def describe(model):
    """The model's entry in config.json, from which open_model makes it."""
    if isinstance(model, VisionLanguageModel):
        return dict(kind="vision", decoder=dataclasses.asdict(model.config),
                    clip=dataclasses.asdict(model.clip_config))
    kind = "clip" if isinstance(model, CLIP) else "decoder"
    return {"kind": kind, kind: dataclasses.asdict(model.config)}


def join(decoder_name, clip_name, fit=""):
    """A VisionLanguageModel from a decoder and a CLIP checkpoint, with a new projector.

    clip_name: a checkpoint of clip_pretrain.py, or a CLIP of `transformers` by folder or hub name.
    fit: "pad" or "crop" (common.images.fit), empty for what CLIP was trained with ("pad", as in
    LLaVA, for OpenAI's). Returns (model, tokenizer, [decoder's info, CLIP's info]).
    """
    decoder_info, decoder_weights, _ = checkpoint.read(decoder_name, ("decoder",))
    folder = checkpoint.locate(clip_name)
    if (folder / "manifest.json").is_file():
        clip_info, clip_weights, _ = checkpoint.read(folder, ("clip",))
    else:
        clip_info, clip_weights = read_transformers_clip(folder)
    clip_config = CLIPConfig(**clip_info["clip"])
    clip_config.fit = fit or clip_config.fit
    model = VisionLanguageModel(GPTConfig(**decoder_info["decoder"]), clip_config)
    prefix = "vision_model."
    tower = {n.removeprefix(prefix): w for n, w in clip_weights.items() if n.startswith(prefix)}
    checkpoint.load_weights(model.decoder, decoder_weights, decoder_info["folder"])
    checkpoint.load_weights(model.vision_tower, tower, clip_info["folder"])
    return model, tokenizer_of(decoder_info), [decoder_info, clip_info]


def read_transformers_clip(folder):
    """(info, weights) of a CLIP in `transformers` format, such as OpenAI's on the hub."""
    import transformers  # knows the defaults that config.json leaves out

    config = read_json(folder / "config.json")
    if config.get("model_type") != "clip":
        raise UserError(f"{folder} holds a {config.get('model_type')} model, not a CLIP")
    config = transformers.CLIPConfig(**config)
    vision, text = config.vision_config, config.text_config
    end_id = 49407 if text.eos_token_id == 2 else text.eos_token_id  # 2: old exports
    clip = CLIPConfig(
        vision.image_size, vision.patch_size, vision.hidden_size, vision.num_hidden_layers,
        vision.num_attention_heads, text.hidden_size, text.num_hidden_layers,
        text.num_attention_heads, text.max_position_embeddings, text.vocab_size, end_id,
        config.projection_dim, vision.hidden_act)
    file = folder / "model.safetensors"
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    weights = {n: w.float() for n, w in weights.items() if not n.endswith("position_ids")}
    info = {"stage": "transformers", "kind": "clip", "clip": dataclasses.asdict(clip),
            "folder": str(folder), "step": 0, "sha256": checkpoint.file_sum(file), "metrics": {}}
    return info, weights
