"""What eval.py scores without --tasks: all that a checkpoint and its data folder allow.

Text by loss and bits per byte, chats by loss and exact answers. CLIP by picking the right caption
of 32, by retrieval and, with --zero_shot, by the right class's name alone. Pictures by the loss
with the right one, another one, none and a grey one, and what the right one saves against another
and the grey one; by which of 32 captions the decoder finds likeliest; and by exact answers, also
with the pictures shuffled among the questions (what remains then was guessed) and with none. All
answers are greedy. Standard errors are by bootstrap over windows, chats, pictures or answers.
"""

import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.config import UserError, read_json
from common.images import ImageError
from data import Chats, Text, check_tokenizer
from evals.image_ablation import Gains, Held, a_token, nats_by_chat
from evals.loglikelihood import Item, likelihoods
from evals.metrics import bootstrap, retrieval_recall
from evals.zero_shot import Labelled, choose_captions, counted, features_of, groups_of_different
from inference.conversation import answer_all, fits, ready_to_chat, turns_of
from model import head_loss
from train.packing import Captions, Packed
from vision import image_spec, open_model

ANSWER_TOKENS = 64  # longest answer that is scored
CHOICES = 32
CHOOSERS = 256  # most pictures that choose by likelihood: each of them costs all its captions


@dataclass
class Score:
    """A figure, its standard error, and what guessing gives; None where there is no such thing."""

    value: float
    error: float | None = None
    chance: float | None = None

    def line(self, label):
        error = "" if self.error is None else f" ± {self.error:.4f}"
        chance = "" if self.chance is None else f"  (guessing {self.chance:.3f})"
        return f"{label:32s} {self.value:.4f}{error}{chance}"

    def cells(self):
        """For a table, with "" for None."""
        return [f"{self.value:.4g}", *("" if figure is None else f"{figure:.2g}"
                                       for figure in (self.error, self.chance))]


def share(marks, chance=None):
    """The Score of marks, a number or truth value an item: their mean."""
    marks = np.array(marks, float)
    return Score(float(marks.mean()), bootstrap(marks), chance)


def score(name, cfg, machine, split):
    """All scores that a checkpoint and the data's `split` allow, as {name: Score}; prints each as
    soon as it is known."""
    scores = {}
    for found in groups_of_scores(name, cfg, machine, split):
        for label, figure in found.items():
            print(figure.line(label), flush=True)
        scores |= found
    return scores


def groups_of_scores(name, cfg, machine, split):
    """Yield what `score` returns, a few at a time."""
    model, tokenizer, info = open_model(name, machine.device)
    data, items, stage = Path(cfg.data), cfg.items, info["stage"]
    if info["kind"] == "clip":
        yield clip_scores(model, tokenizer, data / "captions", cfg, machine, split)
    elif cfg.zero_shot and not cfg.report:
        raise UserError(f"--zero_shot={cfg.zero_shot} is for a CLIP, which {name} is not")
    if stage == "pretrain" or (info["kind"] != "clip" and (data / "text").is_dir()):
        check_tokenizer(data / "text", tokenizer)
        found = text_loss(model, tokenizer, data / "text", items, machine, split=split)
        yield {label + f"/{stage}" * (stage != "pretrain"): x for label, x in found.items()}
    if stage in ("sft", "vision_sft"):
        check_tokenizer(data / "chats", tokenizer)
        chats = Chats(data / "chats", split)
        packed = Packed([Held(chats, items, tokenizer)], model.config.max_positions, tokenizer)
        yield {"chat_loss": loss_of(nats_by_chat(machine, model, packed, 8), tokenizer)}
    if info["kind"] == "vision":
        yield looking_scores(model, tokenizer, data, stage, items, machine, split)
    if info["kind"] != "clip":  # losses are done: from here on the model only answers
        ready_to_chat(model)
    if stage in ("sft", "vision_sft"):
        yield {"chat_exact": share(exact(model, tokenizer, chats, items)[0])}
    if info["kind"] == "vision" and (data / "captions" / split).is_dir():
        check_tokenizer(data / "captions", tokenizer)
        found = caption_choice(model, tokenizer, Chats(data / "captions", split), items)
        yield {"caption_choice32": found}
    if stage == "vision_sft":
        yield from answer_scores(model, tokenizer, data / "scenes", items, split)


