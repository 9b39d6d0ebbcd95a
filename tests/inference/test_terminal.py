"""sample.py in a terminal: streaming, commands, keys, and its end."""

import fcntl
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
from test_batch_inference import SHORT, asked
from test_conversation import BLUE, RED, TOKENIZER, new_model, save

PATIENCE = 60  # seconds without output until a program counts as dead
LONG = 3000  # tokens of an answer that is stopped
ENVIRONMENT = {**os.environ, "TERM": "dumb", "PYTHONUNBUFFERED": "1"}


class Terminal:
    """sample.py in a pseudo-terminal, and a user who types and reads."""

    def __init__(self, folder, *argv):
        self.screen = ""  # shown and not yet read
        command = [sys.executable, str(ROOT / "sample.py"), *map(str, argv)]
        self.process, self.keys = pty.fork()
        if self.process == 0:
            os.chdir(folder)
            os.execve(sys.executable, command, ENVIRONMENT)
        fcntl.ioctl(self.keys, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 500, 0, 0))

    def more(self, deadline):
        """Read once; false at the end of the program."""
        assert self.answers(deadline - time.monotonic()), f"nothing follows {self.screen!r}"
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
            assert self.more(deadline), f"ended after {self.screen!r}"
        shown, self.screen = self.screen.split(words, 1)
        return shown + words

    def type(self, keys):
        os.write(self.keys, keys.encode())

    def interrupt(self):
        """Ctrl-C at the prompt, twice if needed: Python misses one while it draws the prompt."""
        assert not self.screen
        time.sleep(0.3)
        self.type("\x03")
        if not self.answers(PATIENCE / 4):
            self.type("\x03")

    def answers(self, seconds):
        """Whether there is output within that time."""
        poll = select.poll()
        poll.register(self.keys, select.POLLIN | select.POLLHUP)
        return bool(poll.poll(max(0, seconds) * 1000))

    def say(self, line):
        """Type a line; the output up to the next prompt."""
        self.type(f"{line}\n")
        self.until("\n")
        return self.until("you: ").removesuffix("you: ").removesuffix("\n")

    def end(self):
        """Wait for the program to end; (exit status, last output)."""
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
    """A folder with a checkpoint of a long context, and two images."""
    folder = tmp_path_factory.mktemp("terminal")
    save(folder / "talker", new_model(context=2 * LONG))
    RED.save(folder / "red.png")
    BLUE.save(folder / "a blue one.png")
    return folder


@pytest.fixture(scope="module")
def terminals(folder):
    """The program that most tests share: starting it takes seconds."""
    found = []
    yield found
    for one in found:
        one.close()


@pytest.fixture
def terminal(terminals, folder):
    """A program at its prompt, with a new conversation."""
    if not terminals or terminals[-1].process is None:
        terminals.append(Terminal(folder, "talker", *SHORT))
        greeting = terminals[-1].until("you: ")
        assert greeting.startswith("/help lists the commands")
    one = terminals[-1]
    one.say("/set temperature 0")
    one.say("/set max_tokens 12")
    assert one.say("/reset") == "(a new conversation)"
    yield one
    if one.screen:  # a test failed in the middle
        terminals.pop().close()


def test_an_answer_streams_and_ctrl_c_stops_it(terminal):
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
    terminal.say("/set max_tokens 12")
    assert terminal.say("Go on.").startswith("model: ")
    for _ in range(3):
        assert "removed" in terminal.say("/undo")
    assert terminal.say("What do you see?") == first


def test_an_empty_answer_is_shown_as_such(folder):
    model = new_model()
    with torch.no_grad():  # <|end|> is always the most likely
        model.decoder.final_norm.weight.zero_()
        model.decoder.head.weight[TOKENIZER.end] = 100 * model.decoder.final_norm.bias
    save(folder / "silent", model)
    lines = ["What do you see?", "Is it red?", "/undo", "/photo", "/quit"]
    result = run("sample.py", folder / "silent", *SHORT, stdin="\n".join(lines))
    assert (result.status, result.err) == (0, "")
    assert result.out.count("model: \n(no answer)\n") == 2
    assert "removed" in result.out
    for word in "/image", "/reset", "/undo", "/set", "/quit", "penalty, seed, max_tokens":
        assert word in result.out
    assert run("sample.py", folder / "silent", "--prompt=hi", *SHORT).out == "\n"


