"""How fast a benchmark is scored by likelihood, beside lm_eval on the exported model.

    pip install lm_eval
    python bench_tasks.py                    # 50 rows of HellaSwag's form, both in fp32
    python bench_tasks.py --precision=auto   # as each runs by itself

A random decoder is asked the same rows by both, in turn, in batches of at most 16. Only the
questions are timed: no model is loaded, no file read. Every figure is the median of five.
"""

import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import tales
from asking import Asking
from bench_decode import speaking
from chat import ready_to_chat
from common.config import UserError, parse, run_main
from export import write_folder
from model import GPT, GPTConfig
from tokenizer import gpt2

BATCH = 16  # rows at most; on a CPU ours takes fewer (likelihood.ROWS_AT_ONCE)
TASK = """task: local
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE}}
output_type: multiple_choice
validation_split: validation
process_docs: !function utils.process_docs
doc_to_text: "{{query}}"
doc_to_target: "{{label}}"
doc_to_choice: "choices"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@dataclass
class Config:
    rows: int = 50  # questions, of four endings each
    repeats: int = 5  # how often each is timed
    n_layer: int = 8  # of the model
    n_embd: int = 512  # its width
    threads: int = 1  # of the processor
    # of both; auto: what eval.py and `lm_eval --model hf` each take by themselves
    precision: Literal["auto", "fp32", "bf16"] = "fp32"


def main():
    cfg = parse(Config, sys.argv[1:])
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(0)
    tokenizer = gpt2()
    model = GPT(GPTConfig(n_layer=cfg.n_layer, n_head=cfg.n_embd // 64, n_embd=cfg.n_embd))
    speaking(model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows(cfg.rows)))
        theirs = by_lm_eval(model.eval(), tokenizer, file, cfg.precision)
        ours = by_ours(ready_to_chat(model, cfg.precision), tokenizer, file)
        seconds, picks = {"lm_eval": [], "ours": []}, {}
        for _ in range(cfg.repeats):
            for name, ask in ("lm_eval", theirs), ("ours", ours):
                spent, picks[name] = ask()
                seconds[name].append(spent)
    found = {name: statistics.median(some) for name, some in seconds.items()}
    same = sum(a == b for a, b in zip(*picks.values(), strict=True))
    print(f"{cfg.rows} questions of 4 endings, {cfg.precision}, {cfg.threads} threads: "
          f"lm_eval {found['lm_eval']:.1f} s, ours {found['ours']:.1f} s, "
          f"{found['lm_eval'] / found['ours']:.2f} times as fast; "
          f"{same} of {cfg.rows} endings chosen alike")


def rows(n, seed=1):
    """Questions in HellaSwag's form: how a story begins, and four that it could go on with.

    About as long as there: 60 tokens, and 26 for an ending.
    """
    rng, found = random.Random(seed), []

    def sentences(count):
        said = []
        while len(said) < count:
            said += [part.strip(".!? ") for part in re.split(r"[.!?]", tales.story(rng))]
        return ". ".join(filter(None, said[:count])) + "."

    for number in range(n):
        found.append({"activity_label": "A story", "ctx_a": sentences(rng.randint(4, 8)),
                      "ctx_b": "", "endings": [sentences(rng.randint(2, 4)) for _ in range(4)],
                      "label": number % 4})
    return found


def by_ours(model, tokenizer, file):
    """A function that asks all questions: (seconds, the number of each chosen ending)."""
    def ask():
        asking = Asking("hellaswag", str(file), model, tokenizer)
        began = time.perf_counter()
        found = asking.ask(range(len(asking.questions)))
        return time.perf_counter() - began, [
            max(range(4), key=lambda k: answer["said"][k][0]) for answer in found]
    return ask


def by_lm_eval(model, tokenizer, file, precision):
    """The same by lm_eval's own HellaSwag."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1",
                      HF_DATASETS_CACHE=str(file.parent / "cache"))
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("bench_tasks.py needs lm_eval: pip install lm_eval") from None
    folder = file.parent / "tasks"
    folder.mkdir()
    utils = Path(next(iter(lm_eval.__path__))) / "tasks/hellaswag/utils.py"
    (folder / "utils.py").write_text(utils.read_text())
    (folder / "local.yaml").write_text(TASK.replace("FILE", str(file)))
    write_folder(model, tokenizer, "pretrain", file.parent / "export")
    dtype = {"fp32": "float32", "bf16": "bfloat16"}.get(precision, "auto")
    theirs, spent = HFLM(str(file.parent / "export"), device="cpu", dtype=dtype,
                         batch_size=BATCH, add_bos_token=True), []
    asked = theirs.loglikelihood

    def timed(*args, **kwargs):
        began = time.perf_counter()
        found = asked(*args, **kwargs)
        spent.append(time.perf_counter() - began)
        return found

    def ask():
        theirs.loglikelihood = timed
        found = lm_eval.simple_evaluate(
            theirs, tasks=["local"], log_samples=True, bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False))
        samples = sorted(found["samples"]["local"], key=lambda sample: sample["doc_id"])
        return spent[-1], [max(range(4), key=lambda k: sample["filtered_resps"][k][0])
                           for sample in samples]
    return ask


if __name__ == "__main__":
    run_main(main)
