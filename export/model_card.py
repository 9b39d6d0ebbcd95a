"""The model card of an upload, made from what the checkpoints themselves say: stages, commands,
data, losses, time, price, and an example with a real answer."""

import dataclasses
import importlib
import shlex
from pathlib import Path

from common.config import UserError, read_json
from common.images import read_image
from inference.conversation import BLIND, Conversation, ready_to_chat

QUESTION = "What do you see?"
LIMITS = """A small model, for learning how such models are made. It invents facts, repeats itself,
and knows little beyond its training data; nothing was done to make it safe or fair. Do not rely on
what it says. English only."""
TOKENS = """What users write is ordinary text to the chat template, whatever token it spells; text
that is given to the tokenizer itself can spell special tokens."""
STAGES = ("pretrain", "sft", "clip_pretrain", "vision_pretrain", "vision_sft")

USE_NATIVE = """With the code of nanoGPT-Vision:

```
python sample.py {name}
```"""

USE_TEXT = """```python
from transformers import pipeline

talk = pipeline("text-generation", model="{name}")
print(talk({question}, max_new_tokens=64))
```"""

USE_VISION = """```python
from transformers import pipeline

look = pipeline("image-text-to-text", model="{name}")
question = [{{"role": "user", "content": [{{"type": "image", "url": "picture.jpg"}},
                                        {{"type": "text", "text": "{question}"}}]}}]
print(look(text=question, max_new_tokens=64))
```"""


def card(name, info, cfg, picture="", answer=""):
    """The text of README.md. name: where the model will be; cfg: upload.Config; picture: a file
    name beside the card, and what the model says of it."""
    sees, pretrained = info["kind"] == "vision", info["stage"] == "pretrain"
    stages = [*info.get("lineage", []), info]
    data = [settings["data"] for settings in map(settings_of, stages) if settings.get("data")]
    head = ["---", f"license: {cfg.license}", "language: en",
            f"library_name: {'nanogpt-vision' if cfg.native else 'transformers'}",
            f"pipeline_tag: {'image-text-to-text' if sees else 'text-generation'}",
            "tags:", "- nanogpt-vision", "---", ""]
    use = USE_NATIVE if cfg.native else USE_VISION if sees else USE_TEXT
    question = ('"<|endoftext|>Once upon a time"' if pretrained  # documents began with it
                else '[{"role": "user", "content": "What is your name?"}]')
    lines = [*head, f"# {name.split('/')[-1]}", "",
             f"{info['parameters'] / 1e6:.1f} M parameters, trained from nothing with "
             f"nanoGPT-Vision; the last stage is `{info['stage']}.py`.", "",
             use.format(name=name, question=QUESTION if sees else question), ""]
    if picture:
        lines += ["## What it sees", "", f"![{QUESTION}]({picture})", "",
                  f"**{QUESTION}** {answer}", ""]
    lines += ["## How it was made", "",
              "| stage | steps | validation loss (nats) | minutes | $ |", "|---|---|---|---|---|"]
    for stage in stages:
        m = stage["metrics"]
        lines.append(f"| `{stage['stage']}` | {stage['step']:,} | {figure(m, 'val_loss', 1, 4)} | "
                     f"{figure(m, 'seconds', 60, 1)} | {figure(m, 'dollars', 1, 2)} |")
    lines += ["", f"Data: {', '.join(dict.fromkeys(data)) or 'not written down'}.", "", "```",
              *filter(None, map(command_of, stages)), "```", ""]
    scores = scores_of(info)
    if scores:
        lines += ["## Scores", "", "| score | |", "|---|---|"]
        lines += [f"| {label} | {value:.4g}{error_of(scores, label)} |"
                  for label, value in scores.items() if not label.endswith("_error")] + [""]
    lines += ["## Limits", "", LIMITS, *([] if cfg.native or pretrained else ["", TOKENS]), ""]
    return "\n".join(lines)


def config_of(stage):
    """What the checkpoint of a stage in a lineage says of itself, if it is still there."""
    if "settings" in stage:
        return stage
    try:
        return read_json(Path(stage["folder"]) / "config.json")
    except UserError:  # trained elsewhere, or removed since
        return {}


def settings_of(stage):
    """The settings of a stage in a lineage, as far as they are known; those of imports are not
    ours."""
    config = config_of(stage)
    return {} if "imported_from" in config else config.get("settings", {})


def command_of(stage):
    """The command that trains a stage with these settings, those left away that are the default."""
    config, settings = config_of(stage), settings_of(stage)
    if "imported_from" in config:
        return shlex.join(["python", "upload.py", "--out=out/imported",
                           f"--import_original={config['imported_from']['file']}"])
    if not settings or stage["stage"] not in STAGES:
        return ""
    own = importlib.import_module(stage["stage"]).Config
    usual = {field.name: field.default for field in dataclasses.fields(own)}
    flags = [f"--{name}={value}" for name, value in settings.items()
             if name in usual and value != usual[name]]
    return shlex.join(["python", f"{stage['stage']}.py", *flags])


def scores_of(info):
    """What eval.py --report wrote beside a run of the last stage, or nothing."""
    if info["stage"] != "vision_sft":
        return {}
    try:
        return read_json(Path(info["folder"]).parent.parent / "report.json")
    except UserError:
        return {}


def error_of(scores, label):
    """Its standard error in words, where report.json has one."""
    return f" ± {scores[f'{label}_error']:.2g}" if f"{label}_error" in scores else ""


def figure(metrics, name, divisor, digits):
    value = metrics.get(name)
    return f"{value / divisor:.{digits}f}" if value else ""


def held_out_pictures(info):
    """The pictures that a checkpoint of the demo never saw, where they are."""
    folder = Path(str(info.get("settings", {}).get("data", ""))).parent / "images"
    return sorted(folder.glob("*.png"))


def example(model, tokenizer, info, file):
    """(file, what the model answers to it); the file is one that it never saw, if any is known."""
    if info["kind"] != "vision":
        if file:
            raise UserError(f"--picture={file}: {BLIND}")
        return "", ""
    file = file or next(iter(held_out_pictures(info)), "")
    if not file:
        return "", ""
    conversation = Conversation(ready_to_chat(model, "fp32"), tokenizer)
    return file, "".join(conversation.ask(QUESTION, [read_image(file)], 64)).strip()
