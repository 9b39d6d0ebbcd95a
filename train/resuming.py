"""Going on where a run stopped: from its newest whole checkpoint."""

import dataclasses

import torch

from common import checkpoint
from common.config import UserError
from common.device import PRECISIONS, precision_name


def make_folder(run):
    """Make the folder of a Run, and make sure that all machines see it."""
    if run.machine.is_main:
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            checkpoint.clear(run.folder, everything=not run.cfg.resume)
        except OSError as error:
            raise UserError(f"--out={run.folder} cannot be made a folder or written into: "
                            f"{error.strerror}; choose another") from None
    run.machine.barrier()
    missing = torch.tensor(float(not run.folder.is_dir()), device=run.device)
    if run.machine.sum(missing) > 0:
        raise UserError(f"not every machine sees --out={run.folder}: it must be a folder that "
                        "all of them share")


def resume(run):
    """Load the weights of the newest checkpoint, if any; returns its training state."""
    found = checkpoint.steps_in(run.folder)
    newest = torch.tensor(max(found, default=0), device=run.device)
    if run.machine.sum(newest.clone()) != run.ranks * newest:
        raise UserError(f"the processes see different checkpoints in {run.folder}: --out must "
                        "be a folder that all machines share")
    if not found:
        run.log.resume(-1)
        return None
    folder, info, weights, state = newest_whole(run, list(found.values()))
    if info["stage"] != run.stage or info["tokenizer"] != run.tokenizer.fingerprint:
        raise UserError(f"{run.folder} holds a run of {info['stage']}.py or of another "
                        "tokenizer; choose another --out, or --resume=False to replace it")
    checkpoint.load_weights(run.model, weights, folder)
    run.metrics, run.origins = info["metrics"], info.get("origins", [])
    run.began -= info["metrics"].get("seconds", 0)
    run.log.resume(state["step"] - 1)
    before = {**dataclasses.asdict(type(run.cfg)()), **info["settings"]}
    changed = [f"{name} ({before[name]} -> {value})"
               for name, value in run.settings.items() if before[name] != value]
    run.log.say(f"going on from {folder}" + (f"; changed: {', '.join(changed)}" if changed else ""))
    keep_types(run, info)
    if state["step"] >= run.cfg.max_steps:  # nothing is done with other settings any more
        run.settings = {**run.settings, **info["settings"]}
    ranks = info.get("processes", run.ranks)
    if ranks != run.ranks:
        run.log.say(f"{ranks} process{'es' * (ranks > 1)} before, {run.ranks} now: the same "
                    "batches, but sums in another order, so not the same last bits")
    return state


def keep_types(run, info):
    """With --precision=auto, compute in the types that the run began with, so that it stays exact
    on another processor."""
    if run.cfg.precision != "auto" or "precision" not in info:
        return
    here, muon_here = run.machine.dtype, run.optimizer.dtype
    run.machine.dtype = PRECISIONS[info["precision"]]
    run.optimizer.dtype = PRECISIONS[info["muon_precision"]]
    if (here, muon_here) != (run.machine.dtype, run.optimizer.dtype):
        run.log.say(f"the run began in {info['precision']}, Muon's products in "
                    f"{info['muon_precision']}, and stays so to be exact; this machine would "
                    f"choose {precision_name(here)}: --precision={precision_name(here)}")


def newest_whole(run, folders):
    """(folder, info, weights, training state) of the newest checkpoint that is not damaged."""
    while True:
        folder = folders.pop()
        try:
            return folder, *checkpoint.read(folder, with_state=True)
        except UserError as error:
            if not folders:
                raise
            run.log.say(f"{error}; trying the one before")
