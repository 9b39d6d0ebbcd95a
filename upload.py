"""Take a checkpoint elsewhere: to transformers, llama.cpp, the Hugging Face hub; bring one here.

    python upload.py out/demo/vision_sft --to=hf_folder             # a folder for transformers
    python upload.py out/demo/vision_sft --repo=NAME/REPO           # the same, pushed to the hub
    python upload.py out/demo/vision_sft --repo=NAME/REPO --native=True   # for sample.py NAME/REPO
    python upload.py out/demo/vision_sft --space=NAME/SPACE         # app.py with it, as a Space
    python upload.py out/demo/sft --gguf=model.gguf                 # a text model for llama.cpp
    python upload.py --import_original=checkpoint_035000.pt --out=out/imported

--dry_run=True prints what would be pushed. The token comes from the environment (HF_TOKEN) or from
`hf auth login`. A push that broke off goes on with the same command: what is there is not sent
again. --to and --repo write for `transformers`, which has to be installed: pip install transformers
"""

import ast
import hashlib
import importlib.metadata
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from common import checkpoint
from common.checkpoint import file_sum
from common.config import UserError, parse, run_main
from export.model_card import card, example, held_out_pictures
from export.to_transformers import CHAT_TEMPLATE, write_folder
from vision import open_model

HERE = Path(__file__).resolve().parent
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
SPACE_CARD = """---
title: {title}
sdk: gradio
sdk_version: {gradio}
app_file: app.py
license: {license}
---

A small model, trained from nothing with nanoGPT-Vision. `app.py` serves `checkpoint`.
"""


@dataclass
class Config:
    to: str = ""  # folder to write for transformers
    repo: str = ""  # NAME/REPO on the hub to push it to
    native: bool = False  # push the checkpoint as it is, for this project, not for transformers
    space: str = ""  # NAME/SPACE on the hub to push app.py and the checkpoint to
    gguf: str = ""  # file to write for llama.cpp; text models only
    gguf_dtype: Literal["f16", "f32"] = "f16"  # of its weights
    import_original: str = ""  # a checkpoint of the original nanoGPT-Vision to read, with --out
    out: str = ""  # run folder for it
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the weights for transformers
    license: str = "mit"  # of the weights, for the card; mind the data's
    picture: str = ""  # an example for the card; empty: a held-out one of the demo, if it is there
    private: bool = False  # a new repository or Space is private
    overwrite: bool = False  # write into what is there already; other weights there go
    dry_run: bool = False  # print what would be pushed, and push nothing


def main():
    argv = sys.argv[1:]
    name = argv.pop(0) if argv and not argv[0].startswith("-") else ""
    cfg = parse(Config, argv)
    wishes = [cfg.to, cfg.repo, cfg.space, cfg.gguf, cfg.import_original]
    if cfg.import_original:
        if not cfg.out or name or any(wishes[:-1]):
            raise UserError("--import_original=FILE goes with --out=FOLDER and nothing else")
        from export.from_original import import_original

        return import_original(cfg.import_original, cfg.out, cfg.overwrite)
    if not name:
        raise UserError("say which checkpoint: python upload.py out/demo/vision_sft --to=hf_folder")
    if not any(wishes):
        raise UserError("say where it should go: --to, --repo, --space or --gguf")
    if cfg.gguf:
        write_llama(name, cfg)
    if cfg.to and checkpoint.locate(name).resolve() == Path(cfg.to).resolve():
        raise UserError(f"{cfg.to} is the checkpoint itself; say another folder")
    if cfg.to or cfg.repo:
        with new_folder(cfg.to, cfg.overwrite) as folder:
            (native if cfg.native else for_transformers)(name, folder, cfg)
            if cfg.repo:
                push(folder, cfg.repo, "model", cfg)
    if cfg.space:
        with new_folder("", False) as folder:
            space(name, folder, cfg)
            push(folder, cfg.space, "space", cfg)


class new_folder:
    """A folder whose content appears under its name when all is in it; without a name, for a
    while."""

    def __init__(self, name, overwrite):
        self.name, self.target = name, Path(name).absolute() if name else None
        if self.target and self.target.exists() and not self.target.is_dir():
            raise UserError(f"{name} is a file; say a folder")
        if self.target and self.target.is_dir() and any(self.target.iterdir()) and not overwrite:
            raise UserError(f"the folder {name} is not empty; say another, or --overwrite=True")

    def __enter__(self):
        near = self.target and next(path for path in self.target.parents if path.exists())
        try:  # near, as a rename takes the same disk
            self.folder = Path(tempfile.mkdtemp(prefix=".writing-", dir=near))
        except OSError as error:
            raise UserError(f"cannot write into {near}: {error.strerror}") from None
        return self.folder

    def __exit__(self, kind, *_):
        if kind is None and self.target:
            self.target.mkdir(parents=True, exist_ok=True)
            for pattern in WEIGHTS:  # readers might take the old ones
                for path in self.target.glob(pattern):
                    path.unlink()
            for path in self.folder.iterdir():
                path.chmod(0o644)
                path.replace(self.target / path.name)
            print(f"written: {self.name}")
        shutil.rmtree(self.folder, ignore_errors=True)


def for_transformers(name, folder, cfg):
    """Fill `folder` with what transformers opens, and the model card."""
    model, tokenizer, info = open_model(name, kinds=("decoder", "vision"))
    info["parameters"] = sum(p.numel() for p in model.parameters())
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[cfg.dtype]
    try:
        from transformers.utils.logging import disable_progress_bar
    except ImportError:
        raise UserError("this is written by a library that is missing here: "
                        "pip install transformers") from None
    if not sys.stderr.isatty():
        disable_progress_bar()
    write_folder(model, tokenizer, info["stage"], folder, dtype)
    add_card(model, tokenizer, info, folder, cfg)


