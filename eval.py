"""Score a checkpoint on validation data, and sum up a whole pipeline.

    python eval.py out/demo/pretrain --data=data/demo
    python eval.py out/demo/vision_sft --data=data/demo --report=out/demo
    python eval.py out/full/clip_pretrain --zero_shot=data/imagenet/val
    python eval.py compare out/a out/b --out=out/comparison          # runs side by side
    python eval.py out/full/pretrain --tasks=hellaswag:hellaswag_val.jsonl,piqa:piqa.jsonl
    python eval.py out/full/vision_sft --tasks=pope:coco_pope.json --image_root=val2014.zip

What is scored follows from the checkpoint: text by loss and bits per byte, chats by loss and exact
answers, CLIP by picking the right caption of 32 and, with --zero_shot, the right class by its name
alone, pictures by the loss with the right one, another one and none, and by exact answers, also
with the pictures shuffled among the questions (what remains then was guessed). Later stages have
the loss on text and chats again, to show what they forgot. All answers are greedy. With --report
the checkpoints it came from are scored as well, and report.md and report.json sum up the pipeline.
With --tasks instead it is asked the questions of public benchmarks, or of one's own, from local
files: NAME:FILE, names as in tasks.TASKS. With --out the answer to every question is kept there,
and a run that was stopped goes on behind them.
"""

import itertools
import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import compare
from asking import Asking
from chat import Conversation, answer_all, fits, open_for_chat, ready_to_chat, turns_of
from clip import caption_choice
from common import checkpoint
from common.checkpoint import write_json
from common.config import UserError, parse, read_json, run_main
from common.distributed import peak_memory_gb, pick_device, setup
from common.log import duration, lineage_table, price
from common.report import Page, Picture, Sample, Samples, Table
from data import Text, check_tokenizer, validation_loss
from looking import Held, Looking
from overlap import overlaps, sentence
from packing import Captions, Chats, Packed
from pictures import PictureError, read_image
from vision import VisionLanguageModel, open_model
from zero_shot import Labelled, zero_shot

ANSWER_TOKENS = 64  # longest answer that is scored


@dataclass
class Config:
    data: str = "data/demo"  # folder with text/, chats/, captions/, scenes/, as far as needed
    items: int = 1000  # most items a task scores
    zero_shot: str = ""  # folder of pictures, a subfolder a class, for a CLIP; empty for none
    prompt: str = "a photo of a {}."  # the caption of a class there
    tasks: str = ""  # NAME:FILE, NAME:FILE ... of benchmarks to score instead, see above
    image_root: str = ""  # where their pictures are: a folder, zip or tar
    out: str = ""  # folder for the answers to every question; empty for none
    report: str = ""  # folder for report.md and report.json of the whole pipeline; empty for none
    started: float = 0.0  # when the pipeline started (seconds since 1970), for its total time
    device: str = "auto"  # auto, cpu, cuda, mps


def main():
    argv = sys.argv[1:]
    if argv[:1] == ["compare"]:
        names = list(itertools.takewhile(lambda word: not word.startswith("-"), argv[1:]))
        return compare.compare(names, parse(compare.Config, argv[1 + len(names):]).out)
    if not argv or argv[0].startswith("-"):
        parse(Config, argv)
        raise UserError("say which checkpoint to score: python eval.py out/demo/vision_sft")
    cfg = parse(Config, argv[1:])
    machine = setup(cfg.device)
    if cfg.tasks:
        return benchmarks(argv[0], cfg, machine)
    names = [argv[0]]
    if cfg.report:
        lineage = checkpoint.read(argv[0])[0].get("lineage", [])
        parents = [p for p in lineage if p["stage"] in ("pretrain", "clip_pretrain")]
        names = [p["folder"] for p in parents] + names
    scores = {}
    for name in names:
        began = time.time()
        scores.update(score(name, cfg, machine))
        print(f"({name}: {time.time() - began:.0f} s)", file=sys.stderr)
    if cfg.report:
        report(argv[0], cfg, scores)


