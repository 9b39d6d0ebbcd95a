"""Export a checkpoint to transformers, llama.cpp or the Hugging Face Hub.

    python upload.py out/demo/vision_sft --to=hf_folder             # a folder for transformers
    python upload.py out/demo/vision_sft --repo=NAME/REPO           # the same, pushed to the hub
    python upload.py out/demo/vision_sft --repo=NAME/REPO --native=True   # for sample.py NAME/REPO
    python upload.py out/demo/vision_sft --space=NAME/SPACE         # app.py with it, as a Space
"""

import importlib.metadata
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import checkpoint
from common.atomic import NewFolder
from common.config import UserError, one_line, parse_checkpoint, run_main
from common.device import PRECISIONS
from export.model_card import fill_template, held_out_images, write_card
from export.to_transformers import write_folder
from vision import open_model

HERE = Path(__file__).resolve().parent
APP = ("app.py", "clip.py", "data.py", "model.py", "tokenizer.py", "vision.py", "requirements.txt",
       "common", "export", "inference")  # files and folders that app.py needs
RESUME_ONLY = shutil.ignore_patterns("state")  # part of a checkpoint
HINTS = {401: "the token is not accepted: check HF_TOKEN",
         402: "the hub wants payment, as for gradio Spaces of free accounts",
         403: "the token may not write there: give it write access"}
RETRY = "start the same command again: files that have arrived are not sent again"


@dataclass
class Config:
    # --- destination
    to: str = ""  # folder to write for transformers
    repo: str = ""  # NAME/REPO on the hub to push it to
    space: str = ""  # NAME/SPACE on the hub to push app.py and the checkpoint to
    native: bool = False  # push the checkpoint as it is, for this project, not for transformers
    private: bool = False  # a new repository or Space is private
    overwrite: bool = False  # replace an earlier export, or write into a repository with content
    dry_run: bool = False  # list what would be pushed, and push nothing

    # --- format
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the weights for transformers

    # --- model card
    license: str = "mit"  # of the weights, for the model card; mind the data's
    image: str = ""  # example for the model card; empty: a held-out one of the demo, if any


def main():
    name, cfg = parse_checkpoint(Config)
    if not any((cfg.to, cfg.repo, cfg.space)):
        raise UserError("name a target: --to, --repo or --space")
    if cfg.to:
        check_target(Path(cfg.to), cfg.overwrite)
        with NewFolder(cfg.to) as folder:
            fill_model(name, folder, cfg)
            check_target(Path(cfg.to), cfg.overwrite, {path.name for path in folder.iterdir()})
        print(f"written: {cfg.to}")
    for repo, kind, fill in (cfg.repo, "model", fill_model), (cfg.space, "space", fill_space):
        if repo:
            with tempfile.TemporaryDirectory() as folder:
                fill(name, Path(folder), cfg)
                push(Path(folder), repo, kind, cfg)


def check_target(target, overwrite, names=()):
    """UserError if the folder `target` is neither new nor, with overwrite, an earlier export, which
    has only files of these names."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{target} exists; choose another folder, or replace an earlier export by "
                        "--overwrite=True")
    if not (target / "README.md").is_file() or not all(map(Path.is_file, target.iterdir())):
        raise UserError(f"{target} is not an earlier export, so it is not replaced; choose another "
                        "folder")
    for other in sorted(set(os.listdir(target)) - set(names or os.listdir(target))):
        raise UserError(f"{target} is not replaced: this export has no {other}, so the one in it "
                        "would be lost; move that elsewhere, or choose another folder")


def fill_model(name, folder, cfg):
    """Fill `folder` with what transformers opens, or with the checkpoint as it is, and a card."""
    model, tokenizer, info = open_model(name, kinds=None if cfg.native else ("decoder", "vision"))
    if cfg.native:
        shutil.copytree(info["folder"], folder, dirs_exist_ok=True, ignore=RESUME_ONLY)
    else:
        write_folder(model, tokenizer, info["stage"], folder, PRECISIONS[cfg.dtype])
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner may read
    if info["kind"] != "clip":
        write_card(folder, model, tokenizer, info, cfg)


def fill_space(name, folder, cfg):
    """Fill `folder` with app.py, the code it needs, the checkpoint, and example images."""
    info = checkpoint.read(name, ("decoder", "vision"))[0]
    if info["stage"] == "pretrain":
        raise UserError(f"{name} is a pretrained checkpoint, which continues text and does not "
                        "chat; a Space takes one of sft.py or of a vision stage")
    shutil.copytree(info["folder"], folder / "checkpoint", ignore=RESUME_ONLY)
    for path in (HERE / part for part in APP):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, folder)
    (folder / "examples").mkdir()
    for image in held_out_images(info)[:3] if info["kind"] == "vision" else ():
        shutil.copy(image, folder / "examples")
    fill_template("space_card.md", folder, title=cfg.space.split("/")[-1], license=cfg.license,
                  gradio=importlib.metadata.version("gradio"))


def push(folder, repo, kind, cfg):
    """Push the files of `folder` to the hub, which skips those that it has already."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars

    print(f"{'would push' if cfg.dry_run else 'pushing'} to the {kind} {repo}:")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"  {path.stat().st_size:>14,}  {path.relative_to(folder)}")
    if cfg.dry_run:
        return
    if not get_token():
        raise UserError("there is no token for the hub: set HF_TOKEN or run `hf auth login`")
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    try:
        api.create_repo(repo, repo_type=kind, private=cfg.private, exist_ok=True,
                        space_sdk="gradio" if kind == "space" else None)
        others = set(api.list_repo_files(repo, repo_type=kind)) - {".gitattributes", "README.md"}
        if others and not cfg.overwrite:  # those two are in a new one
            raise UserError(f"{repo} exists with content ({', '.join(sorted(others)[:3])}); "
                            "choose another name, or --overwrite=True to write into it")
        found = api.upload_folder(repo_id=repo, repo_type=kind, folder_path=folder,
                                  delete_patterns="*.safetensors*" if cfg.overwrite else None,
                                  commit_message="nanoGPT-Vision")
    except UserError:
        raise
    except Exception as error:  # the exception types depend on the library's HTTP client
        cause = error.__cause__ or error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        reason = one_line(f"{type(cause).__name__}: {cause}".replace(get_token(), ""))
        hint = HINTS.get(status, RETRY)
        raise UserError(f"the push to {repo} failed ({reason}); {hint}") from None
    print(f"pushed: {found.commit_url}")


if __name__ == "__main__":
    run_main(main)
