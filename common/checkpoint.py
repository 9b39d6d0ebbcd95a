"""Checkpoints: whole or not there at all, checked on reading, never unpickled unsafely.

    out/demo/pretrain/step_00001000/
        model.safetensors     the weights, under their plain names
        config.json           stage, model, settings, tokenizer, metrics, lineage
        tokenizer.json        where the vocabulary is not GPT-2's
        state/training.pt     optimizer, step: what resuming needs and sampling does not
        state/shard_00000.pt  ... where the run is sharded, each process's rows of the optimizer
        manifest.json         sha256 of every other file; written last

A checkpoint is written into a temporary folder, flushed to disk and renamed, so a folder with this
name is complete. Readers check the sums: safetensors and torch.load both take a flipped byte.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.atomic import flush
from common.config import UserError, one_line, read_json, read_sealed, seal

STEP_FOLDER = re.compile(r"step_(\d{8})$")


def begin(run_folder, step):
    """An empty folder to write the checkpoint of `step` into."""
    temporary = unfinished(run_folder, step)
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "state").mkdir(parents=True)
    return temporary


def unfinished(run_folder, step):
    return Path(run_folder) / f".writing-step_{step:08d}"


def save_shard(run_folder, step, number, optimizer):
    """Write one process's share of the optimizer's state, between `begin` and `save`.

    Not by torch.distributed.checkpoint: that one's index is a pickle, and unpickled unsafely.
    """
    path = unfinished(run_folder, step) / "state" / f"shard_{number:05d}.pt"
    torch.save(optimizer, path)
    flush(path, deep=False)


def save(run_folder, step, weights, info, tokenizer, training_state, begun=False, keep_every=0):
    """Write the checkpoint of `step` and remove those no longer wanted; returns its folder.

    weights: dict of name to tensor; info: what goes into config.json; training_state: dict.
    begun: whether it has shards in it already. Where the disk is full, the older of the newest two
    makes room; UserError if that was not enough: nothing of the new one is left then.
    """
    folder, content = Path(run_folder) / f"step_{step:08d}", (weights, info, tokenizer,
                                                              training_state)
    temporary = unfinished(run_folder, step)
    for again in (True, False):
        try:
            if not begun:
                begin(run_folder, step)
            fill(temporary, *content)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
            break
        except (OSError, SafetensorError, RuntimeError) as error:  # of each library's own
            reason = why(error, temporary)
            room = not begun and again and prune(run_folder, keep_every, newest=1)
            if not room:
                shutil.rmtree(temporary, ignore_errors=True)
                before = "; the one before is whole" if steps_in(run_folder) else ""
                raise UserError(f"cannot write the checkpoint of step {step} into {run_folder}: "
                                f"{reason}{before}") from None
    flush(folder.parent, deep=False)
    prune(run_folder, keep_every)
    return folder


def why(error, folder):
    """What went wrong in writing into `folder`, in words. Of a full disk PyTorch's own writer says
    only that it is not where it thought to be."""
    with contextlib.suppress(OSError):
        if not isinstance(error, OSError) and shutil.disk_usage(folder).free < 1 << 20:
            return os.strerror(errno.ENOSPC)
    return one_line(error)


def fill(temporary, weights, info, tokenizer, training_state):
    """Write the files of a checkpoint, its sums last, and force them to the disk."""
    weights = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    save_file(weights, temporary / "model.safetensors")
    torch.save(training_state, temporary / "state" / "training.pt")
    write_json(temporary / "config.json", info)
    tokenizer.save(temporary)
    write_json(temporary / "manifest.json", seal({"sha256": sums(temporary)}))
    flush(temporary)


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sums(folder):
    """sha256 of every file below `folder` but the manifest, by relative name."""
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.name != "manifest.json")
    return {str(p.relative_to(folder)): file_sum(p) for p in files}


def file_sum(path):
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def steps_in(run_folder):
    """The whole checkpoints of a run, as {step: folder}, in order of their steps."""
    found = {}
    for path in sorted(Path(run_folder).glob("step_*")):
        match = STEP_FOLDER.search(path.name)
        if match and (path / "manifest.json").is_file():
            found[int(match.group(1))] = path
    return found


def clear(run_folder, everything=False):
    """Remove what killed runs left half done; all checkpoints as well if `everything`."""
    left = [p for start in (".writing-", ".removing-") for p in Path(run_folder).glob(f"{start}*")]
    for folder in [*left, *(steps_in(run_folder).values() if everything else ())]:
        shutil.rmtree(folder)


def prune(run_folder, keep_every=0, newest=2):
    """Remove checkpoints but the newest two, the one with the lowest validation loss and those of
    a multiple of keep_every steps; says whether any was removed. One being read stays."""
    found, removed = steps_in(run_folder), False
    losses = {}
    for step, folder in found.items():
        with contextlib.suppress(UserError, KeyError):  # a damaged one must not stop the run
            losses[step] = read_json(folder / "config.json")["metrics"]["val_loss"]
    losses = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    keep = {*list(found)[-newest:], *([min(losses, key=losses.get)] if losses else []),
            *(step for step in found if keep_every and step % keep_every == 0)}
    for step in found.keys() - keep:
        removed |= remove(found[step])
    return removed


def remove(folder):
    """Remove a checkpoint, at once for all who look; False if it is being read."""
    with contextlib.suppress(OSError), held(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
        gone = folder.with_name(f".removing-{folder.name}")
        folder.rename(gone)
        shutil.rmtree(gone)
        return True
    return False


@contextlib.contextmanager
def held(folder, how=fcntl.LOCK_SH):
    """A lock on a checkpoint: many may read it, and nobody may remove it then."""
    with open(folder / "manifest.json", "rb") as file:
        try:
            fcntl.flock(file, how)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            pass
        yield


def locate(name):
    """The folder that `name` means: a checkpoint, the newest of a run, or a model of the hub."""
    path = Path(name)
    if (path / "config.json").is_file():
        return path
    if path.is_dir():
        found = steps_in(path)
        if found:
            return list(found.values())[-1]
        raise UserError(f"{path} holds no checkpoint (no step_* folder with a manifest.json)")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not path.parent.exists():
        return download(str(name))
    raise UserError(f"there is no checkpoint {name}: train it first, or check the path")


def find(name):
    """The folder of the checkpoint that `name` means; UserError if it is not one of ours."""
    folder = locate(name)
    if not (folder / "manifest.json").is_file():
        raise UserError(f"{folder} is no checkpoint of this project: it has no manifest.json")
    return folder


def download(repository):
    """The folder of a model from the Hugging Face hub, fetched once."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors"]
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"there is no folder {repository}, and the Hugging Face hub does not give "
                        f"it either: {str(error).splitlines()[0]}") from None


