"""A page that shows what a model looked at: sample.py --show=attention, and a tab of app.py.

For each token of an answer: how much each layer attended (mean over heads) to image patches and
words before it, and the likeliest next tokens. For words: the cosine with patches in its CLIP.
"""

import base64
import contextlib
import functools
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import torch

from clip import caption_ids, normalise
from common.config import UserError
from common.images import fit, to_pixels
from inference.conversation import decoder_of
from model import rotate
from vision import open_model

SHOWN, CANDIDATES, WORDS = 96, 6, 24  # tokens of an answer, likeliest ones, words for CLIP
open_clip = functools.cache(functools.partial(open_model, kinds=("clip",)))


@torch.inference_mode()
def attention_page(conversation, info):
    """The HTML of the last answer of a Conversation; info: of the checkpoint, whose lineage names
    the CLIP. UserError if the answer is empty."""
    model, tokenizer = conversation.model, conversation.tokenizer
    decoder, (*earlier, turn), layers = decoder_of(model), conversation.turns, []
    answer = turn.answer[:SHOWN]  # a copy: more may come meanwhile
    ids = [*conversation.ids([*earlier, replace(turn, answer=[])]), *answer]
    first = len(ids) - len(answer)  # place of the answer's first token
    if not answer:
        raise UserError("there is no answer to look into")
    with contextlib.ExitStack() as hooks:
        for block in decoder.blocks:
            hooks.enter_context(block.attention.register_forward_pre_hook(
                lambda module, given: layers.append(weights(module, *given[:2])[first - 1 : -1])))
        states = decoder.hidden(conversation.embeddings(ids))[0, first - 1 : -1]
    chances, likely = decoder.head(states).float().softmax(-1).topk(CANDIDATES)

    data = {"tokens": ["" if i < 0 else tokenizer.decode([i]) for i in ids], "first": first,
            "attention": (torch.stack(layers, 1) * 1000).round().int().tolist(),
            "candidates": [[[tokenizer.decode([i]), p] for i, p in zip(*both, strict=True)]
                           for both in zip(likely.tolist(), chances.tolist(), strict=True)],
            "patches": [], "clip": [], "image": ""}
    if shown := [image for turn in conversation.turns for image in turn.images]:
        spec, file = model.image_spec, io.BytesIO()
        fit(shown[0].picture, spec.size, spec.fit).save(file, "PNG")
        said = " ".join(f"{t.text} {tokenizer.decode(t.answer)}" for t in conversation.turns)
        words = list(dict.fromkeys(re.findall(r"[^\W\d_]{3,}", said.lower())))
        data |= {"image": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
                 "patches": [place for place, i in enumerate(ids) if i == shown[0].id],
                 "clip": clip_words(info, shown[0].picture, words[:WORDS])}
    page = Path(__file__).with_name("attention_page.html").read_text(encoding="utf-8")
    return page.replace("$data", json.dumps(data).replace("<", "\\u003c"))


def weights(attention, x, rotary):
    """Attention weights (T, T) of a model.Attention on x (1, T, C), the mean over its heads."""
    T = x.size(1)
    qk = attention.qkv(x).view(1, T, 3, attention.n_head, -1)[:, :, :2]
    q, k = rotate(qk, *rotary)[0].float().permute(1, 2, 0, 3)  # (H, T, D)
    later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    scores = (q @ k.mT * q.size(-1) ** -0.5).masked_fill(later, float("-inf"))
    return scores.softmax(-1).mean(0)


def clip_words(info, image, words):
    """[[word, the cosines * 1000 of an image's patches with it]], by the CLIP of info's lineage;
    [] if that is not one of clip_pretrain.py, or is gone."""
    folders = [line["folder"] for line in info.get("lineage", [])
               if line["stage"] == "clip_pretrain"]
    try:
        clip, tokenizer, _ = open_clip(*folders)
    except (UserError, TypeError):
        return []
    config, tower = clip.config, clip.vision_model
    patches = tower.post_layernorm(tower.patches(normalise(to_pixels(
        [image], config.image_size, config.fit))))
    patches = torch.nn.functional.normalize(clip.visual_projection(patches)[0], dim=-1)
    cosines = clip.text_features(caption_ids(tokenizer, words, config.context)) @ patches.T
    return [[word, row] for word, row in zip(words, (cosines * 1000).round().int().tolist(),
                                             strict=True)]
