"""sample.py --input: every row gets a line, and a run resumes to the same file."""

import json
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, run
from test_conversation import BLUE, RED, new_model, save
from test_tokenizer import say

SHORT = ("--max_tokens=12", "--device=cpu", "--precision=fp32")
QUESTION = "What do you see?"


def write(path, rows):
    """A JSONL file of objects, or of lines as they are; returns its path."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), errors="surrogateescape")
    return path


def answer_all(checkpoint, rows, out, *flags):
    """The output lines of a run for `rows`, without the header."""
    file = write(out.with_suffix(".rows"), rows)
    result = run("sample.py", checkpoint, f"--input={file}", f"--output={out}", *SHORT, *flags)
    assert (result.status, result.err) == (0, "")  # no progress bar outside a terminal
    text = out.read_text(encoding="utf-8").removesuffix("\n")
    lines = list(map(json.loads, text.split("\n")))[1:]
    assert [line.pop("row") for line in lines] == list(range(len(lines)))
    return lines


def asked(checkpoint, prompt, *flags):
    """The answer of sample.py --prompt."""
    result = run("sample.py", checkpoint, f"--prompt={prompt}", *SHORT, *flags)
    assert (result.status, result.err) == (0, "")
    return result.out.removesuffix("\n")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A vision checkpoint."""
    save(folder := tmp_path_factory.mktemp("checkpoint"), new_model())
    return folder


@pytest.fixture
def folder(tmp_path):
    """A folder with images p0.png ... beside the rows."""
    for i in range(5):
        (RED if i % 2 == 0 else BLUE).rotate(30 * i).save(tmp_path / f"p{i}.png")
    return tmp_path


def test_rows_get_the_same_answers_as_prompts(checkpoint, folder):
    prompts = [QUESTION, "Is it red?", "How many\nthings?" * 5, "\N{THUMBS UP SIGN}"]
    expected = [asked(checkpoint, prompt) for prompt in prompts]
    assert len(set(expected)) == len(prompts)
    rows = [{"prompt": prompt} for prompt in prompts]
    for batch in 1, 3, 64:
        lines = answer_all(checkpoint, rows, folder / f"{batch}.jsonl", f"--batch={batch}")
        assert lines == [{"answer": answer} for answer in expected]


def test_a_chat_in_any_form_is_answered_after_its_last_question(checkpoint, folder):
    turns = say("user", "Is it red?", "assistant", "No.", "user", QUESTION)
    theirs = [{"from": {"user": "human", "assistant": "gpt"}[turn["role"]],
               "value": turn["content"]} for turn in turns]
    lines = answer_all(checkpoint, [
        {"messages": turns}, {"messages": [*turns, *say("assistant", "A ring.")]},
        {"conversations": theirs}, {"conversations": [*theirs, {"from": "gpt", "value": "A"}]},
        {"instruction": "Is it", "input": "red?", "output": "No."}, {"prompt": "Is it\nred?"},
        {"messages": [*say("system", "Be brief."), *turns]},
        {"prompt": QUESTION, "response": "A ring."}, {"prompt": QUESTION}], folder / "out.jsonl")
    answers = [line["answer"] for line in lines]
    assert len(set(answers[:4])) == 1 and answers[4] == answers[5] and answers[7] == answers[8]
    assert len(set(answers)) == 4


def test_images_are_relative_to_the_input_file(checkpoint, folder):
    one, two = f"--image={folder}/p0.png", f"--image={folder}/p1.png"
    lines = answer_all(checkpoint, [
        {"prompt": QUESTION, "image": "p0.png"},
        {"prompt": QUESTION, "image": f"..\\{folder.name}\\p0.png"},
        {"prompt": f"<image>\n{QUESTION}", "images": ["p0.png"]},
        {"prompt": QUESTION, "images": ["p0.png", "p1.png"]}, {"prompt": QUESTION}],
        folder / "out.jsonl")
    answers = [line["answer"] for line in lines]
    assert answers == [asked(checkpoint, QUESTION, *flags)
                       for flags in [(one,)] * 3 + [(one, two), ()]]


def test_rows_and_seeds_share_no_sample(checkpoint, folder):
    answers = [answer_all(checkpoint, [{"prompt": QUESTION}] * 4, folder / f"{number}.jsonl",
                          "--temperature=1", "--repetition_penalty=2", f"--seed={seed}")
               for number, seed in enumerate((1, 1, 2))]
    assert answers[0] == answers[1]
    assert len({line["answer"] for lines in answers[1:] for line in lines}) == 8


def test_a_pretrained_checkpoint_continues_text(pipeline, tmp_path):
    prompts, checkpoint = ["Once upon", "Mia has a"], pipeline.folder / "pretrain"
    lines = answer_all(checkpoint, [{"prompt": prompt} for prompt in prompts],
                       tmp_path / "out.jsonl")
    assert [prompt + line["answer"] for prompt, line in zip(prompts, lines, strict=True)] == [
        asked(checkpoint, prompt) for prompt in prompts]


def test_ids_are_kept(checkpoint, folder):
    ids = ["a/1", 7, 0, ["x"], "\N{THUMBS UP SIGN}\u2028", "\ud83d"]  # at last half a character
    rows = [{"id": id_, "prompt": QUESTION} for id_ in ids] + [{"id": "broken"}]
    lines = answer_all(checkpoint, rows, folder / "out.jsonl")
    assert [line["id"] for line in lines] == [*ids, "broken"] and "error" in lines[-1]


