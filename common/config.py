"""Settings: a dataclass, a config file of plain assignments, and flags, all checked in one place.

    python pretrain.py configs/demo/pretrain.py --max_steps=500

A config file is read, never executed: each `name = value` in it becomes a flag ahead of those of
the command line. --help is made from the comments of the dataclass: the one on a setting's line
and those right above it. A comment `# --- name` starts a group.
"""

import argparse
import ast
import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args


class UserError(Exception):
    """An error that the user can correct. The message says what, where and what to do."""


def one_line(error, longest=300):
    """An error message of a library on one line, printable, at most about `longest` characters."""
    words = " ".join(str(error).split()).encode("utf-8", "replace").decode()
    text = "".join(letter if letter.isprintable() else "?" for letter in words)
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}"


@dataclass
class TrainSettings:
    """Settings of every training stage."""

    # --- optimization
    max_steps: int = 1000  # optimizer steps of the run
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: Muon for matrices, AdamW for the rest
    # a rate or momentum of -1 follows from the size and the number of steps (train/recipe.py)
    muon_lr: float = -1.0  # Muon's peak learning rate
    momentum: float = -1.0  # Muon's momentum
    lr: float = -1.0  # AdamW's peak learning rate
    embedding_lr: float = 0.0  # peak learning rate of token embeddings; 0 for the same as lr
    weight_decay: float = 0.01  # decoupled weight decay, multiplied by the learning rate
    decay: Literal["matrices", "all"] = "matrices"  # all: also norms, biases and embeddings
    beta1: float = 0.9  # AdamW's beta1
    beta2: float = 0.95  # AdamW's beta2
    grad_clip: float = 1.0  # maximum global gradient norm; 0 for no clipping
    schedule: Literal["linear", "cosine"] = "linear"  # shape of the learning-rate decay
    warmup: float = 0.02  # fraction of steps used for learning-rate warmup
    cooldown: float = 0.5  # fraction of steps used for learning-rate decay, at the end
    final_lr: float = 0.0  # learning rate after the decay, as a fraction of the peak

    # --- run
    out: str = "out/run"  # run folder: checkpoints, log.jsonl, loss.png, report.md, report.html
    seed: int = 1337  # seed of the initial weights and of the data order
    resume: bool = True  # resume from the newest checkpoint in `out`; False restarts the run
    time_limit: float = 0.0  # minutes after which the run saves and stops; 0 for no limit
    eval_every: int = 250  # steps between evaluations; 0 for only at the end
    save_every: int = 1000  # steps between checkpoints; the last step always saves one
    keep_every: int = 0  # steps between checkpoints that are kept for good; 0 for none
    log_every: int = 10  # steps between printed lines
    dollars_per_hour: float = 0.0  # price of one device, for the report
    tracker: Literal["none", "trackio", "wandb"] = "none"  # also log to this experiment tracker

    # --- hardware
    device: str = "auto"  # auto, cpu, cuda, mps
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: the best for the device
    compile: bool = False  # torch.compile: slower start, faster steps (needs a C++ compiler)
    # minutes without progress after which, of several processes, the stalled one is reported and
    # the job ends; 0 for never
    step_timeout: float = 15.0


