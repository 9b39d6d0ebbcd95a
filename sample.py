"""Use a checkpoint of any stage in the terminal: a folder, or a name on the Hugging Face hub.

    python sample.py out/demo/pretrain --prompt='Mia has'                    # continues text
    python sample.py out/demo/vision_sft --image=FILE                        # chats about an image
    python sample.py out/demo/vision_sft --image=FILE --prompt='What do you see?'
    python sample.py out/demo/vision_sft --image=FILE --prompt='What is red?' --show=attention
    python sample.py out/demo/vision_sft --input=rows.jsonl --output=answers.jsonl
    git log -3 | python sample.py out/full/sft --prompt=-                    # reads standard input
"""

import contextlib
import io
import os
import shlex
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

with contextlib.suppress(ImportError):  # some builds of Python have none
    import readline  # noqa: F401 (line editing and history in input())

from common.atomic import check_output, writing
from common.config import UserError, parse, parse_checkpoint, run_main
from common.device import pick_device
from common.images import read_image
from inference.attention_page import attention_page
from inference.batch_inference import answer_file
from inference.conversation import TEXT_ONLY, Conversation, has_vision, open_for_chat
from inference.generate import Generation, Sampler, Sampling
from inference.quantized_linear import fastest_precision

# Characters that could move a terminal's cursor, or worse, are replaced; tabs and newlines stay.
UNPRINTABLE = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)],
                            "\N{REPLACEMENT CHARACTER}") | {ord("\r"): ""}


@dataclass
class Config(Generation):
    # --- input and output
    prompt: str = ""  # a question, - for standard input; empty: an interactive chat
    image: tuple[str, ...] = ()  # an image for the first question; repeatable
    input: str = ""  # a JSONL file of questions to answer: see docs/chat.md
    output: str = ""  # the JSONL file for their answers; resumes after the last completed batch
    batch: int = 64  # questions answered at once
    show: Literal["", "attention"] = ""  # write a page: what the last answer's tokens looked at
    page: str = "attention.html"  # the file for --show

    def __post_init__(self):
        super().__post_init__()
        if self.batch < 1:
            raise UserError(f"batch must be 1 or more, not {self.batch}")
        if bool(self.input) != bool(self.output):
            raise UserError("--input and --output go together: the questions and their answers")
        if self.input and (self.prompt or self.image):
            raise UserError("--input has its own questions and images: omit --prompt and --image")


def main():
    name, cfg = parse_checkpoint(Config)
    for stream in sys.stdin, sys.stdout:  # bytes that are not UTF-8, or not encodable, end nothing
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    for setting in ["output"] * bool(cfg.output) + ["page"] * bool(cfg.show):
        check_output(getattr(cfg, setting), f"--{setting}=")
    device = pick_device(cfg.device)
    images = [read_image(name) for name in cfg.image]
    cfg.precision = fastest_precision(device, cfg.precision)
    model, tokenizer, info = open_for_chat(name, device, cfg.precision)
    if cfg.input:
        return answer_file(model, tokenizer, info, cfg)
    chat = Chat(Conversation(model, tokenizer), cfg, device, info)
    chat.start_over(images)
    prompt = sys.stdin.read().strip() if cfg.prompt == "-" else cfg.prompt
    if info["stage"] == "pretrain":
        if not prompt or cfg.show:
            raise UserError("a pretrained checkpoint continues text: give it a --prompt, and no "
                            "--show, which is for chats")
        print(prompt, end="", flush=True)
        show(chat.conversation.continue_text(prompt, cfg.max_tokens, chat.sampler))
    elif prompt:
        chat.ask(prompt)
    elif cfg.prompt:
        raise UserError("--prompt=- found nothing on standard input")
    else:
        chat.run()


def show(pieces):
    """Print an answer as it comes; Ctrl-C stops it."""
    terminal = sys.stdout.isatty()
    try:
        for piece in pieces:
            print(piece.translate(UNPRINTABLE) if terminal else piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" ...")


class Chat:
    """A conversation in the terminal. A method do_NAME is the command /NAME; its docstring is what
    /help says."""

    def __init__(self, conversation, cfg, device, info):
        self.conversation, self.cfg, self.device, self.info = conversation, cfg, device, info
        self.sampler = Sampler(cfg, device)

    def start_over(self, images):
        """A new conversation, whose first question is about these images."""
        if images and not has_vision(self.conversation.model):
            raise UserError(TEXT_ONLY)
        self.conversation.turns, self.images = [], images

    def ask(self, text, prefix=""):
        """Print the answer to a question as it comes."""
        images = [] if self.conversation.turns else self.images
        if n := self.conversation.add_question(text, images, self.cfg.max_tokens):
            print(f"(the context is full: the {n} oldest turns are dropped)")
        print(prefix, end="", flush=True)
        show(self.conversation.answer(self.cfg.max_tokens, self.sampler))
        if prefix and not self.conversation.turns[-1].answer:
            print("(no answer)")
        if self.cfg.show:
            page = attention_page(self.conversation, self.info)
            with writing(self.cfg.page, "--page="):
                Path(self.cfg.page).write_text(page, encoding="utf-8")
            print(f"wrote {self.cfg.page}: open it in a browser")

    def run(self):
        """Answer questions and carry out commands until /quit or the end of the input."""
        interactive = sys.stdin.isatty()
        if interactive:
            print("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends")
        while True:
            try:
                line = input("you: ").strip()
                if not interactive:
                    print(line)
                name, _, argument = line.partition(" ")
                if name == "/quit":
                    return
                if name.startswith("/"):
                    getattr(self, f"do_{name[1:]}", self.do_help)(argument.strip())
                elif line:
                    self.ask(line, "model: ")
            except EOFError:
                return print()
            except UserError as error:
                print(f"({error})")
            except KeyboardInterrupt:  # at the prompt, in a command, or before an answer began
                print("\n(stopped; Ctrl-D ends)")

    def do_help(self, _):
        """/help              list the commands"""
        for command in self.do_help, self.do_image, self.do_reset, self.do_undo, self.do_set:
            print(command.__doc__)
        print("/quit              end\nsettings:",
              ", ".join(field.name for field in fields(Sampling)))

    def do_image(self, argument):
        """/image FILE ...    start over with these images; quote names with spaces"""
        try:
            names = shlex.split(argument)
        except ValueError as error:  # an unclosed quote
            raise UserError(f"{argument}: {error}") from None
        self.start_over([read_image(os.path.expanduser(name)) for name in names])
        print("(a new conversation)")

    def do_reset(self, _):
        """/reset             start over without images"""
        self.do_image("")

    def do_undo(self, _):
        """/undo              remove the last question and answer"""
        if not self.conversation.turns:
            raise UserError("there is nothing to undo")
        self.conversation.turns.pop()
        print("(the last question and its answer are removed)")

    def do_set(self, argument):
        """/set NAME VALUE    change a setting"""
        name, _, value = argument.partition(" ")
        value = getattr(parse(Sampling, [f"--{name}={value}"]), name)
        self.cfg = replace(self.cfg, **{name: value})
        self.sampler = Sampler(self.cfg, self.device)
        print(f"{name} {value}")


if __name__ == "__main__":
    run_main(main)
