"""Evaluation metrics as pure functions.

Marks are the scores of single items, floats (N,): a score is their mean and bootstrap(marks) its
standard error.
"""

import math
import re
from collections import Counter
from functools import reduce
from itertools import chain
from operator import or_

import numpy as np


def bootstrap(values, n=1000, statistic=np.mean):
    """Standard error of a statistic over items: its deviation over n resamples with replacement.

    values: (N, ...), one item per row; statistic: from such an array to a number. Always drawn with
    the same seed. 0 for a single item. Source: Efron (1979), "Bootstrap Methods".
    """
    values, random = np.asarray(values), np.random.default_rng(0)
    N = len(values)
    return float(np.std([statistic(values[random.integers(N, size=N)]) for _ in range(n)], ddof=1))


def multiple_choice(log_likelihoods, choices, answers):
    """Marks (N,) for picking the likeliest choice: {"acc", "acc_norm", "chance"}.

    log_likelihoods: N sequences of summed log-probabilities, one per choice; choices: N lists of
    strings without the leading space; answers: (N,) index of the correct one. acc compares the
    sums, acc_norm the sums per *character*; the first of equals is picked. Errors: ValueError for
    NaN. Source: process_results in api/task.py of lm_eval 0.4.13.
    """
    marks = []
    for sums, texts, answer in zip(log_likelihoods, choices, answers, strict=True):
        if np.isnan(sums).any():
            raise ValueError("the log-likelihood of a choice is NaN")
        per_character = np.array(sums) / [len(text) for text in texts]
        marks.append([np.argmax(sums) == answer, per_character.argmax() == answer, 1 / len(texts)])
    return dict(zip(("acc", "acc_norm", "chance"), np.array(marks, float).T, strict=True))


def auroc(scores, labels):
    """Area under the ROC curve of scores (N,) for labels (N,), True or False; 0.5 by chance.

    Also 0.5 where all labels are equal, as in some bootstrap samples of few items.
    """
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores)) if len(set(labels)) > 1 else 0.5


def f1(said, labels):
    """F1 score of yes, from said (N,) and labels (N,), True for yes; 0 where undefined."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, said, zero_division=0))


def says_yes(answer):
    """Whether POPE's evaluate.py reads a yes: no No, no or not in the first sentence."""
    return not {"No", "no", "not"} & set(answer.split(".")[0].replace(",", "").split(" "))


DIGITS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4",
          "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
    hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
    mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
    who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've
    you'd you'd've you'll you're you've"""
REPAIRED = {word[: mark.start()] + word[mark.end() :]: word  # each lacks one of its apostrophes
            for word in CONTRACTIONS.split() for mark in re.finditer("'", word)}
REPAIRED |= {"somebody'd": "somebodyd"}  # a slip of the official table


def vqa_normalise(answer):
    """An answer as the VQA evaluation compares it: "The two dogs." becomes "2 dogs".

    Punctuation but ' and : becomes a space, or nothing where the answer has it beside a space or
    has 1,000 in it; periods stay before a digit only. Then lower case, digits for number words to
    ten, no articles, apostrophes in contractions. Source: vqaEval.py of GT-Vision-Lab/VQA.
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

    human_answers: a list of strings. From 4 on (VQA has 10) the result is the mean over leaving
    each of them out; a single one has to match. All are normalised. Errors: ValueError for 0, 2
    and 3 answers, with which the full score would be out of reach. Source: Antol et al.
    (arXiv:1505.00468) and vqaEval.py of GT-Vision-Lab/VQA, which, unlike its rules and this,
    normalises nothing where all people agree to the letter.
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

    Lower case; "isn't" is "is n't", "man's" is "man 's"; words with a hyphen, slash, period, comma
    or colon inside stay whole (t-shirt, 3.5); all other punctuation and signs are dropped. Unlike
    there also &, %, $, # and brackets, the period of "st.", and "cannot" stays one word.
    """
    text = re.sub(rf"(?<=\w)({CLITIC})", r" \1", caption.lower().replace("’", "'"))
    return re.findall(rf"(?:(?<=\s){CLITIC}|\w+(?:[-/.,:]\w+)*)", text)


def ngrams(caption):
    """The n-grams of a caption: one Counter each for n = 1 to 4."""
    words = caption_words(caption)
    return [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in (1, 2, 3, 4)]


def bleu_counts(candidates, references):
    """What bleu4 takes, of N candidates (strings) with N lists of references: correct n-grams
    (N, 4), all n-grams (N, 4), and the length of the closest reference (N,), the shorter of two."""
    correct, total, closest = [], [], []
    for candidate, texts in zip(map(ngrams, candidates), references, strict=True):
        texts = list(map(ngrams, texts))
        most = [reduce(or_, counters) for counters in zip(*texts, strict=True)]
        correct.append([(candidate[n] & most[n]).total() for n in range(4)])
        total.append([candidate[n].total() for n in range(4)])
        size, sizes = candidate[0].total(), [text[0].total() for text in texts]
        closest.append(min((abs(other - size), other) for other in sizes)[1])
    return [np.array(column, float) for column in (correct, total, closest)]


def bleu4(correct, total, closest):
    """BLEU-4 (...), 0 to 1, from the counts of bleu_counts: (..., 4), (..., 4) and (...).

    The score of a corpus is made of the summed counts of its items. Source: Papineni et al. (2002),
    bleu_scorer.py of coco-caption ("closest"); words: see caption_words.
    """
    # The tiny terms are those of coco-caption: without a match a score is nearly 0, never 0 / 0.
    precision = ((correct + 1e-15) / (total + 1e-9)).prod(-1) ** 0.25
    ratio = (total[..., 0] + 1e-15) / (closest + 1e-9)
    return precision * np.exp(np.minimum(0, 1 - 1 / ratio))


def cider(candidates, references):
    """CIDEr-D of N candidates (strings) with N lists of references: scores (N,), 0 to 10.

    An n-gram weighs log(N / items with it in a reference): a single item scores 0, and scores of
    different sets cannot be compared. Source: Vedantam et al. (arXiv:1411.5726), cider_scorer.py
    of coco-caption (sigma 6); words: see caption_words.
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