def parse(config_class, argv=None, usage="[CONFIG]"):
    """Settings from `[config file] [--name=value ...]`; --help lists them with their comments.

    usage: what --help shows between the script's name and the settings.
    Raises UserError for an unknown name (with the nearest one), a value of the wrong type or a
    broken config file.
    """
    flags = list(sys.argv[1:] if argv is None else argv)
    if flags and not flags[0].startswith("-"):
        flags = [*read_config_file(flags[0], config_class), *flags[1:]]
    for flag in flags:
        if flag.startswith("--") and flag != "--help":
            check_name(flag[2:].split("=")[0], config_class, "on the command line")
    about = sys.modules[config_class.__module__].__doc__ or ""
    if not config_class.__doc__.startswith(f"{config_class.__name__}("):  # dataclass's own
        about += f"\n{inspect.getdoc(config_class)}"
    parser = Parser(
        usage=f"python {Path(sys.argv[0]).name} {usage} [--name=value ...]",
        description=about, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for title, settings in described_settings(config_class).items():
        group = parser.add_argument_group(title)
        for field, comment in settings:
            group.add_argument(f"--{field.name}", **options_of(field, comment))
    found = vars(parser.parse_args(flags))
    return config_class(**{name: tuple(value) if isinstance(value, list) else value
                           for name, value in found.items()})


def parse_checkpoint(config_class, argv=None, default=None, usage="CHECKPOINT [CONFIG]"):
    """(checkpoint name, settings) from `CHECKPOINT [config file] [--name=value ...]`.

    default: the name where the command line has none; without a default that is a UserError.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = default if not argv or argv[0].startswith("-") else argv.pop(0)
    settings = parse(config_class, argv, usage)
    if name is None:
        raise UserError(f"name a checkpoint: python {Path(sys.argv[0]).name} out/demo/sft")
    return os.path.expanduser(name), settings


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{one_line(message)}; --help lists the settings")


def options_of(field, comment):
    """What argparse should know about a setting of type bool, int, float, str, Literal or
    tuple[str, ...]; the last can be given several times."""
    kind, default = field.type, field.default
    shown = f"{comment} (default: {default})" if default not in ("", ()) else comment
    options = {"default": default, "help": shown.strip().replace("%", "%%")}
    if kind == tuple[str, ...]:
        kind, options = str, options | {"action": "append", "default": []}
    if kind not in (bool, int, float, str):
        return options | {"choices": get_args(kind)}
    return options | {"type": functools.partial(value_of, kind), "metavar": kind.__name__.upper()}


def value_of(kind, text):
    """The value of type `kind` that `text` spells."""
    try:
        if kind is str and text.startswith("~/"):  # which a shell does not expand after a =
            text = os.path.expanduser(text)
        text.encode()  # fails for bytes that are not UTF-8, such as a file name in Latin-1
        value = ("False", "True").index(text) == 1 if kind is bool else kind(text)
        if kind is not str and not abs(value) < 2**63:  # NaN is not below it either
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a valid {kind.__name__}") from None
    return value


def described_settings(config_class):
    """{group: [(field, help)]} from the comments in the source of a settings class."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    groups = {}
    for cls in config_class.__mro__[:-1]:  # a stage's own settings first
        group, above = "settings", []
        for line in inspect.getsource(cls).splitlines():
            setting = re.fullmatch(r"    (\w+): .*? = .*?(?:  # (.*))?", line)
            if heading := re.fullmatch(r"    # --- (.+)", line):
                group = heading[1]
            elif comment := re.fullmatch(r"    # (.+)", line):
                above.append(comment[1])
                continue
            elif setting and setting[1] in fields:
                text = " ".join(filter(None, [*above, setting[2]]))
                groups.setdefault(group, []).append((fields.pop(setting[1]), text))
            above = []
    return groups


def read_config_file(path, config_class):
    """The assignments in the file `path` as a list of flags."""
    try:
        lines = ast.parse(Path(path).read_text(encoding="utf-8-sig")).body
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"cannot read the config file {path}: {one_line(error)}") from None
    flags = []
    for node in lines:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        where = f"{path}, line {node.lineno}"
        try:
            (target,), value = node.targets, ast.literal_eval(node.value)
            name = target.id
            if not isinstance(value, int | float | str) or b"\0" in str(value).encode():
                raise TypeError
        except (AttributeError, TypeError, ValueError, RecursionError, MemoryError):
            raise UserError(f"{where}: a config file holds only lines like `max_steps = 500`, with "
                            "a plain number, string, True or False") from None
        check_name(name, config_class, f"in {where}")
        flags.append(f"--{name}={value}")
    return flags


def check_name(name, config_class, where):
    """UserError for a setting that does not exist."""
    names = [field.name for field in dataclasses.fields(config_class)]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "--help lists the settings"
        raise UserError(f"there is no setting {name[:60]!r} ({where}); {hint}")


def read_json(path):
    """The JSON value in the file `path`, or a UserError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def seal(content):
    """The dict `content` with the sha256 of its JSON, so that a file of checksums can be checked
    itself, whatever the order and spaces in it."""
    content = json.loads(json.dumps(content))  # as it will be read: keys are strings, no tuples
    content.pop("seal", None)
    text = json.dumps(content, sort_keys=True)
    return {**content, "seal": hashlib.sha256(text.encode()).hexdigest()}


def read_sealed(path):
    """The dict that `seal` made, from the file `path`; UserError if it was changed since."""
    content = read_json(path)
    if not isinstance(content, dict) or content.get("seal") != seal(content)["seal"]:
        raise UserError(f"{path} is damaged: its seal, the sha256 of its content, does not match; "
                        "make it again or copy it again")
    return content


def run_main(main):
    """Call main(); a UserError becomes one line and status 1, KeyboardInterrupt a silent exit."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
