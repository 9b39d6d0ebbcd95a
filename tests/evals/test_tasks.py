"""evals/tasks.py and evals/runner.py: what benchmarks ask, how answers are scored, and resuming."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run
from test_conversation import BLUE, RED, TOKENIZER, config, new_model, save, with_weights

from common.config import UserError
from evals import runner, tasks
from evals.runner import TaskRunner
from evals.tasks import DESCRIBE, LETTER, SHORT, TASKS, question_of
from export.to_transformers import write_folder
from model import GPT

HELLASWAG = {"ind": 4, "activity_label": "Removing ice", "label": "3", "split": "val",
             "ctx_a": "[header] A man is outside [title] He is cold.  He shovels.",
             "ctx_b": "the man",
             "endings": ["sits [step] down.", "is [title] gone.", "walks.", "scrapes ice."]}
HUB = {"id": "x", "question": "What melts ice?", "choices": {
    "text": ["cold", "heat", "snow"], "label": ["1", "2", "3"]}, "answerKey": "3"}
PIQA = {"goal": "Melt ice.", "sol1": "Cool it.", "sol2": "Heat it.", "label": 1}
LAMBADA = {"text": "He fell on the ice and broke his leg.\n"}
POPE = {"question_id": 1, "image": "red.png", "text": "Is there a ring in the image?",
        "label": "no"}
VQA = {"question": "What is it?", "answers": [{"answer": "ring", "answer_id": i}
                                              for i in range(10)], "image": "red.png"}
CAPTION = {"image": "red.png", "captions": ["A ring.", "A red ring."]}
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
    model = GPT(config(context)).eval()
    with torch.no_grad():
        model.head.weight.zero_()
    return model


# ---------------------------------------------------------------------------------------- questions


@pytest.mark.parametrize("name, row, expected", [
    ("hellaswag", HELLASWAG, (  # as lm_eval's preprocess makes it, spaces included
        "Removing ice: [header] A man is outside. He is cold. He shovels. The man".replace(
            "[header] ", " ").replace(":  ", ": "),
        ["sits down.", "is. gone.", "walks.", "scrapes ice."], "scrapes ice.", [])),
    ("arc", HUB, ("Question: What melts ice?\nAnswer:", ["cold", "heat", "snow"], "snow", [])),
    ("piqa", PIQA, ("Question: Melt ice.\nAnswer:", ["Cool it.", "Heat it."], "Heat it.", [])),
    ("lambada", LAMBADA, ("He fell on the ice and broke his", ["leg."], "leg.", [])),
    ("pope", POPE, (f"{POPE['text']}\n{SHORT}", ["Yes", "No"], "No", ["red.png"])),
    ("vqa", VQA, (f"What is it?\n{SHORT}", [], ["ring"] * 10, ["red.png"])),
    ("vqa", {"question": "What is it?", "answer": "ring", "image": "red.png"},
     (f"What is it?\n{SHORT}", [], ["ring"], ["red.png"])),
    ("captions", CAPTION, (DESCRIBE, [], ["A ring.", "A red ring."], ["red.png"])),
    ("scienceqa", SCIENCE, (f"Context: Ice is cold.\nWhat melts ice?\nA. cold\nB. heat\n{LETTER}",
                            ["A", "B"], "B", ["red.png"])),
    ("exact", OWN, ("And?", ["A star."], ["A star."], ["red.png"])),
    ("likelihood", {"prompt": "What?", "response": "A star."},
     ("What?", ["A star."], ["A star."], [])),
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
    ("lambada", {"text": "leg"}, "no passage"),
    ("pope", POPE | {"label": "maybe"}, "'maybe' is not in list"),
    ("pope", {**POPE, "image": ""}, "no image"),
    ("vqa", VQA | {"answers": ["a", "b"]}, "1 answer, or 4 and more"),
    ("captions", {"image": "red.png", "captions": ["", "A ring."]}, "empty answer"),
    ("exact", {"conversations": [{"from": "gpt", "value": "A"}]}, "turns out of order"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_broken_row_is_left_out_with_the_reason(name, row, why, tmp_path):
    good = {"hellaswag": HELLASWAG, "arc": HUB, "piqa": PIQA, "lambada": LAMBADA,
            "pope": POPE, "vqa": VQA, "captions": CAPTION, "scienceqa": SCIENCE,
            "exact": OWN}[name]
    found = task_runner(name, tmp_path, [good, row, good], new_model(512))
    assert len(found.questions) == 2 and len(found.left_out) == 1
    assert found.left_out[0].startswith("row 1: ") and why in found.left_out[0]


@pytest.mark.parametrize("row, question, n_images", [
    ({"conversations": [{"from": "human", "value": "<image>\nWhat?"},
                        {"from": "gpt", "value": "A ring."}], "image": "red.png"}, "What?", 1),
    ({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"},
                   {"role": "assistant", "content": "A ring."}]}, "What?", 0),
    ({"instruction": "What?", "input": "Here.", "output": "A ring."}, "What?\nHere.", 0),
    ({"id": "1", "image_path": "/content/drive/red.png", "caption": "A ring."}, "", 1),
], ids=["LLaVA", "messages", "instruction", "caption"])
def test_own_files_in_any_format_of_the_data(row, question, n_images, tmp_path):
    """By likelihood and exact match; text-only as well where there are images, which are found by
    the end of a path."""
    for name in "likelihood", "exact":
        found = task_runner(name, tmp_path, [row] * 3)
        text = TOKENIZER.decode(found.item(found.questions[0]).prompt)
        assert text.endswith(f"<|user|>{'<|image|>' * n_images}{question}<|end|><|assistant|>")
        assert found.questions[0].references == ["A ring."]
        result = found.run()
        assert result["n"] == 3 and not found.left_out and ("text_only" in result) == bool(n_images)


@pytest.mark.parametrize("name, text, model, why", [
    ("pope", b"", new_model, "holds no rows"),
    ("pope", b"[]", new_model, "holds no rows"),
    ("pope", b"[1, 2", new_model, "cannot read"),
    ("pope", None, new_model, "cannot read the task file"),
    ("pope", b'{"questions": []}', new_model, "format of pope .row 0: no field 'label'"),
    ("winogrande", b"{}", new_model, "no task winogrande: hellaswag, arc, "),
    ("pope", json.dumps(POPE).encode(), text_model, "text-only"),
    ("hellaswag", json.dumps(HELLASWAG).encode(), lambda: text_model(64),
     "row 0: longer than the context"),
])
def test_what_cannot_be_asked_is_one_sentence(name, text, model, why, tmp_path):
    if text is not None:
        (tmp_path / "rows.json").write_bytes(text)
    with pytest.raises(UserError, match=why):
        TaskRunner(name, str(tmp_path / "rows.json"), model(), TOKENIZER).run()


def test_json_lists_and_files_of_the_hub_are_read_like_lines(tmp_path, monkeypatch):
    (tmp_path / "rows.json").write_text(json.dumps([PIQA, PIQA], indent=1))
    monkeypatch.setattr(tasks, "fetched", lambda pattern: [tmp_path / pattern.split("/")[-1]])
    for path in str(tmp_path / "rows.json"), "hf://owner/name/rows.json":
        assert len(TaskRunner("piqa", path, text_model(), TOKENIZER).questions) == 2


def test_unreadable_images_are_left_out_and_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = [POPE, POPE | {"image": "gone.png"}, POPE | {"image": "broken.png"}, POPE]
    found = task_runner("pope", tmp_path, rows)
    assert found.run()["n"] == 2
    assert [text[:7] for text in found.left_out] == ["row 1: ", "row 2: "]
    assert "gone.png" in found.left_out[0] and "broken.png" in found.left_out[1]


def test_a_question_about_an_image_is_asked_in_the_chat_template_with_and_without_it(tmp_path):
    found = task_runner("exact", tmp_path, [OWN])
    with_image, text_only = (TOKENIZER.decode(found.item(found.questions[0], given).prompt)
                             for given in (True, False))
    assert with_image == ("<|endoftext|><|user|><|image|>What?<|end|><|assistant|>A<|end|>"
                          "<|user|>And?<|end|><|assistant|>")
    assert text_only == with_image.replace("<|image|>", "")


# ------------------------------------------------------------------------------------------- scores


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
            "scienceqa": {"question": some(rng, 3, 9), "choices": texts, "answer": k},
        }[name])
    return found


CHOSEN = [name for name, task in TASKS.items()
          if task.score in (tasks.choice_scores, tasks.yes_no_scores)]


@pytest.mark.parametrize("name", CHOSEN)
def test_an_untrained_model_scores_chance(name, tmp_path):
    rows = synthetic(name, random.Random(5), 300)
    chance = {"piqa": 1 / 2, "pope": 1 / 2}.get(name, 1 / 4)
    result = task_runner(name, tmp_path, rows).run()
    assert result["n"] == 300 and result["chance"] == pytest.approx(chance)
    for label, (value, error) in result["scores"].items():
        if label in ("acc", "acc_norm", "auroc"):
            guess = 0.5 if label == "auroc" else chance
            assert abs(value - guess) <= 3 * error < 0.15, label


def test_closed_forms_for_a_model_that_finds_all_tokens_equally_likely(tmp_path):
    rng, V, log_V = random.Random(3), TOKENIZER.n_vocab, np.log(TOKENIZER.n_vocab)
    model = uniform_model()
    rows = [{"text": f"{some(rng, 3, 9)} ring"} for _ in range(30)]
    found = task_runner("lambada", tmp_path, rows, model).run()["scores"]
    n = len(TOKENIZER.encode(" ring"))
    assert found["perplexity"][0] == pytest.approx(V**n, rel=1e-4)
    rows = [{"prompt": some(rng, 3, 9), "response": some(rng, 1, 9)} for _ in range(30)]
    found = task_runner("likelihood", tmp_path, rows, model).run()["scores"]
    assert found["nats"][0] == pytest.approx(log_V, rel=1e-5)


YES, NO = [[-1.0, True, 1], [-2.0, False, 1]], [[-3.0, False, 1], [-2.0, True, 1]]


@pytest.mark.parametrize("name, rows, answers, expected", [
    ("pope", [POPE | {"label": label} for label in ("yes", "yes", "no", "no")],
     [YES, NO, YES, NO], {"acc": 0.5, "f1": 0.5, "yes_share": 0.5, "auroc": 0.5}),
    ("vqa", [VQA] * 2, ["The ring.", "star"], {"vqa": 0.5}),
    ("exact", [OWN] * 2, [" A star.", "A"], {"exact": 0.5}),
    ("captions", [CAPTION | {"captions": ["a red ring on a table"]},
                  CAPTION | {"captions": ["a blue star in the sky"]}],
     ["a red ring on a table", "a cold man sees ice"], {"cider": 5}),
])
def test_scores_by_hand(name, rows, answers, expected):
    questions = [question_of(TASKS[name], row) for row in rows]
    scores, _ = TASKS[name].score(questions, answers)
    found = {label: tasks.value_and_error(score) for label, score in scores.items()}
    assert {label: value for label, (value, _) in found.items()} == pytest.approx(expected)
    assert all(0 < error < 5 for _, error in found.values())


# ------------------------------------------------------------------------------------------ lm_eval


def by_lm_eval(folder, file, model):
    """The samples of lm_eval's own HellaSwag for an exported model."""
    lm_eval = pytest.importorskip("lm_eval", reason="pip install lm_eval")
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


