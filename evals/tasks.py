"""What the rows of public benchmarks and of the user's own files ask, and how answers are scored.

Choices are made by likelihood as in lm-evaluation-harness: the likeliest continuation of the
question (acc), or the likeliest per character (acc_norm). Other tasks generate a greedy answer.
"""

import json
import re
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import numpy as np

from common import hub
from common.archives import fetched
from common.config import UserError
from evals import metrics
from prep.schema import images_of, messages_of, text_of
from prep.sources import parsed

SHORT = "Answer the question using a single word or phrase."  # these three as in LLaVA 1.5
LETTER = "Answer with the option's letter from the given choices directly."
DESCRIBE = "Provide a one-sentence caption for the provided image."
RESAMPLES = 100  # of the bootstrap for a score that is not a mean


@dataclass
class Question:
    """What a row asks: in a chat, or as the beginning of a document."""

    messages: list  # the last is the user's; or one message, the document's beginning
    choices: list = field(default_factory=list)  # strings
    answer: int = 0  # index of the correct choice
    references: list = field(default_factory=list)  # correct answers, where one is generated
    images: list = field(default_factory=list)  # file names, or the bytes of files
    ids: list = field(default_factory=list)  # of a window of text: the first is given


def user(text):
    return [{"role": "user", "content": text}]


# -------------------------------------------------------------------------------- rows to questions


def hellaswag(row):
    """Zellers et al. 2019, as lm_eval writes it: the beginning of a scene, four endings."""
    def clean(text):
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    start = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return Question(user(clean(start)), [clean(text) for text in row["endings"]],
                    int(row["label"]))


def arc(row):
    """Clark et al. 2018, in the form of AI2's files or the hub's."""
    question, choices = row["question"], row.get("choices")
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, dict):
        texts, labels = choices["text"], choices["label"]
    else:
        texts, labels = ([choice[name] for choice in choices] for name in ("text", "label"))
    return Question(user(f"Question: {question}\nAnswer:"), texts, labels.index(row["answerKey"]))


def piqa(row):
    """Bisk et al. 2020, the label in the row."""
    return Question(user(f"Question: {row['goal']}\nAnswer:"), [row["sol1"], row["sol2"]],
                    int(row["label"]))


def lambada(row):
    """Paperno et al. 2016: the last word of a passage."""
    start, _, word = row["text"].strip().rpartition(" ")
    if not start:
        raise ValueError("no passage before the last word")
    return Question(user(start), [word])


def gsm(row):
    """Cobbe et al. 2021: a sum in words."""
    if metrics.gsm_answer(row["answer"]) is None:
        raise ValueError("an answer without a number")
    return Question(user(row["question"]), references=[row["answer"]])


def pope(row):
    """Li et al. 2023: is there a ... in the image?"""
    correct = ["yes", "no"].index(row["label"].lower())
    return Question(user(f"{row['text']}\n{SHORT}"), ["Yes", "No"], correct,
                    images=images_of(row, []))


def vqa(row):
    """Goyal et al. 2017: a question, and what ten people answered, or one."""
    answers = row.get("answers") or [row["answer"]]
    answers = [answers] if isinstance(answers, str) else answers
    answers = [a["answer"] if isinstance(a, dict) else a for a in answers]
    metrics.vqa_accuracy("", answers)  # raises ValueError for 2 or 3
    return Question(user(f"{row['question']}\n{SHORT}"), references=answers,
                    images=images_of(row, []))


def captions(row):
    """An image and one or more captions, as in COCO (Chen et al. 2015)."""
    found = row.get("captions") or row["caption"]
    return Question(user(DESCRIBE), references=[found] if isinstance(found, str) else found,
                    images=images_of(row, []))


def mmstar(row):
    """Chen et al. 2024: the options stand in the question, the answer is a letter."""
    options = set(re.findall(r"\b([A-H])[:.)]", row["question"].rpartition("Options:")[2]))
    letters = list(takewhile(options.__contains__, "ABCDEFGH")) or list("ABCD")
    return Question(user(f"{row['question']}\n{LETTER}"), letters, letters.index(row["answer"]),
                    images=images_of(row, []))


