"""evals/metrics.py: every metric is what its source computes, or the result by hand."""

import math
import random

import numpy as np
import pytest

from evals.metrics import (
    auroc,
    bleu4,
    bleu_counts,
    caption_words,
    cider,
    f1,
    gsm_answer,
    retrieval_ranks,
    score,
    vqa_accuracy,
    vqa_normalise,
)


@pytest.mark.parametrize("values", [
    np.random.default_rng(1).normal(3, 2, 500),
    np.random.default_rng(2).random(800) < 0.3,
    np.arange(40.0),
], ids=["normal", "marks", "few"])
def test_error_of_a_mean_is_the_standard_error(values):
    assert score(values)[:2] == (values.mean(), pytest.approx(
        values.std() / len(values)**0.5, rel=0.08))
    assert score(values) == score(list(values))
    assert score(values[:1]).error < 1e-9


def test_items_of_a_cluster_are_one_sample():
    """Their error is that of the sandwich formula, sqrt(sum over clusters of (sum of
    deviations)^2) / N; for clusters of equal items that of the clusters alone."""
    random = np.random.default_rng(3)
    keys = random.integers(200, size=1000)
    values = random.normal(size=200)[keys] + random.normal(size=1000)
    sums = np.bincount(keys, values - values.mean())
    assert score(values, clusters=keys.tolist()).error == pytest.approx(
        (sums**2).sum() ** 0.5 / 1000, rel=0.08)
    assert score(values, clusters=range(1000)) == score(values)
    pairs = [(key, f"own {i}") if i % 2 else (f"{i}", key) for i, key in enumerate(keys.tolist())]
    assert score(values, clusters=pairs) == score(values, clusters=keys.tolist())
    again = score(np.repeat(values, 5), clusters=[i // 5 for i in range(5000)])
    assert again[:2] == pytest.approx(score(values)[:2])


def test_error_of_any_statistic_is_its_deviation_over_new_samples():
    def sample(seed, N=200):
        draw = np.random.default_rng(seed)
        labels = draw.random(N) < 0.4
        return np.stack((draw.normal(labels * 1.0), labels), 1)

    def gap(rows):
        return rows[rows[:, 1] == 1, 0].mean() - rows[rows[:, 1] == 0, 0].mean()

    deviation = np.std([gap(sample(seed)) for seed in range(1000)])
    errors = [score(sample(seed), gap, n=200).error for seed in range(10)]
    assert np.mean(errors) == pytest.approx(deviation, rel=0.1)


@pytest.mark.parametrize(("metric", "given", "labels", "expected"), [
    (auroc, [1, 2, 3, 4], [0, 0, 1, 1], 1), (auroc, [1, 2, 3, 4], [1, 1, 0, 0], 0),
    (auroc, [5, 5, 5], [1, 0, 1], 0.5), (auroc, [1, 2, 2, 3], [0, 1, 0, 1], 3.5 / 4),
    (auroc, [1, 2], [1, 1], 0.5), (auroc, [1, 2], [0, 0], 0.5),
    (f1, [1, 1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0], 0.75), (f1, [1, 1], [1, 1], 1),
    (f1, [0, 1], [1, 0], 0), (f1, [0, 0], [0, 0], 0)])
def test_auroc_and_f1_by_hand(metric, given, labels, expected):
    assert metric(np.array([given, labels]).T) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("answer", "expected"), [
    ("Yes.", "yes"), ("The two dogs!", "2 dogs"), ("None", "0"), ("the", ""),
    ("a black-and-white t-shirt", "black and white t shirt"), ("red/blue", "red blue"),
    ("red / blue", "red blue"), ("wait, what?", "wait what"),
    ("1,000 to-day", "1000 today"),  # a comma between digits closes up all other marks
    ("a -b c-d", "b cd"),  # and so does a space beside the mark elsewhere
    ("3.5 ft.", "3.5 ft"), ("U.S.A.", "usa"), (".5", ".5"), ("2:50 p.m.", "2:50 pm"),
    ("girl's", "girl's"), ("dont", "don't"), ("couldn'tve", "couldn't've"), ("twas", "'twas"),
    ("Couldntve", "couldntve"),  # two are missing: not in the official table
    ("somebody'd", "somebodyd"), ("  on\nthe\ttable ", "on table"), ("CAFÉ 日本", "café 日本"),
])
def test_vqa_answers_are_normalised_by_the_official_rules(answer, expected):
    assert vqa_normalise(answer) == expected


@pytest.mark.parametrize(("same", "expected"), [
    (0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_leaves_each_of_ten_people_out(same, expected):
    """With 2 equal: 1/3 where one of them is left out (2 of 10), otherwise 2/3: 0.6."""
    people = ["Two."] * same + [f"answer {i}" for i in range(10 - same)]
    assert vqa_accuracy("the two", people) == pytest.approx(expected)


def test_vqa_accuracy_of_other_numbers_of_people():
    for answer, people, expected in (("A dog", ["dog."], 1), ("dogs", ["dog"], 0),
                                     ("b", ["x", "b", "c", "d"], 3 / 4 / 3), ("b", ["b"] * 4, 1)):
        assert vqa_accuracy(answer, people) == pytest.approx(expected)
    for n in 0, 2, 3:
        with pytest.raises(ValueError, match="1 answer, or 4 and more"):
            vqa_accuracy("b", ["b"] * n)


@pytest.mark.parametrize(("text", "expected"), [
    ("She has 3 + 4 = 7.\n#### 7", "7"), ("#### 1,234,567", "1234567"), ("#### $18.", "18"),
    ("####-5", "-5"), ("It costs $1,234.50.", "1234.50"), ("#### 7\nQuestion: 9 more", "7"),
    ("first 4 #### none", "4"), ("-$5 or $-5", "-5"), ("from 10-15", "15"), ("x = .5", ".5"),
    ("3.0", "3.0"), ("５ or five", None), ("####", None),
])
def test_the_final_number_of_a_solution(text, expected):
    assert gsm_answer(text) == expected


WORDS = "a the red blue big small dog cat cube ball man's tree on under near isn't sits runs"


def random_captions(N=60, seed=0):
    """N candidates and 1 to 5 references each, which share n-grams with them."""
    draw, known = random.Random(seed), WORDS.split()
    candidates, references = [], []
    for _ in range(N):
        words = draw.choices(known, k=draw.randint(1, 14))
        candidates.append(" ".join(words).capitalize() + draw.choice(["", ".", " !"]))
        runs = [words[draw.randint(0, 4) : draw.randint(4, 14)] for _ in range(draw.randint(1, 5))]
        references.append([" ".join(run + draw.choices(known, k=draw.randint(0, 6)))
                           for run in runs])
    candidates[:4] = ["", "dog", "日本 の 赤い cube", "a dog on a dog on a dog on a dog"]
    references[4] = ["", "a dog"]
    return candidates, references


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("metric", ["bleu", "cider"])
def test_captions_score_what_coco_caption_gives_them(metric, seed):
    """With the same words, so without its Java tokenizer."""
    theirs = pytest.importorskip(f"pycocoevalcap.{metric}.{metric}",
                                 reason="pip install pycocoevalcap")
    candidates, references = random_captions(seed=seed)
    results = {i: [" ".join(caption_words(text))] for i, text in enumerate(candidates)}
    truth = {i: [" ".join(caption_words(text)) for text in texts]
             for i, texts in enumerate(references)}
    if metric == "bleu":
        expected, _ = theirs.Bleu(4).compute_score(truth, results, verbose=0)
        assert bleu4(bleu_counts(candidates, references)) == pytest.approx(expected[3], abs=1e-12)
    else:
        _, marks = theirs.Cider().compute_score(truth, results)
        assert cider(candidates, references) == pytest.approx(np.array(marks), abs=1e-12)


def test_bleu4_from_the_counts_that_coco_caption_publishes():
    """cocoEvalCapDemo.ipynb: 1000 captions of the validation set, Bleu_4 0.191."""
    counts = np.array([[5732, 2510, 1043, 423, 9893, 8893, 7893, 6893, 9855]])
    assert round(float(bleu4(counts)), 3) == 0.191


@pytest.mark.parametrize(("candidate", "references", "expected"), [
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 threes, 1 of 3 fours are in the reference of 8 words
    ("the cat sat on the rug", ["A cat sat on the mat, the end."],
     (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25 * math.exp(1 - 8 / 6)),
    ("the the the the", ["the cat is here"], 0),  # repetition does not count
    # the brevity penalty: the closest reference, of two the shorter
    ("one two three four", ["one two three four five six seven", "one two three four five", "one"],
     math.exp(1 - 5 / 4)),
    ("one two three four five", ["one two three four five six",
                                 "one two three four x y z w v", "one two three four"], 1),
    ("", ["a red cube"], 0), ("", [""], 0),
])
def test_bleu4_by_hand(candidate, references, expected):
    found = bleu4(bleu_counts([candidate], [references]))
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-3)


@pytest.mark.parametrize(("candidates", "references", "expected"), [
    # one word correct of two, all weighing log 2: a cosine of 1 / sqrt 2, and a length 1 off
    (["red", "big dog"], [["red cube"], ["big dog"]],
     [10 / 4 * math.exp(-1 / (2 * 36)) / math.sqrt(2), 10 * 2 / 4]),
    (["one two three four", "five six seven eight"],
     [["one two three four"], ["five six seven eight"]], [10, 10]),
    (["a red cube"], [["a red cube"]], [0]),  # a single item
    (["", "日本"], [["a red cube"], ["a blue ball"]], [0, 0]),
])
def test_cider_by_hand(candidates, references, expected):
    assert cider(candidates, references) == pytest.approx(expected)


@pytest.mark.parametrize(("caption", "expected"), [  # as Stanford's PTBTokenizer 3.4.1 gave them
    ("A black-and-white cat, on a t-shirt.", "a black-and-white cat on a t-shirt"),
    ("A stop sign that says 'Stop'", "a stop sign that says stop"),
    ("They're we've I'd she'll", "they 're we 've i 'd she 'll"),
    ("Two dogs' bowls can't; it's 3.5 feet -- tall!",
     "two dogs bowls ca n't it 's 3.5 feet tall"),
    ("\"Hello,\" said a man's dog...", "hello said a man 's dog"),
    ("red/blue café naïve 日本 1,000", "red/blue café naïve 日本 1,000"),
])
def test_captions_are_split_as_coco_caption_does(caption, expected):
    assert caption_words(caption) == expected.split()


@pytest.mark.parametrize(("similarity", "images", "texts"), [
    # image 0 is nearest to text 0, image 1 to text 2 and then 1, image 2 finds its own last
    ([[9, 1, 2], [3, 5, 8], [7, 6, 4]], [0, 1, 2], [0, 1, 1]),
    ([[1, 1, 1]] * 3, [2, 2, 2], [2, 2, 2]),  # of equals, the correct one comes last
])
def test_retrieval_ranks_by_hand(similarity, images, texts):
    similarity, matches = np.array(similarity), np.eye(3, dtype=bool)
    assert retrieval_ranks(similarity, matches).tolist() == images
    assert retrieval_ranks(similarity.T, matches.T).tolist() == texts


def test_retrieval_with_several_texts_per_image_is_that_of_sorting():
    owner = np.random.default_rng(0).permutation(np.arange(60) % 20)  # the image of each text
    similarity = np.random.default_rng(1).normal(size=(20, 60))
    order = np.argsort(-similarity, 1)
    first = [int(np.flatnonzero(owner[row] == i)[0]) for i, row in enumerate(order)]
    assert retrieval_ranks(similarity, np.arange(20)[:, None] == owner).tolist() == first
