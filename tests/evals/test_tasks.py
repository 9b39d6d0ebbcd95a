"""The claims of evals/tasks.py, evals/runner.py and evals/contamination.py: what a benchmark asks,
scores and has seen."""

import io
import json
import random
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image
from test_chat import BLUE, RED, SIGHT, TOKENIZER, config, new_model, save, with_weights
from test_scores import peer

from common.checkpoint import write_json
from common.config import UserError, seal
from common.device import Machine
from evals import runner, tasks
from evals.contamination import hashes, overlaps, sentence, texts_in
from evals.runner import Asking
from evals.tasks import DESCRIBE, LETTER, SHORT, TASKS, question_of
from evals.validation import text_loss
from export.to_transformers import write_folder
from model import GPT
from prep.writers import write_chats, write_manifest, write_text
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
WORDS = ["red", "blue", "ring", "star", "big", "small", "cold", "ice", "heat", "man", "shovel"]

TASK = """task: local
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE}}
output_type: multiple_choice
validation_split: validation
process_docs: !function utils.process_docs
doc_to_text: "{{query}}"
doc_to_target: "{{label}}"
doc_to_choice: "choices"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def asked(name, row):
    """(text of the last turn, choices, the right one or the answers wanted, pictures) of a row."""
    q = question_of(TASKS[name], row)
    right = q.choices[q.answer] if q.choices and not q.wanted else q.wanted
    return q.messages[-1]["content"], q.choices, right, q.images


def some(rng, low, high):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def letters(rng, n):
    """Words that nobody else says."""
    return " ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(n))


def written(folder, rows, name="rows.jsonl"):
    """A JSONL file of rows, with two pictures in its folder."""
    for color, image in (("red", RED), ("blue", BLUE)):
        image.save(folder / f"{color}.png")
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def ask(name, folder, rows, model=None, **kwargs):
    return Asking(name, written(folder, rows), model or new_model(), TOKENIZER,
                  image_root=str(folder), **kwargs)


def text_model(context=256):
    return with_weights(GPT(config(context)))


# ------------------------------------------------------------------------------------ what is asked


@pytest.mark.parametrize("name, row, expected", [
    ("hellaswag", HELLASWAG, (  # as lm_eval's preprocess makes it, spaces included
        "Removing ice: [header] A man is outside. He is cold. He shovels. The man".replace(
            "[header] ", " ").replace(":  ", ": "),
        ["sits down.", "is. gone.", "walks.", "scrapes ice."], "scrapes ice.", [])),
    ("arc", AI2, ("Question: What melts ice?\nAnswer:", ["cold", "heat"], "heat", [])),
    ("arc", HUB, ("Question: What melts ice?\nAnswer:", ["cold", "heat", "snow"], "snow", [])),
    ("piqa", PIQA, ("Question: Melt ice.\nAnswer:", ["Cool it.", "Heat it."], "Heat it.", [])),
    ("lambada", LAMBADA, ("He fell on the ice and broke his", ["leg."], "leg.", [])),
    ("gsm", GSM, (GSM["question"], [], [GSM["answer"]], [])),
    ("pope", POPE, (f"{POPE['text']}\n{SHORT}", ["Yes", "No"], "No", ["red.png"])),
    ("pope_said", POPE | {"label": "Yes"},
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
    ("exact", OWN, ("And?", ["A star."], ["A star."], ["red.png"])),
    ("likelihood", {"prompt": "What?", "response": "A star."},
     ("What?", ["A star."], ["A star."], [])),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_row_in_its_public_form_asks_what_the_reference_asks(name, row, expected):
    assert asked(name, row) == expected
    assert asked(name, json.dumps(row).encode()) == expected  # a line of a file


@pytest.mark.parametrize("name, row, why", [
    ("hellaswag", b"{half a line", "not a line of JSON"),
    ("hellaswag", ["a", "list"], "no object"),
    ("hellaswag", {"ctx_a": "A man"}, "no field 'activity_label'"),
    ("hellaswag", HELLASWAG | {"label": ""}, "invalid literal"),  # the test split has no labels
    ("hellaswag", HELLASWAG | {"ctx_b": None}, "another form"),
    ("hellaswag", HELLASWAG | {"endings": ["a", "[step]", "b", "c"]}, "empty answer"),
    ("hellaswag", HELLASWAG | {"label": 4}, "the answer 4 of 4 choices"),
    ("arc", HUB | {"answerKey": "E"}, "not in list"),
    ("piqa", PIQA | {"label": -1}, "the answer -1 of 2 choices"),
    ("lambada", {"text": "leg"}, "no passage"),
    ("gsm", GSM | {"answer": "six"}, "without a number"),
    ("pope", POPE | {"label": "maybe"}, "'maybe' is not in list"),
    ("pope", POPE | {"label": None}, "another form"),
    ("pope", {**POPE, "image": ""}, "no picture"),
    ("vqa", VQA | {"answers": ["a", "b"]}, "1 answer, or of 4 and more"),
    ("captions", {"image": "red.png", "captions": ["", "A ring."]}, "empty answer"),
    ("mmstar", MMSTAR | {"answer": "D"}, "not in list"),
    ("scienceqa", SCIENCE | {"answer": 2}, "the answer 2 of 2 choices"),
    ("exact", {"conversations": [{"from": "gpt", "value": "A"}]}, "turns out of order"),
    ("text", {"text": " "}, "no text in the field text"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_broken_row_is_left_out_and_said_why(name, row, why, tmp_path):
    with pytest.raises(ValueError, match=why):
        question_of(TASKS[name], row)
    good = {"hellaswag": HELLASWAG, "arc": AI2, "piqa": PIQA, "lambada": LAMBADA, "gsm": GSM,
            "pope": POPE, "vqa": VQA, "captions": CAPTION, "mmstar": MMSTAR, "scienceqa": SCIENCE,
            "exact": OWN, "text": {"text": "ring " * 300}}[name]
    path = written(tmp_path, [good, "HERE", good])
    text = row.decode() if isinstance(row, bytes) else json.dumps(row)
    (tmp_path / "rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text().replace(
        '"HERE"', text))
    found = Asking(name, path, new_model(512), TOKENIZER, image_root=str(tmp_path))
    assert (len(found.questions) == 2 or name == "text") and len(found.left_out) == 1
    assert found.left_out[0].startswith("row 1: ") and why in found.left_out[0]


@pytest.mark.parametrize("row, question, shown", [
    ({"conversations": [{"from": "human", "value": "<image>\nWhat?"},
                        {"from": "gpt", "value": "A ring."}], "image": "red.png"}, "What?", 1),
    ({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"},
                   {"role": "assistant", "content": "A ring."}]}, "What?", 0),
    ({"instruction": "What?", "input": "Here.", "output": "A ring."}, "What?\nHere.", 0),
    ({"prompt": "What?", "response": "A ring."}, "What?", 0),
    ({"id": "1", "image_path": "/content/drive/red.png", "caption": "A ring."}, "", 1),
], ids=["LLaVA", "messages", "instruction", "prompt", "caption"])
def test_a_file_of_ones_own_in_any_form_of_the_data_is_asked(row, question, shown, tmp_path):
    """By likelihood and by exact match; blind where there are pictures, which a path that was
    somebody else's names by its end."""
    for name in "likelihood", "exact":
        found = ask(name, tmp_path, [row] * 3)
        text = TOKENIZER.decode(found.item(found.questions[0]).prompt)
        assert text.endswith(f"<|user|>{'<|image|>' * shown}{question}<|end|><|assistant|>")
        assert found.questions[0].wanted == ["A ring."]
        result = found.run()
        assert result["n"] == 3 and not found.left_out and ("blind" in result) == bool(shown)


