"""Asking a model a task's questions: in batches, with pictures and without, from where it stopped.

Beside every score stand its standard error (bootstrap over the questions), what guessing gives,
and, where there are pictures, what the model gets without them.
"""

import hashlib
import json
from pathlib import Path

from common.archives import open_images
from common.config import UserError
from common.images import fit, read_image
from evals.loglikelihood import Item, likelihoods
from evals.tasks import TASKS, question_of, rows_of, value_and_error, windows
from inference.conversation import answer_all, fits
from tokenizer import render, split_at_images
from vision import VisionLanguageModel

PART = 256  # questions between two writes
WINDOW = 256  # tokens of a text that are predicted one from the others, as in scoring.text_loss


class Asking:
    """One task's questions for one model, asked with their pictures and without.

    out: a folder for the answers; checkpoint: whose they are, its sha256. left_out names the rows
    that have no part in the scores, and says why.
    """

    def __init__(self, name, path, model, tokenizer, items=1000, image_root="", out="",
                 checkpoint=""):
        if name not in TASKS:
            raise UserError(f"there is no task {name}: {', '.join(TASKS)}")
        self.name, self.task = name, TASKS[name]
        self.model, self.tokenizer = model, tokenizer
        self.find, self.refused, self.rows, self.questions = open_images(image_root), [], [], []
        for number, row in enumerate(rows_of(path)[: None if self.task.windows else items]):
            try:
                self.questions.append(question_of(self.task, row))
                self.rows.append(number)
            except ValueError as error:
                self.refused.append(f"row {number}: {error}")
        self.left_out = self.refused
        if not self.questions:
            raise UserError(f"{path} holds no row of the form that {name} has "
                            f"({self.refused[0]})")
        if self.task.windows:
            T = min(WINDOW, model.config.max_positions - 1)
            self.questions = windows(self.questions, tokenizer, T, items)
            self.rows = list(range(len(self.questions)))
        self.sees = any(question.images for question in self.questions)
        if self.sees and not isinstance(model, VisionLanguageModel):
            raise UserError(f"{name} asks about pictures, and this checkpoint cannot see")
        self.log = Path(out) / f"{name}.{Path(path).stem}.jsonl" if out else None
        asked = repr([checkpoint, str(next(model.parameters()).dtype), self.questions])
        self.head = {"task": name, "asked": hashlib.sha256(asked.encode()).hexdigest()}

    def run(self, progress=None):
        """{"n", "scores": {name: (value, standard error)}, "chance", "blind": the same without
        pictures, or nothing}. Answers already in the log are not asked for again."""
        found = self.logged()
        if progress:
            progress(len(found))
        for start in range(len(found), len(self.questions), PART):
            part = self.ask(range(start, min(start + PART, len(self.questions))))
            self.write(part)
            found += part
            if progress:
                progress(len(part))
        kept = [i for i, answer in enumerate(found) if "lost" not in answer]
        self.left_out = [*self.refused, *(f"row {self.rows[i]}: {answer['lost']}"
                                          for i, answer in enumerate(found) if "lost" in answer)]
        if not kept:
            raise UserError(f"{self.name}: no question fits the model, or no picture can be read: "
                            f"{self.left_out[-1]}")
        questions = [self.questions[i] for i in kept]
        result = {"n": len(kept), **self.summed(questions, [found[i]["said"] for i in kept])}
        if self.sees:
            blind = self.summed(questions, [found[i]["blind"] for i in kept])
            result["blind"] = blind["scores"]
        return result

    def summed(self, questions, found):
        values, chance = self.task.score(questions, found)
        return {"scores": {name: value_and_error(value) for name, value in values.items()},
                "chance": None if chance is None else float(chance)}

    def ask(self, numbers):
        """What the model says to the questions of these numbers: {"said"}, with "blind" where the
        task has pictures, or {"lost": why it cannot be asked}."""
        found, items = {}, {}
        for number in numbers:
            try:
                items[number] = self.item(self.questions[number])
            except UserError as error:
                found[number] = {"lost": str(error)}
        for number, answer in self.answers(items).items():
            found[number] = {"said": answer}
        if self.sees:
            without = {number: self.item(self.questions[number], seeing=False)
                       for number in items if self.questions[number].images}
            blind = self.answers(without)
            for number in items:
                found[number]["blind"] = blind.get(number, found[number]["said"])
        return [found[number] for number in numbers]

    def item(self, question, seeing=True):
        """The Item of a question; UserError for a picture that is not there, and for a question
        too long for the model."""
        if question.ids:
            return Item(question.ids[:1], [question.ids[1:]])
        ids, choices = self.render(question, seeing)
        longest = max(map(len, choices)) if self.task.way == "choose" else self.task.max_tokens
        if not fits(self.model, self.tokenizer, ids, longest):
            raise UserError("longer than the context")
        return Item(ids, choices, [self.picture(name) for name in question.images if seeing])

    def answers(self, items):
        """{number: [[log-likelihood, whether greedy decoding says it, tokens] of each choice], or
        an answer in words} of {number: Item}."""
        asked = list(items.values())
        if not asked:
            return {}
        if self.task.way == "choose":
            found = [[[x.nats, x.greedy, len(ids)]
                      for x, ids in zip(some, item.answers, strict=True)] for item, some
                     in zip(asked, likelihoods(self.model, self.tokenizer, asked), strict=True)]
        else:
            found = answer_all(self.model, self.tokenizer, [item.prompt for item in asked],
                               [item.images for item in asked], self.task.max_tokens)
        return dict(zip(items, found, strict=True))

    def picture(self, name):
        content = name if isinstance(name, bytes) else self.find(name)
        _, size, how = self.model.image_spec
        return fit(read_image(content, str(name)[:80], size, how), size, how)

    def render(self, question, seeing):
        """(ids of the question, ids of each choice)."""
        t, messages = self.tokenizer, question.messages
        if self.task.document:
            text = messages[0]["content"]
            start = t.encode(text.rstrip())  # a space behind it is the choice's, as in lm_eval
            whole = [t.encode(f"{text} {choice}") for choice in question.choices]
            return [t.end_of_text, *start], [ids[len(start):] for ids in whole]
        if question.images and not seeing:
            messages = [{**m, "content": "".join(filter(None, split_at_images(m["content"])))}
                        for m in messages]
        chat = render(t, messages, len(question.images) if seeing else 0)
        # Of several choices, how an answer begins decides: "Yes" stands for "Yes." as well.
        end = [t.end] if len(question.choices) == 1 else []
        return [*chat.ids, t.assistant], [[*t.encode(choice), *end] for choice in question.choices]

    def logged(self):
        """What the log holds of an earlier start, whole parts of it: a batch decides about the
        last digits. UserError for answers of another checkpoint, or to other questions."""
        if not self.log or not self.log.is_file():
            return []
        found = []
        for line in self.log.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n"):  # the last line of a run that was killed
                break
            found.append(json.loads(line))
        if found and found[0] != self.head:
            raise UserError(f"{self.log} holds answers of another checkpoint, or to other "
                            "questions; say another --out, or remove it")
        found = found[1:]
        whole = len(found) if len(found) == len(self.questions) else len(found) // PART * PART
        self.log.unlink()
        self.write(found[:whole])
        return found[:whole]

    def write(self, answers):
        """Append answers to the log."""
        if not self.log:
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a", encoding="utf-8") as file:
            head = [] if file.tell() else [self.head]
            file.writelines(json.dumps(line) + "\n" for line in [*head, *answers])