def answer_scores(model, tokenizer, folder, items, split):
    """Yield exact answers about images, all and by kind of question.

    Guessing is what the model gets right with the images shuffled among the questions.
    """
    asked = {"vqa_shuffled": (split, "other"), "vqa_exact": (split, "own"),
             "vqa_blind": (split, "none"), "vqa_heldout_pairs": (f"{split}_pairs", "own")}
    guesses = {}
    for label, (part, images) in asked.items():
        if not (folder / part).is_dir():  # only the demo's scenes have held-out pairs
            continue
        marks, kinds = exact(model, tokenizer, Chats(folder, part), items, images)
        found = {"": share(marks)} | {f"/{kind}": share(kinds[kind]) for kind in sorted(kinds)}
        if label == "vqa_shuffled":
            guesses = {kind: figure.value for kind, figure in found.items()}
        if label == "vqa_exact":
            for kind, figure in found.items():
                figure.chance = guesses.get(kind)
        yield {label + kind: figure for kind, figure in found.items()}


def looking_scores(model, tokenizer, data, stage, items, machine, split):
    """Loss on held-out captions, or questions and answers, with each kind of picture; the gains."""
    kind, label = ("scenes", "answer") if stage == "vision_sft" else ("captions", "caption")
    check_tokenizer(data / kind, tokenizer)
    looking = Gains(Chats(data / kind, split), items, model.config.max_positions, tokenizer,
                    model.image_spec)
    nats = looking.nats(machine, model, 8)
    names = {"own": f"{label}_loss", "other": f"{label}_loss_other_picture",
             "none": f"{label}_loss_no_picture", "blank": f"{label}_loss_blank_picture"}
    scores = {names[kind]: loss_of(found, tokenizer) for kind, found in nats.items()}
    gains = {"other": "vision_gain_shuffled", "blank": "vision_gain_blank"}
    return scores | {gains[kind]: Score(*found, 0.0)
                     for kind, found in looking.gains(nats).items()}


def loss_of(nats, tokenizer):
    """The Score of what looking.nats_by_chat found, in nats a token."""
    if not nats:
        raise UserError("no chat's pictures can be read, so there is nothing to score")
    return Score(*a_token(list(nats.values())), math.log(tokenizer.n_vocab))


def caption_choice(model, tokenizer, chats, items):
    """How often the caption of a picture is the likeliest of 32 different ones, by nats a token.

    model: one that is ready to chat. Asked is what stands before the first answer of a chat with
    one picture, and its groups of 32 choose among the captions of each other.
    """
    asked = []
    for number in range(len(chats)):
        if len(asked) == min(items, CHOOSERS):
            break
        prompt, answer = turns_of(chats, number)[0]
        answer = [*answer, tokenizer.end]
        if chats.n_images(number) == 1 and fits(model, tokenizer, prompt, len(answer)):
            try:
                asked.append((prompt, answer, chats.images(number, model.image_spec)))
            except ImageError as error:
                print(f"(left out: {error})", file=sys.stderr)
    if not asked:
        raise UserError(f"{chats.folder}: no chat with one picture fits, so none chooses a caption")
    groups = groups_of_different([tuple(answer) for _, answer, _ in asked], CHOICES)
    questions = [Item(asked[i][0], [asked[k][1] for k in group], asked[i][2])
                 for group in groups for i in group]
    marks = []
    found = likelihoods(model, tokenizer, questions)
    for number, (item, of_item) in enumerate(zip(questions, found, strict=True)):
        each = [x.nats / len(ids) for x, ids in zip(of_item, item.answers, strict=True)]
        marks.append(int(np.argmax(each)) == number % len(item.answers))
    return share(marks, 1 / len(groups[0]))


def clip_scores(model, tokenizer, folder, cfg, machine, split):
    """How often the right caption is chosen and found, and the right class with --zero_shot."""
    scores = {}
    if folder.is_dir() or not cfg.zero_shot:
        check_tokenizer(folder, tokenizer)
        pairs = Captions(Chats(folder, split), tokenizer, image_spec(model.config),
                         model.config.context)
        images, texts, keys = features_of(model, pairs, machine, max(cfg.items, 2048))
        marks, _ = choose_captions(model, images[:2048], texts[:2048], keys[:2048], CHOICES)
        scores["clip_choice32"] = share(marks, 1 / min(CHOICES, len(set(keys[:2048]))))
        n = cfg.items
        scores |= retrieval(images[:n], texts[:n], keys[:n])
    if cfg.zero_shot:
        labelled = Labelled(cfg.zero_shot, cfg.prompt)
        right, n = counted(model, tokenizer, labelled, machine)
        scores["clip_zero_shot"] = share(np.arange(n) < right, 1 / len(labelled.captions))
    return scores


