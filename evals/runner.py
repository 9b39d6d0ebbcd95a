"""Runs a task (evals/tasks.py) on a model: in batches, with images and text-only, resumable."""

import hashlib
from pathlib import Path

from common.archives import open_images
from common.atomic import append_rows, resume_rows, writing
from common.config import UserError
from common.device import pick_dtype
from common.images import fit, read_image
from evals.loglikelihood import Item, likelihoods
from evals.tasks import TASKS, question_of, rows_of, text_windows
from inference.conversation import answer_all, fits
from tokenizer import render, split_at_images
from vision import VisionLanguageModel

PART = 256  # questions between two writes
WINDOW = 256  # tokens of a window of text, as in validation.text_loss


def runners_of(cfg, model, tokenizer, info, out):
    """{name: TaskRunner} of --tasks; info: of the checkpoint, as checkpoint.read returns it."""
    wanted = [item.strip().partition(":")[::2] for item in cfg.tasks.split(",")]
    tasks = [task for task, _ in wanted]
    runners = {task if tasks.count(task) == 1 else f"{task}:{Path(path).stem}": TaskRunner(
        task, path, model, tokenizer, cfg.items, cfg.image_root, out, info["sha256"])
        for task, path in wanted}
    if len(runners) < len(wanted):
        raise UserError(f"--tasks={cfg.tasks} has one task twice with files of the same name; "
                        "rename one of them")
    return runners


class TaskRunner:
    """The questions of one task's file for one model. out: folder for the answers; checkpoint:
    sha256 of the model; left_out: the rows that are not scored, with the reason."""

    def __init__(self, name, path, model, tokenizer, items=1000, image_root="", out="",
                 checkpoint=""):
        if name not in TASKS:
            raise UserError(f"there is no task {name}: {', '.join(TASKS)}")
        self.name, self.task, self.model, self.tokenizer = name, TASKS[name], model, tokenizer
        self.find = open_images(image_root)
        self.left_out, self.questions = [], []
        for number, (_, row, _) in enumerate(rows_of(path)[: None if self.task.windows else items]):
            try:
                self.questions.append(question_of(self.task, row, number))
            except ValueError as error:
                self.left_out.append(f"row {number}: {error}")
        if not self.questions:
            raise UserError(f"{path} has no row in the format of {name} ({self.left_out[0]})")
        if self.task.windows:
            T = min(WINDOW, model.config.max_positions - 1)
            self.questions = text_windows(self.questions, tokenizer, T, items)
        has_images = any(question.images for question in self.questions)
        self.kinds = ("answer", "text_only") if has_images else ("answer",)
        if has_images and not isinstance(model, VisionLanguageModel):
            raise UserError(f"{name} asks about images, but this checkpoint is text-only")
        self.file = Path(out) / f"{name}.{Path(path).stem}.jsonl" if out else None
        dtype, found = pick_dtype(next(model.parameters()).device), (image_root, self.find.identity)
        asked = repr([checkpoint, str(dtype), self.questions, has_images and found])
        self.header = {"task": name, "asked": hashlib.sha256(asked.encode()).hexdigest()}

    def run(self, progress=lambda n: None):
        """{"n", "scores": {name: (value, standard error)}, "chance", "text_only": scores without
        images, if there are any}. Answers already in the file are not generated again."""
        found = []
        if self.file:
            with writing(self.file):
                found = resume_rows(self.file, self.header, len(self.questions), PART)
        progress(len(found))
        for start in range(len(found), len(self.questions), PART):
            part = self.ask(range(start, min(start + PART, len(self.questions))))
            if self.file:
                with writing(self.file):
                    append_rows(self.file, part)
            found += part
            progress(len(part))
        asked = list(zip(self.questions, found, strict=True))
        self.left_out += [f"row {question.row}: {answer['skipped']}" for question, answer in asked
                          if "skipped" in answer]
        asked = [pair for pair in asked if "skipped" not in pair[1]]
        if not asked:
            raise UserError(f"{self.name}: no question fits the model, or no image is readable: "
                            f"{self.left_out[-1]}")
        questions, answers = zip(*asked, strict=True)
        result = {"n": len(asked)}
        for kind in self.kinds:
            scores = self.task.score(questions, [answer[kind] for answer in answers])
            label = "scores" if kind == "answer" else kind
            result[label] = {name: (x.value, x.error) for name, x in scores.items()}
            result["chance"] = next(iter(scores.values())).chance
        return result

    def ask(self, numbers):
        """{"answer": text, or what `likelihoods` returns of the choices} of the questions of these
        numbers, with "text_only" where the task has images; or {"skipped": the reason}."""
        found, items = {number: {"row": number} for number in numbers}, {}
        for number in numbers:
            try:
                items[number] = self.item(self.questions[number])
            except UserError as error:
                found[number]["skipped"] = str(error)
        for number, answer in self.answers(items):
            found[number] |= dict.fromkeys(self.kinds, answer)
        for number, answer in self.answers({
                number: self.item(self.questions[number], with_images=False)
                for number in items if self.questions[number].images}):
            found[number]["text_only"] = answer
        return list(found.values())

    def answers(self, items):
        """Pairs of a number and the answer, of {number: Item}."""
        asked = list(items.values())
        if self.task.max_tokens:
            found = answer_all(self.model, self.tokenizer, [item.prompt for item in asked],
                               [item.images for item in asked], self.task.max_tokens)
        else:
            found = likelihoods(self.model, self.tokenizer, asked)
        return zip(items, found, strict=True)

    def item(self, question, with_images=True):
        """The Item of a question; UserError for an image that cannot be read, or a question longer
        than the context."""
        t, messages = self.tokenizer, question.messages
        images = question.images if with_images else []
        if question.ids:
            return Item(question.ids[:1], [question.ids[1:]])
        if self.task.document:
            text = messages[0]["content"]
            start = t.encode(text.rstrip())  # as in lm_eval, a final space belongs to the choice
            ids = [t.end_of_text, *start]
            choices = [t.encode(f"{text} {choice}")[len(start):] for choice in question.choices]
        else:
            if question.images and not with_images:
                messages = [{**m, "content": "".join(filter(None, split_at_images(m["content"])))}
                            for m in messages]
            ids = [*render(t, messages, len(images)).ids, t.assistant]
            # Among several choices, "Yes" also stands for "Yes.": only a single one has to end.
            end = [t.end] if len(question.choices) == 1 else []
            choices = [[*t.encode(choice), *end] for choice in question.choices]
        if not fits(self.model, t, ids, self.task.max_tokens or max(map(len, choices))):
            raise UserError("longer than the context")
        found, spec = [], getattr(self.model, "image_spec", ())[1:]
        for name in images:
            content = name if isinstance(name, bytes) else self.find(name)
            found.append(fit(read_image(content, str(name)[:80], *spec), *spec))
        return Item(ids, choices, found)