@pytest.mark.parametrize("text, why", [
    ("", "holds no rows"), ("[]", "holds no rows"), ("[1, 2", "cannot read"),
    ('{"questions": []}\n', "no row of the form that pope has .row 0: no field 'label'"),
])
def test_a_file_without_questions_is_a_sentence(text, why, tmp_path):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(UserError, match=why):
        Asking("pope", str(tmp_path / "rows.json"), new_model(), TOKENIZER)


def test_what_cannot_be_asked_at_all_is_a_sentence(tmp_path):
    path = written(tmp_path, [POPE])
    for name, file, model, why in (
            ("winogrande", path, new_model(), "there is no task winogrande: hellaswag, arc, "),
            ("pope", f"{path}.gone", new_model(), "cannot read the task file"),
            ("pope", path, text_model(), "this checkpoint cannot see")):
        with pytest.raises(UserError, match=why):
            Asking(name, file, model, TOKENIZER)
    with pytest.raises(UserError, match=r"no question fits .* row 0: longer than the context"):
        ask("hellaswag", tmp_path, [HELLASWAG], text_model(64)).run()


def test_a_json_list_and_a_file_of_the_hub_are_read_like_lines(tmp_path, monkeypatch):
    (tmp_path / "rows.json").write_text(json.dumps([PIQA, PIQA], indent=1))
    monkeypatch.setattr(tasks, "fetched", lambda pattern: [tmp_path / pattern.split("/")[-1]])
    for path in str(tmp_path / "rows.json"), "hf://owner/name/rows.json":
        assert len(Asking("piqa", path, text_model(), TOKENIZER).questions) == 2


