"""sample.py --input: every row gets a line, and a run resumes to the same file."""

import json
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, run
from test_conversation import BLUE, RED, new_model, save

SHORT = ("--max_tokens=12", "--device=cpu", "--precision=fp32")
QUESTION = "What do you see?"


def write(path, rows):
    """A JSONL file of objects, or of lines as they are; returns its path."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def read(path):
    return list(map(json.loads, path.read_text(encoding="utf-8").removesuffix("\n").split("\n")))


def answer_all(checkpoint, rows, out, *flags):
    """The lines of a run that answers rows beside `out`."""
    file = write(out.with_suffix(".rows"), rows)
    result = run("sample.py", checkpoint, f"--input={file}", f"--output={out}", *SHORT, *flags)
    assert (result.status, result.err) == (0, "")  # no bar where nobody sees it move
    lines = read(out)
    assert [line.pop("row") for line in lines] == list(range(len(lines)))
    return lines


def asked(checkpoint, prompt, *flags):
    """What sample.py --prompt says."""
    result = run("sample.py", checkpoint, f"--prompt={prompt}", *SHORT, *flags)
    assert (result.status, result.err) == (0, "")
    return result.out.removesuffix("\n")


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A checkpoint that sees."""
    folder = tmp_path_factory.mktemp("seeing")
    save(folder, new_model())
    return folder


@pytest.fixture
def eyes(seeing, tmp_path):
    """(a checkpoint that sees, a folder with pictures p0.png ... beside the rows)."""
    for i in range(5):
        (RED if i % 2 == 0 else BLUE).rotate(30 * i).save(tmp_path / f"p{i}.png")
    return seeing, tmp_path


# ---------------------------------------------------------------------------------------- answers


def test_rows_get_the_answers_that_prompts_get(eyes):
    checkpoint, folder = eyes
    prompts = [QUESTION, "Is it red?", "How many\nthings?" * 5, "\N{THUMBS UP SIGN}"]
    expected = [asked(checkpoint, prompt) for prompt in prompts]
    assert len(set(expected)) == len(prompts)
    rows = [{"prompt": prompt} for prompt in prompts]
    for batch in 1, 3, 64:
        lines = answer_all(checkpoint, rows, folder / f"{batch}.jsonl", f"--batch={batch}")
        assert lines == [{"answer": answer} for answer in expected]


def test_a_chat_in_any_form_is_answered_after_its_last_question(eyes):
    checkpoint, folder = eyes
    said = [("user", "Is it red?"), ("assistant", "No."), ("user", QUESTION)]
    turns = [{"role": role, "content": text} for role, text in said]
    theirs = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text}
              for role, text in said]
    right = {"role": "assistant", "content": "A ring."}
    lines = answer_all(checkpoint, [
        {"messages": turns}, {"messages": [*turns, right]}, {"conversations": theirs},
        {"conversations": [*theirs, {"from": "gpt", "value": "A ring."}]},
        {"instruction": "Is it", "input": "red?", "output": "No."}, {"prompt": "Is it\nred?"},
        {"messages": [{"role": "system", "content": "Be brief."}, *turns]},
        {"prompt": QUESTION, "response": "A ring."}, {"prompt": QUESTION}], folder / "out.jsonl")
    answers = [line["answer"] for line in lines]
    assert len(set(answers[:4])) == 1 and answers[4] == answers[5] and answers[7] == answers[8]
    assert len(set(answers)) == 4


def test_images_are_relative_to_the_input_file(eyes):
    checkpoint, folder = eyes
    one, two = f"--image={folder}/p0.png", f"--image={folder}/p1.png"
    messages = [{"role": "user", "content": f"{QUESTION}\n<image>"}]
    lines = answer_all(checkpoint, [
        {"prompt": QUESTION, "image": "p0.png"}, {"prompt": QUESTION, "image": ["p0.png"]},
        {"prompt": QUESTION, "image": f"{folder}/p0.png"},
        {"prompt": f"<image>\n{QUESTION}", "images": ["p0.png"]},
        {"prompt": QUESTION, "images": ["p0.png", "p1.png"]}, {"prompt": QUESTION},
        {"messages": messages, "image": "p0.png"}], folder / "out.jsonl")
    answers = [line["answer"] for line in lines]
    assert answers[:4] == [asked(checkpoint, QUESTION, one)] * 4
    assert answers[4:6] == [asked(checkpoint, QUESTION, *flags) for flags in ((one, two), ())]


def test_every_row_has_its_own_seed(eyes):
    checkpoint, folder = eyes
    flags = ("--temperature=1", "--repetition_penalty=2", "--batch=2", "--seed=5")
    rows = [{"prompt": QUESTION}] * 4
    lines = answer_all(checkpoint, rows, folder / "a.jsonl", *flags)
    assert len({line["answer"] for line in lines}) == 4
    assert lines[2] == {"answer": asked(checkpoint, QUESTION, *flags[:3], "--seed=7")}
    assert answer_all(checkpoint, rows, folder / "b.jsonl", *flags) == lines


