"""The model card of an upload, filled in from the checkpoints: stages, commands, data, losses,
time, price, scores, and an example with an answer of the model."""

import dataclasses
import importlib
import shlex
from pathlib import Path
from string import Template

from common.config import UserError, read_json
from common.images import read_image
from common.report import lineage_table, score_texts, table
from inference.conversation import TEXT_ONLY, Conversation, ready_to_chat

TEMPLATE = Path(__file__).with_name("model_card_template.md")
STAGES = ("pretrain", "sft", "clip_pretrain", "vision_pretrain", "vision_sft")
QUESTION = "What do you see?"
PROMPTS = {
    "pretrain": '"<|endoftext|>Once upon a time"',  # training documents begin with this token
    "decoder": '[{"role": "user", "content": "What is your name?"}]',
    "vision": f"""[{{"role": "user", "content": [{{"type": "image", "url": "image.jpg"}},
                                        {{"type": "text", "text": "{QUESTION}"}}]}}]"""}
USE_NATIVE = """With the code of nanoGPT-Vision:

```
python sample.py {name}
```"""
USE_TRANSFORMERS = """```python
from transformers import pipeline

model = pipeline("{task}", model="{name}")
prompt = {prompt}
print(model({argument}, max_new_tokens=64))
```"""
EXAMPLE = """## Example

![{question}]({image})

**{question}** {answer}

"""
SPECIAL_TOKENS = """
The chat template treats what users write as ordinary text, even the name of a special token; text
that is passed to the tokenizer directly can contain special tokens.
"""


def card(name, info, cfg, image="", answer=""):
    """The text of README.md. name: where the model will be; cfg: upload.Config; image: a file name
    beside the card, and the model's answer to QUESTION about it."""
    vision, pretrained = info["kind"] == "vision", info["stage"] == "pretrain"
    task = "image-text-to-text" if vision else "text-generation"
    stages = [*info.get("lineage", []), info]
    data = dict.fromkeys(filter(None, (settings_of(stage).get("data") for stage in stages)))
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        license=cfg.license, library="nanogpt-vision" if cfg.native else "transformers", task=task,
        title=name.split("/")[-1], parameters=f"{info['parameters'] / 1e6:.1f}",
        stage=info["stage"],
        usage=(USE_NATIVE if cfg.native else USE_TRANSFORMERS).format(
            name=name, task=task, prompt=PROMPTS["pretrain" if pretrained else info["kind"]],
            argument="text=prompt" if vision else "prompt"),
        example=EXAMPLE.format(question=QUESTION, image=image, answer=answer) if image else "",
        lineage=lineage_table(stages), data=", ".join(data) or "unknown",
        commands="\n".join(filter(None, map(command_of, stages))), scores=scores_of(info))
    return text if cfg.native or pretrained else text + SPECIAL_TOKENS


def settings_of(stage):
    """The settings of a stage in a lineage; {} if it was imported, or its folder was removed."""
    try:
        config = stage if "settings" in stage else read_json(Path(stage["folder"], "config.json"))
    except UserError:
        return {}
    return {} if "imported_from" in config else config.get("settings", {})


def command_of(stage):
    """The command that trains a stage with the same settings; "" if they are unknown."""
    settings = settings_of(stage)
    if not settings or stage["stage"] not in STAGES:
        return ""
    fields = dataclasses.fields(importlib.import_module(stage["stage"]).Config)
    flags = [f"--{field.name}={settings[field.name]}" for field in fields
             if settings.get(field.name, field.default) != field.default]
    return shlex.join(["python", f"{stage['stage']}.py", *flags])


def scores_of(info):
    """The section with the scores that eval.py --report wrote for a vision_sft run, or ""."""
    file = Path(info.get("folder", "")).parent.parent / "report.json"
    if info["stage"] != "vision_sft" or not file.is_file():
        return ""
    rows = score_texts(read_json(file)).items()
    return f"## Scores\n\n{table(['score', 'value'], rows)}\n\n"


def held_out_images(info):
    """The demo's images that a checkpoint was not trained on, if they are still there."""
    folder = Path(str(info.get("settings", {}).get("data", ""))).parent / "images"
    return sorted(folder.glob("*.png"))


def example(model, tokenizer, info, file):
    """(image file, the model's answer to QUESTION about it); by default a held-out image."""
    if info["kind"] != "vision":
        if file:
            raise UserError(f"--image={file}: {TEXT_ONLY}")
        return "", ""
    file = file or next(iter(held_out_images(info)), "")
    if not file:
        return "", ""
    conversation = Conversation(ready_to_chat(model, "fp32"), tokenizer)
    return file, "".join(conversation.ask(QUESTION, [read_image(file)], 64)).strip()
