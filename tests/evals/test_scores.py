"""The claims of evals/metrics.py: every metric is what its source computes, or what a hand works
out."""

import math
import random

import numpy as np
import pytest

from evals.metrics import (
    auroc,
    bits_per_byte,
    bleu4,
    bleu_of,
    bootstrap,
    caption_words,
    cider,
    gsm_answer,
    gsm_exact,
    multiple_choice,
    retrieval_recall,
    says_yes,
    vqa_accuracy,
    vqa_normalise,
    yes_no,
)


def peer(module, package):
    return pytest.importorskip(module, reason=f"compared with a package: pip install {package}")


# ------------------------------------------------------------------------------- errors and bits


@pytest.mark.parametrize("values", [
    np.random.default_rng(1).normal(3, 2, 500),
    np.random.default_rng(2).random(800) < 0.3,
    np.arange(40.0),
], ids=["normal", "marks", "few"])
def test_the_error_of_a_mean_is_the_deviation_over_the_root_of_the_items(values):
    assert bootstrap(values, 4000) == pytest.approx(values.std() / len(values)**0.5, rel=0.04)
    assert bootstrap(values) == pytest.approx(values.std() / len(values)**0.5, rel=0.08)


def test_the_error_of_any_statistic_is_its_spread_over_fresh_samples():
    """The AUROC of two columns, and a sum, whose error is N times that of the mean."""
    def sample(random, N=300):
        labels = random.random(N) < 0.4
        return np.stack((random.normal(labels * 1.0), labels), 1)

    def area(rows):
        return auroc(rows[:, 0], rows[:, 1])

    spread = np.std([area(sample(np.random.default_rng(seed))) for seed in range(1000)])
    errors = [bootstrap(sample(np.random.default_rng(seed)), 200, statistic=area)
              for seed in range(10)]
    assert np.mean(errors) == pytest.approx(spread, rel=0.1)
    marks = np.arange(50.0)
    assert bootstrap(marks, statistic=np.sum) == pytest.approx(50 * bootstrap(marks))


def test_the_same_seed_gives_the_same_error():
    values = np.arange(30.0)
    assert bootstrap(values, seed=4) == bootstrap(list(values), seed=4) != bootstrap(values, seed=5)
    assert bootstrap([7.0]) == bootstrap([True, True, True]) == 0


def test_bits_per_byte_of_a_uniform_guess_and_of_a_coin_a_character():
    assert bits_per_byte(1000 * math.log(256), 1000) == pytest.approx(8)
    assert bits_per_byte(7 * math.log(2), len("日本語ab".encode())) == pytest.approx(7 / 11)
    assert bits_per_byte(0.0, 5) == 0


# -------------------------------------------------------------------------------- multiple choice


def test_sums_of_characters_and_of_bytes_pick_differently():
    """-9 over 3 characters of 9 bytes, -15 over 12 of 12, -4 over 2 of 2, worked out by hand."""
    texts = ["日本語", "hippopotamus", "ox"]
    marks = multiple_choice([[-9, -15, -4]] * 3, [texts] * 3, [0, 1, 2])
    assert marks["acc"].tolist() == [0, 0, 1]  # -4 is the most
    assert marks["acc_norm"].tolist() == [0, 1, 0]  # of -3, -1.25, -2
    assert marks["acc_bytes"].tolist() == [1, 0, 0]  # of -1, -1.25, -2
    assert marks["chance"].tolist() == [1 / 3] * 3


def test_equals_go_to_the_first_choice_and_none_may_be_impossible():
    marks = multiple_choice([(-1, -1), (-np.inf, -7)], [("a", "b"), ("a", "b")], [0, 1])
    assert marks["acc"].tolist() == marks["acc_norm"].tolist() == [1, 1]


def test_likelihoods_without_knowledge_score_chance():
    draw = np.random.default_rng(0)
    sizes = draw.integers(2, 6, 3000)
    marks = multiple_choice([draw.normal(-20, 5, size) for size in sizes],
                            [["word" * n for n in range(1, size + 1)] for size in sizes],
                            [draw.integers(size) for size in sizes])
    for name in ("acc", "acc_norm", "acc_bytes"):
        error = bootstrap(marks[name])
        assert abs(marks[name].mean() - marks["chance"].mean()) < 3 * error < 0.03, name


# -------------------------------------------------------------------------------------- yes or no


def areas(seed, levels, N=200):
    random = np.random.default_rng(seed)
    return random.integers(levels, size=N) / 7, random.random(N) < 0.3