def test_control_characters_of_an_answer_are_not_printed(terminal):
    """At a high temperature the model generates any byte."""
    terminal.say("/set temperature 100")
    terminal.say("/set max_tokens 500")
    said = terminal.say("What do you see?").removeprefix("model: ")
    assert len(said) > 100 and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", said)


def test_image_and_reset_start_over(terminal, folder):
    terminal.say("Is it red?")
    assert terminal.say("/image red.png") == "(a new conversation)"
    question, picture = "What do you see?", f"--image={folder}/red.png"
    red = terminal.say(question)
    assert red == "model: " + asked(folder / "talker", question, picture)
    terminal.say("/image red.png 'a blue one.png'")
    both = asked(folder / "talker", question, picture, f"--image={folder}/a blue one.png")
    assert terminal.say(question) == f"model: {both}"
    assert terminal.say("/reset") == "(a new conversation)"
    assert terminal.say(question) == "model: " + asked(folder / "talker", question)


def test_undo_removes_the_last_question_but_not_the_image(terminal, folder):
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


def test_set_changes_a_setting(terminal):
    question, answers = "What do you see?", []
    for temperature, seed in ("5", "1"), ("5", "2"), ("5", "1"), ("0", "1"):
        terminal.say(f"/set seed {seed}")
        assert terminal.say(f"/set temperature {temperature}") == f"temperature {temperature}.0"
        answers.append(terminal.say(question))
        terminal.say("/undo")
    assert answers[0] == answers[2] and len(set(answers)) == 3


@pytest.mark.parametrize(("command", "words"), [
    ("/set temprature 1", "temprature"), ("/set top_k 0.5", "'0.5' is not a valid int"),
    ("/set temperature hot", "'hot' is not a valid float"), ("/set", "setting"),
    ("/set temperature -1", "temperature must be 0 to"),
    ("/set temperature nan", "'nan' is not a valid float"),
    ("/set top_p 1e-50", "top_p must be 1e-09 to 1, not 1e-50"),
    ("/set max_tokens 0", "max_tokens must be 1 to"), ("/image 'no.png", "No closing quotation"),
    ("/image talker", "talker"), (f"/image {'no' * 200}", "File name too long"),
    ("word, " * 4000, "context is 6000")])
def test_an_error_is_one_sentence_and_changes_nothing(terminal, command, words):
    terminal.say("/image red.png")
    first = terminal.say("What do you see?")
    found = terminal.say(command)
    assert words in found and found[0] + found[-1] == "()" and "\n" not in found
    second = terminal.say("Is it red?")
    assert second.startswith("model: ")
    terminal.say("/undo")
    terminal.say("/undo")
    assert terminal.say("What do you see?") == first and terminal.say("Is it red?") == second


def test_ctrl_c_at_the_prompt_drops_the_line_and_ctrl_d_ends(terminal):
    terminal.type("half a questi")
    terminal.until("half a questi")
    terminal.interrupt()
    assert terminal.until("you: ").endswith("Ctrl-D ends)\nyou: ")
    assert terminal.say("What do you see?").startswith("model: ")
    terminal.type("\x04")
    status, shown = terminal.end()
    assert (status, shown.strip()) == (0, "")
    terminal.screen = ""


def test_a_question_can_come_from_standard_input(folder):
    question, picture = "What do you see?", f"--image={folder}/red.png"
    argv = ("sample.py", folder / "talker", "--prompt=-", *SHORT)
    for flags in [], [picture], [picture, f"--image={folder}/a blue one.png"]:
        result = run(*argv, *flags, stdin=f"\n{question}\n")
        assert result.out == asked(folder / "talker", question, *flags) + "\n"
    assert "standard input" in run(*argv, stdin=" \n").refusal
    done = subprocess.run(
        [sys.executable, ROOT / argv[0], *argv[1:]], input=b"caf\xe9?", capture_output=True,
        timeout=PATIENCE, env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}, check=False)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout  # bytes that are not UTF-8
