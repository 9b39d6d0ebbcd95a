"""The model card of an upload, made from what the checkpoints themselves say: stages, commands,
data, losses, time, price, and an example with a real answer."""

import dataclasses
import importlib
from pathlib import Path

from chat import Conversation, ready_to_chat
from common.config import UserError, read_json
from pictures import read_image

QUESTION = "What do you see?"
LIMITS = """A small model, for learning how such models are made. It invents facts, repeats itself,
and knows little beyond its training data; nothing was done to make it safe or fair. Do not rely on
what it says. English only. Text of users that spells a special token is ordinary text in the
project's own code, but `transformers` reads it as the token: clean it first where that matters."""

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
    head = ["---", f"license: {cfg.license}", "language: en", "library_name: transformers",
            f"pipeline_tag: {'image-text-to-text' if sees else 'text-generation'}",
            "tags:", "- nanogpt-vision", "---", ""]
    use = USE_VISION if sees else USE_TEXT
    question = ('"Once upon a time"' if pretrained
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
        lines += [f"| {label} | {value:.4g} |" for label, value in scores.items()] + [""]
    lines += ["## Limits", "", LIMITS, ""]
    return "\n".join(lines)


def settings_of(stage):
    """The settings of a stage in a lineage: its own, or those in its checkpoint if it is there."""
    if "settings" in stage:
        return stage["settings"]
    try:
        return read_json(Path(stage["folder"]) / "config.json").get("settings", {})
    except UserError:  # trained elsewhere, or removed since
        return {}


def command_of(stage):
    """The command that trains a stage with these settings, those left away that are the default."""
    settings = settings_of(stage)
    if not settings:
        return ""
    config = importlib.import_module(stage["stage"]).Config
    usual = {field.name: field.default for field in dataclasses.fields(config)}
    flags = [f"--{name}={value}" for name, value in settings.items()
             if name in usual and value != usual[name]]
    return " ".join([f"python {stage['stage']}.py", *flags])


def scores_of(info):
    """What eval.py --report wrote beside a run of the last stage, or nothing."""
    if info["stage"] != "vision_sft":
        return {}
    try:
        return read_json(Path(info["folder"]).parent.parent / "report.json")
    except UserError:
        return {}


def figure(metrics, name, divisor, digits):
    value = metrics.get(name)
    return "" if value is None else f"{value / divisor:.{digits}f}"


def example(model, tokenizer, info, file):
    """(file, what the model answers to it); the file is one that it never saw, if any is known."""
    if not file:
        folder = Path(str(info.get("settings", {}).get("data", ""))).parent / "pictures"
        file = next(iter(sorted(folder.glob("*.png"))), "")
    if not file or info["kind"] != "vision":
        return "", ""
    conversation = Conversation(ready_to_chat(model, "fp32"), tokenizer)
    return file, "".join(conversation.ask(QUESTION, [read_image(file)], 64)).strip()
