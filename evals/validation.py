"""The scores of eval.py without --tasks: all that a checkpoint and its data folder allow.

Text: loss and bits per byte. Chats: loss and exact answers. CLIP: the correct caption of 32,
retrieval and, with --zero_shot, classification. Images: the loss with the correct image, a
mismatched one, a blank one and none; the caption that the decoder finds likeliest of 32; and exact
answers, also with the images shuffled among the questions and without. All answers are greedy.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch

from common.config import UserError, read_json
from data import Chats, Text, check_tokenizer
from evals import zero_shot
from evals.image_ablation import SUFFIXES, AblatedChats, ImageAblation, nats_by_chat
from evals.loglikelihood import Item, likelihoods
from evals.metrics import ratio, retrieval_ranks, score
from inference.conversation import answer_all, expand_images, fits, ready_to_chat, turns_of
from model import head_loss
from train.packing import Captions, Packed
from vision import image_spec, open_model

ANSWER_TOKENS = 64  # longest generated answer
CHOICES = 32  # captions to choose from
CHOOSERS = 256  # most images of caption_choice: each is scored with 32 captions


def scores_of(name, cfg, machine, split):
    """Yield {label: Score} of all that a checkpoint and the data's `split` allow, in parts."""
    model, tokenizer, info = open_model(name, machine.device)
    data, items, stage = Path(cfg.data), cfg.items, info["stage"]
    if info["kind"] == "clip":
        yield from clip_scores(model, tokenizer, cfg, machine, split)
        return
    if cfg.zero_shot and not cfg.report:
        raise UserError(f"--zero_shot={cfg.zero_shot} is for a CLIP, which {name} is not")
    # Losses, in the precision of training
    if stage == "pretrain" or (data / "text").is_dir():
        check_tokenizer(data / "text", tokenizer)
        found = text_loss(model, tokenizer, data / "text", items, machine, split=split)
        yield {label + f"/{stage}" * (stage != "pretrain"): x for label, x in found.items()}
    log_V, T = math.log(tokenizer.n_vocab), model.config.max_positions
    if stage in ("sft", "vision_sft"):
        chats = AblatedChats(opened(data / "chats", split, tokenizer), items, tokenizer)
        nats = nats_by_chat(machine, model, Packed([chats], T, tokenizer), 8)
        yield {"chat_loss": score([*nats.values()], ratio, log_V)}
    if info["kind"] == "vision":
        folder, label = ("scenes", "answer") if stage == "vision_sft" else ("captions", "caption")
        chats = opened(data / folder, split, tokenizer)
        ablation = ImageAblation(chats, items, T, tokenizer, model.image_spec,
                                 others=("mismatched", "text_only", "blank"))
        nats = {kind: nats_by_chat(machine, model, packed, 8)
                for kind, packed in ablation.packed.items()}
        yield {f"{label}_loss{SUFFIXES[kind]}": score(
            [*pairs.values()], ratio, log_V, clusters=[*map(chats.cluster, pairs)])
            for kind, pairs in nats.items()}
        names = {"mismatched": "vision_gain_shuffled", "blank": "vision_gain_blank"}
        yield {names[kind]: gain for kind, gain in ablation.gains(nats).items()}
    # Answers, in the precision of inference
    ready_to_chat(model)
    if info["kind"] == "vision" and (data / "captions" / split).is_dir():
        chats = opened(data / "captions", split, tokenizer)
        yield {"caption_choice32": caption_choice(model, tokenizer, chats, items)}
    yield from answer_scores(model, tokenizer, data, stage, items, split)


def opened(folder, split, tokenizer):
    check_tokenizer(folder, tokenizer)
    return Chats(folder, split)


