"""Asking a model a task's questions: in batches, with pictures and without, from where it stopped.

Beside every score stand its standard error (bootstrap over the questions), what guessing gives,
and, where there are pictures, what the model gets without them.
"""

import json
from pathlib import Path

import numpy as np

import scores
from archives import open_pictures
from chat import answer_all, fits
from common.config import UserError
from likelihood import Item, likelihoods
from pictures import read_image
from tasks import TASKS, rows_of
from tokenizer import IMAGE_MARK, render
from vision import VisionLanguageModel

PART = 256  # questions between two writes
REPEATS = 100  # bootstrap samples of a score that is no mean


class Asking:
    """One task's questions for one model, asked with their pictures and without."""

    def __init__(self, name, path, model, tokenizer, items=1000, image_root="", out=""):
        if name not in TASKS:
            raise UserError(f"there is no task {name}: {', '.join(TASKS)}")
        self.name, self.task = name, TASKS[name]
        self.model, self.tokenizer = model, tokenizer
        self.find, self.left_out, self.questions = open_pictures(image_root), [], []
        rows = rows_of(path)[:items]
        for number, row in enumerate(rows):
            try:
                self.questions.append(self.task.read(row))
            except (KeyError, TypeError, ValueError, IndexError) as error:
                self.left_out.append(f"row {number}: {type(error).__name__} {error}")
        if not self.questions:
            raise UserError(f"{path} holds no row of the form that {name} has "
                            f"({self.left_out[0]})")
        self.sees = any(question.images for question in self.questions)
        if self.sees and not isinstance(model, VisionLanguageModel):
            raise UserError(f"{name} asks about pictures, and this checkpoint cannot see")
        self.log = Path(out) / f"{name}.jsonl" if out else None

    def run(self, progress=None):
        """{"n", "scores": {name: (value, standard error)}, "chance", "blind": the same without
        pictures, or nothing}. Answers already in the log are not asked for again."""
        found = self.logged()
        for start in range(len(found), len(self.questions), PART):
            numbers = range(start, min(start + PART, len(self.questions)))
            part = self.ask(numbers, seeing=True)
            blind = self.ask(numbers, seeing=False) if self.sees else [None] * len(part)
            rows = [list(pair) for pair in zip(part, blind, strict=True)]
            self.write(rows)
            found += rows
            if progress:
                progress(len(rows))
        kept = [i for i, (seen, _) in enumerate(found) if seen is not None]
        if not kept:
            raise UserError(f"{self.name}: no question fits the model, or no picture can be read: "
                            f"{self.left_out[0]}")
        questions = [self.questions[i] for i in kept]
        result = {"n": len(kept), **self.summed(questions, [found[i][0] for i in kept])}
        if self.sees:
            result["blind"] = self.summed(questions, [found[i][1] for i in kept])["scores"]
        return result

    def summed(self, questions, found):
        values, chance = self.task.score(questions, found)
        errors = {name: self.error(questions, found, name, value)
                  for name, value in values.items()}
        return {"scores": {name: (float(np.mean(value)), errors[name])
                           for name, value in values.items()},
                "chance": None if chance is None else float(chance)}

    def error(self, questions, found, name, value):
        """The standard error of a score, over the questions."""
        if isinstance(value, np.ndarray):
            return scores.bootstrap(value)

        def again(numbers):  # of a score that is no mean: AUROC, BLEU ...
            return self.task.score([questions[i] for i in numbers],
                                   [found[i] for i in numbers])[0][name]

        return scores.bootstrap(np.arange(len(questions)), n=REPEATS, statistic=again)

    def ask(self, numbers, seeing):
        """What the model says to the questions of these numbers; None where it cannot be asked."""
        asked, found = [], {}
        for number in numbers:
            question = self.questions[number]
            ids, choices = self.render(question, seeing and bool(question.images))
            longest = max(map(len, choices)) if self.task.way == "choose" else self.task.max_tokens
            try:
                images = [self.picture(name) for name in question.images] if seeing else []
                if not fits(self.model, self.tokenizer, ids, longest):
                    raise UserError("longer than the context")
                asked.append((number, Item(ids, choices, images)))
            except UserError as error:
                self.left_out.append(f"question {number}: {error}")
        items = [item for _, item in asked]
        answers = (self.choose if self.task.way == "choose" else self.say)(items) if items else []
        found = dict(zip((number for number, _ in asked), answers, strict=True))
        return [found.get(number) for number in numbers]

    def choose(self, items):
        """[[log-likelihood, whether greedy decoding says it, tokens] of each choice]."""
        return [[[x.nats, x.greedy, len(ids)] for x, ids in zip(some, item.answers, strict=True)]
                for item, some in zip(items, likelihoods(self.model, self.tokenizer, items),
                                      strict=True)]

    def say(self, items):
        return answer_all(self.model, self.tokenizer, [item.prompt for item in items],
                          [item.images for item in items], self.task.max_tokens)

    def picture(self, name):
        content = name if isinstance(name, bytes) else self.find(name)
        _, size, how = self.model.pictures
        return read_image(content, str(name)[:80], size, how)

    def render(self, question, seeing):
        """(ids of the question, ids of each choice)."""
        t, text = self.tokenizer, question.messages[-1]["content"]
        if self.task.document:
            start = t.encode(text)
            whole = [t.encode(f"{text} {choice}") for choice in question.choices]
            return [t.end_of_text, *start], [ids[len(start):] for ids in whole]
        messages = question.messages
        if not seeing:
            messages = [{**m, "content": m["content"].replace(f"{IMAGE_MARK}\n", "")}
                        for m in messages]
        chat = render(t, messages, len(question.images) if seeing else 0)
        return [*chat.ids, t.assistant], [[*t.encode(choice), t.end] for choice in question.choices]

    def logged(self):
        """What the log holds of an earlier start, whole parts of it."""
        if not self.log or not self.log.is_file():
            return []
        found = []
        for line in self.log.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:  # the last line of a run that was killed
                break
        whole = len(found) if len(found) == len(self.questions) else len(found) // PART * PART
        self.log.write_text("".join(json.dumps(row) + "\n" for row in found[:whole]),
                            encoding="utf-8")
        return found[:whole]

    def write(self, rows):
        if self.log:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with open(self.log, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