def test_a_pretrained_checkpoint_continues_text(pipeline, tmp_path):
    prompts, checkpoint = ["Once upon", "Mia has a"], pipeline.folder / "pretrain"
    lines = answer_all(checkpoint, [{"prompt": prompt} for prompt in prompts],
                       tmp_path / "out.jsonl")
    assert [prompt + line["answer"] for prompt, line in zip(prompts, lines, strict=True)] == [
        asked(checkpoint, prompt) for prompt in prompts]


def test_ids_are_kept(eyes):
    checkpoint, folder = eyes
    ids = ["a/1", 7, 0, ["x"], "\N{THUMBS UP SIGN}\u2028", "\ud83d"]  # at last half a character
    rows = [{"id": id_, "prompt": QUESTION} for id_ in ids] + [{"id": "broken"}]
    lines = answer_all(checkpoint, rows, folder / "out.jsonl")
    assert [line["id"] for line in lines] == [*ids, "broken"] and "error" in lines[-1]


# ----------------------------------------------------------------------------------- broken rows

BROKEN = {
    "not a line of JSON": '{"prompt": "What',
    "row is not a JSON object": '["What?"]',
    "a row without a question": {"text": QUESTION},
    "a question that is not text": {"prompt": 5},
    "a chat without a question": {"messages": [{"role": "assistant", "content": "No."}]},
    "turns out of order": {"messages": [{"role": "user", "content": text} for text in "ab"]},
    "a turn without text": {"messages": [{"role": "user", "content": [QUESTION]}]},
    "there is no image no.png": {"prompt": QUESTION, "image": "no.png"},
    "is not a readable image": {"prompt": QUESTION, "image": "text.png"},
    "File name too long": {"prompt": QUESTION, "image": "no" * 300},
    "an image that is neither a name nor bytes": {"prompt": QUESTION, "image": 5},
    "more than 4 images": {"prompt": QUESTION, "images": [f"p{i}.png" for i in range(5)]},
    "images and <image> marks do not match": {"prompt": "<image>?"},
    "longer than the context of 256 tokens": {"prompt": "word," * 300},
}


def test_a_broken_row_gets_an_error_and_the_others_their_answers(eyes):
    """Each between two good rows, and all of a batch broken."""
    checkpoint, folder = eyes
    (folder / "text.png").write_text("not a picture")
    good = {"prompt": QUESTION, "image": "p0.png"}
    rows = [good, *(row for broken in BROKEN.values() for row in (broken, good))]
    lines = answer_all(checkpoint, rows, folder / "out.jsonl")
    assert lines[::2] == [lines[0]] * (len(BROKEN) + 1) and lines[0]["answer"]
    for words, line in zip(BROKEN, lines[1::2], strict=True):
        assert words in line["error"] and "answer" not in line
    alone = answer_all(checkpoint, BROKEN.values(), folder / "alone.jsonl", "--batch=2")
    assert alone == lines[1::2]


def test_invalid_utf8_is_an_error_of_its_line_only(eyes):
    checkpoint, folder = eyes
    expected = answer_all(checkpoint, [{"prompt": QUESTION}], folder / "one.jsonl")
    rows = [b'\xef\xbb\xbf{"prompt": "What do you see?"}\r', b'{"prompt": "caf\xe9?"}', b" ",
            '{"id": "\u2028\x85", "prompt": "What do you see?"}'.encode()]
    (folder / "bytes.jsonl").write_bytes(b"\n".join(rows))
    assert run("sample.py", checkpoint, f"--input={folder}/bytes.jsonl",
               f"--output={folder}/out.jsonl", *SHORT).status == 0
    first, second, third = read(folder / "out.jsonl")
    assert first["answer"] == third["answer"] == expected[0]["answer"]
    assert second["error"] == "not a line of JSON"


def test_a_text_only_model_refuses_images(pipeline, tmp_path):
    image = f"{pipeline.data}/images/0.png"
    lines = answer_all(pipeline.folder / "sft", [
        {"prompt": QUESTION, "image": image}, {"prompt": QUESTION}], tmp_path / "out.jsonl")
    assert "text-only" in lines[0]["error"] and "answer" in lines[1]


# ------------------------------------------------------------------------ stopped and started again

ROWS = [*({"id": f"q{i}", "prompt": f"{QUESTION} {i}", "image": f"p{i % 5}.png"}
          for i in range(9)), {"prompt": "", "id": "broken"}, {"prompt": "And now?"}]


@pytest.mark.parametrize("flags", [(), ("--temperature=1", "--repetition_penalty=1.2")],
                         ids=["greedy", "drawn"])