def scienceqa(row):
    """Lu et al. 2022, with or without an image."""
    letters = [chr(ord("A") + i) for i in range(len(row["choices"]))]
    options = [f"{letter}. {text}" for letter, text in zip(letters, row["choices"], strict=True)]
    hint = [f"Context: {row['hint']}"] if row.get("hint") else []
    text = "\n".join([*hint, row["question"], *options, LETTER])
    return Question(user(text), letters, int(row["answer"]), images=images_of(row, []))


def own(row):
    """A chat in any form that prepare.py reads; its last answer is the reference."""
    messages = messages_of(row)
    return Question(messages[:-1], [messages[-1]["content"]], 0, [messages[-1]["content"]],
                    images_of(row, messages))


def text(row):
    """A text of which every token is predicted; text_windows cuts the texts of all rows."""
    return Question(user(text_of(row, "text")))


def text_windows(questions, tokenizer, T, most):
    """Their texts end to end, each after <|endoftext|>, as `most` Questions of T + 1 ids at most.

    Each begins with the last id of the one before; the last may be shorter.
    """
    ids, end = [], tokenizer.end_of_text
    for question in questions:
        ids += [end, *tokenizer.encode(question.messages[0]["content"])]
        if len(ids) > T * most:
            break
    parts = [ids[start : start + T + 1] for start in range(0, len(ids) - 1, T)][:most]
    return [Question(user(tokenizer.decode([i for i in part[1:] if i != end])), ids=part)
            for part in parts]


def question_of(task, row):
    """The Question of a row, which may be a line of JSON; ValueError with the reason if it has
    another form."""
    row = parsed(row)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    try:
        question = task.read(row)
    except KeyError as error:
        raise ValueError(f"no field {error}") from None
    except (AttributeError, TypeError) as error:
        raise ValueError(f"a field of the wrong type ({error})") from None
    if task.image and not question.images:
        raise ValueError("no image")
    texts = [*question.choices, *question.references]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("an empty answer")
    if question.choices and not 0 <= question.answer < len(question.choices):
        raise ValueError(f"the answer {question.answer} of {len(question.choices)} choices")
    return question


# ------------------------------------------------------------------------------------------- scores
# Each function returns ({name: score}, chance). A score is an array of marks with the mean as its
# value, or (an array with one item per row, the statistic that computes the value from it).


def value_and_error(score):
    """(value, standard error by bootstrap over the questions) of a score."""
    if isinstance(score, tuple):
        rows, statistic = score
        return float(statistic(rows)), metrics.bootstrap(rows, RESAMPLES, statistic)
    return float(np.mean(score)), metrics.bootstrap(score)


def choice_scores(questions, found):
    """found: of each question [log-likelihood, is it the greedy answer, tokens] of each choice."""
    marks = metrics.multiple_choice([[x[0] for x in choices] for choices in found],
                                    [question.choices for question in questions],
                                    [question.answer for question in questions])
    return {"acc": marks["acc"], "acc_norm": marks["acc_norm"]}, marks["chance"].mean()


def yes_no_scores(questions, found):
    """Accuracy, and what POPE reports beside it."""
    marks, chance = choice_scores(questions, found)
    margins = np.array([yes[0] - no[0] for yes, no in found])
    rows = np.stack((margins, [question.answer == 0 for question in questions]), 1)
    return {"acc": marks["acc"], "f1": (rows, lambda x: metrics.f1(x[:, 0] > 0, x[:, 1] > 0)),
            "yes_share": (margins > 0).astype(float),
            "auroc": (rows, lambda x: metrics.auroc(x[:, 0], x[:, 1]))}, chance