def benchmarks(name, cfg, machine):
    """Score the tasks of --tasks; prints them, and writes eval.json where there is --out."""
    wishes = [wish.strip().partition(":")[::2] for wish in cfg.tasks.split(",")]
    names = [task for task, _ in wishes]
    model, tokenizer, info = open_for_chat(name, machine.device)
    askings = {task if names.count(task) == 1 else f"{task}:{Path(path).stem}": Asking(
        task, path, model, tokenizer, cfg.items, cfg.image_root, cfg.out, info["sha256"])
        for task, path in wishes}
    found = {}
    seen = overlaps(list(askings.values()), info)
    for (task, asking), overlap in zip(askings.items(), seen, strict=True):
        with tqdm(total=len(asking.questions), desc=task, disable=None) as bar:
            found[task] = result = {**asking.run(bar.update), "overlap": overlap}
        for label, (value, error) in result["scores"].items():
            beside = [f"{result['n']} questions"]
            if result["chance"] is not None and label.startswith("acc"):
                beside.append(f"guessing {result['chance']:.3f}")
            if "blind" in result:
                beside.append("blind {:.3f} ± {:.3f}".format(*result["blind"][label]))
            print(f"{task + '/' + label:24s} {value:.4f} ± {error:.4f}  ({', '.join(beside)})")
        print(f"({sentence(overlap)})")
        if asking.left_out:
            print(f"({task}: {len(asking.left_out)} left out, such as {asking.left_out[0]})",
                  file=sys.stderr)
    if cfg.out:
        write_json(Path(cfg.out) / "eval.json", {
            "checkpoint": info["folder"], "sha256": info["sha256"], "tasks": found})


def score(name, cfg, machine):
    """All scores that a checkpoint and the data allow, as {name: figure}; prints them."""
    model, tokenizer, info = open_model(name, machine.device)
    data, items, stage, scores = Path(cfg.data), cfg.items, info["stage"], {}
    if info["kind"] == "clip":
        scores |= clip_scores(model, tokenizer, data / "captions", cfg, machine)
    elif cfg.zero_shot and not cfg.report:
        raise UserError(f"--zero_shot={cfg.zero_shot} is for a CLIP, which {name} is not")
    if stage == "pretrain" or (info["kind"] != "clip" and (data / "text").is_dir()):
        check_tokenizer(data / "text", tokenizer)
        found = text_loss(model, tokenizer, data / "text", items, machine)
        scores |= {label + f"/{stage}" * (stage != "pretrain"): x for label, x in found.items()}
    if stage in ("sft", "vision_sft"):
        check_tokenizer(data / "chats", tokenizer)
        chats = Chats(data / "chats", "val")
        packed = Packed([Held(chats, items, tokenizer)], model.config.max_positions, tokenizer)
        scores["chat_loss"] = validation_loss(machine, packed, 8, loss_of(model), len(packed))
    if info["kind"] == "vision":
        scores |= looking_scores(model, tokenizer, data, stage, items, machine)
    if stage in ("sft", "vision_sft"):  # losses are done: from here on the model only answers
        ready_to_chat(model)
        scores["chat_exact"], _ = exact(model, tokenizer, chats, items)
    if stage == "vision_sft":
        for label, split, shuffled in (("vqa_exact", "val", False), ("vqa_shuffled", "val", True),
                                       ("vqa_heldout_pairs", "val_pairs", False)):
            if split != "val" and not (data / "scenes" / split).is_dir():
                continue  # only the picture world has held-out pairs
            chats = Chats(data / "scenes", split)
            right, kinds = exact(model, tokenizer, chats, items, shuffled)
            scores[label] = right
            scores |= {f"{label}/{kind}": share for kind, share in sorted(kinds.items())}
    for label, figure in scores.items():
        print(f"{label:32s} {figure:.4f}")
    return scores


def loss_of(model):
    """The function from a data.Batch to the loss of a decoder or vision model."""
    if isinstance(model, VisionLanguageModel):
        return model
    return lambda batch: model(*batch.inputs())


def looking_scores(model, tokenizer, data, stage, items, machine):
    """Loss on held-out captions, or questions and answers, with each kind of picture."""
    kind, label = ("scenes", "answer") if stage == "vision_sft" else ("captions", "caption")
    check_tokenizer(data / kind, tokenizer)
    looking = Looking(Chats(data / kind, "val"), items, model.config.max_positions, tokenizer,
                      *model.pictures)
    losses = looking.losses(machine, model, 8)
    return {name.replace("val_loss", f"{label}_loss").replace("val_", f"{label}_loss_"): figure
            for name, figure in losses.items()}


def clip_scores(model, tokenizer, folder, cfg, machine):
    """How often the right caption is chosen, and the right class where there is --zero_shot."""
    scores = {}
    if folder.is_dir() or not cfg.zero_shot:
        check_tokenizer(folder, tokenizer)
        pairs = Captions(Chats(folder, "val"), tokenizer, model.config.image_size,
                         model.config.context, model.config.fit)
        scores["clip_choice32"], _ = caption_choice(model, pairs, machine)
    if cfg.zero_shot:
        labelled = Labelled(cfg.zero_shot, cfg.prompt)
        scores["clip_zero_shot"] = zero_shot(model, tokenizer, labelled, machine)
    return scores


