"""Answers to a file of questions: sample.py --input=rows.jsonl --output=answers.jsonl.

A row is {"prompt": ...} or a chat in any form that prepare.py reads, answered after its last
question; paths in `image` are relative to the input file or the working directory. After a header,
an output line is {"row": 0, "answer": ...} or {"row": 0, "error": ...}, with the row's `id` if it
has one. Each row has a fixed seed and batch, so a resumed run gives the same answers.
"""

import hashlib
import os
from dataclasses import fields, replace
from pathlib import Path

from tqdm import tqdm

from common.atomic import append_rows, resume_rows, writing
from common.checkpoint import file_sum
from common.config import UserError
from common.images import fit, read_image
from inference.conversation import TEXT_ONLY, answer_all, check_length, expand_images, has_vision
from inference.generate import Sampler, Sampling
from prep.schema import chat_of
from prep.sources import Files, Refused, parsed, show
from tokenizer import render


def answer_file(model, tokenizer, info, cfg):
    """Answer the rows of cfg.input into cfg.output (a sample.Config)."""
    source = Files(cfg.input)
    rows = list(source.rows())
    if not rows:
        raise UserError(f"--input={cfg.input} has no rows")
    settings = {field.name: getattr(cfg, field.name) for field in fields(Sampling)}
    header = {"checkpoint": info["sha256"], "questions": " ".join(map(file_sum, source.paths)),
              "precision": cfg.precision, "batch": cfg.batch, **settings}
    refused = Refused()
    with writing(cfg.output, "--output="):
        n_done = len(resume_rows(cfg.output, header, len(rows), cfg.batch))
        if n_done:
            print(f"({cfg.output} has {n_done:,} of {len(rows):,} rows already)")
        with tqdm(total=len(rows), initial=n_done, unit=" rows", disable=None) as bar:
            for start in range(n_done, len(rows), cfg.batch):
                numbers = range(start, min(start + cfg.batch, len(rows)))
                lines = answer_rows(model, tokenizer, info["stage"], rows, numbers, cfg)
                append_rows(cfg.output, lines)
                for line in lines:
                    if "error" in line:
                        refused.add(line["error"], [rows[line["row"]][0]])
                bar.update(len(lines))
    if n_done < len(rows):
        n_errors = sum(entry["rows"] for entry in refused.values())
        print(f"{cfg.output}: {len(rows) - n_done:,} rows done, {n_errors:,} of them with an error")
        show(refused.table(), "no answer to ")


def answer_rows(model, tokenizer, stage, rows, numbers, cfg):
    """The output lines of the rows of these numbers."""
    lines, asked, device = [], [], next(model.parameters()).device
    for number in numbers:
        line = {"row": number}
        lines.append(line)
        try:
            row = parsed(rows[number][1])
            if isinstance(row, dict) and row.get("id") is not None:
                line["id"] = row["id"]
            ids, images = question(model, tokenizer, stage, row, Path(cfg.input).parent)
        except (ValueError, TypeError, UserError) as error:
            line["error"] = str(error)
            continue
        # Hashed, so that two seeds share no row's seed.
        seed = hashlib.sha256(f"{cfg.seed} {number}".encode()).digest()[:7]
        sampler = Sampler(replace(cfg, seed=int.from_bytes(seed, "big")), device)
        sampler.begin(ids)
        asked.append((line, ids, images, sampler))
    if asked:
        answered, prompts, images, samplers = zip(*asked, strict=True)
        stop = tokenizer.end_of_text if stage == "pretrain" else tokenizer.end
        answers = answer_all(model, tokenizer, prompts, images, cfg.max_tokens, cfg.batch,
                             None if samplers[0].greedy else samplers, stop)
        for line, answer in zip(answered, answers, strict=True):
            line["answer"] = answer
    return lines


def question(model, tokenizer, stage, row, folder):
    """(ids, PIL images) of a row's question; a ValueError or UserError says why there is none."""
    (*messages, _), names = chat_of(row, answer="?")
    if names and not has_vision(model):
        raise ValueError(TEXT_ONLY)
    # Fitted at once: a batch of photos in full size would fill the memory.
    images = [fit(read_image(name, "an image") if isinstance(name, bytes) else
                  read_image(place_of(name, folder)),
                  *model.image_spec[1:]) for name in names]
    if stage == "pretrain":
        ids = [tokenizer.end_of_text, *tokenizer.encode(messages[-1]["content"])]
    else:
        ids = [*render(tokenizer, messages, len(images)).ids, tokenizer.assistant]
    check_length(model, len(expand_images(model, tokenizer, ids)))
    return ids, images


def place_of(name, folder):
    """The path of an image, from the working directory or `folder`; \\ may stand for /."""
    names = [name, name.replace("\\", "/")]
    places = [os.path.join(base, name) for name in names for base in ("", folder)]
    return next(filter(os.path.exists, places), places[1])