def generated_yes_no_scores(questions, answers):
    rows = np.array([(metrics.says_yes(answer), question.answer == 0)
                     for question, answer in zip(questions, answers, strict=True)])
    return {"acc": (rows[:, 0] == rows[:, 1]).astype(float),
            "f1": (rows, lambda x: metrics.f1(x[:, 0], x[:, 1])),
            "yes_share": rows[:, 0].astype(float)}, 0.5


def word_scores(questions, found):
    """Whether the last word is the greedy answer, and its perplexity."""
    nats = np.array([choices[0][0] for choices in found])
    return {"acc": np.array([float(choices[0][1]) for choices in found]),
            "perplexity": (nats, lambda x: np.exp(-x.mean()))}, 0.0


def loss_scores(questions, found):
    """Loss in nats per token of the references, or of the windows of a text."""
    rows = np.array([(choices[0][0], choices[0][2]) for choices in found])
    return {"nats": (rows, lambda x: -x[:, 0].sum() / x[:, 1].sum())}, None


def text_scores(questions, found):
    """The loss, and bits per byte of UTF-8 (The Pile, arXiv:2101.00027)."""
    n_bytes = [len(question.messages[0]["content"].encode()) for question in questions]
    rows = np.stack(([choices[0][0] for choices in found], n_bytes), 1)
    bits = (rows, lambda x: -x[:, 0].sum() / x[:, 1].sum() / np.log(2))
    return {**loss_scores(questions, found)[0], "bits_per_byte": bits}, None


def marked_by(name, metric):
    """The scoring of generated answers by metric(answer, references), from 0 to 1."""
    def scores(questions, answers):
        pairs = zip(questions, answers, strict=True)
        return {name: np.array([float(metric(a, q.references)) for q, a in pairs])}, 0.0

    return scores


def caption_scores(questions, answers):
    references = [question.references for question in questions]
    counts = metrics.bleu_counts(answers, references)  # once, not for every resample

    def bleu(rows):
        return metrics.bleu4(*(column[rows].sum(0) for column in counts))

    return {"cider": metrics.cider(answers, references),
            "bleu4": (np.arange(len(answers)), bleu)}, 0.0


@dataclass
class Task:
    """How rows are read, asked and scored."""

    read: callable
    score: callable
    max_tokens: int = 0  # of a generated answer; 0 for choosing by likelihood
    document: bool = False  # the question is the beginning of a document, not a chat
    image: bool = False  # every question needs one
    windows: bool = False  # the rows are texts of which every token is predicted


TASKS = {
    "hellaswag": Task(hellaswag, choice_scores, document=True),
    "arc": Task(arc, choice_scores, document=True),
    "piqa": Task(piqa, choice_scores, document=True),
    "lambada": Task(lambada, word_scores, document=True),
    "gsm": Task(gsm, marked_by("exact", lambda a, references: (
        metrics.gsm_answer(a) == metrics.gsm_answer(references[0]))), 320),
    "pope": Task(pope, yes_no_scores, image=True),
    "pope_generate": Task(pope, generated_yes_no_scores, 16, image=True),
    "vqa": Task(vqa, marked_by("vqa", metrics.vqa_accuracy), 16, image=True),
    "captions": Task(captions, caption_scores, 64, image=True),
    "mmstar": Task(mmstar, choice_scores, image=True),
    "scienceqa": Task(scienceqa, choice_scores),
    "likelihood": Task(own, loss_scores),
    "exact": Task(own, marked_by(
        "exact", lambda a, references: a.strip() == references[0].strip()), 64),
    "text": Task(text, text_scores, windows=True),
}


def rows_of(path):
    """The rows of a JSON file, or the lines of a JSONL file; hf://OWNER/NAME/FILE is downloaded."""
    try:
        path = fetched(path)[0] if path.startswith(hub.PREFIX) else path
        text = Path(path).read_bytes()
        rows = json.loads(text) if text.lstrip().startswith(b"[") else [
            line for line in text.split(b"\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the task file {path}: {error}") from None
    if not rows:
        raise UserError(f"the task file {path} holds no rows")
    return rows
