"""Use a checkpoint of any stage in the terminal.

    python sample.py out/demo/pretrain --prompt='Mia has'                    # continues text
    python sample.py out/demo/sft                                            # chats
    python sample.py out/demo/vision_sft --image=FILE                        # chats about an image
    python sample.py out/demo/vision_sft --image=FILE --prompt='What do you see?'
    python sample.py out/demo/vision_sft --input=rows.jsonl --output=answers.jsonl
    git log -3 | python sample.py out/full/sft --prompt=-                    # reads standard input

A checkpoint is a folder or a name on the Hugging Face hub. Without --prompt it is a chat that keeps
the conversation; /help lists its commands, Ctrl-C stops an answer. Questions can come from a pipe.
"""

import cmd
import io
import json
import os
import shlex
import sys
from dataclasses import dataclass, fields, replace
from typing import Literal

from common.config import UserError, parse_checkpoint, run_main
from common.device import pick_device
from common.images import read_image
from inference.batch_inference import answer_file
from inference.conversation import (
    TEXT_ONLY,
    Conversation,
    decoder_of,
    has_vision,
    open_for_chat,
    pick_precision,
)
from inference.generate import Decoding, Sampler, Sampling
from prep.schema import MAX_IMAGES
from tokenizer import IMAGE_MARK

# Characters that could move a terminal's cursor, or worse, are replaced; tabs and newlines stay.
UNPRINTABLE = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)],
                            "\N{REPLACEMENT CHARACTER}") | {ord("\r"): ""}


@dataclass
class Config(Sampling):
    # --- input and output
    prompt: str = ""  # a question, - for standard input; empty: an interactive chat
    image: tuple[str, ...] = ()  # an image for the first question; repeatable
    input: str = ""  # a JSONL file of questions to answer: rows with a prompt, or chats; see README
    output: str = ""  # the JSONL file for their answers; resumes after the last completed batch
    batch: int = 64  # questions answered at once

    # --- sampling
    max_tokens: int = 256  # longest answer

    # --- hardware
    device: str = "auto"  # auto, cpu, cuda, mps
    # of weights and products; auto: the fastest here that costs a model under 0.01 nats per token
    precision: Literal["auto", "bf16", "fp16", "fp32", "int8"] = "auto"
    compile: bool = False  # torch.compile: much slower to start, then faster on a GPU

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_tokens", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if bool(self.input) != bool(self.output):
            raise UserError("--input and --output go together: the questions and their answers")
        if self.input and (self.prompt or self.image):
            raise UserError("--input has its own questions and images: omit --prompt and --image")


def main():
    name, cfg = parse_checkpoint(Config)
    for stream in sys.stdin, sys.stdout:  # bytes that are not UTF-8, or not encodable, end nothing
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    device = pick_device(cfg.device)
    images = read_images(cfg.image)
    model, tokenizer, info = open_for_chat(name, device, pick_precision(device, cfg.precision))
    if images and not has_vision(model):
        raise UserError(TEXT_ONLY)
    if cfg.input:
        return answer_file(model, tokenizer, info["stage"], cfg)
    decoding = Decoding(decoder_of(model), compile=cfg.compile)
    chat = Chat(Conversation(model, tokenizer, decoding), cfg, device)
    chat.start_over(cfg.image, images)
    prompt = sys.stdin.read().strip() if cfg.prompt == "-" else cfg.prompt
    if info["stage"] == "pretrain":
        if not prompt:
            raise UserError("a pretrained checkpoint continues text: give it a --prompt")
        print(prompt, end="", flush=True)
        show(chat.conversation.continue_text(prompt, cfg.max_tokens, chat.sampler))
    elif prompt:
        chat.ask(prompt)
    elif cfg.prompt:
        raise UserError("--prompt=- found nothing on standard input")
    else:
        chat.run()


def read_images(names):
    """PIL images of some files, in their order."""
    if len(names) > MAX_IMAGES:
        raise UserError(f"{len(names)} images are too many; at most {MAX_IMAGES}")
    return [read_image(name) for name in names]


def show(pieces):
    """Print an answer as it comes; Ctrl-C stops it."""
    terminal = sys.stdout.isatty()
    try:
        for piece in pieces:
            print(piece.translate(UNPRINTABLE) if terminal else piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" ...", end="")
    print()


