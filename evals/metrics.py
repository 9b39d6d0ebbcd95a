"""The metrics of evaluation, as small pure functions in plain numpy.

    pytest tests/test_scores.py

Marks are the scores of single items, floats (N,): a score is their mean and bootstrap(marks) its
standard error. What cannot be scored (no items, unequal lists, NaN) is a ValueError.
"""

import math
import re
from collections import Counter
from functools import reduce
from itertools import chain
from operator import or_

import numpy as np


def items(**columns):
    """The number of items, which must be the same in every column and not zero."""
    lengths = {name: len(column) for name, column in columns.items()}
    if 0 in lengths.values() or len(set(lengths.values())) > 1:
        raise ValueError(f"expected equally many items, and at least one, but there are {lengths}")
    return next(iter(lengths.values()))


def numbers(name, values):
    """values as an array of floats; a ValueError for NaN, which has no place in an order."""
    values = np.asarray(values, float)
    if np.isnan(values).any():
        raise ValueError(f"NaN among the {name} cannot be scored")
    return values


def truths(name, values):
    """values (N,), each True or False (or 1 or 0), as an array of bools."""
    values = np.asarray(values)
    if not np.isin(values, (0, 1)).all():
        raise ValueError(f"{name} must be true or false, or 1 or 0, but holds {set(values.flat)}")
    return values.astype(bool)


def bootstrap(values, n=1000, seed=0, statistic=np.mean):
    """Standard error of a statistic over items, by drawing them again n times with replacement.

    values: (N, ...), an item a row; statistic: from such an array to a number, of two columns with
    np.stack((scores, labels), 1). The error itself is uncertain by 1 in sqrt(2 n). 0 for a single
    item, NaN where the statistic was. Source: Efron (1979), "Bootstrap Methods".
    """
    values = np.asarray(values)
    N, random = items(values=values), np.random.default_rng(seed)
    return float(np.std([statistic(values[random.integers(N, size=N)]) for _ in range(n)], ddof=1))


def bits_per_byte(nats, n_bytes):
    """Bits a byte of UTF-8 costs, from the summed loss of a text in nats: 0 and up, less is better.

    A uniform guess costs 8, whatever the tokenizer. Source: The Pile (arXiv:2101.00027).
    """
    if n_bytes <= 0:
        raise ValueError(f"bits per byte of {n_bytes} bytes are not defined")
    return nats / n_bytes / math.log(2)


def multiple_choice(log_likelihoods, choices, answers):
    """Marks (N,) for picking the likeliest choice: {"acc", "acc_norm", "acc_bytes", "chance"}.

    log_likelihoods: N sequences of summed log-probabilities, one a choice; choices: N lists of
    strings, without the space before; answers: (N,) index of the right one. acc compares the sums,
    acc_norm the sums a *character* of the choice, acc_bytes those a byte; equals go to the first.
    ValueError also for an empty choice, and for an answer that is none of the choices.
    Source: process_results in api/task.py of lm_eval 0.4.13, where HellaSwag, ARC and PIQA report
    acc and acc_norm, and of all tasks only Global PIQA acc_bytes.
    """
    items(log_likelihoods=log_likelihoods, choices=choices, answers=answers)
    marks = []
    for sums, texts, answer in zip(log_likelihoods, choices, answers, strict=True):
        sums, K = numbers("log_likelihoods", sums), items(log_likelihoods=sums, choices=texts)
        if not all(texts) or not 0 <= answer < K:
            raise ValueError(f"expected an answer among choices with text: {answer} of {texts}")
        lengths = [[1] * K, [len(text) for text in texts], [len(text.encode()) for text in texts]]
        marks.append([*((sums / lengths).argmax(1) == answer), 1 / K])
    return dict(zip(("acc", "acc_norm", "acc_bytes", "chance"), np.array(marks).T, strict=True))


def auroc(scores, labels):
    """Area under the ROC curve: how often a true item scores above a false one, equals half.

    scores, labels: (N,), any numbers and True or False. Range 0 to 1, 0.5 by chance; NaN where all
    labels are the same. Source: Mann & Whitney (1947), by ranks; equal scores share the mean rank.
    """
    items(scores=scores, labels=labels)
    scores, labels = numbers("scores", scores), truths("labels", labels)
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[inverse]
    true, false = labels.sum(), (~labels).sum()
    ahead = ranks[labels].sum() - true * (true + 1) / 2
    return float(ahead / (true * false)) if true and false else math.nan