def test_a_missing_picture_is_left_out_and_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows = [POPE, POPE | {"image": "gone.png"}, POPE | {"image": "broken.png"}, POPE]
    found = ask("pope", tmp_path, rows)
    assert found.run()["n"] == 2 and len(found.left_out) == 2
    assert "row 1: there is no picture gone.png" in found.left_out[0]
    assert "row 2: broken.png is not a readable picture" in found.left_out[1]


def test_a_picture_question_is_asked_in_the_chat_template_with_its_picture_and_without(tmp_path):
    found = ask("exact", tmp_path, [OWN])
    seen, blind = (TOKENIZER.decode(found.item(found.questions[0], seeing).prompt)
                   for seeing in (True, False))
    assert seen == ("<|endoftext|><|user|><|image|>What?<|end|><|assistant|>A<|end|>"
                    "<|user|>And?<|end|><|assistant|>")
    assert blind == seen.replace("<|image|>", "")


# ------------------------------------------------------------------------------------------- scores


def synthetic(name, rng, n):
    """Rows with the right answer drawn at random, so that nothing can be known."""
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


CHOSEN = [name for name, task in TASKS.items()
          if task.score in (tasks.choice_scores, tasks.yes_no_scores)]


@pytest.mark.parametrize("name", CHOSEN)
def test_a_model_that_was_not_trained_scores_chance(name, tmp_path):
    """As initialised, where it sees the last token alone, and with weights that mix them all."""
    torch.manual_seed(1)
    models = [VisionLanguageModel(config(256), SIGHT), new_model()]
    if name not in ("pope", "mmstar"):
        models += [GPT(config(256)), text_model()]
    rows = synthetic(name, random.Random(5), 300)
    for model in models:
        result = ask(name, tmp_path, rows, model.eval()).run()
        assert result["n"] == 300
        chance = {"piqa": 1 / 2, "pope": 1 / 2}.get(name, 1 / 4)
        assert result["chance"] == pytest.approx(chance)
        accuracies = [result["scores"][label] for label in ("acc", "acc_norm", "auroc")
                      if label in result["scores"]]
        expected = [chance, 0.5 if "auroc" in result["scores"] else chance]
        for (value, error), guess in zip(accuracies, expected, strict=True):
            assert abs(value - guess) <= 3 * error < 0.15


