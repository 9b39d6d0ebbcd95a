"""Public benchmarks, and one's own, from local files: what their rows ask, how answers are scored.

Choices are made by likelihood, as lm-evaluation-harness has it: the choice that the model finds
likeliest behind the question (acc), or likeliest for its length (acc_norm). Other tasks ask for an
answer, greedily.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import scores
from archives import fetched
from common import hub
from common.config import UserError
from prep.rows import messages_of, pictures_of

SHORT = "Answer the question using a single word or phrase."  # these three as in LLaVA 1.5
LETTER = "Answer with the option's letter from the given choices directly."
DESCRIBE = "Provide a one-sentence caption for the provided image."


@dataclass
class Question:
    """What a row asks: in a chat, or as the beginning of a document."""

    messages: list  # the last is the user's; or one message, the document's beginning
    choices: list = field(default_factory=list)  # strings, for a choice
    answer: int = 0  # which of them is right
    wanted: list = field(default_factory=list)  # right answers, for one in words
    images: list = field(default_factory=list)  # names of pictures, or their bytes


def said(text):
    return [{"role": "user", "content": text}]


# -------------------------------------------------------------------------------- rows to questions


def hellaswag(row):
    """Zellers et al. 2019, as lm_eval writes it: the beginning of a scene, four endings."""
    def clean(text):
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    start = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return Question(said(clean(start)), [clean(text) for text in row["endings"]],
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
    return Question(said(f"Question: {question}\nAnswer:"), texts, labels.index(row["answerKey"]))


def piqa(row):
    """Bisk et al. 2020, the label in the row."""
    return Question(said(f"Question: {row['goal']}\nAnswer:"), [row["sol1"], row["sol2"]],
                    int(row["label"]))


def lambada(row):
    """Paperno et al. 2016: the last word of a passage."""
    start, _, word = row["text"].strip().rpartition(" ")
    return Question(said(start), [word])


def gsm(row):
    """Cobbe et al. 2021: a sum in words."""
    return Question(said(row["question"]), wanted=[row["answer"]])


def pope(row):
    """Li et al. 2023: is there a ... in the picture?"""
    right = ["yes", "no"].index(row["label"].lower())
    return Question(said(f"{row['text']}\n{SHORT}"), ["Yes", "No"], right,
                    images=pictures_of(row, []))


def vqa(row):
    """Goyal et al. 2017: a question, and what ten people answered, or one."""
    answers = row.get("answers") or [row["answer"]]
    answers = [a["answer"] if isinstance(a, dict) else a for a in answers]
    return Question(said(f"{row['question']}\n{SHORT}"), wanted=answers,
                    images=pictures_of(row, []))


def captions(row):
    """A picture and one or more captions of it, as in COCO (Chen et al. 2015)."""
    return Question(said(DESCRIBE), wanted=row.get("captions") or [row["caption"]],
                    images=pictures_of(row, []))


def mmstar(row):
    """Chen et al. 2024: the options stand in the question, the answer is a letter."""
    letters = list(dict.fromkeys(re.findall(r"\b([A-H])[:.)]", row["question"]))) or list("ABCD")
    return Question(said(f"{row['question']}\n{LETTER}"), letters, letters.index(row["answer"]),
                    images=pictures_of(row, []))


def scienceqa(row):
    """Lu et al. 2022, with or without a picture."""
    letters = [chr(ord("A") + i) for i in range(len(row["choices"]))]
    options = [f"{letter}. {text}" for letter, text in zip(letters, row["choices"], strict=True)]
    hint = [f"Context: {row['hint']}"] if row.get("hint") else []
    text = "\n".join([*hint, row["question"], *options, LETTER])
    return Question(said(text), letters, int(row["answer"]), images=pictures_of(row, []))


def own(row):
    """A chat in any form that prepare.py reads; its last answer is asked for."""
    messages = messages_of(row)
    return Question(messages[:-1], [messages[-1]["content"]], 0, [messages[-1]["content"]],
                    pictures_of(row, messages))


# ------------------------------------------------------------------------------------------- scores


def choice_scores(questions, found):
    """Marks by name, for choices: found is a list of Likelihoods a question."""
    texts = [question.choices for question in questions]
    marks = scores.multiple_choice([[x[0] for x in some] for some in found], texts,
                                   [question.answer for question in questions])
    return {"acc": marks["acc"], "acc_norm": marks["acc_norm"]}, marks["chance"].mean()


def yes_no_scores(questions, found):
    """Accuracy, and what POPE reports beside it."""
    marks, chance = choice_scores(questions, found)
    margins = np.array([yes[0] - no[0] for yes, no in found])
    labels = np.array([question.answer == 0 for question in questions])
    both = scores.yes_no(margins > 0, labels)
    return {"acc": marks["acc"], "f1": both["f1"], "yes_share": both["yes_share"],
            "auroc": scores.auroc(margins, labels)}, chance


def word_scores(questions, found):
    """Whether greedy decoding says the last word, and its perplexity."""
    nats = np.array([some[0][0] for some in found])
    return {"acc": np.array([float(some[0][1]) for some in found]),
            "perplexity": float(np.exp(-nats.mean()))}, 0.0


def loss_scores(questions, found):
    """Nats a token of the wanted answers; found holds their log-likelihood and length."""
    nats, n = (np.array([some[0][k] for some in found]) for k in (0, 2))
    return {"nats": float(-nats.sum() / n.sum())}, None


def exact_scores(questions, answers):
    pairs = zip(questions, answers, strict=True)
    return {"exact": np.array([float(a.strip() == q.wanted[0].strip()) for q, a in pairs])}, 0.0


def gsm_scores(questions, answers):
    pairs = zip(questions, answers, strict=True)
    return {"exact": np.array([float(scores.gsm_exact(a, q.wanted[0])) for q, a in pairs])}, 0.0


def vqa_scores(questions, answers):
    pairs = zip(questions, answers, strict=True)
    return {"vqa": np.array([scores.vqa_accuracy(a, q.wanted) for q, a in pairs])}, 0.0


def said_yes_scores(questions, answers):
    labels = [question.answer == 0 for question in questions]
    says = [scores.says_yes(answer) for answer in answers]
    return {"acc": np.array(says == np.array(labels), float), **{
        name: value for name, value in scores.yes_no(says, labels).items()
        if name in ("f1", "yes_share")}}, 0.5


def caption_scores(questions, answers):
    wanted = [question.wanted for question in questions]
    each = scores.cider(answers, wanted)[1]
    return {"cider": np.array(each), "bleu4": scores.bleu4(answers, wanted)[0]}, 0.0


@dataclass
class Task:
    """How a kind of file is read, asked and scored. way: "choose", or "say" an answer in words."""

    read: callable
    way: str
    score: callable
    max_tokens: int = 64
    document: bool = False  # the question is a document's beginning, not a chat


TASKS = {
    "hellaswag": Task(hellaswag, "choose", choice_scores, document=True),
    "arc": Task(arc, "choose", choice_scores, document=True),
    "piqa": Task(piqa, "choose", choice_scores, document=True),
    "lambada": Task(lambada, "choose", word_scores, document=True),
    "gsm": Task(gsm, "say", gsm_scores, 320),
    "pope": Task(pope, "choose", yes_no_scores),
    "pope_said": Task(pope, "say", said_yes_scores, 16),
    "vqa": Task(vqa, "say", vqa_scores, 16),
    "captions": Task(captions, "say", caption_scores),
    "mmstar": Task(mmstar, "choose", choice_scores),
    "scienceqa": Task(scienceqa, "choose", choice_scores),
    "likelihood": Task(own, "choose", loss_scores),
    "exact": Task(own, "say", exact_scores),
}


def rows_of(path):
    """The rows of a JSON or JSONL file; hf://OWNER/NAME/FILE fetches it once."""
    try:
        path = fetched(path)[0] if path.startswith(hub.PREFIX) else path
        text = Path(path).read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else [
            json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the task file {path}: {error}") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"the task file {path} holds no rows")
    return rows