@pytest.mark.slow
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
    found = TaskRunner("hellaswag", file, model, TOKENIZER)
    answers = [answer["answer"] for answer in found.ask(range(20))]
    for ours, theirs in zip(answers, samples, strict=True):
        assert [x[0] for x in ours] == pytest.approx(
            [nats for nats, _ in theirs["filtered_resps"]], abs=1e-2)
    marks, _ = TASKS["hellaswag"].score(found.questions, answers)
    for metric in "acc", "acc_norm":
        assert marks[metric].tolist() == [sample[metric] for sample in samples]
    assert 0 < marks["acc"].sum() < 20 and (marks["acc"] != marks["acc_norm"]).any()


# ----------------------------------------------------------------------------------------- resuming


def test_a_stopped_run_resumes_and_asks_nothing_twice(tmp_path, monkeypatch):
    name = "pope"
    monkeypatch.setattr(runner, "PART", 4)
    monkeypatch.setattr(tasks, "RESAMPLES", 5)
    rows = synthetic("pope", random.Random(4), 10)
    for number, row in enumerate(rows):
        row["label"] = "yes" if number in (3, 4, 5, 6) else "no"
    rows[1]["image"] = "gone.png"
    rows[9]["text"] = "too long " * 99
    complete = task_runner(name, tmp_path, rows)
    result = complete.run()
    counts, stopped = [], task_runner(name, tmp_path, rows, out=str(tmp_path / "out"))

    def stop(n):
        counts.append(n)
        if sum(counts) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.run(stop)
    with open(stopped.file, "a") as file:
        file.write('{"answer": [[')  # killed while writing
    for asked in [8, 9], []:  # the rest, then nothing
        resumed, numbers = task_runner(name, tmp_path, rows, out=str(tmp_path / "out")), []
        ask = resumed.ask
        resumed.ask = lambda some, ask=ask, numbers=numbers: numbers.extend(some) or ask(some)
        assert resumed.run() == result and numbers == asked
        assert resumed.left_out == complete.left_out and len(complete.left_out) == 2
        assert resumed.left_out[1] == "row 9: longer than the context"
        assert len(stopped.file.read_text().splitlines()) == 11


def test_answers_of_another_checkpoint_or_to_other_questions_are_refused(tmp_path):
    rows, out = synthetic("piqa", random.Random(4), 5), str(tmp_path / "out")
    task_runner("piqa", tmp_path, rows, out=out, checkpoint="a").run()
    for other, checkpoint in (rows, "b"), (rows[:4], "a"):
        with pytest.raises(UserError, match="--out"):
            task_runner("piqa", tmp_path, other, out=out, checkpoint=checkpoint).run()


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
    found = json.loads((tmp_path / "out/eval.json").read_text())
    assert set(found["tasks"]) == {"pope:popular", "pope:random", "piqa"}
    assert found["tasks"]["piqa"]["n"] == 5 and len(found["sha256"]) == 64
    logs = [f"{name}.jsonl" for name in ("pope.popular", "pope.random", "piqa.rows")]
    assert all((tmp_path / "out" / log).is_file() for log in logs)