def test_a_last_word_and_a_chat_of_a_model_that_was_not_trained_cost_a_uniform_guess(tmp_path):
    """Of V ids each as likely: log V nats a token; no greedy answer is right."""
    model, rng = GPT(config(256)).eval(), random.Random(3)
    with torch.no_grad():
        model.head.weight.zero_()
    rows = [{"text": f"{some(rng, 3, 9)} ring"} for _ in range(30)]
    found = ask("lambada", tmp_path, rows, model).run()["scores"]
    n = len(TOKENIZER.encode(" ring"))
    assert found["perplexity"][0] == pytest.approx(TOKENIZER.n_vocab**n, rel=1e-4)
    rows = [{"prompt": some(rng, 3, 9), "response": some(rng, 1, 9)} for _ in range(30)]
    found = ask("likelihood", tmp_path, rows, model).run()["scores"]
    assert found["nats"][0] == pytest.approx(np.log(TOKENIZER.n_vocab), rel=1e-5)


def test_texts_are_cut_into_windows_of_which_every_token_is_predicted_once():
    """Each document behind <|endoftext|>, in order; the last window is what is left."""
    rng, end = random.Random(2), TOKENIZER.end_of_text
    texts = [some(rng, 3, 30) for _ in range(20)]
    whole = [token for text in texts for token in (end, *TOKENIZER.encode(text))]
    for T in 7, 64, len(whole) - 1, 9999:
        found = tasks.windows([question_of(TASKS["text"], {"text": text}) for text in texts],
                              TOKENIZER, T, 9999)
        assert all(len(question.ids) == T + 1 for question in found[:-1])
        assert [whole[0], *(i for question in found for i in question.ids[1:])] == whole
        assert "".join(q.messages[0]["content"] for q in found) == "".join(texts)
        some_of_them = tasks.windows([question_of(TASKS["text"], {"text": text}) for text in texts],
                                     TOKENIZER, T, 3)
        assert [q.ids for q in some_of_them] == [q.ids for q in found[:3]]


def test_a_text_costs_what_its_shards_cost(tmp_path):
    """By the windows of evals/validation.py, whose files prepare.py text makes of the same
    documents."""
    rng, model = random.Random(3), text_model(512)
    texts = [some(rng, 20, 90) for _ in range(40)]
    (tmp_path / "text").mkdir()
    write_text(tmp_path / "text", "val", texts, TOKENIZER)
    write_manifest(tmp_path / "text", TOKENIZER)
    expected = text_loss(model, TOKENIZER, tmp_path / "text", 6,
                         Machine(torch.device("cpu"), torch.float32))
    found = ask("text", tmp_path, [{"text": text} for text in texts], model, items=6).run()
    assert found["n"] == 6 and found["chance"] is None
    for name, label in ("nats", "text_val_loss"), ("bits_per_byte", "text_bits_per_byte"):
        value, error = found["scores"][name]
        assert value == pytest.approx(expected[label].value, rel=1e-5)
        assert error == pytest.approx(expected[label].error, rel=0.3)


def test_a_text_costs_a_model_that_guesses_all_tokens_alike_a_closed_form(tmp_path):
    """log V nats a token, and as many bits a byte as log2 V a token over bytes a token."""
    model, rng = GPT(config(64)).eval(), random.Random(3)
    with torch.no_grad():
        model.head.weight.zero_()
    texts = [some(rng, 1, 40) for _ in range(30)]
    n = sum(len(TOKENIZER.encode(text)) + 1 for text in texts) - 1
    found = ask("text", tmp_path, [{"text": text} for text in texts], model)
    assert {len(question.ids) for question in found.questions[:-1]} == {64}  # 63 are predicted
    scores, V = found.run()["scores"], TOKENIZER.n_vocab
    n_bytes = sum(len(text.encode()) for text in texts)
    assert scores["nats"] == pytest.approx((np.log(V), 0), rel=1e-5, abs=1e-5)
    assert scores["bits_per_byte"][0] == pytest.approx(n * np.log2(V) / n_bytes, rel=1e-5)


