"""What eval.py scores without --tasks: everything that a checkpoint and its data folder allow.

Text: loss and bits per byte. Chats: loss and exact answers. CLIP: the correct caption of 32,
retrieval and, with --zero_shot, classification. Images: the loss with the correct image, a
mismatched one, a blank one and none; the caption that the decoder finds likeliest of 32; and exact
answers, also with the images shuffled among the questions and without. Generated answers are
greedy. Standard errors are by bootstrap over windows, chats, images or answers.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.config import UserError, read_json
from common.images import ImageError
from data import Chats, Text, check_tokenizer
from evals import zero_shot
from evals.image_ablation import AblatedChats, ImageAblation, nats_by_chat, per_token
from evals.loglikelihood import Item, likelihoods
from evals.metrics import bootstrap, retrieval_ranks
from inference.conversation import answer_all, fits, ready_to_chat, turns_of
from model import head_loss
from train.packing import Captions, Packed
from vision import image_spec, open_model

ANSWER_TOKENS = 64  # longest generated answer
CHOICES = 32  # captions to choose from
CHOOSERS = 256  # most images of caption_choice: each is scored with 32 captions


@dataclass
class Score:
    """A value, its standard error, and the value by chance; None where it is not defined."""

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
    """The Score of marks, a number or truth value per item: their mean."""
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
    """Yield what `score` returns, one kind of score at a time."""
    model, tokenizer, info = open_model(name, machine.device)
    data, items, stage = Path(cfg.data), cfg.items, info["stage"]
    vision = info["kind"] == "vision"

    def opened(kind):
        check_tokenizer(data / kind, tokenizer)
        return Chats(data / kind, split)

    if info["kind"] == "clip":
        if (data / "captions").is_dir() or not cfg.zero_shot:
            yield caption_scores(model, tokenizer, opened("captions"), items, machine)
        if cfg.zero_shot:
            labelled = zero_shot.Labelled(cfg.zero_shot, cfg.prompt)
            correct, n = zero_shot.count_correct(model, tokenizer, labelled, machine)
            yield {"clip_zero_shot": share(np.arange(n) < correct, 1 / len(labelled.captions))}
        return
    if cfg.zero_shot and not cfg.report:
        raise UserError(f"--zero_shot={cfg.zero_shot} is for a CLIP, which {name} is not")
    # Losses, in the precision of training
    if stage == "pretrain" or (data / "text").is_dir():
        check_tokenizer(data / "text", tokenizer)
        found = text_loss(model, tokenizer, data / "text", items, machine, split=split)
        yield {label + f"/{stage}" * (stage != "pretrain"): x for label, x in found.items()}
    if stage in ("sft", "vision_sft"):
        packed = Packed([AblatedChats(opened("chats"), items, tokenizer)],
                        model.config.max_positions, tokenizer)
        nats = nats_by_chat(machine, model, packed, 8)
        yield {"chat_loss": loss_score([*nats.values()], tokenizer)}
    if vision:
        kind, label = ("scenes", "answer") if stage == "vision_sft" else ("captions", "caption")
        yield ablation_scores(model, tokenizer, opened(kind), items, machine, label)
    # Answers, in the precision of inference
    ready_to_chat(model)
    if vision and (data / "captions" / split).is_dir():
        yield {"caption_choice32": caption_choice(model, tokenizer, opened("captions"), items)}
    yield from answer_scores(model, tokenizer, data, stage, items, split)


# ------------------------------------------------------------------------------------------- losses


def loss_score(pairs, tokenizer):
    """The Score, in nats per token, of items: pairs (N, 2) of nats and tokens."""
    return Score(*per_token(pairs), math.log(tokenizer.n_vocab))


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
        for row in rows.targets.tolist():
            text = tokenizer.decode([i for i in row if i != tokenizer.end_of_text])
            n_bytes.append(len(text.encode()))
    by_token = np.stack((nats, np.full(n, val.T)), 1)
    by_byte = np.stack((np.array(nats) / math.log(2), n_bytes), 1)
    return {"text_val_loss": loss_score(by_token, tokenizer),
            "text_bits_per_byte": Score(*per_token(by_byte), 8.0)}


def ablation_scores(model, tokenizer, chats, items, machine, label):
    """Loss of captions, or of answers about images, with each kind of image; the vision gains."""
    ablation = ImageAblation(chats, items, model.config.max_positions, tokenizer, model.image_spec,
                             others=("mismatched", "text_only", "blank"))
    nats = ablation.nats(machine, model, 8)
    names = {"correct": f"{label}_loss", "mismatched": f"{label}_loss_mismatched_image",
             "text_only": f"{label}_loss_text_only", "blank": f"{label}_loss_blank_image"}
    gains = {"mismatched": "vision_gain_shuffled", "blank": "vision_gain_blank"}
    return {names[kind]: loss_score([*pairs.values()], tokenizer)
            for kind, pairs in nats.items()} | {
        gains[kind]: Score(*found, 0.0) for kind, found in ablation.gains(nats).items()}


# ------------------------------------------------------------------------------------------ answers


def turns(model, tokenizer, chats, n, max_tokens=None):
    """Yield (number of the chat, prompt, answer as ids, images) of every assistant turn in the
    first n chats, without those whose images are unreadable or that exceed the context.

    max_tokens: room for a generated answer; None for just the reference.
    """
    spec, too_long = getattr(model, "image_spec", None), 0
    for i in range(min(n, len(chats))):
        try:
            images = chats.images(i, spec)
        except ImageError as error:
            print(f"(left out: {error})", file=sys.stderr)
            continue
        for prompt, answer in turns_of(chats, i):
            if fits(model, tokenizer, prompt, max_tokens or len(answer) + 1):
                yield i, prompt, answer, images[: prompt.count(tokenizer.image)]
            else:
                too_long += 1
    if too_long:
        print(f"({chats.folder}: {too_long} turns too long for the context)", file=sys.stderr)


def exact_answers(model, tokenizer, chats, items, images="correct"):
    """(whether each generated answer equals its reference, the group of each question or "").

    Each turn follows the reference turns before it. images: see AblatedChats.
    """
    ablated = AblatedChats(chats, items, tokenizer, images)
    asked = list(turns(model, tokenizer, ablated, items, ANSWER_TOKENS))
    if not asked:
        raise UserError(f"no chat of {chats.folder} fits the model's context")
    numbers, prompts, references, shown = zip(*asked, strict=True)
    answers = answer_all(model, tokenizer, prompts, shown, ANSWER_TOKENS)
    file = chats.folder / "groups.json"
    groups = read_json(file) if file.is_file() else [""] * len(chats)
    return [answer == tokenizer.decode(reference) for answer, reference
            in zip(answers, references, strict=True)], [groups[i] for i in numbers]


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
    chance = {}
    for label, kind, part, images in table[: {"sft": 1, "vision_sft": 5}.get(stage, 0)]:
        marks, groups = exact_answers(model, tokenizer, Chats(data / kind, part), items, images)
        found = {"": share(marks)}
        for group in sorted(set(groups) - {""}):
            found[f"/{group}"] = share([mark for mark, other in zip(marks, groups, strict=True)
                                        if other == group])
        for name, figure in found.items():
            if label == "vqa_shuffled":
                chance[name] = figure.value
            elif label == "vqa_exact":
                figure.chance = chance.get(name)
        yield {label + name: figure for name, figure in found.items()}


def caption_choice(model, tokenizer, chats, items):
    """How often an image's caption is the likeliest per token of 32 different ones.

    model: ready to chat. The prompt is everything before the first answer of a chat with one
    image; each group of 32 such chats chooses among its captions.
    """
    first = {}  # of each chat (prompt, answer, images)
    for number, prompt, answer, images in turns(model, tokenizer, chats, len(chats)):
        if len(first) == min(items, CHOOSERS):
            break
        if chats.n_images(number) == 1:
            first.setdefault(number, (prompt, [*answer, tokenizer.end], images))
    if not first:
        raise UserError(f"{chats.folder}: no chat with one image fits the model's context")
    asked = list(first.values())
    groups = zero_shot.groups_of_different([tuple(answer) for _, answer, _ in asked], CHOICES)
    questions = [Item(asked[i][0], [asked[k][1] for k in group], asked[i][2])
                 for group in groups for i in group]
    marks, size = [], len(groups[0])
    for number, found in enumerate(likelihoods(model, tokenizer, questions)):
        answers = questions[number].answers
        losses = [-x.nats / len(ids) for x, ids in zip(found, answers, strict=True)]
        marks.append(int(np.argmin(losses)) == number % size)
    return share(marks, 1 / size)


# --------------------------------------------------------------------------------------------- CLIP


def caption_scores(model, tokenizer, chats, items, machine):
    """How often the correct caption of 32 is chosen, and retrieval."""
    pairs = Captions(chats, tokenizer, image_spec(model.config), model.config.context)
    images, texts, keys = zero_shot.features_of(model, pairs, machine, max(items, 2048))
    marks, _ = zero_shot.choose_captions(model, images[:2048], texts[:2048], keys[:2048], CHOICES)
    choice = share(marks, 1 / min(CHOICES, len(set(keys[:2048]))))
    return {"clip_choice32": choice, **retrieval(images[:items], texts[:items], keys[:items])}


def retrieval(images, texts, keys):
    """Recall at 1, 5 and 10 from image features (N, E) to text features (N, E) and back. Captions
    with equal keys (N) are correct for each other's images."""
    keys = np.array(keys)
    matches = keys[:, None] == keys
    similarity, found = (images @ texts.T).float().cpu().numpy(), {}
    for way, scores in ("image_to_text", similarity), ("text_to_image", similarity.T):
        ranks = retrieval_ranks(scores, matches)
        for k in 1, 5, 10:
            chance = np.mean([recall_by_chance(len(keys), int(n), k) for n in matches.sum(1)])
            found[f"clip_{way}_r{k}"] = share(ranks < k, float(chance))
    return found


def recall_by_chance(n, correct, k):
    """The probability that k of n drawn at random contain one of the `correct` ones."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k) if k < n else 1.0
