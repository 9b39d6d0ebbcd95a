"""Score a checkpoint on validation data, and sum up a whole pipeline.

    python eval.py out/demo/pretrain --data=data/demo
    python eval.py out/demo/vision_sft --data=data/demo --report=out/demo
    python eval.py out/full/clip_pretrain --zero_shot=data/imagenet/val
    python eval.py compare out/a out/b --out=out/comparison          # runs side by side
    python eval.py out/full/pretrain --tasks=hellaswag:hellaswag_val.jsonl,piqa:piqa.jsonl
    python eval.py out/full/vision_sft --tasks=pope:coco_pope.json --image_root=val2014.zip

What is scored follows from the checkpoint, see evals/validation.py: losses, exact answers, what
the right picture saves, captions chosen, classes named. Beside each figure stand its standard
error and what guessing gives. Later stages have the loss on text and chats again, to show what
they forgot. With --report the checkpoints it came from are scored as well, and report.md and
report.json sum up the pipeline; a figure NAME of report.json has its error in NAME_error. With
--tasks instead it is asked the questions of public benchmarks, or of one's own, from local files:
NAME:FILE, names as in tasks.TASKS. With --out the answer to every question is kept there, and a
run that was stopped goes on behind them.
"""

import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from common import checkpoint
from common.checkpoint import write_json
from common.config import parse, parse_checkpoint, read_json, run_main
from common.device import peak_memory_gb, pick_device, setup
from common.images import read_image
from common.report import (
    ReportImage,
    Sample,
    lineage_table,
    sample_blocks,
    table,
    write_report,
)
from evals import compare
from evals.contamination import overlaps, sentence
from evals.runner import Asking
from evals.validation import Score, score
from inference.conversation import Conversation, open_for_chat
from train.log import duration, price


@dataclass
class Config:
    # --- data
    data: str = "data/demo"  # folder with text/, chats/, captions/, scenes/, as far as needed
    # the split to score; a report has both if there is a test split. Tune on val only: after
    # choices were made on it, a test set measures nothing
    split: Literal["val", "test"] = "val"
    items: int = 1000  # most items a task scores
    zero_shot: str = ""  # folder of pictures, a subfolder a class, for a CLIP; empty for none
    prompt: str = "a photo of a {}."  # the caption of a class there

    # --- benchmarks
    tasks: str = ""  # NAME:FILE, NAME:FILE ... of benchmarks to score instead, see above
    image_root: str = ""  # where their pictures are: a folder, zip or tar
    overlap: bool = True  # whether to look for their questions in the training data
    out: str = ""  # folder for the answers to every question; empty for none

    # --- report
    report: str = ""  # folder for report.md and report.json of the whole pipeline; empty for none
    started: float = 0.0  # when the pipeline started (seconds since 1970), for its total time

    # --- hardware
    device: str = "auto"  # auto, cpu, cuda, mps


def main():
    argv = sys.argv[1:]
    if argv[:1] == ["compare"]:
        names = list(itertools.takewhile(lambda word: not word.startswith("-"), argv[1:]))
        flags = argv[1 + len(names):]
        return compare.compare(names, parse(compare.Config, flags, "compare RUN RUN ...").out)
    name, cfg = parse_checkpoint(Config)
    machine = setup(cfg.device)
    if cfg.tasks:
        return benchmarks(name, cfg, machine)
    names = [name]
    if cfg.report:
        lineage = checkpoint.read(name)[0].get("lineage", [])
        parents = [p for p in lineage if p["stage"] in ("pretrain", "clip_pretrain")]
        names = [p["folder"] for p in parents] + names
    scores = {}
    tests = (Path(cfg.data) / "chats" / "test").is_dir()
    for split in [cfg.split] if not cfg.report else ["val", "test"] if tests else ["val"]:
        for scored in names:
            began = time.time()
            print(f"{scored}, {'validation' if split == 'val' else 'test'} data:")
            found = score(scored, cfg, machine, split)
            prefix = "val_" if split == "val" and cfg.report and tests else ""
            scores = scores | {prefix + label: figure for label, figure in found.items()}
            print(f"({time.time() - began:.0f} s)", file=sys.stderr)
    if cfg.report:
        report(name, cfg, scores)


