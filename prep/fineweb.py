"""Token shards that somebody else made, fetched from the Hugging Face hub, every file checked."""

import contextlib
import os
import shutil
from pathlib import Path

import numpy as np

import tokenizer as tokenizers
from common import hub
from common.checkpoint import file_sum, write_json
from common.config import UserError, seal
from data import read_array
from prep.writers import new_data_set


def fetch_shards(cfg):
    """Fetch the first cfg.shards training shards of cfg.repository, and those for validation.

    Killed and started again it goes on, and a data set that is there already grows.
    """
    remotes = hub.listing(cfg.repository)
    kinds = {kind: [remote for remote in remotes if kind in remote.name]
             for kind in ("train", "val")}
    if not all(kinds.values()) or cfg.shards > len(kinds["train"]):
        raise UserError(f"{cfg.repository} has {len(kinds['train'])} training and "
                        f"{len(kinds['val'])} validation shards; --shards={cfg.shards} needs more")
    chosen = [*kinds["val"], *kinds["train"][: cfg.shards or None]]
    folder = new_data_set(cfg.out, keep=True)
    tokens = {"train": 0, "val": 0}
    names = [Path(remote.name).name for remote in chosen]
    with folder as out:
        for number, (remote, name) in enumerate(zip(chosen, names, strict=True), 1):
            with contextlib.suppress(OSError):  # what an older data set has is not fetched again
                os.link(folder.path / name, out / name)
            n = len(read_array(hub.fetch(cfg.repository, remote, out), np.uint16))
            tokens["val" if remote in kinds["val"] else "train"] += n
            print(f"{number} of {len(chosen)}: {name}, {n:,} tokens", flush=True)
        clear(out, names)
        write_json(out / "manifest.json", seal({
            "tokenizer_name": "gpt2", "tokenizer": tokenizers.gpt2().fingerprint,
            "train_tokens": tokens["train"], "val_tokens": tokens["val"],
            "repository": cfg.repository,
            "sha256": {name: remote.sha256 or file_sum(out / name)
                       for remote, name in zip(chosen, names, strict=True)}}))
    print(f"{cfg.out}: {tokens['train']:,} tokens to train on, {tokens['val']:,} for validation")


def clear(folder, names):
    """Remove everything else from a folder: an earlier start was asked for more, or for others."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in names:
            path.unlink()
