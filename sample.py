"""Talk to a checkpoint of any stage, in the terminal.

    python sample.py out/demo/pretrain --prompt='Mia has'                    # continues text
    python sample.py out/demo/sft                                            # chats
    python sample.py out/demo/vision_sft --image=FILE                        # chats about a picture
    python sample.py out/demo/vision_sft --image=FILE --prompt='What do you see?'
    python sample.py out/demo/vision_sft --input=rows.jsonl --output=answers.jsonl
    git log -3 | python sample.py out/full/sft --prompt=-                    # reads standard input

A checkpoint is a folder or a name on the Hugging Face hub. Without --prompt it is a chat that keeps
the conversation; /help lists its commands, Ctrl-C stops an answer. Questions can come from a pipe.
"""

import contextlib
import io
import json
import os
import shlex
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from common.config import UserError, parse_checkpoint, run_main
from common.device import pick_device
from common.images import read_image
from inference.batch_inference import answer_file
from inference.conversation import (
    TEXT_ONLY,
    Conversation,
    decoder_of,
    open_for_chat,
    pick_precision,
)
from inference.generate import Decoding, Sampler, Sampling
from prep.schema import MAX_IMAGES
from tokenizer import IMAGE_MARK

HELP = """/image FILE ...    start over with this picture, or these
/reset             start over, without a picture
/undo              take the last question and answer back
/save FILE         write the conversation to a new file, .json or .jsonl, as prepare.py reads it
/set               show the settings
/set NAME VALUE    change one: {names}
/quit              end (so does Ctrl-D); Ctrl-C stops an answer"""

# What would move a terminal's cursor, or worse, is shown as a mark; tabs and line breaks stay.
UNPRINTABLE = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)],
                            "\N{REPLACEMENT CHARACTER}") | {ord("\r"): ""}


@dataclass
class Config(Sampling):
    # --- input and output
    prompt: str = ""  # what to say, - for standard input; empty: an interactive chat
    image: tuple[str, ...] = ()  # a picture to talk about; repeatable
    input: str = ""  # a JSONL file of questions to answer: rows with a prompt, or chats; see README
    output: str = ""  # the JSONL file for their answers; what is there already is not done again
    batch: int = 64  # questions answered at once

    # --- sampling
    max_tokens: int = 256  # longest answer

    # --- hardware
    device: str = "auto"  # auto, cpu, cuda, mps
    # of weights and products; auto: the fastest here that costs a model under 0.01 nats
    precision: Literal["auto", "bf16", "fp16", "fp32", "int8"] = "auto"
    compile: bool = False  # torch.compile: much slower to start, then faster on a GPU

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_tokens", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if bool(self.input) != bool(self.output):
            raise UserError("--input and --output go together: rows of questions, and where their "
                            "answers are written")
        if self.input and (self.prompt or self.image):
            raise UserError("--input has the questions and their pictures: leave --prompt and "
                            "--image away")


def main():
    name, cfg = parse_checkpoint(Config)
    for stream in sys.stdin, sys.stdout:  # what is no UTF-8, or no letter here, ends nothing
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    device = pick_device(cfg.device)
    pictures = read_images(cfg.image)
    model, tokenizer, info = open_for_chat(name, device, pick_precision(device, cfg.precision))
    if cfg.input:
        return answer_file(model, tokenizer, info["stage"], cfg)
    decoding = Decoding(decoder_of(model), compile=cfg.compile)
    talk = Talk(Conversation(model, tokenizer, decoding), cfg, device)
    if pictures and not talk.conversation.sees:
        raise UserError(TEXT_ONLY)
    prompt = sys.stdin.read().strip() if cfg.prompt == "-" else cfg.prompt
    if info["stage"] == "pretrain":
        if not prompt:
            raise UserError("a pretrained checkpoint continues text: say --prompt='Once upon a'")
        print(prompt, end="", flush=True)
        show(talk.conversation.continue_text(prompt, cfg.max_tokens, talk.sampler))
    elif cfg.prompt:
        if not prompt:
            raise UserError("--prompt=- found nothing on standard input")
        talk.show_pictures(cfg.image, pictures)
        talk.ask(prompt)
    else:
        talk.show_pictures(cfg.image, pictures)
        talk.go_on()


def read_images(names):
    """PIL images of some files, in their order."""
    if len(names) > MAX_IMAGES:
        raise UserError(f"{len(names)} pictures, but {MAX_IMAGES} are the most at once")
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