def yes_no(said, labels):
    """{"accuracy", "precision", "recall", "f1", "yes_share"} of answers to yes-or-no questions.

    said, labels: (N,), True for yes. All from 0 to 1; precision, recall and f1 are those of yes,
    and 0 where they would be 0 / 0. Source: evaluate.py of AoiDragon/POPE (arXiv:2305.10355).
    """
    items(said=said, labels=labels)
    said, labels = truths("said", said), truths("labels", labels)
    both, yes, meant = (said & labels).sum(), said.sum(), labels.sum()
    return {"accuracy": float((said == labels).mean()), "precision": float(both / max(yes, 1)),
            "recall": float(both / max(meant, 1)), "f1": float(2 * both / max(yes + meant, 1)),
            "yes_share": float(said.mean())}


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
    """How far an answer agrees with people's, 0 to 1: min(people who gave it / 3, 1).

    human_answers: a list of strings. Of 4 and more (VQA has 10) each is left out in turn, and the
    result is the mean; a single one is matched, 1.0 or 0.0. All are normalised before.
    Errors: ValueError for no answers, for 2 or 3 (full marks would be out of reach), for a string.
    Source: Antol et al. (arXiv:1505.00468) and vqaEval.py of GT-Vision-Lab/VQA, which, unlike its
    rules and this, normalises nothing where all people agree to the letter.
    """
    if isinstance(human_answers, str) or len(human_answers) in (0, 2, 3):
        raise ValueError(f"expected a list of 1 answer, or of 4 and more, not {human_answers!r}")
    N, answer = len(human_answers), vqa_normalise(answer)
    same = sum(vqa_normalise(human) == answer for human in human_answers)
    left_out = (same * min((same - 1) / 3, 1) + (N - same) * min(same / 3, 1)) / N
    return left_out if N > 1 else float(same)


NUMBER = r"(?:(?<!\w)-)?\$?(?:(?<!\w)-)?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"


def gsm_answer(text):
    """The final number of a GSM8K answer: after "####", else the last one; None without any.

    A string: "1,234." and "$1234" are "1234", but "3.0" is not "3". A hyphen after a digit or a
    letter is no minus. Source: extract_answer of openai/grade-school-math (arXiv:2110.14168), and
    for the last number the filter "flexible-extract" of lm_eval's gsm8k.
    """
    marked = re.search(rf"####\s*({NUMBER})", text)
    found = [marked[1]] if marked else re.findall(NUMBER, text)
    return re.sub("[$,]", "", found[-1]) if found else None


def gsm_exact(text, reference):
    """Whether two GSM8K answers end in the same number. ValueError if the reference has none."""
    if gsm_answer(reference) is None:
        raise ValueError(f"this reference has no number: {reference!r}")
    return gsm_answer(text) == gsm_answer(reference)


CLITIC = r"(?:n't|'(?:s|m|d|re|ve|ll))(?!\w)"


def caption_words(caption):
    """The words of a caption, nearly as coco-caption has them from Stanford's PTBTokenizer.

    Lower case; "isn't" is "is n't", "man's" is "man 's"; words with a hyphen, slash, period, comma
    or colon inside stay whole (t-shirt, 3.5); all other punctuation and signs are dropped. Unlike
    there also &, %, $, # and brackets, the period of "st.", and "cannot" stays one word.
    """
    text = re.sub(rf"(?<=\w)({CLITIC})", r" \1", caption.lower().replace("’", "'"))
    return re.findall(rf"(?:(?<=\s){CLITIC}|\w+(?:[-/.,:]\w+)*)", text)


def caption_grams(candidates, references):
    """N pairs (grams of the candidate, [grams of a reference]); grams: Counters for n = 1 to 4."""
    items(candidates=candidates, references=references)
    if any(isinstance(captions, str) or not captions for captions in references):
        raise ValueError("every candidate needs a list of at least one reference")

    def grams(caption):
        words = caption_words(caption)
        return [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in (1, 2, 3, 4)]

    return [(grams(candidate), [grams(reference) for reference in captions])
            for candidate, captions in zip(candidates, references, strict=True)]