def test_the_scores_are_what_a_hand_works_out_from_the_answers():
    """With errors by bootstrap; POPE's and BLEU's of what is no mean, too."""
    yes, no = [[-1.0, True, 1], [-2.0, False, 1]], [[-3.0, False, 1], [-2.0, True, 1]]
    questions = [question_of(TASKS["pope"], POPE | {"label": label})
                 for label in ("yes", "yes", "no", "no") * 25]
    values, chance = TASKS["pope"].score(questions, [yes, no, yes, no] * 25)
    found = {name: tasks.value_and_error(value) for name, value in values.items()}
    assert chance == 0.5 and {name: value for name, (value, _) in found.items()} == {
        "acc": 0.5, "f1": 0.5, "yes_share": 0.5, "auroc": 0.5}
    assert all(error == pytest.approx(0.05, abs=0.02) for _, error in found.values())
    values, _ = TASKS["pope_said"].score(questions[:4], ["Yes.", "No, it is not", "no", "No."])
    assert values["acc"].tolist() == [1, 0, 1, 1]
    values, _ = TASKS["gsm"].score([question_of(TASKS["gsm"], GSM)] * 2, ["So it is 6.", "5"])
    assert values["exact"].tolist() == [1, 0]
    values, _ = TASKS["vqa"].score([question_of(TASKS["vqa"], VQA)] * 2, ["The ring.", "star"])
    assert values["vqa"].tolist() == [1, 0]
    values, _ = TASKS["exact"].score([question_of(TASKS["exact"], OWN)] * 2, [" A star.", "A"])
    assert values["exact"].tolist() == [1, 0]
    rows = [question_of(TASKS["captions"], {"image": "red.png", "caption": text}) for text in
            ("a red ring on a table", "a blue star in the sky")]
    values, _ = TASKS["captions"].score(rows, ["a red ring on a table", "a cold man sees ice"])
    assert values["cider"].tolist() == pytest.approx([10, 0])
    assert 0 < tasks.value_and_error(values["bleu4"])[0] < 1


@pytest.fixture
def looking():
    """A vision model whose Yes is likelier the redder a picture is, and equal without one."""
    model = new_model()
    yes, no = (TOKENIZER.encode(text)[0] for text in ("Yes", "No"))
    direction = torch.ones(32) / 32**0.5

    def hidden(x, positions=None, mask=None, cache=None, run=None, where=None):
        red = (x @ direction).cumsum(1)[..., None] * direction  # what stood before is added up
        red = red if cache is None else torch.zeros_like(x)
        return red if where is None else red.flatten(0, 1)[where]

    with torch.no_grad():
        model.decoder.token_embedding.weight.zero_()
        model.decoder.head.weight.zero_()
        model.decoder.head.weight[yes], model.decoder.head.weight[no] = direction, -direction
    model.decoder.hidden = hidden
    model.image_tokens = lambda pixels: (
        (pixels[..., 0].float().mean((1, 2)) - pixels[..., 2].float().mean((1, 2)))[:, None, None]
        / 255 * direction).expand(-1, SIGHT.n_patches, -1)
    return model


def test_shuffled_pictures_bring_what_no_pictures_bring(looking, tmp_path):
    """And the right ones everything, so that the score is of what is in the picture."""
    rng, rows = random.Random(2), []
    for number in range(120):
        red = rng.random() < 0.5
        color = (250, 0, rng.randrange(50)) if red else (rng.randrange(50), 0, 250)
        Image.new("RGB", (32, 32), color).save(tmp_path / f"{number}.png")
        rows.append({"text": "Is it red?", "label": "yes" if red else "no",
                     "image": f"{number}.png"})
    right = ask("pope", tmp_path, rows, looking).run()
    assert right["scores"]["acc"][0] == right["scores"]["auroc"][0] == 1
    assert right["blind"]["auroc"][0] == 0.5
    moved = [row | {"image": rows[(i + 60) % 120]["image"]} for i, row in enumerate(rows)]
    shuffled = ask("pope", tmp_path, moved, looking).run()
    for label in "acc", "auroc":
        (value, error), (blind, blind_error) = shuffled["scores"][label], shuffled["blind"][label]
        assert abs(value - blind) < 2 * np.hypot(error, blind_error)
    assert shuffled["blind"] == right["blind"]