@torch.inference_mode()
def text_loss(model, tokenizer, folder, items, machine, batch=32, split="val"):
    """Loss in nats per token, and bits per byte of the text, over the split's first windows."""
    val = Text(folder, split, min(256, model.config.max_positions), tokenizer.n_vocab)
    n, decoder = min(items, len(val)), getattr(model, "decoder", model)
    nats, n_bytes = [], []
    for start in range(0, n, batch):
        rows = val.batch(range(start, min(start + batch, n))).to(machine.device)
        with machine.autocast():
            states = decoder.hidden(decoder.token_embedding(rows.ids))  # (B, T, C)
            nats += [head_loss(row, decoder.head.weight, targets).item()
                     for row, targets in zip(states, rows.targets, strict=True)]
        n_bytes += map(tokenizer.n_bytes, rows.targets.tolist())
    log_V, bits = math.log(tokenizer.n_vocab), np.array(nats) / math.log(2)
    return {"text_val_loss": score(np.stack((nats, np.full(n, val.T)), 1), ratio, log_V),
            "text_bits_per_byte": score(np.stack((bits, n_bytes), 1), ratio, 8.0)}


def turns(model, tokenizer, chats, n, max_tokens=None):
    """Yield (number of the chat, prompt, answer as ids, images) of every assistant turn in the
    first n chats that fits the context, with max_tokens, if given, instead of the answer."""
    spec, too_long = getattr(model, "image_spec", None), 0
    for i in range(min(n, len(chats))):
        images = chats.images(i, spec)
        complete = turns_of(getattr(chats, "chats", chats), i)  # text-only: as many as with images
        for (prompt, answer), (longest, _) in zip(turns_of(chats, i), complete, strict=True):
            if fits(model, tokenizer, longest, max_tokens or len(answer) + 1):
                yield i, prompt, answer, images[: prompt.count(tokenizer.image)]
            else:
                too_long += 1
    if too_long:
        print(f"({chats.folder}: {too_long} turns too long for the context)", file=sys.stderr)


def answer_scores(model, tokenizer, data, stage, items, split):
    """Yield exact answers of chats and about images, in all and by kind of question.

    The chance of vqa_exact is vqa_shuffled: with the images shuffled among the questions.
    """
    table = [("chat_exact", "chats", split, "correct"),
             ("vqa_shuffled", "scenes", split, "mismatched"),
             ("vqa_exact", "scenes", split, "correct"),
             ("vqa_text_only", "scenes", split, "text_only"),
             ("vqa_heldout_pairs", "scenes", f"{split}_pairs", "correct")]
    if not (data / "scenes" / f"{split}_pairs").is_dir():  # only the demo has held-out pairs
        table.pop()
    shuffled = {}
    for label, kind, part, images in table[: {"sft": 1, "vision_sft": 5}.get(stage, 0)]:
        chats = Chats(data / kind, part)
        marks = exact_answers(model, tokenizer, chats, items, images)
        chances = shuffled if label == "vqa_exact" else {}
        found = {group: score([mark for mark, _ in some], chance=chances.get(group),
                              clusters=[chats.cluster(number) for _, number in some])
                 for group, some in marks.items()}
        if label == "vqa_shuffled":
            shuffled = {group: x.value for group, x in found.items()}
        yield {label + group: x for group, x in found.items()}


def exact_answers(model, tokenizer, chats, items, images):
    """{"": [(whether an answer, generated after the reference turns before it, equals its
    reference, number of the chat)], "/GROUP": of each group in it}. images: see AblatedChats."""
    ablated = AblatedChats(chats, items, tokenizer, images)
    asked = list(turns(model, tokenizer, ablated, items, ANSWER_TOKENS))
    if not asked:
        raise UserError(f"no chat of {chats.folder} fits the model's context")
    numbers, prompts, references, shown = zip(*asked, strict=True)
    answers = answer_all(model, tokenizer, prompts, shown, ANSWER_TOKENS)
    marks = [(answer == tokenizer.decode(reference), number)
             for number, answer, reference in zip(numbers, answers, references, strict=True)]
    file, found = chats.folder / "groups.json", {}
    if file.is_file():
        groups = read_json(file)
        for mark, number in marks:
            found.setdefault(f"/{groups[number]}", []).append((mark, number))
    return {"": marks, **dict(sorted(found.items()))}


