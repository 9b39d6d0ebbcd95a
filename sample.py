"""Talk to a checkpoint of any stage, in the terminal.

    python sample.py out/demo/pretrain --prompt='Mia has'                    # continues text
    python sample.py out/demo/sft                                            # chats
    python sample.py out/demo/vision_sft --image=FILE --prompt='What do you see?'
    python sample.py out/demo/vision_sft --image=FILE                        # chats about a picture

Without --prompt it is a chat that keeps the conversation: `/image FILE` shows another picture,
`/reset` starts over, `/quit` ends; Ctrl-C stops an answer. Questions can also come from a pipe.
"""

import sys
from dataclasses import dataclass

import torch

from chat import BLIND, Conversation
from common.config import UserError, parse, run_main
from common.distributed import pick_device
from pictures import read_image
from vision import open_model


@dataclass
class Config:
    prompt: str = ""  # what to say; empty: an interactive chat
    image: str = ""  # a picture to talk about
    max_tokens: int = 256  # longest answer
    temperature: float = 0.0  # 0 takes the likeliest token; above, the higher the wilder
    top_k: int = 0  # draw from the k likeliest tokens only; 0 for all
    top_p: float = 1.0  # draw from the likeliest tokens that make up this probability
    seed: int = 1337  # the same seed gives the same text
    device: str = "auto"  # auto, cpu, cuda, mps


def main():
    argv = sys.argv[1:]
    if not argv or argv[0].startswith("-"):
        parse(Config, argv)  # --help, or a flag that does not exist
        raise UserError("say which checkpoint to talk to: python sample.py out/demo/vision_sft")
    cfg = parse(Config, argv[1:])
    device = pick_device(cfg.device)
    pictures = [read_image(cfg.image)] if cfg.image else []
    model, tokenizer, info = open_model(argv[0], device, kinds=("decoder", "vision"))
    conversation = Conversation(model, tokenizer)
    if pictures and not conversation.sees:
        raise UserError(BLIND)
    sampling = dict(
        max_tokens=cfg.max_tokens, temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p,
        generator=torch.Generator(device).manual_seed(cfg.seed) if cfg.temperature else None)
    if info["stage"] == "pretrain":
        if not cfg.prompt:
            raise UserError("a pretrained checkpoint continues text: say --prompt='Once upon a'")
        print(cfg.prompt, end="")
        show(conversation.continue_text(cfg.prompt, **sampling))
    elif cfg.prompt:
        show(conversation.ask(cfg.prompt, pictures, **sampling))
    else:
        converse(conversation, pictures, sampling)


def show(pieces):
    """Print an answer as it comes; Ctrl-C stops it."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" ...", end="")
    print()


def converse(conversation, pictures, sampling):
    """Read questions until /quit or the end of the input."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401 (line editing and history for input())

        print("/image FILE shows a picture, /reset starts over, /quit ends")
    while True:
        try:
            text = input("you: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not terminal:
            print(text)
        try:
            if text == "/quit":
                return
            if text == "/reset":
                conversation.reset()
                pictures = []
                print("(starting over)")
            elif text.startswith("/image"):
                if not conversation.sees:
                    raise UserError(BLIND)
                pictures = [read_image(text.removeprefix("/image").strip())]
                conversation.reset()
                print("(a new picture, a new conversation)")
            elif text.startswith("/"):
                print(f"(there is no {text.split()[0]}; /image FILE, /reset, /quit)")
            elif text:
                answer = conversation.ask(text, pictures, **sampling)
                print("model: ", end="")
                show(answer)
                pictures = []  # seen: they stay in the conversation's cache
        except UserError as error:
            print(f"({error})")


if __name__ == "__main__":
    run_main(main)
