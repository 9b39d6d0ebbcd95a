"""Checkpoints: complete or absent, checked on reading, never unpickled unsafely.

A folder step_00001000 has the weights under their plain names (model.safetensors), config.json,
tokenizer.json unless the vocabulary is GPT-2's, what only resuming needs (state/training.pt), and
manifest.json, the sha256 of all others. It is written under another name, flushed and renamed, so
it is complete. Readers check the sums, as safetensors and torch.load accept a flipped byte.
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

from common.atomic import publish, take_lock
from common.config import UserError, one_line, read_json, read_sealed, seal


def save(run_folder, step, weights, info, tokenizer, training_state, keep_every=0):
    """Write the checkpoint of `step`, then `prune`; returns its folder.

    weights: {name: tensor}; info: the content of config.json; training_state: dict. On a full disk,
    the older of the newest two checkpoints is removed; if that is not enough, nothing of the new
    one is left and UserError is raised.
    """
    folder = Path(run_folder) / f"step_{step:08d}"
    temporary = folder.with_name(f".writing-{folder.name}")
    for retry in (True, False):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "state").mkdir(parents=True)
            save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()},
                      temporary / "model.safetensors")
            torch.save(training_state, temporary / "state" / "training.pt")
            write_json(temporary / "config.json", info)
            tokenizer.save(temporary)
            write_json(temporary / "manifest.json", seal({"sha256": sums(temporary)}))
            publish(temporary, folder)
            break
        except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: of torch.save
            reason = one_line(error)
            # On a full disk torch.save only says that the file position is not the expected one.
            with contextlib.suppress(OSError):
                if not isinstance(error, OSError) and shutil.disk_usage(temporary).free < 1 << 20:
                    reason = os.strerror(errno.ENOSPC)
            if not (retry and prune(run_folder, keep_every, newest=1)):
                shutil.rmtree(temporary, ignore_errors=True)
                before = "; the one before is complete" if steps_in(run_folder) else ""
                raise UserError(f"cannot write the checkpoint of step {step} into {run_folder}: "
                                f"{reason}{before}") from None
    prune(run_folder, keep_every)
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


def lock(run_folder):
    """Reserve a run's folder until this process ends; returns the file to keep open. lockf also
    locks on network disks, and workers do not inherit it; some disks have no locks."""
    file = open(Path(run_folder) / ".lock", "w")  # noqa: SIM115
    take_lock(file, f"training into --out={run_folder}", call=fcntl.lockf)
    return file


def steps_in(run_folder):
    """The complete checkpoints of a run, as {step: folder} in the order of steps."""
    return {int(path.name.removeprefix("step_")): path
            for path in sorted(Path(run_folder).glob("step_" + "[0-9]" * 8))
            if (path / "manifest.json").is_file()}


def clear(run_folder, everything=False):
    """Remove what killed runs left unfinished; all checkpoints too if `everything`."""
    folders = [*run_folder.glob(".writing-step_*"), *run_folder.glob(".removing-step_*")]
    for folder in [*folders, *(steps_in(run_folder).values() if everything else ())]:
        shutil.rmtree(folder)


def prune(run_folder, keep_every=0, newest=2):
    """Remove checkpoints except the newest two, of those evaluated at their very step the one with
    the lowest validation loss, and multiples of keep_every steps; returns whether any was removed.
    Those being read stay."""
    found, losses = steps_in(run_folder), {}
    for step, folder in found.items():
        with contextlib.suppress(UserError, KeyError):  # a damaged one must not stop the run
            losses[step] = read_json(folder / "config.json")["metrics"]["val_loss"]
    losses = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    keep = {*list(found)[-newest:], *([min(losses, key=losses.get)] if losses else []),
            *(step for step in found if keep_every and step % keep_every == 0)}
    removed = [remove(found[step]) for step in found.keys() - keep]
    return any(removed)


def remove(folder):
    """Remove a checkpoint, atomically for readers; False if it is being read."""
    with contextlib.suppress(OSError, UserError), locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
        removing = folder.with_name(f".removing-{folder.name}")
        folder.rename(removing)
        shutil.rmtree(removing)
        return True
    return False


@contextlib.contextmanager
def locked(folder, how=fcntl.LOCK_SH):
    """A lock on a checkpoint: many may read it, and nobody may remove it meanwhile."""
    with open(folder / "manifest.json", "rb") as file:
        take_lock(file, f"reading {folder}", how)
        yield


def locate(name):
    """The folder that `name` means: a checkpoint, the newest of a run, or a model of the hub."""
    path = Path(name)
    if (path / "config.json").is_file():
        return path
    if path.is_dir():
        if found := steps_in(path):
            return list(found.values())[-1]
        raise UserError(f"{path} holds no checkpoint (no step_* folder with a manifest.json)")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or path.parent.exists():
        raise UserError(f"there is no checkpoint {name}: train it first, or check the path")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"there is no folder {name}, and it cannot be downloaded from the Hugging "
                        f"Face Hub: {str(error).splitlines()[0]}") from None


def read(name, kinds=None, with_state=False):
    """(info, weights, training state or None) of the checkpoint that `name` means, sums checked.
    kinds: of model that the caller accepts ("decoder", "clip", "vision"). info gains "folder" and
    "sha256"."""
    folder = locate(name)
    if not (folder / "manifest.json").is_file():
        raise UserError(f"{folder} is not a checkpoint of this project: it has no manifest.json")
    with locked(folder):
        for file, digest in read_sealed(folder / "manifest.json")["sha256"].items():
            if file.startswith("state/") and not with_state:
                continue
            if not (folder / file).is_file():
                raise UserError(f"the checkpoint {folder} lacks its file {file}")
            if file_sum(folder / file) != digest:
                raise UserError(f"{folder / file} is damaged: its sha256 is not the manifest's; "
                                "use an earlier checkpoint or copy it again")
        info, state = read_json(folder / "config.json"), None
        info["folder"], info["sha256"] = str(folder), file_sum(folder / "manifest.json")
        if kinds and info["kind"] not in kinds:
            raise UserError(f"{folder} is a {info['kind']} checkpoint (made by {info['stage']}.py);"
                            f" a {' or '.join(kinds)} checkpoint is needed here")
        path = folder / "model.safetensors"
        try:
            weights = load_file(path)
            if with_state:
                path = folder / "state" / "training.pt"
                state = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # a damaged file can make PyTorch raise anything
            raise UserError(f"cannot read {path}: {one_line(error)}") from None
        return info, weights, state


def load_weights(module, weights, where):
    """Copy `weights` into `module`, strictly: a missing or extra name is an error that names it."""
    own = module.state_dict()
    missing = [name for name in own if name not in weights]
    extra = [name for name in weights if name not in own]
    shapes = [n for n in own if n in weights and own[n].shape != weights[n].shape]
    for problem, names in (("lacks", missing), ("has unknown", extra), ("has misshapen", shapes)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"the checkpoint {where} {problem} {', '.join(names[:3])}{more}")
    module.load_state_dict(weights)


def lineage(info):
    """The line of checkpoints behind a new run: those behind `info`, then `info` itself."""
    keys = ("stage", "folder", "step", "sha256", "metrics", "settings", "imported_from")
    return [*info.get("lineage", []), {key: info[key] for key in keys if key in info}]