@pytest.mark.parametrize("levels", [2, 5, 10**9])
def test_auroc_is_the_share_of_pairs_in_order(levels):
    scores, labels = areas(levels, levels)
    true, false = scores[labels][:, None], scores[~labels]
    expected = ((true > false) + (true == false) / 2).mean()
    assert auroc(scores, labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("levels", [2, 5, 10**9])
@pytest.mark.parametrize("seed", range(3))
def test_auroc_is_that_of_scikit_learn(seed, levels):
    metrics = peer("sklearn.metrics", "scikit-learn")
    scores, labels = areas(seed, levels)
    expected = metrics.roc_auc_score(labels, scores)
    assert auroc(scores, labels) == pytest.approx(expected, abs=1e-12)


def test_auroc_of_order_reverse_ties_and_one_class():
    assert auroc([1, 2, 3, 4], [0, 0, 1, 1]) == 1
    assert auroc([-np.inf, 2, 3, 4], [1, 1, 0, 0]) == 0
    assert auroc([5, 5, 5], [True, False, True]) == 0.5
    assert math.isnan(auroc([1, 2], [1, 1])) and math.isnan(auroc([1, 2], [0, 0]))


def test_yes_no_by_hand():
    """3 of 4 that meant yes are found, 1 of 6 that meant no is not."""
    said = [1, 1, 1, 0, 1, 0, 0, 0, 0, 0]
    found = yes_no(said, [1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    assert found == pytest.approx({"accuracy": 0.8, "precision": 0.75, "recall": 0.75, "f1": 0.75,
                                   "yes_share": 0.4})


@pytest.mark.parametrize("said_yes", [0.0, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("meant_yes", [0.0, 0.5, 1.0])
def test_yes_no_is_that_of_scikit_learn(said_yes, meant_yes):
    metrics = peer("sklearn.metrics", "scikit-learn")
    random = np.random.default_rng(0)
    said, labels = random.random(97) < said_yes, random.random(97) < meant_yes
    expected = {"accuracy": metrics.accuracy_score(labels, said), "yes_share": said.mean()}
    for name in ("precision", "recall", "f1"):
        expected[name] = getattr(metrics, f"{name}_score")(labels, said, zero_division=0)
    assert yes_no(said, labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("answer", "yes"), [
    ("Yes, there is a dog. It is not brown.", True), ("There is a dog.", True), ("", True),
    ("No, there is none", False), ("there is no dog", False), ("There is not.", False),
    ("Nothing there", True), ("NO", True)])
def test_free_answers_are_read_as_pope_reads_them(answer, yes):
    assert says_yes(answer) is yes


# ---------------------------------------------------------------------------------- short answers


@pytest.mark.parametrize(("answer", "expected"), [
    ("Yes.", "yes"),
    ("The two dogs!", "2 dogs"),
    ("None", "0"),
    ("twenty one", "twenty 1"),
    ("a black-and-white t-shirt", "black and white t shirt"),
    ("red/blue", "red blue"),
    ("red / blue", "red blue"),
    ("wait, what?", "wait what"),
    ("red,blue", "red blue"),
    ("1,000", "1000"),
    ("1,000 to-day", "1000 today"),  # a comma between digits closes up all other marks
    ("a -b c-d", "b cd"),  # and so does a space beside the mark elsewhere
    ("3.5 ft.", "3.5 ft"),
    ("U.S.A.", "usa"),
    (".5", ".5"),
    ("2:50 p.m.", "2:50 pm"),
    ("girl's", "girl's"),
    ("dont", "don't"),
    ("Couldntve", "couldntve"),  # two are missing: not in the official table
    ("couldn'tve", "couldn't've"),
    ("twas", "'twas"),
    ("shes", "shes"),
    ("somebody'd", "somebodyd"),
    ("  on\nthe\ttable ", "on table"),
    ("CAFÉ 日本", "café 日本"),
    ("the", ""),
    ("", ""),
])
def test_vqa_answers_are_normalised_by_the_official_rules(answer, expected):
    assert vqa_normalise(answer) == expected


@pytest.mark.parametrize(("same", "expected"), [
    (0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_leaves_each_of_ten_people_out(same, expected):
    """With 2 alike: 1/3 where one of them is left out (2 of 10), 2/3 else: 0.6."""
    people = ["Two."] * same + [f"answer {i}" for i in range(10 - same)]
    assert vqa_accuracy("the two", people) == pytest.approx(expected)
    assert vqa_accuracy("2", people[::-1]) == pytest.approx(expected)


def test_vqa_accuracy_of_one_reference_and_of_four():
    assert vqa_accuracy("A dog", ["dog."]) == 1.0 and vqa_accuracy("dogs", ["dog"]) == 0.0
    assert vqa_accuracy("b", ["x", "b", "c", "d"]) == pytest.approx(3 / 4 / 3)
    assert vqa_accuracy("b", ["b"] * 4) == 1.0


@pytest.mark.parametrize("answers", [[], ["a", "b"], ["a", "b", "c"], "yes"])
def test_vqa_accuracy_refuses_references_that_cannot_give_full_marks(answers):
    with pytest.raises(ValueError, match="1 answer, or of 4 and more"):
        vqa_accuracy("yes", answers)


@pytest.mark.parametrize(("text", "expected"), [
    ("She has 3 + 4 = 7.\n#### 7", "7"),
    ("#### 1,234,567", "1234567"),
    ("#### $18.", "18"),
    ("####-5", "-5"),
    ("It costs $1,234.50.", "1234.50"),
    ("7 apples and 8 pears make 15", "15"),
    ("#### 7\nQuestion: 9 more", "7"),
    ("first 4 #### none", "4"),
    ("-$5 or $-5", "-5"),
    ("from 10-15", "15"),
    ("x = .5", ".5"),
    ("3.0", "3.0"),
    ("５ or five", None),
    ("####", None),
    ("", None),
])
def test_the_final_number_of_a_solution(text, expected):
    assert gsm_answer(text) == expected


def test_solutions_match_if_their_numbers_do():
    assert gsm_exact("So it is $1,000.", "50 * 20\n#### 1000")
    assert not gsm_exact("So it is 100.", "#### 1000") and not gsm_exact("dunno", "#### 1")
    with pytest.raises(ValueError, match="reference has no number"):
        gsm_exact("1", "one")


# --------------------------------------------------------------------------------------- captions

WORDS = "a the red blue big small dog cat cube ball man's tree on under near isn't sits runs"


def some_captions(N=60, seed=0):
    """N candidates and 1 to 5 references each, which share runs of words with them."""
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
    """The corpus and each item, with the same words, so without its Java tokenizer."""
    theirs = peer(f"pycocoevalcap.{metric}.{metric}", "pycocoevalcap")
    candidates, references = some_captions(seed=seed)
    results = {i: [" ".join(caption_words(text))] for i, text in enumerate(candidates)}
    truth = {i: [" ".join(caption_words(text)) for text in texts]
             for i, texts in enumerate(references)}
    if metric == "bleu":
        scores, marks = theirs.Bleu(4).compute_score(truth, results, verbose=0)
        (score, marks), (found, each) = (scores[3], marks[3]), bleu4(candidates, references)
    else:
        score, marks = theirs.Cider().compute_score(truth, results)
        found, each = cider(candidates, references)
    assert found == pytest.approx(score, abs=1e-12) and score > 0.1
    assert each == pytest.approx(np.array(marks), abs=1e-12)


def test_bleu4_from_the_counts_that_coco_caption_publishes():
    """cocoEvalCapDemo.ipynb: 1000 captions of the validation set, Bleu_4 0.191."""
    found = bleu_of(np.array([5732, 2510, 1043, 423]), np.array([9893, 8893, 7893, 6893]), 9855)
    assert round(float(found), 3) == 0.191


def test_bleu4_by_hand():
    """5 of 6 words, 3 of 5 pairs, 2 of 4 threes, 1 of 3 fours are in the reference of 8 words."""
    found, each = bleu4(["the cat sat on the rug"], [["A cat sat on the mat, the end."]])
    expected = (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25 * math.exp(1 - 8 / 6)
    assert found == pytest.approx(expected, rel=1e-6) and each.tolist() == [found]
    assert bleu4(["the the the the"], [["the cat is here"]])[0] < 1e-3  # repeating gains nothing


def test_the_brevity_penalty_takes_the_closest_reference_and_of_two_the_shorter():
    texts = ["one two three four five six seven", "one two three four five", "one"]
    assert bleu4(["one two three four"], [texts])[0] == pytest.approx(math.exp(1 - 5 / 4), rel=1e-6)
    texts = ["one two three four five six", "one two three four x y z w v", "one two three four"]
    assert bleu4(["one two three four five"], [texts])[0] == pytest.approx(1, rel=1e-6)


def test_cider_by_hand():
    """One word right of two, all weighing log 2: a cosine of 1 / sqrt 2, and a length 1 off."""
    score, each = cider(["red", "big dog"], [["red cube"], ["big dog"]])
    half = 10 / 4 * math.exp(-1 / (2 * 36)) / math.sqrt(2)
    assert each == pytest.approx([half, 10 * 2 / 4]) and score == pytest.approx(each.mean())
    texts = ["one two three four", "five six seven eight"]
    assert cider(texts, [[text] for text in texts])[1] == pytest.approx([10, 10])


@pytest.mark.parametrize("metric", [bleu4, cider])
def test_captions_at_the_edges(metric):
    text = "a red cube on a table"
    score, each = metric(["", text, "日本"], [[text], [text], ["a blue ball on a chair"]])
    assert each[0] < 1e-9 and each[1] > 0.5 and each[2] < 1e-3 and 0 < score < 10
    assert each.shape == (3,)
    order = metric([text, "", "日本"], [[text], [text], ["a blue ball on a chair"]])
    assert order[0] == pytest.approx(score) and order[1][1] == pytest.approx(each[0])
    assert metric([""], [[""]])[0] < 1e-9
    for references in ([[]], ["a string"]):
        with pytest.raises(ValueError, match="list of at least one reference"):
            metric([text], references)


def test_one_item_alone_has_no_cider():
    assert cider(["a red cube"], [["a red cube"]])[0] == 0


@pytest.mark.parametrize(("caption", "expected"), [  # as Stanford's PTBTokenizer 3.4.1 gave them
    ("A black-and-white cat, on a t-shirt.", "a black-and-white cat on a t-shirt"),
    ("A stop sign that says 'Stop'", "a stop sign that says stop"),
    ("They're we've I'd she'll", "they 're we 've i 'd she 'll"),
    ("Two dogs' bowls can't; it's 3.5 feet -- tall!",
     "two dogs bowls ca n't it 's 3.5 feet tall"),
    ("\"Hello,\" said a man's dog...", "hello said a man 's dog"),
    ("red/blue café naïve 日本 1,000", "red/blue café naïve 日本 1,000"),
    ("", ""),
])
def test_captions_are_split_as_coco_caption_does(caption, expected):
    assert caption_words(caption) == expected.split()


# -------------------------------------------------------------------------------------- retrieval


def test_retrieval_by_hand():
    """Image 0 is nearest to text 0, image 1 to text 2 and then 1, image 2 finds its own last."""
    similarity = [[9, 1, 2], [3, 5, 8], [7, 6, 4]]
    images, texts = retrieval_recall(similarity, 1)
    assert images.tolist() == [1, 0, 0] and texts.tolist() == [1, 0, 0]
    images, texts = retrieval_recall(similarity, 2)
    assert images.tolist() == [1, 1, 0] and texts.tolist() == [1, 1, 1]
    assert all(marks.all() for marks in retrieval_recall(similarity, 3))


@pytest.mark.parametrize("k", [1, 3, 10])
def test_retrieval_with_several_texts_an_image_is_that_of_sorting(k):
    owner = np.random.default_rng(0).permutation(np.arange(60) % 20)  # of each text, an image
    similarity = np.random.default_rng(k).normal(size=(20, 60))
    images, texts = retrieval_recall(similarity, k, np.arange(20)[:, None] == owner)
    best = np.argsort(-similarity, 1)[:, :k]
    assert images.tolist() == [float(i in owner[row]) for i, row in enumerate(best)]
    best = np.argsort(-similarity.T, 1)[:, :k]
    assert texts.tolist() == [float(i in row) for i, row in zip(owner, best, strict=True)]
    assert 0 < images.mean() < 1 and 0 < texts.mean() < 1


def test_a_model_that_finds_all_alike_finds_nothing():
    images, texts = retrieval_recall(np.ones((5, 5)), 4)
    assert images.sum() == texts.sum() == 0


# ------------------------------------------------------------------------------ what has no score


@pytest.mark.parametrize("call", [
    lambda: bootstrap([]), lambda: multiple_choice([], [], []), lambda: auroc([], []),
    lambda: yes_no([], []), lambda: bleu4([], []), lambda: cider([], []),
    lambda: multiple_choice([[-1.0, -2.0]], [["a"]], [0]), lambda: auroc([1, 2], [1]),
    lambda: yes_no([1], [1, 0]), lambda: cider(["a"], [["a"], ["b"]])])
def test_no_items_and_unequal_lists_are_refused(call):
    with pytest.raises(ValueError, match="expected equally many items, and at least one"):
        call()


@pytest.mark.parametrize(("call", "message"), [
    (lambda: bits_per_byte(1.0, 0), "of 0 bytes are not defined"),
    (lambda: multiple_choice([[-1, math.nan]], [["a", "b"]], [0]), "NaN among the log_likelihoods"),
    (lambda: multiple_choice([[-1, -2]], [["a", ""]], [0]), "choices with text"),
    (lambda: multiple_choice([[-1, -2]], [["a", "b"]], [2]), "an answer among"),
    (lambda: auroc([math.nan, 1], [1, 0]), "NaN among the scores"),
    (lambda: auroc([1, 2], [-1, 1]), "labels must be true or false"),
    (lambda: yes_no(["yes", "no"], [1, 0]), "said must be true or false"),
    (lambda: retrieval_recall([[1, math.nan], [1, 1]], 1), "NaN among the similarity"),
    (lambda: retrieval_recall([[1, 2]], 1), "cannot rank"),
    (lambda: retrieval_recall([[1]], 0), "cannot rank"),
    (lambda: retrieval_recall([], 1), "cannot rank"),
    (lambda: retrieval_recall([[1, 2]], 1, [[1, 0]]), "every text an image"),
])
def test_what_cannot_be_scored_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
