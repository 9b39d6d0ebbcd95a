"""Settings: a dataclass, a config file of plain assignments, and flags, all checked in one place.

    python pretrain.py configs/demo/pretrain.py --max_steps=500

A config file is read, never executed: each `name = value` in it becomes the flag one could have
typed, ahead of the real flags, so that a file and the command line pass the same checks.
"""

import ast
import dataclasses
import difflib
import hashlib
import json
import math
import os
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


class UserError(Exception):
    """Something the user can put right. The message says what, where and what to do."""


def one_line(error, longest=300):
    """What a library says of a strange file, fit for a terminal: on one line, without control
    letters of the file's own, and not all of it where it repeats the file."""
    words = " ".join(str(error).split()).encode("utf-8", "replace").decode()
    text = "".join(letter if letter.isprintable() else "?" for letter in words)
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}"


@dataclass
class TrainSettings:
    """What every training stage lets you set."""

    out: str = "out/run"  # folder of this run: checkpoints, log.jsonl, loss.png, report.md
    seed: int = 1337  # of the initial weights and of the data order
    resume: bool = True  # go on from the newest checkpoint in `out`; False starts the run anew

    max_steps: int = 1000  # optimizer steps in the whole run
    time_limit: float = 0.0  # minutes after which the run saves and ends early; 0 for no limit
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: Muon for the matrices, AdamW for the rest
    muon_lr: float = 0.02  # peak learning rate of Muon's matrices
    momentum: float = 0.95  # Muon's memory of the gradient; a short run learns more with 0.9
    lr: float = 3e-3  # peak learning rate of everything that AdamW trains
    embedding_lr: float = 0.0  # peak learning rate of token embeddings; 0 for the same as lr
    weight_decay: float = 0.01  # shrinks each weight by this share of its learning rate a step
    decay: Literal["matrices", "all"] = "matrices"  # all: norms, biases and embeddings decay too
    beta1: float = 0.9  # AdamW's memory of the gradient
    beta2: float = 0.95  # AdamW's memory of its square
    grad_clip: float = 1.0  # longest gradient, in its global norm; 0 for no clipping
    schedule: Literal["linear", "cosine"] = "linear"  # shape of the way down
    warmup: float = 0.02  # share of the steps spent rising to the peak
    cooldown: float = 0.5  # share of the steps, at the end, spent coming down
    final_lr: float = 0.0  # where the way down ends, as a share of the peak

    eval_every: int = 250  # steps between evaluations; 0 for only at the end
    save_every: int = 1000  # steps between checkpoints; there is always one at the end
    keep_every: int = 0  # checkpoints of every so many steps are never removed; 0 for none
    log_every: int = 10  # steps between printed lines
    step_timeout: float = 15.0  # minutes after which a process that stalls is named and the job
    # ends; 0 for never
    device: str = "auto"  # auto, cpu, cuda, mps
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: what the device is for
    # divide weights and optimizer over all GPUs (full) or those of a node (hybrid), by FSDP
    shard: Literal["none", "full", "hybrid"] = "none"
    compile: bool = False  # torch.compile: slower to start, faster after (needs a C++ compiler)
    dollars_per_hour: float = 0.0  # price of one device, for the report
    tracker: Literal["none", "trackio", "wandb"] = "none"  # also send the figures there


def parse(config_class, argv=None):
    """Settings from `[config file] [--name=value ...]`; --help lists them with their comments.

    Raises UserError for a name that does not exist (with the nearest one) or a broken file; a value
    of the wrong type ends the program with tyro's message and status 2.
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    file_flags = []
    if argv and not argv[0].startswith("-"):
        file_flags = read_config_file(argv.pop(0), config_class)
    for flag in argv:
        if flag.startswith("--") and flag not in ("--help",):
            check_name(flag[2:].split("=")[0], config_class, "on the command line")
    for flag in (*file_flags, *argv):
        if "\0" in flag or any("\ud800" <= letter <= "\udfff" for letter in flag):
            raise UserError(f"{flag.split('=')[0][:60]!r} is given a letter that is no text")
    settings = tyro.cli(
        config_class,
        args=[*file_flags, *argv],
        config=(tyro.conf.FlagConversionOff,),
        use_underscores=True,
    )
    check_numbers(settings)
    return settings


def check_numbers(settings):
    """UserError for a number that nothing can be counted or multiplied with."""
    for name, value in vars(settings).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name}={value} is no number to compute with")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise UserError(f"--{name} is too large: computers count to 2^63")


def read_config_file(path, config_class):
    """The assignments in the file `path` as a list of flags."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's, about its own language
            tree = ast.parse(Path(path).read_text(encoding="utf-8"), filename=path)
    except FileNotFoundError:
        raise UserError(f"there is no config file {path}") from None
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"cannot read the config file {path}: {one_line(error)}") from None
    flags = []
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        where = f"{path}, line {node.lineno}"
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1
                and isinstance(node.targets[0], ast.Name)):
            raise UserError(f"{where}: a config file holds only lines like `max_steps = 500`")
        name = node.targets[0].id
        check_name(name, config_class, f"in {where}")
        try:
            value = ast.literal_eval(node.value)
            if not isinstance(value, int | float | str | None):
                raise TypeError
            flags.append(f"--{name}={value}")
        except (ValueError, TypeError, RecursionError, MemoryError):
            raise UserError(f"{where}: the value of {name} must be a plain number, string, True or "
                            "False") from None
    return flags


def check_name(name, config_class, where):
    names = [field.name for field in dataclasses.fields(config_class)]
    if name.replace("-", "_") not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "--help lists the settings"
        raise UserError(f"there is no setting {name[:60]!r} ({where}); {hint}")


def read_json(path):
    """The JSON value in the file `path`, or a UserError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except RecursionError:
        raise UserError(f"cannot read {path}: its lists are nested too deeply") from None


def seal(content):
    """The dict `content` with its own sum, so that a list of sums can be checked itself."""
    content = json.loads(json.dumps(content))  # as it will be read: keys are strings, no tuples
    return {**content, "seal": seal_of(content)}


def seal_of(content, without="seal"):
    """The sha256 of a dict's JSON, whatever its order and its spaces, but for one key."""
    rest = {key: value for key, value in content.items() if key != without}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_sealed(path):
    """The dict that `seal` made, from the file `path`; UserError if it is not what it was.

    One that never had a seal is taken as it is.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it does not begin with a brace")
    # Looked up by its value, since the word "seal" can be damaged too.
    found = [key for key, value in content.items() if value == seal_of(content, key)]
    if found != ["seal"] and (found or "seal" in content):
        raise UserError(f"{path} is damaged: its seal, the sum of its content, does not fit; make "
                        "it again or copy it again")
    return content


def run_main(main):
    """Call main(); a UserError becomes one line and status 1, a second Ctrl-C a quiet end."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # who reads our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
