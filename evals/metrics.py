"""Metrics as pure functions, for tasks and validation. Marks (N,) are scores of items, 0 to 1."""

import math
import re
from collections import Counter
from functools import reduce
from itertools import chain
from operator import or_
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Score(NamedTuple):
    """A value, its standard error, and the value by chance; None where it is not defined."""

    value: float
    error: float | None = None
    chance: float | None = None


def score(items, statistic=np.mean, chance=None, n=1000, clusters=None):
    """The Score of items (N, ...): a statistic of them, by default the mean of marks (N,).

    Its error is the deviation over n bootstrap samples of the items, always drawn with the same
    seed; 0 for a single item. Source: Efron (1979), "Bootstrap Methods".
    clusters: a key per item, or a tuple of keys; items that share one, such as questions about an
    image, are drawn together, because they are not independent. Source: Field & Welsh (2007), JRSS
    B 69(3).
    """
    items, random, index = np.asarray(items), np.random.default_rng(0), {}
    numbers = [index.setdefault(key, len(index)) for key in joined(clusters or range(len(items)))]
    drawn, N = [], len(index)
    for _ in range(n):
        times = np.bincount(random.integers(N, size=N), minlength=N)  # that each cluster was drawn
        drawn.append(statistic(items.repeat(times[numbers], axis=0)))
    return Score(float(statistic(items)), float(np.std(drawn, ddof=1)), chance)


def joined(clusters):
    """A key for each item, equal for items that share one of theirs, if only through others."""
    parent, clusters = {}, [key if isinstance(key, tuple) else (key,) for key in clusters]

    def root(key):
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    for keys in clusters:
        for key in keys:
            parent[root(key)] = root(keys[0])
    return [root(keys[0]) for keys in clusters]


def ratio(rows):
    """The sum of the first column over that of the second, such as nats per token."""
    return rows[:, 0].sum() / rows[:, 1].sum()


def auroc(rows):
    """Area under the ROC curve of rows (N, 2), a number and its label, 0 or 1; 0.5 where all labels
    are equal, as in some bootstrap samples of few items."""
    from sklearn.metrics import roc_auc_score

    numbers, labels = rows.T
    return float(roc_auc_score(labels, numbers)) if len(set(labels)) > 1 else 0.5


def f1(rows):
    """F1 score of rows (N, 2), what was said and its label, each 0 or 1; 0 where undefined."""
    said, labels = rows.T.astype(bool)
    return 2 * (said & labels).sum() / max(1, said.sum() + labels.sum())


DIGITS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4",
          "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
CONTRACTIONS = Path(__file__).with_name("contractions.txt").read_text().split()
REPAIRED = {word[: mark.start()] + word[mark.end() :]: word  # each lacks one of its apostrophes
            for word in CONTRACTIONS for mark in re.finditer("'", word)}
REPAIRED |= {"somebody'd": "somebodyd"}  # a slip of the official table


