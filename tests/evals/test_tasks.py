"""evals/tasks.py and evals/runner.py: what benchmarks ask, how answers are scored, and resuming."""

import gzip
import json
import random
import re
from pathlib import Path
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image
from test_conversation import BLUE, RED, SIGHT, TOKENIZER, config, new_model, save, with_weights

from common.config import UserError
from common.device import Machine
from evals import runner, tasks
from evals.runner import TaskRunner
from evals.tasks import DESCRIBE, LETTER, SHORT, TASKS, Question, question_of
from evals.validation import text_loss
from export.to_transformers import write_folder
from model import GPT
from prep.writers import write_manifest, write_shards
from vision import VisionLanguageModel

HELLASWAG = {"ind": 4, "activity_label": "Removing ice", "label": "3", "split": "val",
             "ctx_a": "[header] A man is outside [title] He is cold.  He shovels.",
             "ctx_b": "the man",
             "endings": ["sits [step] down.", "is [title] gone.", "walks.", "scrapes ice."]}
AI2 = {"id": "x", "question": {"stem": "What melts ice?", "choices": [
    {"text": "cold", "label": "A"}, {"text": "heat", "label": "B"}]}, "answerKey": "B"}
HUB = {"id": "x", "question": "What melts ice?", "choices": {
    "text": ["cold", "heat", "snow"], "label": ["1", "2", "3"]}, "answerKey": "3"}
PIQA = {"goal": "Melt ice.", "sol1": "Cool it.", "sol2": "Heat it.", "label": 1}
LAMBADA = {"text": "He fell on the ice and broke his leg.\n"}
GSM = {"question": "2 men have 3 ice picks each. How many?", "answer": "2*3=<<2*3=6>>6\n#### 6"}
POPE = {"question_id": 1, "image": "red.png", "text": "Is there a ring in the image?",
        "label": "no"}
VQA = {"question": "What is it?", "answers": [{"answer": "ring", "answer_id": i}
                                              for i in range(10)], "image": "red.png"}
CAPTION = {"image": "red.png", "captions": ["A ring.", "A red ring."]}
MMSTAR = {"index": 1, "question": "Which has vitamin D. or point E: best?\n"
          "Options: A: ice, B: men, C: heat", "answer": "C", "image": "red.png"}
SCIENCE = {"question": "What melts ice?", "choices": ["cold", "heat"], "answer": 1,
           "hint": "Ice is cold.", "image": "red.png"}
OWN = {"conversations": [
    {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A"},
    {"from": "human", "value": "And?"}, {"from": "gpt", "value": "A star."}], "image": "red.png"}
GOOD = {"hellaswag": HELLASWAG, "arc": AI2, "piqa": PIQA, "lambada": LAMBADA, "gsm": GSM,
        "pope": POPE, "vqa": VQA, "captions": CAPTION, "mmstar": MMSTAR, "scienceqa": SCIENCE,
        "exact": OWN, "text": {"text": "ring " * 300}}
WORDS = ["red", "blue", "ring", "star", "big", "small", "cold", "ice", "heat", "man", "shovel"]
YES, NO = [[-1.0, True, 1], [-2.0, False, 1]], [[-3.0, False, 1], [-2.0, True, 1]]

def some(rng, low, high):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def written(folder, rows, name="rows.jsonl"):
    """A JSONL file of rows (or its lines, as bytes), with two images in its folder."""
    for color, image in (("red", RED), ("blue", BLUE)):
        image.save(folder / f"{color}.png")
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / name).write_bytes(b"".join(line + b"\n" for line in lines))
    return str(folder / name)


def task_runner(name, folder, rows, model=None, **kwargs):
    return TaskRunner(name, written(folder, rows), model or new_model(), TOKENIZER,
                      image_root=str(folder), **kwargs)


def text_model(context=256):
    return with_weights(GPT(config(context)))


def uniform_model(context=256):
    """A model that finds all tokens equally likely."""
    return with_weights(GPT(config(context)), likely=[])


