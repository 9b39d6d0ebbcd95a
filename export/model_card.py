"""The model card of an upload, filled in from the records of its checkpoints."""

import dataclasses
import importlib
import shlex
import shutil
from pathlib import Path

import jinja2

from common.config import UserError, read_json
from common.images import read_image
from common.report import found_scores, lineage_table, score_texts, table
from inference.conversation import TEXT_ONLY, Conversation, ready_to_chat

STAGES = ("pretrain", "sft", "clip_pretrain", "vision_pretrain", "vision_sft")
QUESTION = "What do you see?"


def write_card(folder, model, tokenizer, info, cfg):
    """Write README.md and its example image into `folder`. cfg: upload.Config."""
    if cfg.image and info["kind"] != "vision":
        raise UserError(f"--image={cfg.image}: {TEXT_ONLY}")
    parameters = sum(p.numel() for p in model.parameters())  # ready_to_chat converts some of them
    image = cfg.image or next(iter(held_out_images(info)), "")
    example, answer = "", ""
    if image:
        conversation = Conversation(ready_to_chat(model, "fp32"), tokenizer)
        answer = "".join(conversation.ask(QUESTION, [read_image(image)], 64)).strip()
        example = f"example{Path(image).suffix}"
        shutil.copy(image, folder / example)
    stages = [*info.get("lineage", []), info]
    data = dict.fromkeys(filter(None, (settings_of(stage).get("data") for stage in stages)))
    report = Path(info["folder"]).parent.parent / "report.json"  # of eval.py --report
    scores = score_texts(found_scores(report, info["sha256"]))
    scores = scores and table(["score", "value"], scores.items())
    fill_template(
        "model_card.md", folder, cfg=cfg, info=info, question=QUESTION, example=example,
        answer=answer, name=cfg.repo or Path(cfg.to).absolute().name,
        parameters=parameters, data=", ".join(data) or "unknown", lineage=lineage_table(stages),
        commands=list(filter(None, map(command_of, stages))), scores=scores)


def fill_template(file, folder, **values):
    """Write a template beside this file, filled in, as README.md into `folder`."""
    text = Path(__file__).with_name(file).read_text(encoding="utf-8")
    template = jinja2.Template(text, trim_blocks=True, keep_trailing_newline=True)
    (folder / "README.md").write_text(template.render(values), encoding="utf-8")


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


def held_out_images(info):
    """The demo's images that a vision-language checkpoint was not trained on, if they are there."""
    folder = Path(str(info.get("settings", {}).get("data", ""))).parent / "images"
    return sorted(folder.glob("*.png")) if info["kind"] == "vision" else []