class Talk:
    """A conversation in the terminal, and its commands."""

    def __init__(self, conversation, cfg, device):
        self.conversation, self.cfg, self.device = conversation, cfg, device
        self.sampler = Sampler(cfg, device)
        self.names, self.pictures = (), []  # of the conversation

    def show_pictures(self, names, pictures):
        """Start over with pictures, which the next question is about."""
        self.conversation.reset()
        self.names, self.pictures = tuple(map(os.path.abspath, names)), pictures

    def ask(self, text, name=""):
        """Print the answer to a question as it comes, behind the name of who answers."""
        pictures = [] if self.conversation.turns else self.pictures  # it has seen them
        n = self.conversation.hear(text, pictures, self.cfg.max_tokens)
        if n:
            print(f"(the context of {self.conversation.decoding.slots} tokens is full: the "
                  f"oldest {f'{n} turns are' if n > 1 else 'turn is'} forgotten)")
        print(name, end="", flush=True)
        show(self.conversation.answer(self.cfg.max_tokens, self.sampler))
        if name and not self.conversation.turns[-1].answer:
            print("(no answer)")

    def go_on(self):
        """Read questions until /quit or the end of the input."""
        terminal, ending = sys.stdin.isatty(), False
        if terminal:
            with contextlib.suppress(ImportError):  # Windows has none
                import readline  # noqa: F401 (line editing and history for input())
            print("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends")
        while True:
            try:
                text = input("you: ").strip()
            except KeyboardInterrupt:
                print()
                if ending:
                    return
                print("(Ctrl-C once more, or Ctrl-D, ends)")
                ending = True
                continue
            except EOFError:
                print()
                return
            ending = False
            if not terminal:
                print(text)
            if text == "/quit":
                return
            try:
                if text.startswith("/"):
                    self.obey(*text.split(None, 1))
                elif text:
                    self.ask(text, "model: ")
            except UserError as error:
                print(f"({error})")
            except KeyboardInterrupt:  # before an answer began, or in a command
                print("\n(stopped)")

    def obey(self, name, rest=""):
        """Carry out a command."""
        if name == "/help":
            print(HELP.format(names=", ".join(self.settings())))
        elif name == "/reset":
            self.show_pictures((), [])
            print("(starting over)")
        elif name == "/undo":
            print("(the last question and its answer are taken back)" if self.conversation.undo()
                  else "(there is nothing to take back)")
        elif name == "/image":
            if not self.conversation.sees:
                raise UserError(TEXT_ONLY)
            names = file_names(rest)
            self.show_pictures(names, read_images(names))
            print(f"({'new pictures' if len(names) > 1 else 'a new picture'}, "
                  "a new conversation)")
        elif name == "/save":
            print(f"(saved as {self.save(rest)})")
        elif name == "/set":
            if rest:
                print(f"({self.set(*rest.split(None, 1))})")
            else:
                print("\n".join(f"{n} {getattr(self.cfg, n)}" for n in self.settings()))
        else:
            raise UserError(f"there is no {name}; /help lists the commands")

    def settings(self):
        return [field.name for field in fields(Sampling)] + ["max_tokens"]

    def set(self, name, value=None):
        """Change a setting, to nothing new without a value; returns what it is now."""
        if name not in self.settings():
            raise UserError(f"there is no setting {name}: {', '.join(self.settings())}")
        now = getattr(self.cfg, name)
        if value is None:
            return f"{name} is {now}"
        try:
            self.cfg = replace(self.cfg, **{name: type(now)(value)})
        except ValueError:
            kind = "whole number" if isinstance(now, int) else "number"
            raise UserError(f"{name} is a {kind}, like {now}, not {value!r}") from None
        self.sampler = Sampler(self.cfg, self.device)
        return f"{name} is {getattr(self.cfg, name)}"

    def save(self, name):
        """Write the conversation to a new file; returns its path."""
        if not name:
            raise UserError("say which file")
        messages, decode = [], self.conversation.tokenizer.decode
        for turn in self.conversation.turns:
            if decode(turn.answer).strip():  # no row has a turn without an answer
                # the mark means a picture there, but was only text here
                question = turn.text.replace(IMAGE_MARK, IMAGE_MARK.replace("<", "< "))
                messages += [{"role": "user", "content": question},
                             {"role": "assistant", "content": decode(turn.answer)}]
        if not messages:
            raise UserError("there is nothing to save: no question was answered yet")
        if self.names:
            messages[0]["content"] = IMAGE_MARK * len(self.names) + "\n" + messages[0]["content"]
        row = {"images": list(self.names), "messages": messages}
        path = Path(file_names(name)[0])
        listed = path.suffix == ".json"  # else a line of JSON, as in .jsonl
        try:
            with open(path, "x", encoding="utf-8") as file:
                json.dump([row] if listed else row, file, indent=2 if listed else None,
                          ensure_ascii=False)
                file.write("\n")
        except FileExistsError:
            raise UserError(f"{path} is there already: say another name") from None
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        return path


def file_names(text):
    """File names typed as in a shell, quoted or not, ~ for one's home."""
    try:
        names = [text] if os.path.isfile(text) else shlex.split(text)
    except ValueError:  # a quote without its pair
        names = [text]
    if not any(names):
        raise UserError("say which file")
    return [os.path.expanduser(name) for name in names]


if __name__ == "__main__":
    run_main(main)
