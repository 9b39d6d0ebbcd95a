"""The tasks of eval.py --tasks: TASKS says how rows are read, asked and scored (evals/metrics.py).

Choices are made by likelihood as in lm-evaluation-harness: the likeliest continuation of the
question (acc), or the likeliest per character (acc_norm). Other tasks generate a greedy answer.
"""

import re
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np

from common.config import UserError
from evals import metrics
from evals.metrics import score
from prep.schema import Columns, chat_of, columns_of, images_in, text_of
from prep.sources import Files, parsed

SHORT = "Answer the question using a single word or phrase."  # these three as in LLaVA 1.5
LETTER = "Answer with the option's letter from the given choices directly."
DESCRIBE = "Provide a one-sentence caption for the provided image."
RESAMPLES = 100  # bootstrap samples for a score that is not a mean


@dataclass
class Question:
    """What a row asks: in a chat, or as the beginning of a document."""

    messages: list  # the last is the user's; or one message, the document's beginning
    choices: list = field(default_factory=list)  # strings
    answer: int = 0  # index of the correct choice
    references: list = field(default_factory=list)  # correct answers, where one is generated
    images: list = field(default_factory=list)  # file names, or the bytes of files
    ids: list = field(default_factory=list)  # of a window of text; the first is not predicted
    n_bytes: int = 0  # of a window, from its second id on
    row: int = 0  # its number in the file, or the window's


def user(text):
    return [{"role": "user", "content": text}]


def hellaswag(row):
    def clean(text):
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    start = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return Question(user(clean(start)), [clean(text) for text in row["endings"]],
                    int(row["label"]))


def arc(row):
    question, choices = row["question"], row.get("choices")
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, dict):
        texts, labels = choices["text"], choices["label"]
    else:
        texts, labels = ([choice[name] for choice in choices] for name in ("text", "label"))
    return Question(user(f"Question: {question}\nAnswer:"), texts, labels.index(row["answerKey"]))


def piqa(row):
    return Question(user(f"Question: {row['goal']}\nAnswer:"), [row["sol1"], row["sol2"]],
                    int(row["label"]))


def lambada(row):
    start, _, word = row["text"].strip().rpartition(" ")
    if not start:
        raise ValueError("no passage before the last word")
    return Question(user(start), [word])


def gsm(row):
    if metrics.gsm_answer(row["answer"]) is None:
        raise ValueError("an answer without a number")
    return Question(user(row["question"]), references=[row["answer"]])


def pope(row):
    correct = ["yes", "no"].index(row["label"].lower())
    return Question(user(f"{row['text']}\n{SHORT}"), ["Yes", "No"], correct)


def vqa(row):
    answers = row.get("answers") or [row["answer"]]
    answers = [answers] if isinstance(answers, str) else answers
    answers = [a["answer"] if isinstance(a, dict) else a for a in answers]
    metrics.vqa_accuracy("", answers)  # raises ValueError for 2 or 3
    return Question(user(f"{row['question']}\n{SHORT}"), references=answers)


def captions(row):
    found = row.get("captions") or row["caption"]
    return Question(user(DESCRIBE), references=[found] if isinstance(found, str) else found)


def mmstar(row):
    options = set(re.findall(r"\b([A-H])[:.)]", row["question"].rpartition("Options:")[2]))
    letters = list(takewhile(options.__contains__, "ABCDEFGH")) or list("ABCD")
    return Question(user(f"{row['question']}\n{LETTER}"), letters, letters.index(row["answer"]))


def scienceqa(row):
    letters = [chr(ord("A") + i) for i in range(len(row["choices"]))]
    options = [f"{letter}. {text}" for letter, text in zip(letters, row["choices"], strict=True)]
    hint = [f"Context: {row['hint']}"] if row.get("hint") else []
    text = "\n".join([*hint, row["question"], *options, LETTER])
    return Question(user(text), letters, int(row["answer"]))


def own(row):
    (*messages, last), images = chat_of(row)
    return Question(messages, [last["content"]], references=[last["content"]], images=images)


def text_windows(questions, tokenizer, T, most):
    """Their texts end to end, each after <|endoftext|>, as `most` Questions of T + 1 ids at most,
    each of which begins with the last id of the one before."""
    ids, end = [], tokenizer.end_of_text
    for question in questions:
        ids += [end, *tokenizer.encode(question.messages[0]["content"])]
        if len(ids) > T * most:
            break
    parts = [ids[start : start + T + 1] for start in range(0, len(ids) - 1, T)][:most]
    return [Question(user(tokenizer.decode([i for i in part[1:] if i != end])), ids=part, row=row,
                     n_bytes=tokenizer.n_bytes(part[1:])) for row, part in enumerate(parts)]


def question_of(task, row, number=0):
    """The Question of a row, which may be a line of JSON; ValueError with the reason if it has
    another form."""
    row = parsed(row)
    if not isinstance(row, dict) and not task.windows:  # a text of a .txt file
        raise ValueError("not a JSON object")
    try:
        question = task.read(row)
        if task.image and not question.images:
            question.images = images_in(Columns(row))
        question.row = number
    except KeyError as error:
        raise ValueError(f"no field {error}{columns_of(row)}") from None
    except (AttributeError, TypeError) as error:
        raise ValueError(f"a field of the wrong type ({error})") from None
    if task.image == "required" and not question.images:
        raise ValueError("no image")
    texts = [*question.choices, *question.references]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("an empty answer")
    if question.choices and not 0 <= question.answer < len(question.choices):
        raise ValueError(f"the answer {question.answer} of {len(question.choices)} choices")
    return question


# Each function takes questions and the result of each, a generated text or what `likelihoods`
# returns for its choices, and returns {name: Score}.


def scored(questions, items, *args, **options):
    """The Score of items, one for each question; questions that share an image are a cluster."""
    clusters = [tuple(question.images) or i for i, question in enumerate(questions)]
    return score(items, *args, **options, clusters=clusters)


def choice_scores(questions, found):
    """How often the correct choice is the likeliest (acc), or the likeliest per character
    (acc_norm); the first of equals counts. Source: process_results in api/task.py of lm_eval."""
    marks = []
    for question, choices in zip(questions, found, strict=True):
        sums = np.array([x[0] for x in choices])
        if np.isnan(sums).any():
            raise ValueError("the log-likelihood of a choice is NaN")
        per_character = sums / [len(text) for text in question.choices]
        marks.append((sums.argmax() == question.answer, per_character.argmax() == question.answer))
    acc, acc_norm = np.array(marks).T
    chance = float(np.mean([1 / len(question.choices) for question in questions]))
    return {"acc": scored(questions, acc, chance=chance),
            "acc_norm": scored(questions, acc_norm, chance=chance)}


def yes_no_scores(questions, said):
    """What POPE reports. said: whether each answer is yes."""
    rows = np.stack((said, [question.answer == 0 for question in questions]), 1)
    return {"acc": scored(questions, rows[:, 0] == rows[:, 1], chance=0.5),
            "f1": scored(questions, rows, metrics.f1, n=RESAMPLES),
            "yes_share": scored(questions, rows[:, 0])}


def generated_yes_scores(questions, answers):
    """A yes is, as in POPE's evaluate.py, a first sentence without No, no and not."""
    return yes_no_scores(questions, [
        {"No", "no", "not"}.isdisjoint(answer.split(".")[0].replace(",", "").split(" "))
        for answer in answers])


def likelier_yes_scores(questions, found):
    margins = np.array([yes[0] - no[0] for yes, no in found])
    rows = np.stack((margins, [question.answer == 0 for question in questions]), 1)
    return {**yes_no_scores(questions, margins > 0), "acc": choice_scores(questions, found)["acc"],
            "auroc": scored(questions, rows, metrics.auroc, n=RESAMPLES)}


def word_scores(questions, found):
    """Whether the last word is the greedy answer, and its perplexity."""
    nats, greedy, _ = zip(*(choices[0] for choices in found), strict=True)
    return {"acc": scored(questions, greedy, chance=0.0),
            "perplexity": scored(questions, nats, lambda x: np.exp(-x.mean()), n=RESAMPLES)}


def loss_scores(questions, found):
    """Loss in nats per token of the references, or of the windows of a text."""
    rows = np.array([(-choices[0][0], choices[0][2]) for choices in found])
    return {"nats": scored(questions, rows, metrics.ratio, n=RESAMPLES)}


def text_scores(questions, found):
    """The loss, and bits per byte of UTF-8 (The Pile, arXiv:2101.00027)."""
    rows = np.array([(-choices[0][0], question.n_bytes)
                     for question, choices in zip(questions, found, strict=True)])
    bits = scored(questions, rows, lambda x: metrics.ratio(x) / np.log(2), n=RESAMPLES)
    return {**loss_scores(questions, found), "bits_per_byte": bits}


def marked_by(name, metric):
    """The scoring of generated answers by metric(answer, references), from 0 to 1."""
    return lambda questions, answers: {name: scored(
        questions, [float(metric(answer, question.references))
                    for question, answer in zip(questions, answers, strict=True)], chance=0.0)}


def caption_scores(questions, answers):
    references = [question.references for question in questions]
    counts = metrics.bleu_counts(answers, references)
    return {"cider": scored(questions, metrics.cider(answers, references), chance=0.0),
            "bleu4": scored(questions, counts, metrics.bleu4, n=RESAMPLES)}


@dataclass
class Task:
    """How rows are read, asked and scored."""

    read: callable
    score: callable
    max_tokens: int = 0  # of a generated answer; 0 for choosing by likelihood
    document: bool = False  # the question is the beginning of a document, not a chat
    image: str = ""  # whether rows have images: "required", "optional", or not
    windows: bool = False  # the rows are texts of which every token is predicted


TASKS = {
    "hellaswag": Task(hellaswag, choice_scores, document=True),  # Zellers et al. 2019
    "arc": Task(arc, choice_scores, document=True),  # Clark et al. 2018: AI2's files or the hub's
    "piqa": Task(piqa, choice_scores, document=True),  # Bisk et al. 2020, the label in the row
    "lambada": Task(lambada, word_scores, document=True),  # Paperno et al. 2016
    "gsm": Task(gsm, marked_by("exact", lambda a, references: (  # Cobbe et al. 2021
        metrics.gsm_answer(a) == metrics.gsm_answer(references[0]))), 320),
    "pope": Task(pope, likelier_yes_scores, image="required"),  # Li et al. 2023
    "pope_generate": Task(pope, generated_yes_scores, 16, image="required"),
    "vqa": Task(vqa, marked_by("vqa", metrics.vqa_accuracy), 16, image="required"),  # Goyal 2017
    "captions": Task(captions, caption_scores, 64, image="required"),  # Chen et al. 2015
    "mmstar": Task(mmstar, choice_scores, image="required"),  # Chen et al. 2024
    "scienceqa": Task(scienceqa, choice_scores, image="optional"),  # Lu et al. 2022
    "likelihood": Task(own, loss_scores, image="optional"),  # chats in any form of prepare.py
    "exact": Task(own, marked_by(
        "exact", lambda a, references: a.strip() == references[0].strip()), 64, image="optional"),
    "text": Task(lambda row: Question(user(text_of(row, "text"))), text_scores, windows=True),
}


def rows_of(path):
    """[(name, row, bytes)] of a file in any form of prepare.py, hf://OWNER/NAME/FILE too."""
    rows = list(Files(path).rows())
    if not rows:
        raise UserError(f"the task file {path} holds no rows")
    return rows