def vqa_normalise(answer):
    """An answer as the VQA evaluation compares it: "The two dogs." becomes "2 dogs".

    Punctuation but ' and : becomes a space, or nothing where the answer has it beside a space or
    has 1,000 in it; periods stay before a digit only. Source: vqaEval.py of GT-Vision-Lab/VQA.
    """
    text = re.sub(r"[\n\t]", " ", answer).strip()
    bare, thousands = text, re.search(r"\d,\d", text)
    for mark in PUNCTUATION:
        closed = thousands or f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if closed else " ")
    words = [DIGITS.get(word, word) for word in re.sub(r"\.(?!\d)", "", bare).lower().split()]
    return " ".join(REPAIRED.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(answer, human_answers):
    """Agreement of an answer with human ones, 0 to 1: min(people who gave it / 3, 1).

    human_answers: strings. From 4 on (VQA has 10) the result is the mean over leaving each of them
    out; a single one has to match. ValueError for 0, 2 and 3, with which the full score would be
    out of reach. Source: Antol et al. (arXiv:1505.00468) and vqaEval.py of GT-Vision-Lab/VQA,
    which, unlike its rules and this, normalises nothing where all people agree to the letter.
    """
    N, answer = len(human_answers), vqa_normalise(answer)
    if N in (0, 2, 3):
        raise ValueError(f"expected 1 answer, or 4 and more, not {human_answers!r}")
    same = sum(vqa_normalise(human) == answer for human in human_answers)
    left_out = (same * min((same - 1) / 3, 1) + (N - same) * min(same / 3, 1)) / N
    return left_out if N > 1 else float(same)


NUMBER = r"(?:(?<!\w)-)?\$?(?:(?<!\w)-)?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"


def gsm_answer(text):
    """The final number of a GSM8K answer: after "####", else the last one; None without any.

    A string: "1,234." and "$1234" are "1234", but "3.0" is not "3". A hyphen after a digit or a
    letter is no minus sign. Source: extract_answer of openai/grade-school-math (arXiv:2110.14168),
    and for the last number the filter "flexible-extract" of lm_eval's gsm8k.
    """
    marked = re.search(rf"####\s*({NUMBER})", text)
    found = [marked[1]] if marked else re.findall(NUMBER, text)
    return re.sub("[$,]", "", found[-1]) if found else None


CLITIC = r"(?:n't|'(?:s|m|d|re|ve|ll))(?!\w)"


def caption_words(caption):
    """The words of a caption, nearly as coco-caption has them from Stanford's PTBTokenizer.

    "isn't" is "is n't"; words with a hyphen, slash, period, comma or colon inside stay whole
    (t-shirt, 3.5); other punctuation is dropped. Unlike there also &, %, $, # and brackets, the
    period of "st.", and "cannot" stays one word.
    """
    text = re.sub(rf"(?<=\w)({CLITIC})", r" \1", caption.lower().replace("’", "'"))
    return re.findall(rf"(?:(?<=\s){CLITIC}|\w+(?:[-/.,:]\w+)*)", text)


def ngrams(caption):
    """The n-grams of a caption: one Counter each for n = 1 to 4."""
    words = caption_words(caption)
    return [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in (1, 2, 3, 4)]


def bleu_counts(candidates, references):
    """(N, 9) of N candidates (strings) with N lists of references: correct 1- to 4-grams, all 1- to
    4-grams, and the length of the closest reference, the shorter of two."""
    counts = []
    for candidate, texts in zip(map(ngrams, candidates), references, strict=True):
        texts = list(map(ngrams, texts))
        most = [reduce(or_, counters) for counters in zip(*texts, strict=True)]
        size, sizes = candidate[0].total(), [text[0].total() for text in texts]
        closest = min((abs(other - size), other) for other in sizes)[1]
        counts.append([*((candidate[n] & most[n]).total() for n in range(4)),
                       *(candidate[n].total() for n in range(4)), closest])
    return np.array(counts, float)


def bleu4(counts):
    """BLEU-4 of a corpus, 0 to 1, from bleu_counts. Source: Papineni et al. (2002), bleu_scorer.py
    of coco-caption ("closest"); words: see caption_words."""
    total = counts.sum(0)
    # The tiny terms are those of coco-caption: without a match a score is nearly 0, never 0 / 0.
    precision = ((total[:4] + 1e-15) / (total[4:8] + 1e-9)).prod() ** 0.25
    length = (total[4] + 1e-15) / (total[8] + 1e-9)
    return precision * np.exp(np.minimum(0, 1 - 1 / length))


def cider(candidates, references):
    """CIDEr-D of N candidates (strings) with N lists of references: scores (N,), 0 to 10.

    An n-gram weighs log(N / items with it in a reference): scores of different sets cannot be
    compared. Source: Vedantam et al. (arXiv:1411.5726), cider_scorer.py of coco-caption (sigma 6).
    """
    references = [list(map(ngrams, texts)) for texts in references]
    N, seen = len(references), Counter(
        gram for texts in references for gram in {*chain(*chain(*texts))})

    def weigh(grams):
        return [{gram: count * math.log(N / max(seen[gram], 1)) for gram, count in some.items()}
                for some in grams]

    scores = np.zeros(N)
    for i, (candidate, texts) in enumerate(zip(map(ngrams, candidates), references, strict=True)):
        for text in texts:
            difference = candidate[0].total() - text[0].total()
            similarity = clipped_cosine(weigh(candidate), weigh(text))
            scores[i] += 10 * similarity * math.exp(-(difference**2) / (2 * 6**2)) / len(texts)
    return scores


def clipped_cosine(candidate, reference):
    """Mean over n of the cosine of weights {gram: weight}; repeating a gram does not raise it."""
    total = 0.0
    for ours, theirs in zip(candidate, reference, strict=True):
        norm = math.hypot(*ours.values()) * math.hypot(*theirs.values())
        dot = sum(min(w, theirs[gram]) * theirs[gram] for gram, w in ours.items() if gram in theirs)
        total += dot / norm if norm else 0.0
    return total / len(candidate)


def retrieval_ranks(similarity, matches):
    """How many wrong candidates are at least as similar as the best correct one: (N,).

    similarity, matches: (N, M), queries by candidates; each query needs a correct one. Recall at k
    is the share of ranks below k (Karpathy & Fei-Fei, arXiv:1412.2306).
    """
    best = np.where(matches, similarity, -np.inf).max(1, keepdims=True)
    return ((similarity >= best) & ~matches).sum(1)
