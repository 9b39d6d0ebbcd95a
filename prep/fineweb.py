"""Public token shards, downloaded from the Hugging Face Hub, every file verified."""

import contextlib
import os
import shutil

import numpy as np

import tokenizer as tokenizers
from common import hub
from common.checkpoint import file_sum
from common.config import UserError
from data import read_array
from prep.writers import new_data_set, write_manifest


def fetch_shards(cfg):
    """Download the first cfg.shards training shards of cfg.repository and its validation shards.

    Interrupted, it resumes with what is missing; an existing data set is extended.
    """
    remotes = hub.listing(cfg.repository)
    train, val = ([remote for remote in remotes if remote.split == split]
                  for split in ("train", "val"))
    if cfg.shards > len(train):
        raise UserError(f"{cfg.repository} has {len(train)} training shards; "
                        f"--shards={cfg.shards} needs more")
    folder, counts, sums = new_data_set(cfg.out, "fineweb", keep=True), {"train": 0, "val": 0}, {}
    with folder as out:
        for remote in [*val, *train[: cfg.shards or None]]:
            name = remote.base
            with contextlib.suppress(OSError):  # files of an existing data set are not fetched
                os.link(folder.path / name, out / name)
            n = len(read_array(hub.fetch(cfg.repository, remote, out), np.uint16))
            counts["val" if remote in val else "train"] += n
            sums[name] = remote.sha256 or file_sum(out / name)
            print(f"{name}: {n:,} tokens", flush=True)
        for path in out.iterdir():  # left by an earlier start with other settings
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in sums:
                path.unlink()
        write_manifest(out, "fineweb", tokenizers.gpt2(), train_tokens=counts["train"],
                       val_tokens=counts["val"], repository=cfg.repository, sha256=sums)
    print(f"{cfg.out}: {counts['train']:,} training tokens, {counts['val']:,} validation tokens")