def test_only_questions_about_pictures_have_a_blind_score(tmp_path):
    rows = synthetic("scienceqa", random.Random(1), 6)
    assert "blind" not in ask("scienceqa", tmp_path, rows).run()
    rows[2]["image"] = "red.png"
    found = ask("scienceqa", tmp_path, rows)
    assert found.run()["blind"].keys() == {"acc", "acc_norm"}
    answers = found.ask(range(6))
    assert [answer["said"] == answer["blind"] for answer in answers] == [i != 2 for i in range(6)]


# ------------------------------------------------------------------------------------------ lm_eval


def by_lm_eval(folder, file, model):
    """What lm_eval's own HellaSwag says of an exported model: its samples."""
    peer("lm_eval", "lm_eval")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    utils = Path(next(iter(lm_eval.__path__))) / "tasks/hellaswag/utils.py"
    (folder / "tasks").mkdir()
    (folder / "tasks/utils.py").write_text(utils.read_text())
    (folder / "tasks/local.yaml").write_text(TASK.replace("FILE", file))
    write_folder(model, TOKENIZER, "pretrain", folder / "export")
    theirs = HFLM(str(folder / "export"), device="cpu", batch_size=4, add_bos_token=True)
    found = lm_eval.simple_evaluate(
        theirs, tasks=["local"], log_samples=True, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False))
    return sorted(found["samples"]["local"], key=lambda sample: sample["doc_id"])


def test_hellaswag_picks_what_lm_eval_picks(tmp_path, monkeypatch):
    """With the same model, 20 rows, and an <|endoftext|> in front, which lm_eval has to be told.

    Among them are titles and brackets, no ctx_b, and a context that ends with a space.
    """
    for name in "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE":
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rng, model = random.Random(8), text_model(512)
    rows = [{"activity_label": some(rng, 1, 2), "ctx_a": f"[header] {some(rng, 3, 9)} [title] Then",
             "ctx_b": ["the man", "", "the man [step]"][i % 3], "label": str(rng.randrange(4)),
             "endings": [f"{some(rng, 1, 9)}[substeps] {some(rng, 1, 5)}." for _ in range(4)]}
            for i in range(20)]
    file = written(tmp_path, rows)
    samples = by_lm_eval(tmp_path, file, model)
    found = Asking("hellaswag", file, model, TOKENIZER)
    answers = [answer["said"] for answer in found.ask(range(20))]
    for ours, theirs in zip(answers, samples, strict=True):
        assert [x[0] for x in ours] == pytest.approx(
            [nats for nats, _ in theirs["filtered_resps"]], abs=1e-2)
    marks, _ = TASKS["hellaswag"].score(found.questions, answers)
    for metric in "acc", "acc_norm":
        assert marks[metric].tolist() == [sample[metric] for sample in samples]
    assert 0 < marks["acc"].sum() < 20 and (marks["acc"] != marks["acc_norm"]).any()


# ------------------------------------------------------------------------------- starting again


@pytest.mark.parametrize("name", ["pope", "pope_said"])
def test_a_run_that_was_stopped_goes_on_and_asks_nothing_twice(name, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "PART", 4)
    rows = synthetic("pope", random.Random(4), 10)
    for number, row in enumerate(rows):
        row["label"] = "yes" if number in (3, 4, 5, 6) else "no"
    rows[1]["image"] = "gone.png"
    rows[9]["text"] = "too long " * 99
    whole = ask(name, tmp_path, rows)
    result = whole.run()
    counts, cut = [], ask(name, tmp_path, rows, out=str(tmp_path / "out"))

    def stop(n):
        counts.append(n)
        if sum(counts) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut.run(stop)
    with open(cut.log, "a") as file:
        file.write('{"said": [[')  # killed while it wrote
    again, numbers = ask(name, tmp_path, rows, out=str(tmp_path / "out")), []
    asked_for = again.ask
    again.ask = lambda some: numbers.extend(some) or asked_for(some)
    assert again.run() == result and numbers == [8, 9]
    assert again.left_out == whole.left_out and len(whole.left_out) == 2
    assert again.left_out[1] == "row 9: longer than the context"
    assert len(cut.log.read_text().splitlines()) == 11
    numbers.clear()
    assert again.run() == result and numbers == []


