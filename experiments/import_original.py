"""Import a training checkpoint of the original nanoGPT-Vision, such as checkpoint_035000.pt.

    python experiments/import_original.py checkpoint_035000.pt --out=out/imported
    python sft.py configs/full/sft.py --init_from=out/imported         # continues from there

The original's decoder is ours under other names, except that q, k and v are three matrices, that
rotary positions rotate adjacent columns of a head, and that there are no spare rows for special
tokens (github.com/HayatoHongo/nanoGPTVision). C is the width, H heads, D their size, V the
vocabulary.
"""

import dataclasses
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from zipfile import is_zipfile

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tokenizer as tokenizers
from common import checkpoint
from common.config import UserError, parse_checkpoint, run_main
from model import GPT, GPTConfig

EMBEDDING = "token_embedding_layer.token_embedding_table"
NAMES = {  # parts of our names, and the original's
    "token_embedding": EMBEDDING, "norm1": "layer_norm1", "norm2": "layer_norm2",
    "mlp.up": "feed_forward.net.0", "mlp.down": "feed_forward.net.2",
    "attention.out": "multihead_attention.output_projection",
    "final_norm": "vocab_projection.output_norm", "head.": "vocab_projection.vocab_projection."}
SETTINGS = {  # what shapes do not show, and its name in the file's config
    "n_head": "num_attention_heads", "max_positions": "max_sequence_length",
    "rope_theta": "rope_theta"}
WRAPPERS = ("_orig_mod", "module")  # what torch.compile and DDP put into a name
BUFFERS = {"cos", "sin", "cos_cached", "sin_cached", "inv_freq", "freqs", "freqs_cis",
           "mask", "causal_mask", "tril", "cache_k", "cache_v"}  # they are computed, not learned


@dataclass
class Config:
    # --- import
    out: str = ""  # run folder to write
    overwrite: bool = False  # remove the checkpoints that are in it


def main():
    path, cfg = parse_checkpoint(Config)
    if not cfg.out:
        raise UserError("name a folder to write: --out=out/imported")
    import_original(Path(path), Path(cfg.out), cfg.overwrite)


def import_original(path, out, overwrite=False):
    """Write the original's checkpoint file `path` as a pretrained one below `out`; its folder.

    Code in the file is never run. Raises UserError if any name or shape is not the original's.
    overwrite: whether checkpoints in `out` are removed.
    """
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out} is not empty; choose another folder, or --overwrite=True")
    if (out / "config.json").exists():  # readers would take that for the checkpoint
        raise UserError(f"{out} is the folder of a model; choose another")
    step, theirs, settings = read_original(path)
    config = config_of(theirs, settings, path)
    weights, tokenizer = translated(theirs, config, path), tokenizers.gpt2()
    info = dict(stage="pretrain", kind="decoder", decoder=dataclasses.asdict(config), lineage=[],
                imported_from=dict(file=path.name, sha256=checkpoint.file_sum(path)), step=step,
                settings={str(name): str(value) for name, value in settings.items()},
                tokenizer=tokenizer.fingerprint, tokenizer_name=tokenizer.name, metrics={})
    checkpoint.clear(out, everything=True)
    state = dict(step=step, optimizer={"members": []})  # pretrain.py refuses to resume from it
    folder = checkpoint.save(out, step, weights, info, tokenizer, state)
    print(f"{folder}: the original after {step:,} steps, {config}")
    return folder