def native(name, folder, cfg):
    """Fill `folder` with the checkpoint as it is, without what only resuming needs."""
    model, tokenizer, info = open_model(name)
    info["parameters"] = sum(p.numel() for p in model.parameters())
    copy_checkpoint(info["folder"], folder)
    if info["kind"] != "clip":
        add_card(model, tokenizer, info, folder, cfg)


def copy_checkpoint(source, folder):
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("state"))


def add_card(model, tokenizer, info, folder, cfg):
    file, answer = example(model, tokenizer, info, cfg.picture)
    picture = f"example{Path(file).suffix}" if file else ""
    if file:
        shutil.copy(file, folder / picture)
    text = card(cfg.repo or Path(cfg.to).absolute().name, info, cfg, picture, answer)
    (folder / "README.md").write_text(text, encoding="utf-8")


def space(name, folder, cfg):
    """Fill `folder` with app.py, what it imports, the checkpoint, and pictures to try."""
    info = checkpoint.read(name, ("decoder", "vision"))[0]
    if info["stage"] == "pretrain":
        raise UserError(f"{name} is a pretrained checkpoint, which continues text and does not "
                        "chat; a Space takes one of sft.py or of a vision stage")
    copy_checkpoint(info["folder"], folder / "checkpoint")
    for path in imported(HERE / "app.py"):
        copy = folder / path.relative_to(HERE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    if info["kind"] == "vision":
        for path in held_out_pictures(info)[:3]:
            (folder / "examples").mkdir(exist_ok=True)
            shutil.copy(path, folder / "examples")
    shutil.copy(HERE / "requirements.txt", folder)
    text = SPACE_CARD.format(title=cfg.space.split("/")[-1], license=cfg.license,
                             gradio=importlib.metadata.version("gradio"))
    (folder / "README.md").write_text(text, encoding="utf-8")


def imported(path, found=None):
    """The files of this project that a file imports, itself first, and those that they import."""
    found = [] if found is None else found
    if path in found or not path.is_file():
        return found
    found.append(path)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
        else:
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            module = HERE.joinpath(*name.split("."))
            imported(module.with_suffix(".py"), found)
            imported(module / "__init__.py", found)
    return found


def write_llama(name, cfg):
    """Write a text model as one GGUF file."""
    from export.to_gguf import write_gguf

    path = Path(cfg.gguf)
    if path.exists() and not cfg.overwrite:
        raise UserError(f"{path} is there already; say another name, or --overwrite=True")
    model, tokenizer, info = open_model(name, kinds=("decoder", "vision"))
    chats = info["stage"] != "pretrain"
    write_gguf(model, tokenizer, path, cfg.gguf_dtype, CHAT_TEMPLATE if chats else None)
    print(f"written: {path}")


def push(folder, repo, kind, cfg):
    """Push what is in `folder` to the hub; what is there already is not sent."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    print(f"{'would push' if cfg.dry_run else 'pushing'} to the {kind} {repo}:")
    for file in files:
        print(f"  {(folder / file).stat().st_size:>14,}  {file}")
    if cfg.dry_run:
        return
    if not get_token():
        raise UserError("there is no token for the hub: set HF_TOKEN, or say `hf auth login`")
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    try:
        try:
            there = [entry for entry in api.list_repo_tree(repo, recursive=True, repo_type=kind)
                     if hasattr(entry, "blob_id")]
        except RepositoryNotFoundError:
            there = []
            api.create_repo(repo, repo_type=kind, private=cfg.private, exist_ok=True,
                            space_sdk="gradio" if kind == "space" else None)
        others = {entry.path for entry in there if not same(entry, folder / entry.path)}
        others.discard(".gitattributes")  # the hub makes it for a new repository
        if not others and {*map(str, files)} <= {entry.path for entry in there}:
            return print(f"pushed: {repo} has all of that already")
        others.discard("README.md")  # and this one for a Space
        if others and not cfg.overwrite:
            raise UserError(f"{repo} is there already with other content "
                            f"({', '.join(sorted(others)[:3])}); say another name, or "
                            "--overwrite=True to write into it")
        found = api.upload_folder(repo_id=repo, repo_type=kind, folder_path=folder,
                                  delete_patterns=list(WEIGHTS) if cfg.overwrite else None,
                                  commit_message="nanoGPT-Vision")
    except UserError:
        raise
    except HFValidationError:
        raise UserError(f"the hub takes no repository called {repo!r}: say NAME/REPO") from None
    except Exception as error:  # whatever the library's network layer of the day raises
        raise UserError(explain(error)) from None
    print(f"pushed: {found.commit_url}")


def same(entry, path):
    """Whether a file of the hub (RepoFile) has the content of the file `path`."""
    if not path.is_file() or entry.size != path.stat().st_size:
        return False
    if entry.lfs:
        return entry.lfs.sha256 == file_sum(path)
    content = path.read_bytes()  # git's sum of a file
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def explain(error):
    """What went wrong at a push, in a sentence that does not show the token."""
    from huggingface_hub import get_token

    error = error.__cause__ or error
    status = getattr(getattr(error, "response", None), "status_code", None)
    advice = {401: "the token is not accepted: check HF_TOKEN",
              402: "it wants to be paid for that, as for gradio Spaces of free accounts",
              403: "the token may not write there: give it write access"}.get(status)
    if advice:
        return f"the hub refused ({status}): {advice}"
    why = " ".join(f"{type(error).__name__}: {error}".replace(get_token() or " ", " ").split())
    return (f"the push broke off ({why[:300].rstrip('.')}); start the command again, and what is "
            "there already is not sent again")


if __name__ == "__main__":
    run_main(main)