def read(name, kinds=None, with_state=False):
    """(info, weights, training state or None) of the checkpoint that `name` means, sums checked.

    kinds: the kinds of model the caller can use ("decoder", "clip", "vision"); another one is a
    UserError that says which stage made it. info gains "folder" and "sha256".
    """
    folder = find(name)
    with held(folder):
        return read_held(folder, kinds, with_state)


def read_held(folder, kinds, with_state):
    """`read` of a folder that nobody removes meanwhile."""
    manifest = read_sealed(folder / "manifest.json")
    if "sha256" not in manifest:
        raise UserError(f"{folder / 'manifest.json'} is damaged: it lists no sums of the files")
    for file, wanted in manifest["sha256"].items():
        if file.startswith("state/") and not with_state:
            continue
        if not (folder / file).is_file():
            raise UserError(f"the checkpoint {folder} lacks its file {file}")
        if file_sum(folder / file) != wanted:
            raise UserError(f"{folder / file} is damaged: its sha256 is not the manifest's; "
                            "use an earlier checkpoint or copy it again")
    info = read_json(folder / "config.json")
    info["folder"], info["sha256"] = str(folder), file_sum(folder / "manifest.json")
    if kinds and info["kind"] not in kinds:
        raise UserError(f"{folder} is a {info['kind']} checkpoint (made by {info['stage']}.py); "
                        f"here a {' or '.join(kinds)} checkpoint is needed")
    try:
        weights = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {folder / 'model.safetensors'}: {error}") from None
    return info, weights, read_state(folder, manifest["sha256"]) if with_state else None


def read_state(folder, files):
    """The training state, its "optimizer" as a list: one state dict, or those of all shards."""
    shards = [name for name in sorted(files) if name.startswith("state/shard_")]
    try:
        path = folder / "state" / "training.pt"
        state = torch.load(path, weights_only=True, map_location="cpu")
        if not isinstance(state, dict):
            raise ValueError("it holds no training state")
        found = [state["optimizer"]] if "optimizer" in state else []
        for path in (folder / name for name in shards):  # mapped: only the rows taken are read
            found.append(torch.load(path, weights_only=True, map_location="cpu", mmap=True))
    except Exception as error:  # whatever a strange file makes PyTorch raise
        raise UserError(f"cannot read {path}: {one_line(error)}") from None
    return {**state, "optimizer": found}


def load_weights(module, weights, where, new=()):
    """Copy `weights` into `module`, strictly: a missing or extra name is an error that names it.

    new: prefixes of the names that a stage declares new; they keep their initial values.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in weights and not name.startswith(tuple(new))]
    extra = [name for name in weights if name not in own]
    shapes = [n for n in own if n in weights and own[n].shape != weights[n].shape]
    for problem, names in (("lacks", missing), ("has unknown", extra), ("has misshapen", shapes)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"the checkpoint {where} {problem} {', '.join(names[:3])}{more}")
    module.load_state_dict({**own, **weights})


def lineage(info):
    """The line of checkpoints behind a new run: those behind `info`, then `info` itself."""
    keys = ("stage", "folder", "step", "sha256", "metrics")
    return [*info.get("lineage", []), {key: info[key] for key in keys}]