def text_loss(model, tokenizer, folder, items, machine, T=None, batch=32):
    """Loss in nats a token, and bits per byte of the text, over the first validation windows."""
    val = Text(folder, "val", T or min(256, model.config.max_positions), tokenizer.n_vocab)
    n, decoder = min(items, len(val)), getattr(model, "decoder", model)
    loss, tokens, n_bytes = 0.0, 0, 0
    for start in range(0, n, batch):
        rows = val.batch(range(start, min(start + batch, n))).to(machine.device)
        with torch.inference_mode(), machine.autocast():
            loss += decoder(rows.ids, rows.targets).item()
        tokens += rows.targets.numel()
        for row in rows.targets.tolist():
            text = tokenizer.decode([i for i in row if i != tokenizer.end_of_text])
            n_bytes += len(text.encode())
    return {"text_val_loss": loss / tokens, "text_bits_per_byte": loss / n_bytes / math.log(2)}


def exact(model, tokenizer, chats, items, shuffled=False):
    """Share of answers that are right to the letter, and that share by group.

    Every turn of the assistant in the first `items` chats is asked for, with the right history.
    shuffled: every chat gets the pictures of another one that has as many.
    """
    prompts, wanted, images, groups = [], [], [], []
    shown = Held(chats, items, tokenizer, "other" if shuffled else "own")
    pixels = model.pictures[1:] if isinstance(model, VisionLanguageModel) else ()
    file = chats.folder / "groups.json"
    names = read_json(file) if file.is_file() else [""] * len(chats)
    too_long = 0
    for i in range(len(shown)):
        try:
            pictures = shown.images(i, *pixels)
        except PictureError as error:
            print(f"(left out: {error})", file=sys.stderr)
            continue
        for prompt, answer in turns_of(chats, i):
            if not fits(model, tokenizer, prompt, ANSWER_TOKENS):
                too_long += 1
                continue
            prompts.append(prompt)
            wanted.append(tokenizer.decode(answer))
            images.append(pictures[: prompt.count(tokenizer.image)])
            groups.append(names[i])
    if too_long:
        print(f"({chats.folder}: {too_long} turns too long for the context)", file=sys.stderr)
    if not prompts:
        raise UserError(f"no chat of {chats.folder} fits the model's context")
    found = answer_all(model, tokenizer, prompts, images, ANSWER_TOKENS)
    by_group = defaultdict(list)
    for answer, right, group in zip(found, wanted, groups, strict=True):
        by_group[group].append(answer == right)
    shares = {group: sum(marks) / len(marks) for group, marks in by_group.items() if group}
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(found), shares


# ----------------------------------------------------------------------------------------- report


def report(name, cfg, scores):
    """report.md, .html and .json: scores, time, price, curves, a talk about pictures."""
    folder = Path(cfg.report)
    info = checkpoint.read(name)[0]
    stages = [*info.get("lineage", []), info]
    trained = [stage for stage in stages if stage["metrics"]]  # a CLIP from elsewhere has none
    manifest = Path(cfg.data) / "manifest.json"
    prepared = read_json(manifest) if manifest.is_file() else {}
    figures, total = dict(scores), {key: sum(stage["metrics"][key] for stage in trained)
                                    for key in ("seconds", "dollars")}
    figures["seconds"] = (time.time() - cfg.started if cfg.started
                          else total["seconds"] + prepared.get("seconds", 0))
    figures["dollars"] = total["dollars"]
    figures["peak_rss_gb"] = max([prepared.get("peak_rss_gb", 0), peak_memory_gb()[1],
                                  *(stage["metrics"]["peak_rss_gb"] for stage in trained)])
    sections = {"Scores": [Table(["score", "figure"],
                                 [[label, f"{figure:.4g}"] for label, figure in figures.items()])],
                "Lineage": [lineage_table(stages)]}
    if info["kind"] == "vision":
        talks = conversations(name, Path(cfg.data) / "pictures", cfg.device)
        sections["Talking about pictures it never saw"] = [Samples(talks)]
    curves = [(stage["stage"], Path(stage["folder"]).parent / "loss.png") for stage in trained]
    sections["Loss curves"] = [Picture(f"curves/{stage}.png", path.read_bytes(), stage)
                               for stage, path in curves if path.is_file()]
    lead = f"{duration(figures['seconds'])}, {price(figures['dollars'])}"
    Page(str(folder), lead, sections).write(folder)
    write_json(folder / "report.json", figures)
    print(f"{folder / 'report.html'}, report.md and report.json sum it up")


def conversations(name, pictures, device, n=4):
    """A report.Sample of a talk about each of the first pictures of a folder."""
    model, tokenizer, _ = open_for_chat(name, pick_device(device))
    talks = []
    for path in sorted(pictures.glob("*.png"))[:n]:
        conversation, shown, said = Conversation(model, tokenizer), [read_image(path)], []
        for question in ("What do you see?", "How many things are there?", "Is there a red thing?"):
            answer = "".join(conversation.ask(question, [] if said else shown))
            said += [("user", question), ("model", answer)]
        talks.append(Sample(said, shown))
    return talks


if __name__ == "__main__":
    run_main(main)
