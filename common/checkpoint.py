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
import hashlib
import json
import math
import os
import pickle
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.config import UserError, read_json

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


def save(run_folder, step, weights, info, tokenizer, training_state, begun=False):
    """Write the checkpoint of `step` and remove those no longer wanted; returns its folder.

    weights: dict of name to tensor; info: what goes into config.json; training_state: dict.
    begun: whether it has shards in it already.
    """
    folder = Path(run_folder) / f"step_{step:08d}"
    temporary = unfinished(run_folder, step) if begun else begin(run_folder, step)
    weights = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    save_file(weights, temporary / "model.safetensors")
    torch.save(training_state, temporary / "state" / "training.pt")
    write_json(temporary / "config.json", info)
    tokenizer.save(temporary)
    write_json(temporary / "manifest.json", {"sha256": sums(temporary)})
    flush(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    flush(folder.parent, deep=False)
    prune(run_folder)
    return folder


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


def flush(folder, deep=True):
    """Force `folder`, and if deep the files below it, to the disk."""
    for path in [*(Path(folder).rglob("*") if deep else ()), Path(folder)]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def steps_in(run_folder):
    """The whole checkpoints of a run, as {step: folder}, in order of their steps."""
    found = {}
    for path in sorted(Path(run_folder).glob("step_*")):
        match = STEP_FOLDER.search(path.name)
        if match and (path / "manifest.json").is_file():
            found[int(match.group(1))] = path
    return found


def prune(run_folder):
    """Keep the newest two checkpoints and the one with the lowest validation loss."""
    found = steps_in(run_folder)
    losses = {}
    for step, folder in found.items():
        with contextlib.suppress(UserError, KeyError):  # a damaged one must not stop the run
            losses[step] = read_json(folder / "config.json")["metrics"]["val_loss"]
    losses = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    keep = {*list(found)[-2:], *([min(losses, key=losses.get)] if losses else [])}
    for step in found.keys() - keep:
        shutil.rmtree(found[step])


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
    manifest = read_json(folder / "manifest.json")
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
        found = [state["optimizer"]] if "optimizer" in state else []
        for path in (folder / name for name in shards):  # mapped: only the rows taken are read
            found.append(torch.load(path, weights_only=True, map_location="cpu", mmap=True))
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from None
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