def benchmarks(name, cfg, machine):
    """Score the tasks of --tasks; prints them, and writes eval.json where there is --out."""
    wishes = [wish.strip().partition(":")[::2] for wish in cfg.tasks.split(",")]
    names = [task for task, _ in wishes]
    model, tokenizer, info = open_for_chat(name, machine.device)
    askings = {task if names.count(task) == 1 else f"{task}:{Path(path).stem}": Asking(
        task, path, model, tokenizer, cfg.items, cfg.image_root, cfg.out, info["sha256"])
        for task, path in wishes}
    found = {}
    seen = overlaps(list(askings.values()), info) if cfg.overlap else [None] * len(askings)
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
        if overlap:
            print(f"({sentence(overlap)})")
        if asking.left_out:
            print(f"({task}: {len(asking.left_out)} left out, such as {asking.left_out[0]})",
                  file=sys.stderr)
    if cfg.out:
        write_json(Path(cfg.out) / "eval.json", {
            "checkpoint": info["folder"], "sha256": info["sha256"], "tasks": found})


# ----------------------------------------------------------------------------------------- report


def report(name, cfg, scores):
    """report.md, .html and .json: scores, time, price, curves, a talk about pictures."""
    folder = Path(cfg.report)
    info = checkpoint.read(name)[0]
    stages = [*info.get("lineage", []), info]
    trained = [stage for stage in stages if stage["metrics"]]  # a CLIP from elsewhere has none
    manifest = Path(cfg.data) / "manifest.json"
    prepared = read_json(manifest) if manifest.is_file() else {}
    figures, total = {}, {key: sum(stage["metrics"][key] for stage in trained)
                          for key in ("tflop", "seconds", "dollars")}
    for label, found in scores.items():
        figures |= {label: found.value} | (
            {} if found.error is None else {f"{label}_error": found.error})
    figures["seconds"] = (time.time() - cfg.started if cfg.started
                          else total["seconds"] + prepared.get("seconds", 0))
    figures["dollars"], figures["tflop"] = total["dollars"], total["tflop"]
    figures["peak_rss_gb"] = max([prepared.get("peak_rss_gb", 0), peak_memory_gb()[1],
                                  *(stage["metrics"]["peak_rss_gb"] for stage in trained)])
    costs = {label: Score(figures[label])
             for label in ("tflop", "seconds", "dollars", "peak_rss_gb")}
    tuned = {label: found for label, found in scores.items() if label.startswith("val_")}
    held = {label: found for label, found in scores.items() if label not in tuned}
    sections = {f"Scores{' on test data' if tuned else ''}": [score_table(held | costs)]}
    if tuned:
        sections["Scores on validation data"] = [score_table(tuned)]
    sections["Lineage"] = [lineage_table(stages)]
    if info["kind"] == "vision":
        talks = conversations(name, Path(cfg.data) / "images", cfg.device)
        sections["Talking about pictures it never saw"] = sample_blocks(talks)
    curves = [(stage["stage"], Path(stage["folder"]).parent / "loss.png") for stage in trained]
    sections["Loss curves"] = [ReportImage(f"curves/{stage}.png", path.read_bytes(), stage)
                               for stage, path in curves if path.is_file()]
    lead = f"{duration(figures['seconds'])}, {price(figures['dollars'])}"
    write_report(folder, str(folder), lead, sections)
    write_json(folder / "report.json", figures)
    print(f"{folder / 'report.html'}, report.md and report.json sum it up")


def score_table(scores):
    """A table of {name: Score}."""
    return table(["score", "figure", "±", "guessing"],
                 [[label, *found.cells()] for label, found in scores.items()])


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
