"""Answers to a file of questions: sample.py --input=rows.jsonl --output=answers.jsonl.

A row is {"prompt": ...}, or a chat in any form that prepare.py reads, of which everything behind
the last question is left away; pictures by `image`, one or a list, beside the input file or from
the working directory. A line of the output is {"row": 0, "answer": ...}, with the `id` of the row
if it has one, or {"row": 0, "error": ...} for a row that cannot be answered. Every row draws with a
seed of its own, and a batch is always made of the same rows, so that a run that was stopped and
started again gives the same answers.
"""

import codecs
import json
import os
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from common.config import UserError
from common.images import fit, read_image
from inference.conversation import TEXT_ONLY, answer_all, fits
from inference.generate import Sampler
from prep.schema import images_of, messages_of
from prep.sources import parsed
from tokenizer import render
from vision import VisionLanguageModel


def answer_file(model, tokenizer, stage, cfg):
    """Answer the rows of cfg.input into cfg.output (a sample.Config)."""
    rows = read_rows(cfg.input)
    begun = answered(cfg.output, rows, cfg.batch)
    if begun:
        print(f"({cfg.output} has {begun:,} of {len(rows):,} rows already)")
    if begun == len(rows):
        return
    stop = tokenizer.end_of_text if stage == "pretrain" else tokenizer.end
    n_errors = 0
    try:
        Path(cfg.output).parent.mkdir(parents=True, exist_ok=True)
        # half a surrogate pair, which an id may have, is escaped as JSON escapes it
        with (open(cfg.output, "a", encoding="utf-8", errors="backslashreplace") as file,
              tqdm(total=len(rows), initial=begun, unit=" rows", disable=None) as bar):
            for start in range(begun, len(rows), cfg.batch):
                numbers = range(start, min(start + cfg.batch, len(rows)))
                lines = answer_rows(model, tokenizer, stage, stop, rows, numbers, cfg)
                n_errors += sum("error" in line for line in lines)
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                file.flush()
                bar.update(len(numbers))
    except OSError as error:
        raise UserError(f"cannot write --output={cfg.output}: {error.strerror}") from None
    print(f"{cfg.output}: {len(rows) - begun:,} rows done, {n_errors:,} of them with an error "
          "in place of an answer")


def read_rows(path):
    """The rows of a JSONL file, as objects; a line that is none as the ValueError that says so."""
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
        raise UserError(f"--input={path} holds no row")
    return rows


def answered(path, rows, batch):
    """How many rows the output file has whole batches of; what is behind them is cut off."""
    try:
        # behind the last line break: nothing, or the line that a run was stopped in
        *lines, half = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise UserError(f"cannot read --output={path}: {error.strerror}; "
                        "say another name") from None
    try:
        found = [json.loads(line) for line in lines]
        ours = all(isinstance(line["row"], int) and ("answer" in line) != ("error" in line)
                   for line in found)
    except (ValueError, KeyError, TypeError, RecursionError):
        ours = False
    begin = b'{"row": %d, ' % len(lines)
    if not ours or half[: len(begin)] != begin[: len(half)]:
        raise UserError(f"--output={path} is there, but holds no answers of this kind; "
                        "say another name")
    if len(lines) + bool(half) > len(rows) or any(
            (line["row"], line.get("id")) != (number, id_of(row))
            for number, (line, row) in enumerate(zip(found, rows, strict=False))):
        raise UserError(f"--output={path} has answers to other rows than --input; say another name")
    whole = len(lines) if len(lines) == len(rows) else len(lines) // batch * batch
    if half or whole < len(lines):
        try:
            os.truncate(path, sum(len(line) + 1 for line in lines[:whole]))
        except OSError as error:
            raise UserError(f"cannot write --output={path}: {error.strerror}") from None
    return whole


def id_of(row):
    """What tells a row from others, or None."""
    return row.get("id") if isinstance(row, dict) else None


def answer_rows(model, tokenizer, stage, stop, rows, numbers, cfg):
    """The output lines of the rows of these numbers."""
    lines, prompts, images, samplers = [], [], [], []
    device = next(model.parameters()).device
    for number in numbers:
        row, line = rows[number], {"row": number}
        lines.append(line)
        if id_of(row) is not None:
            line["id"] = row["id"]
        try:
            ids, pictures = question(model, tokenizer, stage, row, Path(cfg.input).parent)
            if not fits(model, tokenizer, ids, 1):
                raise ValueError(f"longer than the context of {model.config.max_positions} tokens")
        except (ValueError, UserError) as error:
            line["error"] = str(error)
            continue
        except TypeError:  # as in prepare.py: a number where a text belongs, and the like
            line["error"] = "a row of another form"
            continue
        prompts.append(ids)
        images.append(pictures)
        sampler = Sampler(replace(cfg, seed=(cfg.seed + number) % 2**63), device)
        sampler.begin(ids)
        samplers.append(sampler)
    drawn = any(not sampler.greedy for sampler in samplers)
    answers = answer_all(model, tokenizer, prompts, images, cfg.max_tokens, cfg.batch,
                         samplers if drawn else None, stop, cfg.compile)
    waiting = [line for line in lines if "error" not in line]
    for line, answer in zip(waiting, answers, strict=True):
        line["answer"] = answer
    return lines


def question(model, tokenizer, stage, row, folder):
    """(ids, PIL pictures) of a row's question, or a ValueError or UserError that says why not."""
    if isinstance(row, ValueError):
        raise row
    messages = messages_of(with_answer(row))[:-1]
    if not messages[-1]["content"].strip():
        raise ValueError("a row without a question")
    names = images_of(row, messages)
    if names and not isinstance(model, VisionLanguageModel):
        raise ValueError(TEXT_ONLY)
    # fitted at once: a batch of photographs as they are would fill the memory
    pictures = [fit(read_image(found(name, folder)), *model.image_spec[1:]) for name in names]
    if stage == "pretrain":
        return [tokenizer.end_of_text, *tokenizer.encode(messages[-1]["content"])], []
    chat = render(tokenizer, messages, len(pictures))
    return [*chat.ids, tokenizer.assistant], pictures


def with_answer(row):
    """A row with an answer of our own behind its last question, so that it is a whole chat."""
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


def found(name, folder):
    """A picture's path: as it is, or beside the input file."""
    beside = os.path.join(folder, name)
    return beside if not os.path.exists(name) and os.path.exists(beside) else name
