"""Score a checkpoint on validation data or benchmarks, and report on a complete pipeline.

    python eval.py out/demo/vision_sft --data=data/demo --report=out/demo
    python eval.py out/full/clip_pretrain --zero_shot=data/imagenet/val
    python eval.py out/full/vision_sft --tasks=pope:coco_pope.json --image_root=val2014.zip

docs/evaluation.md lists the scores (code: evals/validation.py, and evals/tasks.py for --tasks).
--report also scores the pretrained decoder and the CLIP that it was trained from.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from common import checkpoint
from common.atomic import check_output, writing
from common.checkpoint import write_json
from common.config import UserError, parse_checkpoint, read_json, run_main
from common.device import peak_memory_gb, pick_device, setup
from common.images import read_image
from common.report import ReportImage, lineage_table, sample_blocks, table, write_report
from data import check_kind
from evals.metrics import Score
from evals.runner import runners_of
from evals.validation import scores_of
from inference.conversation import Conversation, open_for_chat
from train.log import duration, price


@dataclass
class Config:
    # --- data
    data: str = "data/demo"  # folder with text/, chats/, captions/, scenes/, whichever apply
    # tune on val only: a test set by which choices were made measures nothing. A report has both
    split: Literal["val", "test"] = "val"
    items: int = 1000  # maximum number of items per score
    zero_shot: str = ""  # folder of images, one subfolder per class, for a CLIP; empty for none
    prompt: str = "a photo of a {}."  # caption of a class for --zero_shot

    # --- benchmarks
    tasks: str = ""  # benchmarks to score instead: NAME:FILE,NAME:FILE
    image_root: str = ""  # folder, zip or tar with their images
    out: str = ""  # folder for the answers to --tasks; empty for none

    # --- report
    report: str = ""  # folder for report.md and report.json of the pipeline; empty for none
    original: str = ""  # another pretrained decoder, beside ours in the report, with --tasks too
    started: float = 0.0  # Unix time when the pipeline started, for its total time

    # --- hardware
    device: str = "auto"  # auto, cpu, cuda, mps


def main():
    name, cfg = parse_checkpoint(Config)
    if cfg.items < 1:
        raise UserError(f"--items={cfg.items}: it must be at least 1")
    for setting in "out", "report":
        if folder := getattr(cfg, setting):
            check_output(folder, f"--{setting}=", folder=True)
    machine = setup(cfg.device)
    if (cfg.original and (cfg.out or not cfg.report)) or (
            cfg.tasks and cfg.report and not cfg.original):
        raise UserError("--original goes with --report, not --out; --report with --tasks needs it")
    if cfg.tasks and not cfg.report:
        return benchmarks(name, cfg, machine)
    if not cfg.zero_shot:  # which may be all that there is for a CLIP
        check_kind(cfg.data, "several")
    if not cfg.report:
        return score_split([name], cfg, machine, cfg.split)
    info = checkpoint.read(name)[0]
    name = info["folder"]  # a run may save a newer one meanwhile
    kinds = ["clip_pretrain", *["pretrain"] * (Path(cfg.data) / "text").is_dir()]
    scored = {line["stage"]: line for line in [*info.get("lineage", []), info]
              if line["stage"] in kinds or line is info}
    if cfg.original:
        checkpoint.read(cfg.original, ("decoder",))
        if "pretrain" not in scored:
            raise UserError(f"--original: {name} has no pretrained decoder, or {cfg.data} no text")
    names = [line["folder"] for line in scored.values()]
    for line in scored.values():
        if checkpoint.read(line["folder"])[0]["sha256"] != line["sha256"]:
            raise UserError(f"{line['folder']} was trained again after {name} was trained from it, "
                            "so its scores are not of this pipeline; train the later stages again")
    by_split = {split: score_split(names, cfg, machine, split) for split in ("val", "test")
                if split == "val" or (Path(cfg.data) / "chats" / "test").is_dir()}
    beside = {decoder: score_split([decoder], cfg, machine, "val")
              | (benchmarks(decoder, cfg, machine) if cfg.tasks else {})
              for decoder in ([scored["pretrain"]["folder"], cfg.original] if cfg.original else [])}
    report(name, cfg, by_split, beside)


def score_split(names, cfg, machine, split):
    """{label: Score} of some checkpoints on a split; prints each as soon as it is known."""
    scores = {}
    for name in names:
        began = time.time()
        print(f"{name}, {'validation' if split == 'val' else 'test'} data:")
        for found in scores_of(name, cfg, machine, split):
            scores |= found
            for label, (value, error, chance) in found.items():
                guessing = "" if chance is None else f"  (guessing {chance:.3f})"
                print(f"{label:32s} {value:.4f} ± {error:.4f}{guessing}", flush=True)
        print(f"({time.time() - began:.0f} s)", file=sys.stderr)
    return scores


def benchmarks(name, cfg, machine):
    """{label: Score} of the tasks of --tasks; prints them, and writes eval.json into --out."""
    model, tokenizer, info = open_for_chat(name, machine.device)
    found = {}
    for task, runner in runners_of(cfg, model, tokenizer, info, cfg.out).items():
        with tqdm(total=len(runner.questions), desc=task, disable=None) as bar:
            found[task] = result = runner.run(bar.update)
        for label, (value, error) in result["scores"].items():
            notes = [f"{result['n']} questions"]
            if result["chance"] is not None and label.startswith("acc"):
                notes.append(f"guessing {result['chance']:.3f}")
            if "text_only" in result:
                notes.append("text-only {:.3f} ± {:.3f}".format(*result["text_only"][label]))
            print(f"{task + '/' + label:24s} {value:.4f} ± {error:.4f}  ({', '.join(notes)})")
        if runner.left_out:
            print(f"({task}: {len(runner.left_out)} left out, such as {runner.left_out[0]})",
                  file=sys.stderr)
    if cfg.out:
        with writing(cfg.out, "--out="):
            write_json(Path(cfg.out) / "eval.json", {
                "checkpoint": info["folder"], "sha256": info["sha256"], "tasks": found})
    return {f"{task}/{label}": Score(*score, result["chance"] if label.startswith("acc") else None)
            for task, result in found.items() for label, score in result["scores"].items()}


def report(name, cfg, by_split, beside):
    """Write report.md, .html and .json: scores, time, price, curves, conversations about images.

    by_split: {split: {label: Score}}; with a test split, names of validation scores get val_.
    beside: the same of checkpoints of decoders to be compared.
    """
    folder, info = Path(cfg.report), checkpoint.read(name)[0]
    stages = [*info.get("lineage", []), info]
    trained = [stage for stage in stages if stage["metrics"]]  # an imported CLIP has none
    manifest = Path(cfg.data) / "manifest.json"
    prepared = read_json(manifest) if manifest.is_file() else {}
    costs = {key: sum(stage["metrics"][key] for stage in trained)
             for key in ("tflop", "seconds", "dollars")}
    costs["seconds"] = (time.time() - cfg.started if cfg.started
                        else costs["seconds"] + prepared.get("seconds", 0))
    costs["peak_rss_gb"] = max([prepared.get("peak_rss_gb", 0), peak_memory_gb()[1],
                                *(stage["metrics"]["peak_rss_gb"] for stage in trained)])
    costs = {label: Score(value) for label, value in costs.items()}
    tables = {"Scores": by_split["val"] | costs}
    if "test" in by_split:
        tuned = {f"val_{label}": found for label, found in by_split["val"].items()}
        tables = {"Scores on test data": by_split["test"] | costs,
                  "Scores on validation data": tuned}
    figures, sections = {}, {}
    for title, scores in tables.items():
        figures |= {label: found.value for label, found in scores.items()}
        figures |= {f"{label}_error": found.error for label, found in scores.items()
                    if found.error is not None}
        sections[title] = [table(["score", "value", "±", "guessing"], [
            [label, f"{found.value:.4g}", *("" if x is None else f"{x:.2g}" for x in found[1:])]
            for label, found in scores.items()])]
    if beside:
        labels = dict.fromkeys(label for found in beside.values() for label in found)
        sections["Pretrained decoders side by side"] = [table(["score", *beside], [
            [label, *("{:.4f} ± {:.4f}".format(*found[label][:2]) if label in found else ""
                      for found in beside.values())] for label in labels])]
    sections["Lineage"] = [lineage_table(stages)]
    if info["kind"] == "vision":
        sections["Conversations about new images"] = sample_blocks(conversations(name, cfg))
    curves = {stage["stage"]: Path(stage["folder"]).parent / "loss.png" for stage in trained}
    sections["Loss curves"] = [ReportImage(f"curves/{stage}.png", path.read_bytes(), stage)
                               for stage, path in curves.items() if path.is_file()]
    lead = f"{duration(figures['seconds'])}, {price(figures['dollars'])}"
    with writing(folder, "--report="):
        write_report(folder, str(folder), lead, sections)
        write_json(folder / "report.json", {
            "checkpoint": info["folder"], "sha256": info["sha256"], **figures})
    print(f"wrote {folder / 'report.html'}, report.md and report.json")


def conversations(name, cfg, n=4):
    """A sample for the report: a conversation about each of the first images of the data."""
    model, tokenizer, _ = open_for_chat(name, pick_device(cfg.device))
    samples = []
    for path in sorted(Path(cfg.data, "images").glob("*.png"))[:n]:
        conversation, images, turns = Conversation(model, tokenizer), [read_image(path)], []
        for question in ("What do you see?", "How many things are there?", "Is there a red thing?"):
            answer = "".join(conversation.ask(question, [] if turns else images))
            turns += [("user", question), ("model", answer)]
        samples.append((turns, images))
    return samples


if __name__ == "__main__":
    run_main(main)
