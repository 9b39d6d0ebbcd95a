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

import json
import shlex
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import UseAppendAction

from batch import answer_file
from chat import BLIND, Conversation, decoder_of, open_for_chat
from common.config import UserError, parse, run_main
from common.distributed import pick_device
from decode import Decoding, Sampler, Sampling
from pictures import read_image
from tokenizer import IMAGE_MARK

HELP = """/image FILE ...    start over with this picture, or these
/reset             start over
/undo              take the last question and answer back
/save FILE         write the conversation to a JSON file, in the form that prepare.py reads
/set NAME VALUE    change a setting: {names}
/quit              end (so does Ctrl-D); Ctrl-C stops an answer"""


@dataclass
class Config(Sampling):
    prompt: str = ""  # what to say, - for standard input; empty: an interactive chat
    image: Annotated[tuple[str, ...], UseAppendAction] = ()  # a picture to talk about; repeatable
    max_tokens: int = 256  # longest answer
    input: str = ""  # a JSONL file of questions to answer: rows with a prompt, or chats; see README
    output: str = ""  # the JSONL file for their answers; what is there already is not done again
    batch: int = 64  # questions answered at once
    device: str = "auto"  # auto, cpu, cuda, mps
    # of weights and sums; int8 is for CPUs: the fastest, and hardly less exact
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
    argv = sys.argv[1:]
    if not argv or argv[0].startswith("-"):
        parse(Config, argv)  # --help, or a flag that does not exist
        raise UserError("say which checkpoint to talk to: python sample.py out/demo/vision_sft")
    cfg = parse(Config, argv[1:])
    device = pick_device(cfg.device)
    pictures = [read_image(path) for path in cfg.image]
    model, tokenizer, info = open_for_chat(argv[0], device, cfg.precision)
    if cfg.input:
        return answer_file(model, tokenizer, info["stage"], cfg)
    decoding = Decoding(decoder_of(model), compile=cfg.compile)
    talk = Talk(Conversation(model, tokenizer, decoding), cfg, device)
    if pictures and not talk.conversation.sees:
        raise UserError(BLIND)
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


def show(pieces):
    """Print an answer as it comes; Ctrl-C stops it."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" ...", end="")
    print()


class Talk:
    """A conversation in the terminal, and its commands."""

    def __init__(self, conversation, cfg, device):
        self.conversation, self.cfg, self.device = conversation, cfg, device
        self.sampler = Sampler(cfg, device)
        self.names, self.pictures = (), []  # of the conversation; of the next question

    def show_pictures(self, names, pictures):
        """Start over with pictures, which the next question is about."""
        self.conversation.reset()
        self.names, self.pictures = tuple(names), pictures

    def ask(self, text):
        """Print the answer to a question as it comes."""
        n = self.conversation.hear(text, self.pictures, self.cfg.max_tokens)
        self.pictures = []  # seen: the conversation keeps them
        if n:
            print(f"(the context of {self.conversation.decoding.cache.slots} tokens is full: the "
                  f"oldest {f'{n} turns are' if n > 1 else 'turn is'} forgotten)")
        show(self.conversation.answer(self.cfg.max_tokens, self.sampler))

    def go_on(self):
        """Read questions until /quit or the end of the input."""
        terminal, ending = sys.stdin.isatty(), False
        if terminal:
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
                    self.obey(text)
                elif text:
                    print("model: ", end="", flush=True)
                    self.ask(text)
            except UserError as error:
                print(f"({error})")

    def obey(self, line):
        """Carry out a command."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/help":
            print(HELP.format(names=", ".join(self.settings())))
        elif name == "/reset":
            self.show_pictures((), [])
            print("(starting over)")
        elif name == "/undo":
            print("(the last question and its answer are taken back)" if self.undo()
                  else "(there is nothing to take back)")
        elif name == "/image":
            if not self.conversation.sees:
                raise UserError(BLIND)
            names = file_names(rest)
            self.show_pictures(names, [read_image(name) for name in names])
            print(f"({'new pictures' if len(names) > 1 else 'a new picture'}, "
                  "a new conversation)")
        elif name == "/save":
            print(f"(saved as {self.save(rest)})")
        elif name == "/set":
            print(f"({self.set(*rest.split(None, 1))})" if len(rest.split()) > 1 else
                  "\n".join(f"{n} {getattr(self.cfg, n)}" for n in self.settings()))
        else:
            raise UserError(f"there is no {name}; /help lists the commands")

    def undo(self):
        first = len(self.conversation.turns) == 1
        if first and self.names:  # the pictures went with it: the next question shows them again
            self.pictures = [read_image(name) for name in self.names]
        return self.conversation.undo()

    def settings(self):
        return [field.name for field in fields(Sampling)] + ["max_tokens"]

    def set(self, name, value):
        """Change a setting; returns what it is now."""
        if name not in self.settings():
            raise UserError(f"there is no setting {name}: {', '.join(self.settings())}")
        kind = type(getattr(self.cfg, name))
        try:
            self.cfg = replace(self.cfg, **{name: kind(value)})
        except ValueError:
            raise UserError(f"{name} is a number, like {getattr(self.cfg, name)}, "
                            f"not {value!r}") from None
        self.sampler = Sampler(self.cfg, self.device)
        return f"{name} is {getattr(self.cfg, name)}"

    def save(self, name):
        """Write the conversation to a new file; returns its path."""
        if not name or not self.conversation.turns:
            raise UserError("/save FILE, after something was said")
        path, messages = Path(file_names(name)[0]), []
        for turn in self.conversation.turns:
            answer = self.conversation.tokenizer.decode(turn.answer)
            messages += [{"role": "user", "content": turn.text},
                         {"role": "assistant", "content": answer}]
        if self.names:
            messages[0]["content"] = IMAGE_MARK * len(self.names) + "\n" + messages[0]["content"]
        row = {"images": list(self.names), "messages": messages}
        try:
            with open(path, "x", encoding="utf-8") as file:
                json.dump([row], file, indent=2, ensure_ascii=False)
        except FileExistsError:
            raise UserError(f"{path} is there already: say another name") from None
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        return path


def file_names(text):
    """File names typed as in a shell, quoted or not."""
    try:
        names = [text] if Path(text).is_file() else shlex.split(text)
    except ValueError:  # a quote without its pair
        names = [text]
    if not names:
        raise UserError("say which file")
    return names


if __name__ == "__main__":
    run_main(main)
