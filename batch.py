"""Answers to a file of questions: sample.py --input=rows.jsonl --output=answers.jsonl.

A row is {"prompt": ...}, or a chat in any form that prepare.py reads, of which everything behind
the last question is left away; pictures by `image`, one or a list, beside the input file or from
the working directory. A line of the output is {"row": 0, "answer": ...}, with the `id` of the row
if it has one, or {"row": 0, "error": ...} for a row that cannot be answered. Every row draws with a
seed of its own, and a batch is always made of the same rows, so that a run that was stopped and
started again gives the same answers.
"""

import json
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from chat import BLIND, answer_all, fits
from common.config import UserError
from decode import Sampler
from pictures import read_image
from prep.rows import messages_of, pictures_of
from tokenizer import render
from vision import VisionLanguageModel


def answer_file(model, tokenizer, stage, cfg):
    """Answer the rows of cfg.input into cfg.output (a sample.Config)."""
    rows = read_rows(cfg.input)
    begun = answered(cfg.output, len(rows), cfg.batch)
    if begun:
        print(f"({cfg.output} has {begun:,} of {len(rows):,} answers already)")
    stop = tokenizer.end_of_text if stage == "pretrain" else tokenizer.end
    n_errors = 0
    with (open(cfg.output, "a", encoding="utf-8") as file,
          tqdm(total=len(rows), initial=begun, unit=" rows", disable=None) as bar):
        for start in range(begun, len(rows), cfg.batch):
            numbers = range(start, min(start + cfg.batch, len(rows)))
            lines = answer_rows(model, tokenizer, stage, stop, rows, numbers, cfg)
            n_errors += sum("error" in line for line in lines)
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.flush()
            bar.update(len(numbers))
    print(f"{len(rows):,} rows, {n_errors:,} of those answered now without an answer: {cfg.output}")


def read_rows(path):
    """The rows of a JSONL file, as objects; a line that is none as the ValueError that says so."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --input={path}: {error}") from None
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise UserError(f"--input={path} holds no row")
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            rows.append(ValueError(f"not a JSON object: {error}"))
    return rows


def answered(path, n_rows, batch):
    """How many rows the output file has whole batches of; what is behind them is cut off."""
    if not Path(path).exists():
        return 0
    try:
        content = Path(path).read_bytes()
        lines = content.split(b"\n")[:-1]  # behind the last line break: nothing, or half a line
        numbers = [json.loads(line)["row"] for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--output={path} is there, but holds no answers of this kind ({error}); "
                        "say another name") from None
    if numbers != list(range(len(numbers))) or len(numbers) > n_rows:
        raise UserError(f"--output={path} has answers to other rows than --input; say another name")
    whole = len(numbers) if len(numbers) == n_rows else len(numbers) // batch * batch
    with open(path, "r+b") as file:
        file.truncate(sum(len(line) + 1 for line in lines[:whole]))
    return whole


def answer_rows(model, tokenizer, stage, stop, rows, numbers, cfg):
    """The output lines of the rows of these numbers."""
    lines, prompts, images, samplers = [], [], [], []
    device = next(model.parameters()).device
    for number in numbers:
        row, line = rows[number], {"row": number}
        lines.append(line)
        if isinstance(row, dict) and "id" in row:
            line["id"] = row["id"]
        try:
            ids, pictures = question(model, tokenizer, stage, row, Path(cfg.input).parent)
            if not fits(model, tokenizer, ids, 1):
                raise ValueError(f"longer than the context of {model.config.max_positions} tokens")
        except (ValueError, UserError) as error:
            line["error"] = str(error)
            continue
        prompts.append(ids)
        images.append(pictures)
        sampler = Sampler(replace(cfg, seed=(cfg.seed + number) % 2**63), device)
        sampler.begin(ids)
        samplers.append(sampler)
    drawn = any(not sampler.greedy for sampler in samplers)
    answers = answer_all(model, tokenizer, prompts, images, cfg.max_tokens, cfg.batch,
                         samplers if drawn else None, stop)
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
        raise ValueError("an empty question")
    names = pictures_of(row, messages)
    if names and not isinstance(model, VisionLanguageModel):
        raise ValueError(BLIND)
    pictures = [read_image(found(name, folder)) for name in names]
    if stage == "pretrain":
        return [tokenizer.end_of_text, *tokenizer.encode(messages[-1]["content"])], []
    chat = render(tokenizer, messages, len(pictures))
    return [*chat.ids, tokenizer.assistant], pictures


def with_answer(row):
    """A row with an answer of our own behind its last question, so that it is a whole chat."""
    if not isinstance(row, dict):
        raise ValueError("a row that is no object")
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
    if isinstance(name, bytes) or Path(name).exists():
        return name
    return folder / name if (folder / name).exists() else name