def caption_choice(model, tokenizer, chats, items):
    """How often an image's caption is the likeliest per token of 32 different ones: those of 32
    chats with one image. The prompt is everything before the first answer. Of another caption that
    is longer than the context, the tokens that fit count."""
    first = {}  # of each chat (prompt, answer, images)
    for number, prompt, answer, images in turns(model, tokenizer, chats, len(chats)):
        if len(first) == min(items, CHOOSERS):
            break
        if chats.n_images(number) == 1:
            first.setdefault(number, (prompt, [*answer, tokenizer.end], images))
    if not first:
        raise UserError(f"{chats.folder}: no chat with one image fits the model's context")
    numbers, asked = list(first), list(first.values())
    groups = zero_shot.groups_of_different([tuple(answer) for _, answer, _ in asked], CHOICES)
    order, questions = [i for group in groups for i in group], []
    for group in groups:
        for prompt, _, images in (asked[i] for i in group):
            room = model.config.max_positions - len(expand_images(model, tokenizer, prompt))
            questions.append(Item(prompt, [asked[k][1][:room] for k in group], images))
    size, found = len(groups[0]), likelihoods(model, tokenizer, questions)
    likeliest = [int(np.argmax([nats / n for nats, _, n in answers])) for answers in found]
    return score([k == i % size for i, k in enumerate(likeliest)], chance=1 / size,
                 clusters=[chats.cluster(numbers[i]) for i in order])


def clip_scores(model, tokenizer, cfg, machine, split):
    """Yield how often the correct caption of 32 is chosen, retrieval, and zero-shot accuracy."""
    folder, n, most = Path(cfg.data) / "captions", cfg.items, 2048  # most: of the first score
    info = (folder / "manifest.json").is_file() and read_json(folder / "manifest.json")
    if not cfg.zero_shot or (info and info["tokenizer"] == tokenizer.fingerprint):
        pairs = Captions(opened(folder, split, tokenizer), tokenizer, image_spec(model.config),
                         model.config.context)
        images, texts, keys = zero_shot.features_of(model, pairs, machine, max(n, most))
        clusters = [pairs.chats.cluster(i) for i in pairs.chosen[: len(keys)]]
        groups = zero_shot.groups_of_different(keys[:most], CHOICES)
        marks = zero_shot.caption_choice(images[:most], texts[:most], keys[:most])
        yield {"clip_choice32": score(marks, chance=1 / len(groups[0]),
                                      clusters=[clusters[i] for group in groups for i in group])}
        yield retrieval(images[:n], texts[:n], keys[:n], clusters[:n])
    if cfg.zero_shot:
        labelled = zero_shot.Labelled(cfg.zero_shot, cfg.prompt)
        correct, n = zero_shot.zero_shot(model, tokenizer, labelled, machine)
        yield {"clip_zero_shot": score(np.arange(n) < correct, chance=1 / len(labelled.captions))}


def retrieval(images, texts, keys, clusters=None):
    """Recall at 1, 5 and 10 from image features (N, E) to text features (N, E) and back. Captions
    with equal keys (N) are correct for each other's images."""
    matches, n = np.equal.outer(keys, keys), len(keys)
    similarity, found = (images @ texts.T).float().cpu().numpy(), {}
    for way, scores in ("image_to_text", similarity), ("text_to_image", similarity.T):
        ranks = retrieval_ranks(scores, matches)
        for k in 1, 5, 10:
            chance = np.mean([1 - math.comb(n - correct, k) / max(1, math.comb(n, k))
                              for correct in matches.sum(1).tolist()])  # of k drawn at random
            found[f"clip_{way}_r{k}"] = score(ranks < k, chance=float(chance), clusters=clusters)
    return found