BROKEN = {
    "not UTF-8": '{"prompt": "caf\udce9?"}',
    "row is not a JSON object": "7", "turns of another form": '["What?"]',
    "an empty question; its columns are id, title": {"title": QUESTION, "id": "a"},
    "out of order": {"messages": say("assistant", "No.")},
    "turns out of order": {"messages": say("user", "a", "user", "b")},
    "no.png": {"prompt": QUESTION, "image": "no.png"},
    "is not a readable image": {"prompt": QUESTION, "image": "text.png"},
    "File name too long": {"prompt": QUESTION, "image": "no" * 300},
    "an image that is neither a name nor bytes": {"prompt": QUESTION, "image": 5},
    "more than 4 images": {"prompt": QUESTION, "images": [f"p{i}.png" for i in range(5)]},
    "an image mark, but no image": {"prompt": "<image>?"},
    "context is 256": {"prompt": "word," * 300},
}


def test_a_broken_row_gets_an_error_and_the_others_their_answers(checkpoint, folder):
    """Each between two valid rows, and in batches with no valid row."""
    (folder / "text.png").write_text("not a picture")
    good = {"prompt": QUESTION, "image": "p0.png"}
    rows = [good, *(row for broken in BROKEN.values() for row in (broken, good))]
    lines = answer_all(checkpoint, rows, folder / "out.jsonl")
    assert lines[::2] == [lines[0]] * (len(BROKEN) + 1) and lines[0]["answer"]
    for words, line in zip(BROKEN, lines[1::2], strict=True):
        assert words in line["error"] and "answer" not in line
    file, out = folder / "out.rows", folder / "said.jsonl"
    said = run("sample.py", checkpoint, f"--input={file}", f"--output={out}", *SHORT).out
    assert "no answer to 1 rows: more than 4 images (out.rows:" in said
    alone = answer_all(checkpoint, BROKEN.values(), folder / "alone.jsonl", "--batch=2")
    assert alone == lines[1::2]


ROWS = [*({"id": f"q{i}", "prompt": f"{QUESTION} {i}", "image": f"p{i % 5}.png"}
          for i in range(9)), {"prompt": "", "id": "broken"}, {"prompt": "And now?"}]


def test_a_truncated_output_resumes_to_the_same_file(checkpoint, folder):
    out, flags = folder / "out.jsonl", ("--batch=4", "--temperature=1", "--repetition_penalty=1.2")
    answer_all(checkpoint, ROWS, out, *flags)
    complete = out.read_bytes()
    ends = [i + 1 for i, byte in enumerate(complete) if byte == ord("\n")]
    for length in 0, 5, ends[4], ends[6] - 1:
        out.write_bytes(complete[:length])
        answer_all(checkpoint, ROWS, out, *flags)
        assert out.read_bytes() == complete


def test_a_killed_run_resumes_to_the_same_file(checkpoint, folder):
    rows, flags = ROWS * 8, (*SHORT, "--batch=4", "--temperature=1")
    file, out = write(folder / "in.jsonl", rows), folder / "out.jsonl"
    argv = ["sample.py", checkpoint, f"--input={file}", f"--output={out}", *flags]
    process = subprocess.Popen([sys.executable, ROOT / argv[0], *argv[1:]],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (out.exists() and out.read_bytes().count(b"\n") >= 9):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    assert (process.wait(), process.stderr.read()) == (-signal.SIGKILL, b"")
    process.stderr.close()
    n_done = out.read_bytes().count(b"\n") - 1
    assert 8 <= n_done < len(rows)
    result = run(*argv)
    assert f"({out} has {n_done // 4 * 4} of {len(rows)} rows already)" in result.out
    again = folder / "again.jsonl"
    assert run(*argv[:3], f"--output={again}", *flags).status == 0
    assert out.read_bytes() == again.read_bytes()


def test_a_finished_run_changes_nothing(checkpoint, folder):
    file, out = write(folder / "in.jsonl", ROWS), folder / "new" / "out.jsonl"
    argv = ("sample.py", checkpoint, f"--input={file}", f"--output={out}", *SHORT)
    assert "11 rows done, 1 of them with an error" in run(*argv).out
    before = out.read_bytes(), out.stat().st_mtime_ns
    result = run(*argv)
    assert (result.status, result.out) == (0, f"({out} has 11 of 11 rows already)\n")
    assert (out.read_bytes(), out.stat().st_mtime_ns) == before


def test_an_output_of_another_checkpoint_settings_or_questions_is_refused(pipeline, tmp_path):
    out, rows = tmp_path / "out.jsonl", [{"prompt": QUESTION}]
    answer_all(pipeline.folder / "sft", rows, out)
    before = out.read_bytes()
    files = [write(tmp_path / f"{n}.jsonl", rows * n) for n in (1, 2)]
    for stage, file, flags in (("sft", files[1], ()), ("vision_sft", files[0], ()),
                               ("sft", files[0], ("--temperature=1",)),
                               ("sft", files[0], ("--precision=bf16",)),
                               ("sft", files[0], ("--batch=7",))):
        argv = (pipeline.folder / stage, f"--input={file}", f"--output={out}", *SHORT, *flags)
        assert f"{out} has answers of another checkpoint" in run("sample.py", *argv).refusal
        assert out.read_bytes() == before
