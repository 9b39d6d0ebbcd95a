"""evals/metrics.py: every metric is what its source computes, or the result by hand."""

import math

import numpy as np
import pytest

from evals.metrics import (
    bootstrap,
    caption_words,
    cider,
    multiple_choice,
    retrieval_ranks,
    vqa_accuracy,
    vqa_normalise,
)

# ---------------------------------------------------------------------------------------- bootstrap


@pytest.mark.parametrize("values", [
    np.random.default_rng(1).normal(3, 2, 500),
    np.random.default_rng(2).random(800) < 0.3,
    np.arange(40.0),
], ids=["normal", "marks", "few"])
def test_error_of_a_mean_is_the_standard_error(values):
    assert bootstrap(values) == pytest.approx(values.std() / len(values)**0.5, rel=0.08)
    assert bootstrap(values) == bootstrap(list(values))
    assert bootstrap(values[:1]) < 1e-9


# ------------------------------------------------------------------------------- choices, yes or no


def test_sums_and_characters_pick_differently():
    """-9 over 3 characters of 9 bytes, -15 over 12, -4 over 2, by hand."""
    texts = ["日本語", "hippopotamus", "ox"]
    marks = multiple_choice([[-9, -15, -4]] * 3, [texts] * 3, [0, 1, 2])
    assert marks["acc"].tolist() == [0, 0, 1]  # -4 is the largest
    assert marks["acc_norm"].tolist() == [0, 1, 0]  # of -3, -1.25, -2
    assert marks["chance"].tolist() == [1 / 3] * 3
    equal = multiple_choice([(-1, -1), (-np.inf, -7)], [("a", "b")] * 2, [0, 1])
    assert equal["acc"].tolist() == equal["acc_norm"].tolist() == [1, 1]  # the first of equals
    with pytest.raises(ValueError, match="NaN"):
        multiple_choice([[-1, math.nan]], [["a", "b"]], [0])


# ---------------------------------------------------------------------------------- short answers


@pytest.mark.parametrize(("answer", "expected"), [
    ("Yes.", "yes"),
    ("The two dogs!", "2 dogs"),
    ("a black-and-white t-shirt", "black and white t shirt"),
    ("red / blue", "red blue"),
    ("wait, what?", "wait what"),
    ("1,000 to-day", "1000 today"),  # a comma between digits closes up all other marks
    ("a -b c-d", "b cd"),  # and so does a space beside the mark elsewhere
    ("U.S.A.", "usa"),
    (".5", ".5"),
    ("girl's", "girl's"),
    ("dont", "don't"),
    ("Couldntve", "couldntve"),  # two are missing: not in the official table
    ("twas", "'twas"),
    ("somebody'd", "somebodyd"),
    ("  on\nthe\ttable ", "on table"),
    ("the", ""),
])
def test_vqa_answers_are_normalised_by_the_official_rules(answer, expected):
    assert vqa_normalise(answer) == expected


@pytest.mark.parametrize(("same", "expected"), [
    (0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_leaves_each_of_ten_people_out(same, expected):
    """With 2 equal: 1/3 where one of them is left out (2 of 10), otherwise 2/3: 0.6."""
    people = ["Two."] * same + [f"answer {i}" for i in range(10 - same)]
    assert vqa_accuracy("the two", people) == pytest.approx(expected)


@pytest.mark.parametrize(("answer", "people", "expected"), [
    ("A dog", ["dog."], 1), ("dogs", ["dog"], 0), ("b", ["x", "b", "c", "d"], 3 / 4 / 3),
    ("b", ["b"] * 4, 1), ("b", [], None), ("b", ["b"] * 2, None), ("b", ["b"] * 3, None)])
def test_vqa_accuracy_of_other_numbers_of_people(answer, people, expected):
    if expected is not None:
        assert vqa_accuracy(answer, people) == pytest.approx(expected)
    else:
        with pytest.raises(ValueError, match="1 answer, or 4 and more"):
            vqa_accuracy(answer, people)


# --------------------------------------------------------------------------------------- captions


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


# -------------------------------------------------------------------------------------- retrieval


@pytest.mark.parametrize(("similarity", "images", "texts"), [
    # image 0 is nearest to text 0, image 1 to text 2 and then 1, image 2 finds its own last
    ([[9, 1, 2], [3, 5, 8], [7, 6, 4]], [0, 1, 2], [0, 1, 1]),
    ([[1, 1, 1]] * 3, [2, 2, 2], [2, 2, 2]),  # of equals, the correct one comes last
])
def test_retrieval_ranks_by_hand(similarity, images, texts):
    similarity, matches = np.array(similarity), np.eye(3, dtype=bool)
    assert retrieval_ranks(similarity, matches).tolist() == images
    assert retrieval_ranks(similarity.T, matches.T).tolist() == texts