def test_answers_of_another_checkpoint_or_to_other_questions_are_not_taken(tmp_path):
    rows, out = synthetic("piqa", random.Random(4), 5), str(tmp_path / "out")
    ask("piqa", tmp_path, rows, out=out, checkpoint="a").run()
    for other, checkpoint in (rows, "b"), (rows[:4], "a"):
        with pytest.raises(UserError, match="another checkpoint, or to other questions"):
            ask("piqa", tmp_path, other, out=out, checkpoint=checkpoint).run()


def test_the_same_questions_get_the_same_scores(tmp_path):
    rows = synthetic("pope", random.Random(4), 20)
    assert ask("pope", tmp_path, rows).run() == ask("pope", tmp_path, rows).run()


def test_eval_prints_scores_with_errors_chance_and_blind_and_writes_them(tmp_path):
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
    assert first.out == second.out and "6 questions, guessing 0.500, blind 0." in first.out
    assert "pope:popular/f1" in first.out and "pope:random/auroc" in first.out
    assert "piqa/acc_norm" in first.out and "1 left out, such as row 5: no field" in first.err
    assert "the training data is not here" in first.out
    found = json.loads((tmp_path / "out/eval.json").read_text())
    assert set(found["tasks"]) == {"pope:popular", "pope:random", "piqa"}
    assert found["tasks"]["piqa"]["n"] == 5 and len(found["sha256"]) == 64
    logs = [f"{name}.jsonl" for name in ("pope.popular", "pope.random", "piqa.rows")]
    assert all((tmp_path / "out" / log).is_file() for log in logs)


# ------------------------------------------------------------------------------------------ overlap