def test_a_truncated_output_resumes_to_the_same_file(eyes, flags):
    checkpoint, folder = eyes
    out, flags = folder / "out.jsonl", ("--batch=4", *flags)
    answer_all(checkpoint, ROWS, out, *flags)
    whole = out.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length in 0, 5, ends[3], ends[3] + 1, ends[5] - 1, ends[8] + 30, len(whole) - 1:
        out.write_bytes(whole[:length])
        answer_all(checkpoint, ROWS, out, *flags)
        assert out.read_bytes() == whole


def test_a_killed_run_resumes_to_the_same_file(eyes):
    checkpoint, folder = eyes
    rows, flags = ROWS * 8, (*SHORT, "--batch=4", "--temperature=1")
    file, out = write(folder / "in.jsonl", rows), folder / "out.jsonl"
    argv = ["sample.py", checkpoint, f"--input={file}", f"--output={out}", *flags]
    process = subprocess.Popen([sys.executable, ROOT / argv[0], *argv[1:]],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (out.exists() and out.read_bytes().count(b"\n") >= 8):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    assert (process.wait(), process.stderr.read()) == (-signal.SIGKILL, b"")
    process.stderr.close()
    n_done = out.read_bytes().count(b"\n")
    assert 8 <= n_done < len(rows)
    result = run(*argv)
    assert f"({out} has {n_done // 4 * 4} of {len(rows)} rows already)" in result.out
    again = folder / "again.jsonl"
    assert run(*argv[:3], f"--output={again}", *flags).status == 0
    assert out.read_bytes() == again.read_bytes()


def test_a_finished_run_changes_nothing(eyes):
    checkpoint, folder = eyes
    file, out = write(folder / "in.jsonl", ROWS), folder / "new" / "out.jsonl"
    argv = ("sample.py", checkpoint, f"--input={file}", f"--output={out}", *SHORT)
    assert "11 rows done, 1 of them with an error" in run(*argv).out
    before = out.read_bytes(), out.stat().st_mtime_ns
    for batch in 4, 64:
        result = run(*argv, f"--batch={batch}")
        assert (result.status, result.out) == (0, f"({out} has 11 of 11 rows already)\n")
        assert (out.read_bytes(), out.stat().st_mtime_ns) == before


@pytest.mark.parametrize("content", [
    "Dear diary,", "Dear diary,\nnothing happened.\n", '{"prompt": "What?"}\n', '{"row": 0}\n',
    '{"row": 0, "answer": "A ring."}\nDear diary', '["row"]\n', "\n", "[" * 100_000 + "\n",
    '{"row": 1, "answer": "A ring."}\n', '{"row": 0, "id": "other", "answer": "A ring."}\n',
    '{"row": 0, "answer": "A ring."}\n{"row": 1, "answer": "A ring."}\n',
    '{"row": 0, "answer": "A ring."}\n{"row": 1, "ans'],
    ids=lambda content: content[:60])
def test_another_output_file_is_refused_and_unchanged(pipeline, tmp_path, content):
    out, file = tmp_path / "out.jsonl", write(tmp_path / "in.jsonl", [{"prompt": QUESTION}])
    out.write_text(content)
    argv = ("sample.py", pipeline.folder / "sft", f"--input={file}", f"--output={out}", *SHORT)
    refusal = run(*argv).refusal
    assert f"--output={out} " in refusal
    assert out.read_text() == content


# ---------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(("flags", "words"), [
    ("--input={rows}", "--output"), ("--output={tmp}/out.jsonl", "--input"),
    ("--input={rows} --output={tmp}/out.jsonl --prompt=hi", "--prompt"),
    ("--input={rows} --output={tmp}/out.jsonl --image=x.png", "--image"),
    ("--input={tmp}/no.jsonl --output={tmp}/out.jsonl", "{tmp}/no.jsonl: No such file"),
    ("--input={tmp} --output={tmp}/out.jsonl", "--input={tmp}: Is a directory"),
    ("--input={tmp}/empty.jsonl --output={tmp}/out.jsonl", "no rows"),
    ("--input={rows} --output={tmp}", "--output={tmp}: Is a directory"),
    ("--input={rows} --output={rows}/out.jsonl", "--output={rows}/out.jsonl"),
    ("--input={rows} --output={tmp}/out.jsonl --batch=0", "batch must be 1 or more"),
])
def test_a_mistake_is_one_sentence(pipeline, tmp_path, flags, words):
    names = {"tmp": tmp_path, "rows": write(tmp_path / "in.jsonl", [{"prompt": QUESTION}])}
    (tmp_path / "empty.jsonl").write_text(" \n")
    argv = [flag.format(**names) for flag in flags.split()]
    assert words.format(**names) in run("sample.py", pipeline.folder / "sft", *argv, *SHORT).refusal
    assert not (tmp_path / "out.jsonl").exists()
