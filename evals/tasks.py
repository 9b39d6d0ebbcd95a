"""Public benchmarks, and one's own, from local files: what their rows ask, how answers are scored.

Choices are made by likelihood, as lm-evaluation-harness has it: the choice that the model finds
likeliest behind the question (acc), or likeliest for its length (acc_norm). Other tasks ask for an
answer, greedily.
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
REPEATS = 100  # bootstrap samples of a score that is no mean


@dataclass
class Question:
    """What a row asks: in a chat, or as the beginning of a document."""

    messages: list  # the last is the user's; or one message, the document's beginning
    choices: list = field(default_factory=list)  # strings, for a choice
    answer: int = 0  # which of them is right
    wanted: list = field(default_factory=list)  # right answers, for one in words
    images: list = field(default_factory=list)  # names of pictures, or their bytes
    ids: list = field(default_factory=list)  # of a window of text: the first is given


def said(text):
    return [{"role": "user", "content": text}]


def shown(row):
    """The pictures of a row that asks about one."""
    found = images_of(row, [])
    if not found:
        raise ValueError("no picture")
    return found


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
    if not start:
        raise ValueError("no passage before the last word")
    return Question(said(start), [word])


def gsm(row):
    """Cobbe et al. 2021: a sum in words."""
    if metrics.gsm_answer(row["answer"]) is None:
        raise ValueError("an answer without a number")
    return Question(said(row["question"]), wanted=[row["answer"]])


def pope(row):
    """Li et al. 2023: is there a ... in the picture?"""
    right = ["yes", "no"].index(row["label"].lower())
    return Question(said(f"{row['text']}\n{SHORT}"), ["Yes", "No"], right, images=shown(row))


def vqa(row):
    """Goyal et al. 2017: a question, and what ten people answered, or one."""
    answers = row.get("answers") or [row["answer"]]
    answers = [answers] if isinstance(answers, str) else answers
    answers = [a["answer"] if isinstance(a, dict) else a for a in answers]
    metrics.vqa_accuracy("", answers)  # refuses 2 or 3 of them
    return Question(said(f"{row['question']}\n{SHORT}"), wanted=answers, images=shown(row))


def captions(row):
    """A picture and one or more captions of it, as in COCO (Chen et al. 2015)."""
    found = row.get("captions") or row["caption"]
    return Question(said(DESCRIBE), wanted=[found] if isinstance(found, str) else found,
                    images=shown(row))


def mmstar(row):
    """Chen et al. 2024: the options stand in the question, the answer is a letter."""
    options = set(re.findall(r"\b([A-H])[:.)]", row["question"].rpartition("Options:")[2]))
    letters = list(takewhile(options.__contains__, "ABCDEFGH")) or list("ABCD")
    return Question(said(f"{row['question']}\n{LETTER}"), letters, letters.index(row["answer"]),
                    images=shown(row))


def scienceqa(row):
    """Lu et al. 2022, with or without a picture."""
    letters = [chr(ord("A") + i) for i in range(len(row["choices"]))]
    options = [f"{letter}. {text}" for letter, text in zip(letters, row["choices"], strict=True)]
    hint = [f"Context: {row['hint']}"] if row.get("hint") else []
    text = "\n".join([*hint, row["question"], *options, LETTER])
    return Question(said(text), letters, int(row["answer"]), images=images_of(row, []))


def own(row):
    """A chat in any form that prepare.py reads; its last answer is asked for."""
    messages = messages_of(row)
    return Question(messages[:-1], [messages[-1]["content"]], 0, [messages[-1]["content"]],
                    images_of(row, messages))


def text(row):
    """A text, all of which is to be predicted; windows() cuts what all rows hold."""
    return Question(said(text_of(row, "text")))


def windows(questions, tokenizer, T, most):
    """Their texts end to end, each behind <|endoftext|>, as `most` Questions of T + 1 ids at most.

    Each begins with the id that the one before ends with; the last may be shorter.
    """
    ids, end = [], tokenizer.end_of_text
    for question in questions:
        ids += [end, *tokenizer.encode(question.messages[0]["content"])]
        if len(ids) > T * most:
            break
    parts = [ids[start : start + T + 1] for start in range(0, len(ids) - 1, T)][:most]
    return [Question(said(tokenizer.decode([i for i in part[1:] if i != end])), ids=part)
            for part in parts]


def question_of(task, row):
    """The Question of a row, which may still be a line of JSON; a ValueError says why it is none.
    """
    row = parsed(row)
    if not isinstance(row, dict):
        raise ValueError("a row that is no object")
    try:
        question = task.read(row)
    except KeyError as error:
        raise ValueError(f"no field {error}") from None
    except (AttributeError, TypeError) as error:
        raise ValueError(f"a field of another form ({error})") from None
    texts = [*question.choices, *question.wanted]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("an empty answer")
    if question.choices and not 0 <= question.answer < len(question.choices):
        raise ValueError(f"the answer {question.answer} of {len(question.choices)} choices")
    return question


# ------------------------------------------------------------------------------------------- scores
# A score is an array of marks, whose mean it is; or (an array, an item a row, what makes it of it).


def value_and_error(score):
    """(value, standard error by bootstrap over the questions) of a score."""
    if isinstance(score, tuple):
        rows, statistic = score
        return float(statistic(rows)), metrics.bootstrap(rows, REPEATS, statistic=statistic)
    return float(np.mean(score)), metrics.bootstrap(score)


def choice_scores(questions, found):
    """Marks by name, for choices: found is a list of [log-likelihood, greedy, tokens] a question.
    """
    texts = [question.choices for question in questions]
    marks = metrics.multiple_choice([[x[0] for x in some] for some in found], texts,
                                   [question.answer for question in questions])
    return {"acc": marks["acc"], "acc_norm": marks["acc_norm"]}, marks["chance"].mean()


def yes_no_scores(questions, found):
    """Accuracy, and what POPE reports beside it."""
    marks, chance = choice_scores(questions, found)
    margins = np.array([yes[0] - no[0] for yes, no in found])
    both = np.stack((margins, [question.answer == 0 for question in questions]), 1)
    return {"acc": marks["acc"], "f1": (both, lambda x: f1(x[:, 0] > 0, x[:, 1])),
            "yes_share": (margins > 0).astype(float),
            "auroc": (both, lambda x: auroc(x[:, 0], x[:, 1]))}, chance


def auroc(margins, labels):
    """0.5 where all labels are the same, as in some samples of few questions."""
    return float(np.nan_to_num(metrics.auroc(margins, labels), nan=0.5))


def f1(says, labels):
    return metrics.yes_no(says, labels)["f1"]


def word_scores(questions, found):
    """Whether greedy decoding says the last word, and its perplexity."""
    nats = np.array([some[0][0] for some in found])
    return {"acc": np.array([float(some[0][1]) for some in found]),
            "perplexity": (nats, lambda x: np.exp(-x.mean()))}, 0.0


def loss_scores(questions, found):
    """Nats a token of the wanted answers; found holds their log-likelihood and length."""
    both = np.array([(some[0][0], some[0][2]) for some in found])
    return {"nats": (both, lambda x: -x[:, 0].sum() / x[:, 1].sum())}, None


def text_scores(questions, found):
    """Nats a token and bits per byte; the questions are windows."""
    nats = [-some[0][0] for some in found]
    n_bytes = [len(question.messages[0]["content"].encode()) for question in questions]
    rows = np.stack((nats, [some[0][2] for some in found], n_bytes), 1)
    return {"nats": (rows, lambda x: x[:, 0].sum() / x[:, 1].sum()),
            "bits_per_byte": (rows, lambda x: metrics.bits_per_byte(x[:, 0].sum(), x[:, 2].sum()))
            }, None


def exact_scores(questions, answers):
    pairs = zip(questions, answers, strict=True)
    return {"exact": np.array([float(a.strip() == q.wanted[0].strip()) for q, a in pairs])}, 0.0


def gsm_scores(questions, answers):
    pairs = zip(questions, answers, strict=True)
    return {"exact": np.array([float(metrics.gsm_exact(a, q.wanted[0])) for q, a in pairs])}, 0.0


def vqa_scores(questions, answers):
    pairs = zip(questions, answers, strict=True)
    return {"vqa": np.array([metrics.vqa_accuracy(a, q.wanted) for q, a in pairs])}, 0.0


def said_yes_scores(questions, answers):
    labels = np.array([question.answer == 0 for question in questions])
    says = np.array([metrics.says_yes(answer) for answer in answers])
    return {"acc": (says == labels).astype(float),
            "f1": (np.stack((says, labels), 1), lambda x: f1(x[:, 0], x[:, 1])),
            "yes_share": says.astype(float)}, 0.5


def caption_scores(questions, answers):
    wanted = [question.wanted for question in questions]

    counts = metrics.bleu_counts(answers, wanted)  # once, not for every sample of the bootstrap

    def bleu(numbers):
        return metrics.bleu_of(*(column[numbers].sum(0) for column in counts))

    return {"cider": metrics.cider(answers, wanted)[1],
            "bleu4": (np.arange(len(answers)), bleu)}, 0.0


@dataclass
class Task:
    """How a kind of file is read, asked and scored. way: "choose", or "say" an answer in words."""

    read: callable
    way: str
    score: callable
    max_tokens: int = 64
    document: bool = False  # the question is a document's beginning, not a chat
    windows: bool = False  # the rows are texts, of which every token is predicted


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
    "text": Task(text, "choose", text_scores, windows=True),
}


def rows_of(path):
    """The rows of a JSON file, or the lines of a JSONL file; hf://OWNER/NAME/FILE fetches it once.
    """
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
