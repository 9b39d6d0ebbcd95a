"""sample.py in a terminal: streaming, commands, keys, and how it ends."""

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch
from conftest import ROOT, run
from test_conversation import BLUE, RED, TOKENIZER, new_model, save

from prep.schema import images_of, messages_of
from tokenizer import IMAGE_MARK

PATIENCE = 60  # seconds until a program that says nothing is taken for dead
LONG = 3000  # tokens of an answer that nobody waits for
ENVIRONMENT = {**os.environ, "TERM": "dumb", "PYTHONUNBUFFERED": "1"}


class Terminal:
    """sample.py in a terminal of its own, and somebody who types and reads."""

    def __init__(self, folder, *argv):
        self.screen = ""  # what was shown and not yet read
        command = [sys.executable, str(ROOT / "sample.py"), *map(str, argv)]
        self.process, self.keys = pty.fork()
        if self.process == 0:
            os.chdir(folder)
            os.execve(sys.executable, command, ENVIRONMENT)
        fcntl.ioctl(self.keys, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 500, 0, 0))

    def more(self, deadline):
        """Read once; says whether there was anything: nothing comes behind the end."""
        assert self.answers(deadline - time.monotonic()), f"nothing came behind {self.screen!r}"
        try:
            read = os.read(self.keys, 1 << 16)
        except OSError:  # what Linux says when the other end is gone
            read = b""
        self.screen += read.decode(errors="replace").replace("\r\n", "\n")
        return bool(read)

    def until(self, words):
        """What is shown up to and with `words`."""
        deadline = time.monotonic() + PATIENCE
        while words not in self.screen:
            assert self.more(deadline), f"it ended behind {self.screen!r}"
        shown, self.screen = self.screen.split(words, 1)
        return shown + words

    def type(self, keys):
        os.write(self.keys, keys.encode())

    def interrupt(self):
        """Ctrl-C at the prompt, as soon as a person could press it, and again if nothing happens:
        Python misses one that comes while the prompt is being drawn."""
        assert not self.screen
        time.sleep(0.3)
        self.type("\x03")
        if not self.answers(PATIENCE / 4):
            self.type("\x03")

    def answers(self, seconds):
        """Whether something comes to be read within that time."""
        poll = select.poll()
        poll.register(self.keys, select.POLLIN | select.POLLHUP)
        return bool(poll.poll(max(0, seconds) * 1000))

    def say(self, line):
        """Type a line at the prompt; what is shown before the next prompt, without the line."""
        self.type(f"{line}\n")
        self.until("\n")
        return self.until("you: ").removesuffix("you: ").removesuffix("\n")

    def end(self):
        """Wait for the program to end; (its exit status, what it showed at last)."""
        deadline = time.monotonic() + PATIENCE
        while self.more(deadline):
            pass
        status = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        self.process = None
        return status, self.screen

    def close(self):
        if self.process:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        os.close(self.keys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a checkpoint that can talk for long, and two pictures."""
    folder = tmp_path_factory.mktemp("terminal")
    save(folder / "talker", new_model(context=2 * LONG))
    RED.save(folder / "red.png")
    BLUE.save(folder / "a blue one.png")
    return folder


FLAGS = ("--max_tokens=9", "--device=cpu", "--precision=fp32")


@pytest.fixture(scope="module")
def terminals(folder):
    """The one program that most tests talk to: starting it takes seconds."""
    found = []
    yield found
    for one in found:
        one.close()


@pytest.fixture
def terminal(terminals, folder):
    """A program that waits at its prompt, as good as new."""
    if not terminals or terminals[-1].process is None:
        terminals.append(Terminal(folder, "talker", *FLAGS))
        greeting = terminals[-1].until("you: ")
        assert greeting == "/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends\nyou: "
    one = terminals[-1]
    one.say("/set temperature 0")
    one.say("/set max_tokens 9")
    assert one.say("/reset") == "(a new conversation)"
    yield one
    if one.screen:  # who knows where it is now
        terminals.pop().close()


def one_answer(folder, question, *flags):
    """What sample.py --prompt says to a question."""
    result = run("sample.py", folder / "talker", f"--prompt={question}", *FLAGS, *flags)
    assert (result.status, result.err) == (0, "")
    return result.out.removesuffix("\n")


# ---------------------------------------------------------------------------------------- answers


def test_a_question_gets_the_answer_that_it_gets_without_a_terminal(terminal, folder):
    for question in "What do you see?", "Is it red?":
        assert terminal.say(question) == f"model: {one_answer(folder, question)}"
        terminal.say("/reset")


def test_an_answer_is_shown_while_it_is_made(terminal):
    """The first words are there long before the last."""
    terminal.say("/set max_tokens 400")
    terminal.type("Tell me all!\n")
    terminal.until("model: ")
    deadline, n_reads = time.monotonic() + PATIENCE, 0
    while "you: " not in terminal.screen:
        assert terminal.more(deadline)
        n_reads += 1
    assert n_reads > 20
    terminal.until("you: ")


def test_ctrl_c_stops_the_answer_and_nothing_else(terminal):
    first = terminal.say("What do you see?")
    terminal.say(f"/set max_tokens {LONG}")
    terminal.type("Tell me all!\n")
    terminal.until("model: ")
    deadline = time.monotonic() + PATIENCE
    while len(terminal.screen) < 20:
        terminal.more(deadline)
    terminal.type("\x03")
    shown = terminal.until("you: ")
    assert shown.endswith(" ...\nyou: ") and len(shown) < LONG
    terminal.say("/set max_tokens 9")
    assert terminal.say("Go on.").startswith("model: ")
    for _ in range(3):
        assert "removed" in terminal.say("/undo")
    assert terminal.say("What do you see?") == first


def test_a_model_that_ends_at_once_is_heard_out(folder):
    """Its empty answers are shown as such, and no file gets them."""
    model = new_model()
    with torch.no_grad():  # <|end|> is the likeliest, whatever was read
        model.decoder.final_norm.weight.zero_()
        model.decoder.head.weight[TOKENIZER.end] = 100 * model.decoder.final_norm.bias
    save(folder / "silent", model)
    lines = ["What do you see?", f"/save {folder}/nothing.jsonl", "Is it red?", "/undo", "/quit"]
    result = run("sample.py", folder / "silent", *FLAGS, stdin="\n".join(lines))
    assert (result.status, result.err) == (0, "")
    assert result.out.count("model: \n(no answer)\n") == 2
    assert "nothing to save" in result.out and "removed" in result.out
    assert run("sample.py", folder / "silent", "--prompt=hi", *FLAGS).out == "\n"


def test_what_a_model_says_does_not_steer_the_terminal(terminal):
    """At a high temperature this one says any byte: nothing may move the cursor or clear it."""
    terminal.say("/set temperature 100")
    terminal.say("/set max_tokens 500")
    said = terminal.say("What do you see?").removeprefix("model: ")
    assert len(said) > 100 and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", said)


# --------------------------------------------------------------------------------------- commands


def test_image_shows_a_picture_and_starts_over(terminal, folder):
    terminal.say("Is it red?")
    assert terminal.say("/image red.png") == "(a new conversation)"
    question, picture = "What do you see?", f"--image={folder}/red.png"
    red = terminal.say(question)
    assert red == f"model: {one_answer(folder, question, picture)}"
    for name in "a blue one.png", "'a blue one.png'", "a\\ blue\\ one.png":
        terminal.say(f"/image {name}")
        assert terminal.say(question) not in (red, f"model: {one_answer(folder, question)}")
    terminal.say("/image red.png 'a blue one.png'")
    both = one_answer(folder, question, picture, f"--image={folder}/a blue one.png")
    assert terminal.say(question) == f"model: {both}"


def test_reset_forgets_the_picture_too(terminal, folder):
    terminal.say("/image red.png")
    assert terminal.say("/reset") == "(a new conversation)"
    assert terminal.say("Is it red?") == f"model: {one_answer(folder, 'Is it red?')}"


def test_undo_takes_the_last_question_back_but_not_the_picture(terminal, folder):
    shutil.copy(folder / "red.png", folder / "gone.png")
    terminal.say("/image gone.png")
    (folder / "gone.png").unlink()
    first, second = (terminal.say(text) for text in ("What do you see?", "Is it red?"))
    terminal.say("/undo")
    assert terminal.say("Is it red?") == second
    for _ in range(2):
        assert terminal.say("/undo") == "(the last question and its answer are removed)"
    assert terminal.say("/undo") == "(there is nothing to undo)"
    assert terminal.say("What do you see?") == first


def test_set_changes_a_setting_and_shows_them(terminal):
    question, answers = "What do you see?", []
    for temperature, seed in ("5", "1"), ("5", "2"), ("5", "1"), ("0", "1"):
        terminal.say(f"/set seed {seed}")
        assert terminal.say(f"/set temperature {temperature}") == f"temperature {temperature}.0"
        answers.append(terminal.say(question))
        terminal.say("/undo")
    assert answers[0] == answers[2] and len(set(answers)) == 3
    terminal.say("/set temperature 0.7")
    assert terminal.say("/set temperature") == "temperature 0.7"
    assert terminal.say("/set").splitlines() == [
        "temperature 0.7", "top_k 0", "top_p 1.0", "repetition_penalty 1.0", "seed 1",
        "max_tokens 9"]


@pytest.mark.parametrize(("command", "words"), [
    ("/set temprature 1", "temprature: temperature, top_k, top_p"),
    ("/set top_k 0.5", "top_k is of type int, not '0.5'"),
    ("/set temperature hot", "temperature is of type float"),
    ("/set temperature -1", "temperature must be 0 or more"),
    ("/set max_tokens 0", "max_tokens must be 1 or more"),
    ("/image", "which file?"), ("/image ''", "which file?"),
    ("/image 'no.png", " 'no.png"), ("/image talker", "talker"),
    (f"/image {'no' * 200}", "File name too long"),
    ("/image" + " red.png" * 5, "at most 4"),
    ("/save", "which file?"), ("/save red.png", "red.png: File exists"),
    ("/save no/where.json", "no/where.json: No such file or directory"),
    ("/photo red.png", "/photo"), ("word, " * 4000, "context is 6000"),
])
def test_a_mistake_is_one_sentence_and_changes_nothing(terminal, command, words):
    terminal.say("/image red.png")
    first = terminal.say("What do you see?")
    found = terminal.say(command)
    assert words in found and found[0] + found[-1] == "()" and "\n" not in found
    second = terminal.say("Is it red?")
    assert second.startswith("model: ")
    terminal.say("/undo")
    terminal.say("/undo")
    assert terminal.say("What do you see?") == first and terminal.say("Is it red?") == second


def test_help_names_every_command(terminal):
    shown = terminal.say("/help")
    for name in "/image", "/reset", "/undo", "/save", "/set", "/quit", "Ctrl-C", "Ctrl-D":
        assert name in shown
    assert "temperature, top_k, top_p, repetition_penalty, seed, max_tokens" in shown


def test_a_saved_conversation_is_a_row_of_data(terminal, folder):
    assert "nothing to save" in terminal.say("/save empty.jsonl")
    terminal.say("/image red.png 'a blue one.png'")
    questions = ["What do you see?", f"Is {IMAGE_MARK} red?"]
    answers = [terminal.say(text).removeprefix("model: ") for text in questions]
    assert terminal.say("/save 'one more.jsonl'") == "(saved as one more.jsonl)"
    row = json.loads((folder / "one more.jsonl").read_text())
    messages = messages_of(row)
    assert images_of(row, messages) == [str(folder / "red.png"), str(folder / "a blue one.png")]
    assert [m["content"] for m in messages] == [
        f"{IMAGE_MARK}{IMAGE_MARK}\n{questions[0]}", answers[0], "Is < image> red?", answers[1]]
    assert not (folder / "empty.jsonl").exists()


# ----------------------------------------------------------------------------------- keys and ends


def test_arrow_up_brings_the_last_line_back(terminal):
    answer = terminal.say("What do you see?")
    terminal.say("/undo")
    terminal.type("\x1b[A\x1b[A")
    terminal.until("What do you see?")
    assert terminal.say("") == answer
    assert terminal.say("") == ""  # an empty line asks nothing


def test_ctrl_c_at_the_prompt_drops_the_line(terminal):
    terminal.type("half a questi")
    terminal.until("half a questi")
    terminal.interrupt()
    assert terminal.until("you: ").endswith("\n(Ctrl-D ends)\nyou: ")
    assert terminal.say("What do you see?").startswith("model: ")


def test_ctrl_d_ends(terminal):
    terminal.type("\x04")
    status, shown = terminal.end()
    assert (status, shown.strip()) == (0, "")
    terminal.screen = ""


def test_a_question_can_come_from_standard_input(folder):
    question, picture = "What do you see?", f"--image={folder}/red.png"
    pictures = (picture, f"--image={folder}/a blue one.png")
    for flags in [], [picture], pictures:
        argv = ("sample.py", folder / "talker", "--prompt=-", *FLAGS, *flags)
        result = run(*argv, stdin=f"\n{question}\n")
        assert result.out == one_answer(folder, question, *flags) + "\n"
    assert run(*argv, stdin=" \n").refusal == "error: --prompt=- found nothing on standard input"


def test_bytes_that_are_no_text_end_nothing(folder):
    command = [sys.executable, ROOT / "sample.py", folder / "talker", "--prompt=-", *FLAGS]
    done = subprocess.run(command, input=b"caf\xe9?", capture_output=True, timeout=PATIENCE,
                          env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}, check=False)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout
