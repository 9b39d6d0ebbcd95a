"""Answers to a file of questions: sample.py --input=rows.jsonl --output=answers.jsonl.

A row is {"prompt": ...}, or a chat in any form that prepare.py reads, which is answered after its
last question; images by `image`, one or a list, relative to the input file or to the working
directory. A line of the output is {"row": 0, "answer": ...}, with the row's `id` if it has one, or
{"row": 0, "error": ...}. Every row has its own seed, and batches are always made of the same rows,
so a run that is stopped and started again gives the same answers.
"""

import codecs
import os
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from common.atomic import append_rows, read_rows, truncate_rows
from common.config import UserError
from common.images import fit, read_image
from inference.conversation import TEXT_ONLY, answer_all, fits, has_vision
from inference.generate import Sampler
from prep.schema import images_of, messages_of
from prep.sources import parsed
from tokenizer import render


def answer_file(model, tokenizer, stage, cfg):
    """Answer the rows of cfg.input into cfg.output (a sample.Config)."""
    rows = read_input(cfg.input)
    n_errors = 0
    try:
        Path(cfg.output).parent.mkdir(parents=True, exist_ok=True)
        n_done = resume(cfg.output, rows, cfg.batch)
        if n_done:
            print(f"({cfg.output} has {n_done:,} of {len(rows):,} rows already)")
        with tqdm(total=len(rows), initial=n_done, unit=" rows", disable=None) as bar:
            for start in range(n_done, len(rows), cfg.batch):
                numbers = range(start, min(start + cfg.batch, len(rows)))
                lines = answer_rows(model, tokenizer, stage, rows, numbers, cfg)
                append_rows(cfg.output, lines)
                n_errors += sum("error" in line for line in lines)
                bar.update(len(lines))
    except OSError as error:
        raise UserError(f"cannot write --output={cfg.output}: {error.strerror}; choose another "
                        "name") from None
    if n_done < len(rows):
        print(f"{cfg.output}: {len(rows) - n_done:,} rows done, {n_errors:,} of them with an error "
              "in place of an answer")


def read_input(path):
    """The rows of a JSONL file; for a line that is not JSON the ValueError that says so."""
    try:
        lines = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read --input={path}: {error.strerror}") from None
    rows = []
    for line in lines:
        try:
            rows += [parsed(line)] if line.strip() else []
        except ValueError as error:
            rows.append(error)
    if not rows:
        raise UserError(f"--input={path} has no rows")
    return rows


def resume(path, rows, batch):
    """The number of rows in complete batches of the output file, which is truncated after them."""
    try:
        lines, cut = read_rows(path)
        same = len(lines) + bool(cut) <= len(rows) and all(
            (line["row"], line.get("id")) == (number, id_of(rows[number]))
            and ("answer" in line) != ("error" in line) for number, line in enumerate(lines))
        begin = b'{"row": %d, ' % len(lines)
        same = same and cut[: len(begin)] == begin[: len(cut)]
    except (ValueError, KeyError, TypeError, AttributeError):  # not lines of JSON, or other ones
        same = False
    if not same:
        raise UserError(f"--output={path} has something else than answers to the rows of --input; "
                        "choose another name")
    n = len(lines) if len(lines) == len(rows) else len(lines) // batch * batch
    if cut or n < len(lines):
        truncate_rows(path, n)
    return n


def id_of(row):
    return row.get("id") if isinstance(row, dict) else None


def answer_rows(model, tokenizer, stage, rows, numbers, cfg):
    """The output lines of the rows of these numbers."""
    lines, prompts, images, samplers = [], [], [], []
    device = next(model.parameters()).device
    for number in numbers:
        row, line = rows[number], {"row": number}
        lines.append(line)
        if id_of(row) is not None:
            line["id"] = row["id"]
        try:
            ids, shown = question(model, tokenizer, stage, row, Path(cfg.input).parent)
            if not fits(model, tokenizer, ids, 1):
                raise ValueError(f"longer than the context of {model.config.max_positions} tokens")
        except (ValueError, UserError) as error:
            line["error"] = str(error)
            continue
        except TypeError:  # as in prepare.py: a number instead of a text, and the like
            line["error"] = "a row of another form"
            continue
        prompts.append(ids)
        images.append(shown)
        sampler = Sampler(replace(cfg, seed=(cfg.seed + number) % 2**63), device)
        sampler.begin(ids)
        samplers.append(sampler)
    if all(sampler.greedy for sampler in samplers):
        samplers = None
    stop = tokenizer.end_of_text if stage == "pretrain" else tokenizer.end
    answers = answer_all(model, tokenizer, prompts, images, cfg.max_tokens, cfg.batch, samplers,
                         stop, cfg.compile)
    waiting = [line for line in lines if "error" not in line]
    for line, answer in zip(waiting, answers, strict=True):
        line["answer"] = answer
    return lines


def question(model, tokenizer, stage, row, folder):
    """(ids, PIL images) of a row's question; a ValueError or UserError says why there is none."""
    if isinstance(row, ValueError):
        raise row
    messages = messages_of(with_answer(row))[:-1]
    if not messages[-1]["content"].strip():
        raise ValueError("a row without a question")
    names = images_of(row, messages)
    if names and not has_vision(model):
        raise ValueError(TEXT_ONLY)
    # Fitted at once: a batch of photos in full size would fill the memory.
    images = [fit(read_image(locate(name, folder)), *model.image_spec[1:]) for name in names]
    if stage == "pretrain":
        return [tokenizer.end_of_text, *tokenizer.encode(messages[-1]["content"])], []
    chat = render(tokenizer, messages, len(images))
    return [*chat.ids, tokenizer.assistant], images


def with_answer(row):
    """A row with a placeholder answer to its last question, which makes it a complete chat."""
    if not isinstance(row, dict):
        raise ValueError("row is not a JSON object")
    for name in ("conversations", "messages"):
        turns = row.get(name)
        if isinstance(turns, list) and turns:
            asked = [i for i, turn in enumerate(turns) if isinstance(turn, dict)
                     and (turn.get("from") or turn.get("role")) in ("human", "user")]
            if not asked:
                raise ValueError("a chat without a question")
            return {name: [*turns[: asked[-1] + 1], {"role": "assistant", "content": "?"}]}
    return {**row, "response": "?"}


def locate(name, folder):
    """An image's path: as it is, or relative to the folder of the input file."""
    relative = os.path.join(folder, name)
    return relative if not os.path.exists(name) and os.path.exists(relative) else name