def read_original(path):
    """(step, {name without wrappers: tensor}, config as a dict) of the original's file `path`."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error below is enough
            # Memory-mapped if possible: two thirds are the optimizer's and are not read.
            found = torch.load(path, weights_only=True, map_location="cpu", mmap=is_zipfile(path))
    except Exception as error:  # a damaged file can make it raise anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = (f"wants to run code ({code[1]}), which was not run" if code else
                  "is not a complete file of torch.save: copy it again")
        raise UserError(f"{path} {reason}") from None
    for key, kind in ("current_step", int), ("model_state_dict", dict), ("config", dict):
        if not isinstance(found, dict) or not isinstance(found.get(key), kind):
            raise UserError(f"{path} is not a checkpoint of the original: it lacks {key}")
    if not 0 <= found["current_step"] < 10**8:  # a checkpoint's folder has eight digits
        raise UserError(f"{path}: current_step={found['current_step']} is out of range")
    weights = {}
    for name, tensor in found["model_state_dict"].items():
        name = ".".join(part for part in str(name).split(".") if part not in WRAPPERS)
        if name.split(".")[-1] in BUFFERS:
            continue
        floats = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        if not floats or not tensor.isfinite().all():  # NaN: of a run that diverged
            raise UserError(f"{path}: {name} is not a tensor of finite floating-point numbers")
        weights[name] = tensor.float()
    return found["current_step"], weights, found["config"]


def config_of(theirs, settings, path):
    """The GPTConfig of the original's weights {name: tensor} and its settings."""
    table = theirs.get(f"{EMBEDDING}.weight")
    if table is None or table.dim() != 2:
        raise UserError(f"{path} lacks the matrix {EMBEDDING}.weight")
    layers = {name.split(".")[1] for name in theirs if name.startswith("blocks.")}
    config = GPTConfig(n_layer=max(1, len(layers)), n_embd=table.size(1))  # the others are as ours
    for ours, name in SETTINGS.items():
        value, kinds = settings.get(name), (int, float) if ours == "rope_theta" else (int,)
        if type(value) not in kinds or not 0 < value <= 2**24:
            raise UserError(f"{path}: its config says {name}={value}, which is not possible")
        config = dataclasses.replace(config, **{ours: value})
    if config.n_embd % (2 * config.n_head):
        raise UserError(f"{path}: a width of {config.n_embd} does not divide into "
                        f"{config.n_head} heads of an even size")
    return config


def translated(theirs, config, path):
    """The original's {name: tensor} as a GPT's state dict; UserError for other names or shapes."""
    with torch.device("meta"):  # shapes without memory
        own = GPT(dataclasses.replace(config, vocab_size=50257)).state_dict()
    sources = {name: their_names(name) for name in own}
    expected = {n: (own[name].size(0) // len(names), *own[name].shape[1:])
                for name, names in sources.items() for n in names}
    found = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise UserError(f"{path} lacks {name}")
        if name not in expected:
            raise UserError(f"{path} has unknown {name}")
        if found[name] != expected[name]:
            raise UserError(f"{path} has {name}, which is {found[name]} and not {expected[name]}")
    weights = {}
    for name, names in sources.items():
        parts = [theirs[n] for n in names]
        if len(parts) == 3:
            parts[:2] = (half_split(part, config.n_head) for part in parts[:2])
        elif name in ("token_embedding.weight", "head.weight"):
            parts.append(spare_rows(parts[0], config.vocab_size, rescale=name != "head.weight"))
        weights[name] = torch.cat(parts)
    return weights


def their_names(name):
    """The original's names for one of ours: three for q, k and v, else one."""
    for ours, original in NAMES.items():
        name = name.replace(ours, original)
    parts = ("query", "key", "value") if "attention.qkv" in name else ("",)
    return [name.replace("attention.qkv", f"multihead_attention.{part}_fc") for part in parts]


def half_split(weight, n_head):
    """Rows (H * D, C) of q or k, rotated pairs moved from 2i, 2i + 1 to i, i + D/2 of each head."""
    return weight.unflatten(0, (n_head, -1, 2)).transpose(1, 2).flatten(0, 2)


def spare_rows(weight, n_rows, rescale):
    """Rows that extend weight (V, C) to n_rows: its mean row, from which special tokens start.

    In the head their logits are then the mean logit, so each has at most 1/V of the probability
    (Jensen's inequality). In the embedding, rescale gives it the mean norm of a row, since
    LayerNorm turns small rows into large gradients.
    """
    mean = weight.mean(dim=0)
    factor = weight.norm(dim=1).mean() / mean.norm().clamp_min(1e-9) if rescale else 1.0
    return (mean * factor).expand(n_rows - len(weight), -1)


if __name__ == "__main__":
    run_main(main)