def retrieval(images, texts, keys):
    """Recall at 1, 5 and 10 of pictures (N, E) that look for their captions (N, E), and the other
    way round. Captions with equal keys (N) are right for all their pictures."""
    keys = np.array(keys)
    belongs, found = keys[:, None] == keys, {}
    similarity = (images @ texts.T).float().cpu().numpy()
    for k in 1, 5, 10:
        by_chance = float(np.mean([lucky(len(keys), int(own), k) for own in belongs.sum(1)]))
        for way, marks in zip(("image_to_text", "text_to_image"),
                              retrieval_recall(similarity, k, belongs), strict=True):
            found[f"clip_{way}_r{k}"] = share(marks, by_chance)
    return dict(sorted(found.items(), key=lambda item: "image_to_text" not in item[0]))


def lucky(n, own, k):
    """The probability that k of n, drawn at random, have one of `own` among them."""
    return 1 - math.comb(n - own, k) / math.comb(n, k) if k < n else 1.0


@torch.inference_mode()
def text_loss(model, tokenizer, folder, items, machine, T=None, batch=32, split="val"):
    """Loss in nats per token, and bits per byte of the text, over the split's first windows."""
    val = Text(folder, split, T or min(256, model.config.max_positions), tokenizer.n_vocab)
    n, decoder = min(items, len(val)), getattr(model, "decoder", model)
    nats, n_bytes = [], []
    for start in range(0, n, batch):
        rows = val.batch(range(start, min(start + batch, n))).to(machine.device)
        with machine.autocast():
            states = decoder.hidden(decoder.token_embedding(rows.ids))  # (B, T, C)
            nats += [head_loss(some, decoder.head.weight, targets).item()
                     for some, targets in zip(states, rows.targets, strict=True)]
        for row in rows.targets.tolist():
            text = tokenizer.decode([i for i in row if i != tokenizer.end_of_text])
            n_bytes.append(len(text.encode()))
    by_token = np.stack((nats, np.full(n, val.T)), 1)
    by_byte = np.stack((np.array(nats) / math.log(2), n_bytes), 1)
    return {"text_val_loss": Score(*a_token(by_token), math.log(tokenizer.n_vocab)),
            "text_bits_per_byte": Score(*a_token(by_byte), 8.0)}


def exact(model, tokenizer, chats, items, pictures="own"):
    """Whether each answer is right to the letter, and the same by group: (marks, {group: marks}).

    Every turn of the assistant in the first `items` chats is asked for, with the right history.
    pictures: "own", "other" or "none", see looking.Held.
    """
    prompts, wanted, images, groups = [], [], [], []
    shown = Held(chats, items, tokenizer, pictures)
    spec = getattr(model, "image_spec", None)
    file = chats.folder / "groups.json"
    names = read_json(file) if file.is_file() else [""] * len(chats)
    too_long = 0
    for i in range(len(shown)):
        try:
            found = shown.images(i, spec)
        except ImageError as error:
            print(f"(left out: {error})", file=sys.stderr)
            continue
        for prompt, answer in turns_of(shown, i):
            if not fits(model, tokenizer, prompt, ANSWER_TOKENS):
                too_long += 1
                continue
            prompts.append(prompt)
            wanted.append(tokenizer.decode(answer))
            images.append(found[: prompt.count(tokenizer.image)])
            groups.append(names[i])
    if too_long:
        print(f"({chats.folder}: {too_long} turns too long for the context)", file=sys.stderr)
    if not prompts:
        raise UserError(f"no chat of {chats.folder} fits the model's context")
    said = answer_all(model, tokenizer, prompts, images, ANSWER_TOKENS)
    marks, by_group = [a == b for a, b in zip(said, wanted, strict=True)], defaultdict(list)
    for mark, group in zip(marks, groups, strict=True):
        by_group[group].append(mark)
    return marks, {group: some for group, some in by_group.items() if group}