def bleu4(candidates, references):
    """BLEU-4 of captions: (score of the corpus, scores of the items (N,)), from 0 to 1.

    candidates: N strings; references: N lists of strings. The corpus score is made of summed
    counts, not of the items' scores. The brevity penalty takes the reference closest in length, the
    shorter of two. An empty candidate scores 0. Source: Papineni et al. (2002), bleu_scorer.py of
    coco-caption ("closest"); words: see caption_words.
    """
    counts = bleu_counts(candidates, references)
    return float(bleu_of(*(column.sum(0) for column in counts))), bleu_of(*counts)


def bleu_counts(candidates, references):
    """What bleu_of takes of N items: (N, 4), (N, 4) and (N,); their sums are the corpus's."""
    correct, guesses, closest = [], [], []
    for candidate, captions in caption_grams(candidates, references):
        most = [reduce(or_, counters) for counters in zip(*captions, strict=True)]
        correct.append([(candidate[n] & most[n]).total() for n in range(4)])
        guesses.append([candidate[n].total() for n in range(4)])
        sizes, size = [caption[0].total() for caption in captions], guesses[-1][0]
        closest.append(min((abs(other - size), other) for other in sizes)[1])
    return [np.array(column, float) for column in (correct, guesses, closest)]


def bleu_of(correct, guesses, closest):
    """BLEU-4 (...) from counts of grams, right and said (..., 4), and reference lengths (...)."""
    # The tiny terms are those of coco-caption: without a match a score is nearly 0, never 0 / 0.
    precision = ((correct + 1e-15) / (guesses + 1e-9)).prod(-1) ** 0.25
    ratio = (guesses[..., 0] + 1e-15) / (closest + 1e-9)
    return precision * np.exp(np.minimum(0, 1 - 1 / ratio))


def cider(candidates, references):
    """CIDEr-D of captions: (their mean, scores of the items (N,)), from 0 to 10.

    candidates, references: as for bleu4. A gram of 1 to 4 words weighs log(N / items with it in a
    reference): one item alone scores 0, and different sets cannot be compared. Source: Vedantam et
    al. (arXiv:1411.5726), cider_scorer.py of coco-caption (sigma 6); words: see caption_words.
    """
    counted = caption_grams(candidates, references)
    seen = Counter(gram for _, captions in counted for gram in {*chain(*chain(*captions))})

    def weigh(caption):
        return [{gram: count * math.log(len(counted) / max(seen[gram], 1))
                 for gram, count in grams.items()} for grams in caption]

    scores = np.zeros(len(counted))
    for i, (candidate, captions) in enumerate(counted):
        for caption in captions:
            apart = candidate[0].total() - caption[0].total()
            alike = clipped_cosine(weigh(candidate), weigh(caption))
            scores[i] += 10 * alike * math.exp(-(apart**2) / (2 * 6**2)) / len(captions)
    return float(scores.mean()), scores


def clipped_cosine(candidate, reference):
    """Mean over n of the cosine of weights {gram: weight}; repeating a gram does not raise it."""
    total = 0.0
    for ours, theirs in zip(candidate, reference, strict=True):
        norm = math.hypot(*ours.values()) * math.hypot(*theirs.values())
        dot = sum(min(w, theirs[gram]) * theirs[gram] for gram, w in ours.items() if gram in theirs)
        total += dot / norm if norm else 0.0
    return total / len(candidate)


def retrieval_recall(similarity, k, belongs=None):
    """Recall at k: marks of images that find a text (N,), and of texts that find an image (M,).

    similarity: (N, M), images by texts; belongs: (N, M), True for what belongs together, without it
    image i and text i. A mark is 1.0 if one of the own is among the k most similar; equals count
    against the model. Errors: ValueError also for k < 1 and for an image or a text that nothing
    belongs to. Source: Karpathy & Fei-Fei (arXiv:1412.2306).
    """
    similarity = numbers("similarity", similarity)
    belongs = truths("belongs", np.eye(len(similarity)) if belongs is None else belongs)
    if not belongs.size or belongs.shape != similarity.shape or k < 1:
        raise ValueError(f"cannot rank {similarity.shape} for {belongs.shape} and the first {k}")
    if not (belongs.any(0).all() and belongs.any(1).all()):
        raise ValueError("every image needs a text that belongs to it, and every text an image")

    def marks(similarity, belongs):
        best = np.where(belongs, similarity, -np.inf).max(1, keepdims=True)
        return (((similarity >= best) & ~belongs).sum(1) < k).astype(float)

    return marks(similarity, belongs), marks(similarity.T, belongs.T)