@pytest.mark.parametrize("name, row, expected", [
    ("hellaswag", HELLASWAG, (  # as lm_eval's preprocess makes it, spaces included
        "Removing ice: A man is outside. He is cold. He shovels. The man",
        ["sits down.", "is. gone.", "walks.", "scrapes ice."], "scrapes ice.", [])),
    ("arc", AI2, ("Question: What melts ice?\nAnswer:", ["cold", "heat"], "heat", [])),
    ("arc", HUB, ("Question: What melts ice?\nAnswer:", ["cold", "heat", "snow"], "snow", [])),
    ("piqa", PIQA, ("Question: Melt ice.\nAnswer:", ["Cool it.", "Heat it."], "Heat it.", [])),
    ("lambada", LAMBADA, ("He fell on the ice and broke his", ["leg."], "leg.", [])),
    ("gsm", GSM, (GSM["question"], [], [GSM["answer"]], [])),
    ("pope", POPE, (f"{POPE['text']}\n{SHORT}", ["Yes", "No"], "No", ["red.png"])),
    ("pope_generate", POPE | {"label": "Yes"},
     (f"{POPE['text']}\n{SHORT}", ["Yes", "No"], "Yes", ["red.png"])),
    ("vqa", VQA, (f"What is it?\n{SHORT}", [], ["ring"] * 10, ["red.png"])),
    ("vqa", {"question": "What is it?", "answer": "ring", "image": "red.png"},
     (f"What is it?\n{SHORT}", [], ["ring"], ["red.png"])),
    ("captions", CAPTION, (DESCRIBE, [], ["A ring.", "A red ring."], ["red.png"])),
    ("captions", {"image": "red.png", "caption": "A ring."},
     (DESCRIBE, [], ["A ring."], ["red.png"])),
    ("mmstar", MMSTAR, (f"{MMSTAR['question']}\n{LETTER}", ["A", "B", "C"], "C", ["red.png"])),
    ("scienceqa", SCIENCE, (f"Context: Ice is cold.\nWhat melts ice?\nA. cold\nB. heat\n{LETTER}",
                            ["A", "B"], "B", ["red.png"])),
    ("scienceqa", {"question": "What?", "choices": ["cold", "heat"], "answer": 0},
     (f"What?\nA. cold\nB. heat\n{LETTER}", ["A", "B"], "A", [])),
    ("text", {"text": "A man.", "id": 3}, ("A man.", [], [], [])),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_row_in_its_public_format_asks_what_the_reference_asks(name, row, expected):
    """(text of the last turn, choices, the correct one or the references, images)"""
    for form in row, json.dumps(row).encode():
        q = question_of(TASKS[name], form)
        correct = q.choices[q.answer] if q.choices and not q.references else q.references
        assert (q.messages[-1]["content"], q.choices, correct, q.images) == expected


@pytest.mark.parametrize("name, row, why", [
    ("hellaswag", b"{half a line", "not a line of JSON"),
    ("hellaswag", ["a", "list"], "not a JSON object"),
    ("hellaswag", {"ctx_a": "A man"}, "no field 'activity_label'"),
    ("hellaswag", HELLASWAG | {"label": ""}, "invalid literal"),  # the test split has no labels
    ("hellaswag", HELLASWAG | {"ctx_b": None}, "wrong type"),
    ("hellaswag", HELLASWAG | {"endings": ["a", "[step]", "b", "c"]}, "empty answer"),
    ("hellaswag", HELLASWAG | {"label": 4}, "the answer 4 of 4 choices"),
    ("arc", HUB | {"answerKey": "E"}, "not in list"),
    ("piqa", PIQA | {"label": -1}, "the answer -1 of 2 choices"),
    ("lambada", {"text": "leg"}, "no passage"),
    ("gsm", GSM | {"answer": "six"}, "without a number"),
    ("pope", POPE | {"label": "maybe"}, "'maybe' is not in list"),
    ("pope", POPE | {"label": None}, "wrong type"),
    ("pope", {**POPE, "image": ""}, "no image"),
    ("vqa", VQA | {"answers": ["a", "b"]}, "1 answer, or 4 and more"),
    ("captions", {"image": "red.png", "captions": ["", "A ring."]}, "empty answer"),
    ("mmstar", MMSTAR | {"answer": "D"}, "not in list"),
    ("scienceqa", SCIENCE | {"answer": 2}, "the answer 2 of 2 choices"),
    ("exact", {"conversations": [{"from": "gpt", "value": "A"}]}, "turns out of order"),
    ("pope", {"image": "red.png", "query": "?"}, "no field 'label'; its columns are image, query"),
    ("text", {"text": " "}, "no text in the field text"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_broken_row_is_left_out_with_the_reason(name, row, why, tmp_path):
    found = task_runner(name, tmp_path, [GOOD[name], row, GOOD[name]], new_model(512))
    assert (len(found.questions) == 2 or name == "text") and len(found.left_out) == 1
    assert found.left_out[0].startswith("row 1: ") and why in found.left_out[0]


@pytest.mark.parametrize("row, prompt, answer", [
    (OWN, "<|image|>What?<|end|><|assistant|>A<|end|><|user|>And?", "A star."),
    ({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"},
                   {"role": "assistant", "content": "A ring."}]}, "What?", "A ring."),
    ({"instruction": "What?", "input": "Here.", "output": "A ring."}, "What?\nHere.", "A ring."),
    ({"id": "1", "image_path": "/content/drive/red.png", "caption": "A ring."}, "<|image|>",
     "A ring."),
], ids=["LLaVA", "messages", "instruction", "caption"])
def test_own_files_in_any_format_of_the_data(row, prompt, answer, tmp_path):
    """By likelihood and exact match, in the chat template; text-only as well where there are
    images, which are found by the end of a path."""
    for name in "likelihood", "exact":
        found = task_runner(name, tmp_path, [row] * 3)
        question = found.questions[0]
        with_image, text_only = (TOKENIZER.decode(found.item(question, given).prompt)
                                 for given in (True, False))
        assert with_image.startswith("<|endoftext|>")
        assert with_image.endswith(f"<|user|>{prompt}<|end|><|assistant|>")
        assert text_only == with_image.replace("<|image|>", "")
        result, has_image = found.run(), "<|image|>" in prompt
        assert question.references == [answer] and result["n"] == 3 and not found.left_out
        assert ("text_only" in result) == has_image


@pytest.mark.parametrize("name, text, model, why", [
    ("pope", b"", new_model, "row 0: an empty file"),
    ("pope", b"[]", new_model, "holds no rows"),
    ("pope", b"[1, 2", new_model, "cannot read"),
    ("pope", None, new_model, "no file matches"),
    ("pope", b'{"questions": []}', new_model, "format of pope .row 0: no field 'label'"),
    ("winogrande", b"{}", new_model, "no task winogrande: hellaswag, arc, "),
    ("pope", json.dumps(POPE).encode(), text_model, "text-only"),
    ("hellaswag", json.dumps(HELLASWAG).encode(), lambda: text_model(64),
     "row 0: longer than the context")])
def test_what_cannot_be_asked_is_one_sentence(name, text, model, why, tmp_path):
    if text is not None:
        (tmp_path / "rows.json").write_bytes(text)
    with pytest.raises(UserError, match=why):
        TaskRunner(name, str(tmp_path / "rows.json"), model(), TOKENIZER).run()


def test_json_lists_and_files_of_the_hub_are_read_like_lines(tmp_path, monkeypatch):
    """Whatever the name says, with a byte-order mark, and compressed."""
    a_list, lines = json.dumps([PIQA, PIQA], indent=1), f"{json.dumps(PIQA)}\r\n" * 2
    for name, text in {"rows.json": a_list, "list.jsonl": a_list, "lines.json": lines}.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    monkeypatch.setattr("common.archives.fetched", lambda pattern: [f"{tmp_path}/rows.json"])
    for path in *map(str, tmp_path.iterdir()), "hf://owner/name/rows.json":
        assert len(TaskRunner("piqa", path, text_model(), TOKENIZER).questions) == 2


def synthetic(name, rng, n):
    """Rows with the right answer drawn at random, independent of the question."""
    found = []
    for _ in range(n):
        k, texts = rng.randrange(4), [some(rng, 1, 6) + f" {i}" for i in range(4)]
        found.append({
            "hellaswag": {"activity_label": "x", "ctx_a": some(rng, 3, 9), "ctx_b": "the man",
                          "endings": texts, "label": k},
            "arc": {"question": some(rng, 3, 9), "answerKey": "ABCD"[k],
                    "choices": {"text": texts, "label": list("ABCD")}},
            "piqa": {"goal": some(rng, 3, 9), "sol1": texts[0], "sol2": texts[1], "label": k % 2},
            "pope": {"text": some(rng, 3, 9), "label": ["yes", "no"][k % 2],
                     "image": ["red.png", "blue.png"][rng.randrange(2)]},
            "mmstar": {"question": f"{some(rng, 1, 4)}\nOptions: A: a, B: b, C: c, D: d",
                       "answer": "ABCD"[k], "image": "red.png"},
            "scienceqa": {"question": some(rng, 3, 9), "choices": texts, "answer": k},
        }[name])
    return found


@pytest.mark.parametrize("name", ["hellaswag", "arc", "piqa", "pope", "mmstar", "scienceqa"])
def test_an_untrained_model_scores_chance(name, tmp_path):
    """As initialised, where it uses the last token alone, and with weights that mix all tokens."""
    torch.manual_seed(1)
    rows = synthetic(name, random.Random(5), 300)
    for i, row in enumerate(row for row in rows if row.get("image")):  # each its own image
        (tmp_path / f"{i}.png").symlink_to(tmp_path / row["image"])
        row["image"] = f"{i}.png"
    chance = {"piqa": 1 / 2, "pope": 1 / 2}.get(name, 1 / 4)
    for model in VisionLanguageModel(config(256), SIGHT).eval(), new_model():
        result = task_runner(name, tmp_path, rows, model).run()
        assert result["n"] == 300 and result["chance"] == pytest.approx(chance)
        for label in {"acc", "acc_norm", "auroc"} & result["scores"].keys():
            value, error = result["scores"][label]
            assert abs(value - chance) <= 3 * error < 0.15, label


def test_closed_forms_for_a_model_that_finds_all_tokens_equally_likely(tmp_path):
    rng, V, log_V = random.Random(3), TOKENIZER.n_vocab, np.log(TOKENIZER.n_vocab)
    model = uniform_model()
    rows = [{"text": f"{some(rng, 3, 9)} ring"} for _ in range(30)]
    found = task_runner("lambada", tmp_path, rows, model).run()["scores"]
    assert found["perplexity"][0] == pytest.approx(V ** len(TOKENIZER.encode(" ring")), rel=1e-4)
    rows = [{"prompt": some(rng, 3, 9), "response": some(rng, 1, 9)} for _ in range(30)]
    found = task_runner("likelihood", tmp_path, rows, model).run()["scores"]
    assert found["nats"][0] == pytest.approx(log_V, rel=1e-5)
    texts = [some(rng, 1, 40) + " 日本語" * 9 for _ in range(30)]  # cut within characters
    found = task_runner("text", tmp_path, [{"text": text} for text in texts], uniform_model(64))
    assert {len(question.ids) for question in found.questions[:-1]} == {64}  # 63 are predicted
    scores = found.run()["scores"]
    n = sum(len(TOKENIZER.encode(text)) + 1 for text in texts) - 1
    n_bytes = sum(len(text.encode()) for text in texts)
    assert scores["nats"] == pytest.approx((log_V, 0), rel=1e-5, abs=1e-5)
    assert scores["bits_per_byte"][0] == pytest.approx(n * np.log2(V) / n_bytes, rel=1e-5)


@pytest.mark.parametrize("T", [7, 64, 9999])
def test_every_token_of_the_texts_is_predicted_once(T):
    """Each document after <|endoftext|>, in order; the last window is the rest."""
    rng, end = random.Random(2), TOKENIZER.end_of_text
    texts = [some(rng, 3, 30) for _ in range(20)]
    ids = [token for text in texts for token in (end, *TOKENIZER.encode(text))]
    questions = [question_of(TASKS["text"], {"text": text}) for text in texts]
    found = tasks.text_windows(questions, TOKENIZER, T, 9999)
    assert all(len(question.ids) == T + 1 for question in found[:-1])
    assert [ids[0], *(i for question in found for i in question.ids[1:])] == ids
    assert "".join(q.messages[0]["content"] for q in found) == "".join(texts)
    first = tasks.text_windows(questions, TOKENIZER, T, 3)
    assert [q.ids for q in first] == [q.ids for q in found[:3]]


def test_a_text_has_the_loss_of_its_prepared_shards(tmp_path):
    rng, model = random.Random(3), text_model(512)
    texts = [some(rng, 20, 90) for _ in range(40)]
    write_shards(tmp_path, "val", [[TOKENIZER.end_of_text, *TOKENIZER.encode(text)]
                                   for text in texts])
    write_manifest(tmp_path, "text", TOKENIZER)
    machine = Machine(torch.device("cpu"), torch.float32)
    expected = text_loss(model, TOKENIZER, tmp_path, 6, machine)
    found = task_runner("text", tmp_path, [{"text": text} for text in texts], model, items=6).run()
    assert found["n"] == 6 and found["chance"] is None
    for name, label in ("nats", "text_val_loss"), ("bits_per_byte", "text_bits_per_byte"):
        value, error = found["scores"][name]
        assert value == pytest.approx(expected[label].value, rel=1e-5)
        assert error == pytest.approx(expected[label].error, rel=0.3)
    # Every token is one byte, a third of a character: bits per byte are bits per token.
    write_shards(tmp_path, "val", [[0, *TOKENIZER.encode("語" * 900)]])
    found = text_loss(uniform_model(), TOKENIZER, tmp_path, 9, machine)
    assert found["text_bits_per_byte"].value == pytest.approx(np.log2(TOKENIZER.n_vocab), rel=1e-5)


@pytest.mark.parametrize("name, rows, answers, expected", [
    ("pope", [POPE | {"label": label} for label in ("yes", "yes", "no", "no")],
     [YES, NO, YES, NO], {"acc": 0.5, "f1": 0.5, "yes_share": 0.5, "auroc": 0.5}),
    ("pope_generate", [POPE | {"label": label} for label in ("yes", "yes", "no", "no")],
     ["Yes.", "No, it is not", "no", "No."], {"acc": 0.75, "f1": 2 / 3, "yes_share": 0.25}),
    ("gsm", [GSM] * 2, ["So it is $6.", "5"], {"exact": 0.5}),
    ("vqa", [VQA] * 2, ["The ring.", "star"], {"vqa": 0.5}),
    ("exact", [OWN] * 2, [" A star.", "A"], {"exact": 0.5}),
    ("captions", [CAPTION | {"captions": ["a red ring on a table"]},
                  CAPTION | {"captions": ["a blue star in the sky"]}],
     ["a red ring on a table", "a cold man sees ice"],  # BLEU: 7, 5, 4 and 3 of 11, 9, 7 and 5
     {"cider": 5, "bleu4": (7 / 11 * 5 / 9 * 4 / 7 * 3 / 5) ** 0.25 * np.exp(1 - 12 / 11)})])
def test_scores_by_hand(name, rows, answers, expected):
    questions = [question_of(TASKS[name], row | {"image": f"{i}.png"})
                 for i, row in enumerate(rows)]
    scores = TASKS[name].score(questions, answers)
    assert {label: score.value for label, score in scores.items()} == pytest.approx(expected)
    assert all(0 < score.error < 5 for score in scores.values())


def test_questions_about_one_image_are_one_sample():
    """20 images with 5 questions each, all of them right or all wrong: 0.5 / sqrt(20)."""
    questions = [question_of(TASKS["pope"], POPE | {"image": f"{i // 5}.png"}) for i in range(100)]
    answers = ["No." if i // 5 % 2 else "Yes." for i in range(100)]
    found = TASKS["pope_generate"].score(questions, answers)
    assert found["acc"][:2] == (0.5, pytest.approx(0.5 / 20**0.5, rel=0.08))


@pytest.mark.parametrize("choices, nats, acc, acc_norm", [
    (["日本語", "hippopotamus", "ox"], [-9, -15, -4], 2, 1),  # -3, -1.25 and -2 per character
    (["a", "b"], [-1, -1], 0, 0), (["a", "b"], [-np.inf, -7], 1, 1)])
def test_sums_and_characters_pick_differently(choices, nats, acc, acc_norm):
    """By hand; the first of equals is picked."""
    for answer in range(len(choices)):
        question = Question([], choices, answer)
        found = tasks.choice_scores([question], [[(x,) for x in nats]])
        assert found["acc"] == (answer == acc, 0, 1 / len(choices))
        assert found["acc_norm"] == (answer == acc_norm, 0, 1 / len(choices))
    with pytest.raises(ValueError, match="NaN"):
        tasks.choice_scores([question], [[(x * np.nan,) for x in nats]])


def test_generated_answers_are_read_as_pope_reads_them():
    yes = ["Yes, there is a dog. It is not brown.", "There is a dog.", "", "Nothing there", "NO"]
    no = ["No, there is none", "there is no dog", "There is not."]
    for answer in yes + no:
        found = TASKS["pope_generate"].score([question_of(TASKS["pope"], POPE)], [answer])
        assert found["yes_share"].value == (answer in yes)


def test_mismatched_images_score_like_none_and_the_correct_ones_everything(tmp_path):
    """By a model whose Yes is likelier the redder an image is, and equal without one."""
    model, direction = new_model(), torch.ones(32) / 32**0.5
    yes, no = (TOKENIZER.encode(text)[0] for text in ("Yes", "No"))

    def hidden(x, positions=None, mask=None, where=None):
        red = (x @ direction).cumsum(1)[..., None] * direction  # the sum of all before
        return red.flatten(0, 1)[where]

    with torch.no_grad():
        model.decoder.token_embedding.weight.zero_()
        model.decoder.head.weight.zero_()
        model.decoder.head.weight[yes], model.decoder.head.weight[no] = direction, -direction
    model.decoder.hidden = hidden
    model.image_tokens = lambda pixels: (
        (pixels[..., 0].float().mean((1, 2)) - pixels[..., 2].float().mean((1, 2)))[:, None, None]
        / 255 * direction).expand(-1, SIGHT.n_patches, -1)
    rng, rows = random.Random(2), []
    for number in range(120):
        red = rng.random() < 0.5
        color = (250, 0, rng.randrange(50)) if red else (rng.randrange(50), 0, 250)
        Image.new("RGB", (32, 32), color).save(tmp_path / f"{number}.png")
        rows.append({"text": "Is it red?", "label": ["no", "yes"][red], "image": f"{number}.png"})
    correct = task_runner("pope", tmp_path, rows, model).run()
    assert correct["scores"]["acc"][0] == correct["scores"]["auroc"][0] == 1
    assert correct["text_only"]["auroc"][0] == 0.5
    moved = [row | {"image": rows[(i + 60) % 120]["image"]} for i, row in enumerate(rows)]
    mismatched = task_runner("pope", tmp_path, moved, model).run()
    for label in "acc", "auroc":
        value, error = mismatched["scores"][label]
        text_only, text_only_error = mismatched["text_only"][label]
        assert abs(value - text_only) < 2 * np.hypot(error, text_only_error)
    assert mismatched["text_only"] == correct["text_only"]


def test_only_questions_about_images_are_asked_text_only(tmp_path):
    rows = synthetic("scienceqa", random.Random(1), 6)
    assert "text_only" not in task_runner("scienceqa", tmp_path, rows).run()
    rows[2]["image"] = "red.png"
    found = task_runner("scienceqa", tmp_path, rows)
    assert found.run()["text_only"].keys() == {"acc", "acc_norm"}
    answers = found.ask(range(6))
    assert [a["answer"] == a["text_only"] for a in answers] == [i != 2 for i in range(6)]


@pytest.mark.slow
def test_hellaswag_picks_what_lm_eval_picks(tmp_path, monkeypatch):
    """With the same model, 20 rows, and an <|endoftext|> in front, which lm_eval has to be told.

    Among them are titles and brackets, no ctx_b, and a context that ends with a space.
    """
    for name in "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE":
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lm_eval = pytest.importorskip("lm_eval", reason="pip install lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rng, model = random.Random(8), text_model(512)
    rows = [{"activity_label": some(rng, 1, 2), "ctx_a": f"[header] {some(rng, 3, 9)} [title] Then",
             "ctx_b": ["the man", "", "the man [step]"][i % 3], "label": str(rng.randrange(4)),
             "endings": [f"{some(rng, 1, 9)}[substeps] {some(rng, 1, 5)}." for _ in range(4)]}
            for i in range(20)]
    file = written(tmp_path, rows)
    task = Path(next(iter(lm_eval.__path__))) / "tasks/hellaswag/hellaswag.yaml"
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/local.yaml").write_text(
        f"include: {task}\ntask: local\ntag: []\ndataset_path: json\ntraining_split: null\n"
        f"dataset_kwargs: {{data_files: {{validation: {file}}}}}\n")
    write_folder(model, TOKENIZER, "pretrain", tmp_path / "export")
    samples = lm_eval.simple_evaluate(
        HFLM(str(tmp_path / "export"), device="cpu", batch_size=4, add_bos_token=True),
        tasks=["local"], log_samples=True, bootstrap_iters=0, task_manager=TaskManager(
            include_path=str(tmp_path / "tasks"), include_defaults=False))["samples"]["local"]
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    found = TaskRunner("hellaswag", file, model, TOKENIZER)
    answers = [answer["answer"] for answer in found.ask(range(20))]
    for ours, theirs in zip(answers, samples, strict=True):
        assert [x[0] for x in ours] == pytest.approx(
            [nats for nats, _ in theirs["filtered_resps"]], abs=1e-2)
    marks = [tasks.choice_scores([question], [answer])
             for question, answer in zip(found.questions, answers, strict=True)]
    acc, acc_norm = ([scores[name].value for scores in marks] for name in ("acc", "acc_norm"))
    assert acc == [sample["acc"] for sample in samples] and 0 < sum(acc) < 20
    assert acc_norm == [sample["acc_norm"] for sample in samples] and acc != acc_norm


@pytest.mark.parametrize("name", ["pope", "pope_generate"])
def test_a_stopped_run_resumes_and_asks_nothing_twice(name, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "PART", 4)
    monkeypatch.setattr(tasks, "RESAMPLES", 5)
    rows = [row | {"label": "yes" if 3 <= number < 7 else "no"}
            for number, row in enumerate(synthetic("pope", random.Random(4), 10))]
    rows[1]["image"], rows[2]["image"] = "gone.png", "broken.png"
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows[9]["text"] = "too long " * 99
    complete = task_runner(name, tmp_path, rows)
    result = complete.run()
    stopped = task_runner(name, tmp_path, rows, out=str(tmp_path / "out"))
    stop = Mock(side_effect=[None, None, KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        stopped.run(stop)
    assert stop.mock_calls == [call(0), call(4), call(4)]
    with open(stopped.file, "a") as file:
        file.write('{"answer": [[')  # killed while writing
    for asked in [call(range(8, 10))], []:  # the rest, then nothing
        resumed = task_runner(name, tmp_path, rows, out=str(tmp_path / "out"))
        resumed.ask = Mock(wraps=resumed.ask)
        assert resumed.run() == result and resumed.ask.mock_calls == asked
        assert resumed.left_out == complete.left_out
        assert re.fullmatch(r"row 1: .*gone\.png.*\nrow 2: .*broken\.png.*\n"
                            "row 9: longer than the context", "\n".join(resumed.left_out))
        assert len(stopped.file.read_text().splitlines()) == 11


def test_answers_of_another_model_or_to_other_questions_are_refused(tmp_path, monkeypatch):
    """Of another checkpoint or in another precision; other texts, labels or images."""
    def acc(images, rows=(POPE,), checkpoint="x"):
        return TaskRunner("pope", written(tmp_path, rows), new_model(), TOKENIZER, 9,
                          str(tmp_path / images), str(tmp_path / "out"),
                          checkpoint).run()["scores"]["acc"]

    for color, name in ((RED, "a"), (BLUE, "b"), (None, "empty")):
        (tmp_path / name).mkdir()
        if color:
            color.save(tmp_path / name / "red.png")
    with pytest.raises(UserError, match="no image is readable"):
        acc("empty")
    refusal = "of another checkpoint, .* other questions; choose another name, or remove it"
    with pytest.raises(UserError, match=refusal):
        acc("a")
    (tmp_path / "out" / "pope.rows.jsonl").unlink()
    assert acc("a") == acc("a")
    for other in ("b",), ("a", [POPE | {"label": "yes"}]), ("a", [POPE], "y"):
        with pytest.raises(UserError, match=refusal):
            acc(*other)
    monkeypatch.setattr(runner, "pick_dtype", lambda device: torch.float16)
    with pytest.raises(UserError, match=refusal):
        acc("a")


def test_eval_prints_and_writes_scores_with_errors_chance_and_text_only(tmp_path):
    """Two files of one task are told apart by their names."""
    save(tmp_path / "run", new_model())
    rng = random.Random(4)
    pope = [written(tmp_path, synthetic("pope", rng, 6), f"{name}.jsonl")
            for name in ("popular", "random")]
    piqa = written(tmp_path, [*synthetic("piqa", rng, 5), {"goal": "?"}])
    argv = ("eval.py", tmp_path / "run", f"--tasks=pope:{pope[0]},pope:{pope[1]},piqa:{piqa}",
            f"--image_root={tmp_path}", f"--out={tmp_path / 'out'}", "--device=cpu")
    first, second = run(*argv), run(*argv)
    assert first.status == 0, first.err
    assert first.out == second.out and "6 questions, guessing 0.500, text-only 0." in first.out
    assert "pope:popular/f1" in first.out and "pope:random/auroc" in first.out
    assert "piqa/acc_norm" in first.out and "1 left out, such as row 5: no field" in first.err
    searched = run("experiments/contamination.py", tmp_path / "run", f"--tasks=piqa:{piqa}")
    assert searched.out.startswith("piqa: contamination unknown"), searched.err
    found = json.loads((tmp_path / "out/eval.json").read_text())
    assert set(found["tasks"]) == {"pope:popular", "pope:random", "piqa"}
    assert found["tasks"]["piqa"]["n"] == 5 and len(found["sha256"]) == 64
    logs = [f"{name}.jsonl" for name in ("pope.popular", "pope.random", "piqa.rows")]
    assert all((tmp_path / "out" / log).is_file() for log in logs)
    (tmp_path / "b").mkdir()
    other = written(tmp_path / "b", synthetic("pope", rng, 6), "random.jsonl")
    same = run(*argv[:2], f"--tasks=pope:{pope[1]},pope:{other}", *argv[3:])
    assert "has one task twice with files of the same name" in same.refusal