class Chat(cmd.Cmd):
    """A conversation in the terminal. A method do_NAME is the command /NAME; its docstring is what
    /help says."""

    prompt = "you: "

    def __init__(self, conversation, cfg, device):
        super().__init__()
        self.conversation, self.cfg, self.device = conversation, cfg, device
        self.sampler = Sampler(cfg, device)
        self.names, self.images = (), []  # of the conversation

    def start_over(self, names, images):
        """A new conversation, whose first question is about these images."""
        self.conversation.turns = []
        self.names, self.images = tuple(map(os.path.abspath, names)), images

    def ask(self, text, prefix=""):
        """Print the answer to a question as it comes."""
        images = [] if self.conversation.turns else self.images
        n = self.conversation.add_question(text, images, self.cfg.max_tokens)
        if n:
            print(f"(the context of {self.conversation.context} tokens is full: the {n} oldest "
                  "turns are dropped)")
        print(prefix, end="", flush=True)
        show(self.conversation.answer(self.cfg.max_tokens, self.sampler))
        if prefix and not self.conversation.turns[-1].answer:
            print("(no answer)")

    def run(self):
        """Read questions and commands until /quit or the end of the input."""
        if sys.stdin.isatty():
            print("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends")
        while True:
            try:
                return self.cmdloop()
            except KeyboardInterrupt:  # at the prompt
                print("\n(Ctrl-D ends)")

    def parseline(self, line):
        """(command, argument, line) as cmd.Cmd wants it; the command of a question is None."""
        name, _, argument = line.strip().partition(" ")
        return (name[1:], argument.strip(), line) if name[:1] == "/" else (None, None, line)

    def onecmd(self, line):
        """Carry out a line; a true result ends the chat."""
        if line == "EOF":  # what cmd.Cmd makes of the end of the input
            print()
            return True
        if not sys.stdin.isatty():
            print(line.strip())
        try:
            return super().onecmd(line)
        except UserError as error:
            print(f"({error})")
        except KeyboardInterrupt:  # in a command, or before an answer began
            print("\n(stopped)")

    def default(self, line):
        if line.startswith("/"):
            raise UserError(f"there is no {line.split()[0]}; /help lists the commands")
        if line.strip():
            self.ask(line.strip(), "model: ")

    def emptyline(self):
        """Do nothing, where cmd.Cmd would repeat the last command."""

    def do_help(self, _):
        """/help              list the commands"""
        print("\n".join(getattr(self, name).__doc__ for name in self.get_names()
                        if name.startswith("do_")))
        print(f"settings: {', '.join(self.settings())}; Ctrl-C stops an answer, Ctrl-D ends")

    def do_image(self, argument):
        """/image FILE ...    start over with these images"""
        if not has_vision(self.conversation.model):
            raise UserError(TEXT_ONLY)
        names = file_names(argument)
        self.start_over(names, read_images(names))
        print("(a new conversation)")

    def do_reset(self, _):
        """/reset             start over without images"""
        self.start_over((), [])
        print("(a new conversation)")

    def do_undo(self, _):
        """/undo              remove the last question and answer"""
        if not self.conversation.turns:
            raise UserError("there is nothing to undo")
        self.conversation.turns.pop()
        print("(the last question and its answer are removed)")

    def do_save(self, name):
        """/save FILE         write the conversation to a new JSONL file for prepare.py"""
        path, row = file_names(name)[0], self.row()
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        print(f"(saved as {path})")

    def row(self):
        """The conversation as a row of data, without turns that have no answer."""
        messages, decode = [], self.conversation.tokenizer.decode
        for turn in self.conversation.turns:
            if decode(turn.answer).strip():
                # In data the mark stands for an image; here it was typed as text.
                question = turn.text.replace(IMAGE_MARK, IMAGE_MARK.replace("<", "< "))
                messages += [{"role": "user", "content": question},
                             {"role": "assistant", "content": decode(turn.answer)}]
        if not messages:
            raise UserError("there is nothing to save: no question has an answer yet")
        if self.names:
            messages[0]["content"] = IMAGE_MARK * len(self.names) + "\n" + messages[0]["content"]
        return {"images": list(self.names), "messages": messages}

    def do_set(self, argument):
        """/set [NAME VALUE]  show the settings, or change one"""
        name, _, value = argument.partition(" ")
        names = [name] if name else self.settings()
        if name not in ["", *self.settings()]:
            raise UserError(f"there is no setting {name}: {', '.join(self.settings())}")
        if value:
            kind = type(getattr(self.cfg, name))
            try:
                self.cfg = replace(self.cfg, **{name: kind(value)})
            except ValueError:
                raise UserError(f"{name} is of type {kind.__name__}, not {value!r}") from None
            self.sampler = Sampler(self.cfg, self.device)
        print("\n".join(f"{name} {getattr(self.cfg, name)}" for name in names))

    def do_quit(self, _):
        """/quit              end"""
        return True

    def settings(self):
        return [field.name for field in fields(Sampling)] + ["max_tokens"]


def file_names(text):
    """File names typed as in a shell, quoted or not, ~ for the home folder."""
    try:
        names = [text] if os.path.isfile(text) else shlex.split(text)
    except ValueError:  # an unclosed quote
        names = [text]
    if not any(names):
        raise UserError("which file?")
    return [os.path.expanduser(name) for name in names]


if __name__ == "__main__":
    run_main(main)