def encoded(color, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(file, kind)
    return file.getvalue()


@pytest.fixture
def trained(tmp_path):
    """A model's info, with text and pictured chats that it and the stage before were trained on."""
    rng, root = random.Random(6), tmp_path / "data"
    (root / "text").mkdir(parents=True)
    texts = [letters(rng, 70) for _ in range(30)]
    write_text(root / "text", "train", texts, TOKENIZER, 3000)  # documents continue in the next
    write_manifest(root / "text", TOKENIZER)
    said = [letters(rng, 30) for _ in range(4)]
    write_chats(root / "chats/train", TOKENIZER, [
        ([{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}],
         [tasks_image(encoded(color))])
        for text, color in zip(said, ("red", "blue", "green", "white"), strict=True)])
    write_manifest(root / "chats", TOKENIZER,
                   stored_images={"size": 32, "fit": "pad", "copied": True})
    (tmp_path / "before").mkdir()
    write_json(tmp_path / "before/config.json", {"settings": {"data": str(root / "text")}})
    info = {"settings": {"data": str(root / "chats"), "text_data": str(tmp_path / "gone")},
            "lineage": [{"folder": str(tmp_path / "before")}, {"folder": str(tmp_path / "no")}]}
    return types.SimpleNamespace(info=info, texts=texts, said=said, root=root)


def tasks_image(content):
    """A picture as prepare.py stores it."""
    from prep.convert import prepared

    cfg = types.SimpleNamespace(image_size=32, fit="pad", copy=True)
    return prepared(content, None, cfg)


def test_planted_texts_are_found_and_no_others(trained, tmp_path):
    """A question is found by 16 tokens anywhere in a document or a chat, its instruction aside."""
    rng = random.Random(7)
    rows = [{"text": letters(rng, 20), "label": "yes", "image": "red.png"} for _ in range(40)]
    planted = {3: trained.texts[0], 11: trained.texts[17][20:200], 12: trained.texts[-1],
               25: f"Hm: {trained.said[2]}?", 39: trained.said[0][:-40]}
    for number, text in planted.items():
        rows[number]["text"] = text
    marks = [round(overlaps([ask("pope", tmp_path, [row])], trained.info)[0]["texts"])
             for row in rows]
    assert {number for number, mark in enumerate(marks) if mark} == set(planted)
    found, = overlaps([ask("pope", tmp_path, rows)], trained.info)
    assert found["texts"] == pytest.approx(5 / 40) and found["n_texts"] == 40
    assert found["looked_at"] == [str(trained.root / name) for name in ("chats", "text")]
    assert sentence(found) == "5 of 40 texts, 0 of 1 pictures stand in the training data"


def test_choices_and_answers_count_as_texts_and_short_ones_as_none(trained, tmp_path):
    text = trained.texts[5]
    rows = [{"goal": "Hm?", "sol1": "no", "sol2": text, "label": 0},
            {"goal": "Hm?", "sol1": "no", "sol2": "yes", "label": 0}]
    captions = [{"image": "red.png", "captions": ["A ring.", text]},
                {"image": "red.png", "captions": ["A ring."]}]
    piqa = ask("piqa", tmp_path, rows)
    both = overlaps([piqa, ask("captions", tmp_path, captions)], trained.info)
    assert [(found["texts"], found["n_texts"]) for found in both] == [(0.5, 2), (1, 1)]
    assert both[0]["pictures"] is None and both[1]["pictures"] == 0
    short, = overlaps([ask("captions", tmp_path, captions[1:])], trained.info)
    assert short["texts"] is None and short["n_texts"] == 0


def test_every_window_of_every_shard_is_found(trained, monkeypatch):
    """Also those that begin in one block of what is read at once and end in the next."""
    monkeypatch.setattr("evals.contamination.BLOCK", 100)
    shards = [np.load(path) for path in sorted((trained.root / "text").glob("train*.npy"))]
    wanted = np.unique(np.concatenate([hashes(ids) for ids in shards]))
    assert len(shards) > 2 and len(wanted) > 0.9 * sum(map(len, shards))
    other = wanted + np.uint64(1)
    found = texts_in([trained.root / "text"], np.union1d(wanted, other), TOKENIZER)
    assert found.tolist() == wanted.tolist()


def test_planted_pictures_are_found_and_no_others(trained, tmp_path):
    """As the files that were prepared, or as what prepare.py made of them."""
    files = {"a.png": encoded("blue"), "b.png": tasks_image(encoded("green")),
             "c.png": encoded("yellow"), "d.png": encoded("blue", "BMP"), "e.png": b"broken"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    rows = [POPE | {"image": name} for name in [*files, "gone.png", "a.png"]]
    found, = overlaps([ask("pope", tmp_path, rows)], trained.info)
    assert (found["pictures"], found["n_pictures"]) == (pytest.approx(3 / 5), 5)


def test_where_the_training_data_is_gone_nothing_is_claimed(tmp_path):
    found, = overlaps([ask("pope", tmp_path, [POPE])], {"settings": {"data": str(tmp_path / "x")}})
    assert found["texts"] is found["pictures"] is None and found["looked_at"] == []
    assert "not here" in sentence(found)


def test_texts_of_another_tokenizer_are_passed_over_but_not_their_pictures(trained, tmp_path):
    """As those of a CLIP that has its own vocabulary."""
    path = trained.root / "chats/manifest.json"
    text = path.read_text().replace(TOKENIZER.fingerprint, "another")
    path.write_text(json.dumps(seal(json.loads(text))))
    (tmp_path / "a.png").write_bytes(encoded("blue"))
    row = {"text": trained.said[1], "label": "yes", "image": "a.png"}
    found, = overlaps([ask("pope", tmp_path, [row])], trained.info)
    assert found["texts"] == 0 and found["pictures"] == 1
