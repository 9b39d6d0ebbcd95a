"""Training checkpoints of the original nanoGPT-Vision, such as checkpoint_035000.pt, made ours.

    import_original("checkpoint_035000.pt", "out/imported")
    python sft.py configs/full/sft.py --init_from=out/imported         # goes on from there

The original's decoder is ours under other names, but that q, k and v are three matrices, that
rotary positions turn neighbouring columns of a head, and that no row is spare for special tokens
(github.com/HayatoHongo/nanoGPTVision). C is the width, H heads, D their size, V the vocabulary.
"""

import dataclasses
import re
import warnings
from pathlib import Path
from zipfile import is_zipfile

import torch

import tokenizer as tokenizers
from common import checkpoint
from common.config import UserError
from model import GPT, GPTConfig

EMBEDDING = "token_embedding_layer.token_embedding_table"
NAMES = {  # how the original's names differ from ours
    "token_embedding": EMBEDDING, "norm1": "layer_norm1", "norm2": "layer_norm2",
    "mlp.up": "feed_forward.net.0", "mlp.down": "feed_forward.net.2",
    "attention.out": "multihead_attention.output_projection",
    "final_norm": "vocab_projection.output_norm", "head.": "vocab_projection.vocab_projection."}
WRAPPERS = ("_orig_mod", "module")  # what torch.compile and DDP put into a name
BUFFERS = {"cos", "sin", "cos_cached", "sin_cached", "inv_freq", "freqs", "freqs_cis",
           "mask", "causal_mask", "tril", "cache_k", "cache_v"}  # can be made again
SPELLINGS = {  # of a size in the file's config: the original's, then those of other GPTs
    "n_layer": ("layer_count", "n_layer", "num_layers"),
    "n_head": ("num_attention_heads", "n_head", "num_heads"),
    "n_embd": ("embedding_dim", "n_embd", "hidden_size", "d_model"),
    "max_positions": ("max_sequence_length", "max_seq_len", "block_size", "context_length"),
    "rope_theta": ("rope_theta", "rope_base", "theta", "base")}
HEAD_SIZE = 128  # the original's; shapes do not show it


def import_original(path, out, overwrite=False):
    """Write the original's checkpoint file `path` as a pretrained one below `out`; its folder.

    No code in it is ever run. Raises UserError for a file that is not such a checkpoint, to the
    last name and shape. overwrite: whether checkpoints that `out` has already make room.
    """
    path, out = Path(path), Path(out)
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out} is not empty; say another folder, or --overwrite=True")
    if (out / "config.json").exists():  # readers would take that for the checkpoint
        raise UserError(f"{out} is a model's own folder; say another")
    step, theirs, said = read_original(path)
    config, assumed = sizes_of(theirs, said, path)
    weights, tokenizer = translated(theirs, config, path), tokenizers.gpt2()
    info = dict(stage="pretrain", kind="decoder", decoder=dataclasses.asdict(config), lineage=[],
                imported_from=dict(file=path.name, sha256=checkpoint.file_sum(path)), step=step,
                settings={str(name): str(value) for name, value in said.items()},
                tokenizer=tokenizer.fingerprint, tokenizer_name=tokenizer.name, metrics={})
    checkpoint.clear(out, everything=True)
    nothing = dict(step=step, optimizer={"members": []})  # pretrain.py refuses to go on from
    folder = checkpoint.save(out, step, weights, info, tokenizer, nothing)
    print(f"{folder}: the original after {step:,} steps, n_layer {config.n_layer}, n_embd "
          f"{config.n_embd}, n_head {config.n_head}, max_positions {config.max_positions}, "
          f"rope_theta {config.rope_theta:g}{assumed}")
    return folder


def read_original(path):
    """(step, {name without wrappers: tensor}, config as a dict) of the original's file `path`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an error says it all
            # Mapped where it can be: two thirds are the optimizer's and need not be read.
            found = torch.load(path, weights_only=True, map_location="cpu", mmap=is_zipfile(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # strange bytes can make it raise anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        why = (f"wants to run code ({code[1]}), which was not run" if code else
               "is not a file of torch.save, or not a whole one: copy it again")
        raise UserError(f"{path} {why}") from None
    for key, kind in ("current_step", int), ("model_state_dict", dict), ("config", dict):
        if not isinstance(found, dict) or not isinstance(found.get(key), kind):
            raise UserError(f"{path} is no training checkpoint of the original: it lacks {key}")
    if not 0 <= found["current_step"] < 10**8:  # a checkpoint's folder has eight digits
        raise UserError(f"{path}: current_step is {found['current_step']}, no number of steps")
    weights = {}
    for name, tensor in found["model_state_dict"].items():
        name = ".".join(part for part in str(name).split(".") if part not in WRAPPERS)
        if name.split(".")[-1] in BUFFERS:
            continue
        floats = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        if not floats or not tensor.isfinite().all():  # or NaN, where a run had failed
            raise UserError(f"{path}: {name} is no tensor of finite floating-point numbers")
        weights[name] = tensor.float()
    return found["current_step"], weights, found["config"]


def sizes_of(theirs, said, path):
    """(GPTConfig, words on what was assumed) from `said`, the file's config, and the shapes."""
    table = theirs.get(f"{EMBEDDING}.weight")
    if table is None or table.dim() != 2:
        raise UserError(f"{path} lacks the matrix {EMBEDDING}.weight")
    C = table.size(1)
    layers = {name.split(".")[1] for name in theirs if name.startswith("blocks.")} or {"0"}
    sizes = {"n_layer": len(layers), "n_embd": C}
    for ours, spellings in SPELLINGS.items():
        for name in [name for name in spellings if name in said][:1]:
            value, kind = said[name], (int, float) if ours == "rope_theta" else int
            if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value <= 2**24:
                raise UserError(f"{path}: its config says {name}={value}, which cannot be")
            if sizes.setdefault(ours, value) != value:
                raise UserError(f"{path}: its config says {name}={value}, but the shapes of its "
                                f"weights say {sizes[ours]}")
    if "n_head" not in sizes and C % HEAD_SIZE:
        raise UserError(f"{path}: its config does not say how many heads make up the width, {C}, "
                        f"and {HEAD_SIZE}, the size of the original's, does not divide it")
    assumed = [name for name in ("n_head", "max_positions", "rope_theta") if name not in sizes]
    config = GPTConfig(**{"n_head": C // HEAD_SIZE, **sizes})  # the other defaults are its, too
    if C % (2 * config.n_head):
        raise UserError(f"{path}: {config.n_head} heads of a width of {C} have no even size")
    return config, (f" (its config lacks {', '.join(assumed)}: taken as in the original, with "
                    f"heads of {HEAD_SIZE})") * bool(assumed)


def translated(theirs, config, path):
    """The original's {name: tensor} as a GPT's state dict; UserError for other names or shapes."""
    with torch.device("meta"):  # shapes without memory
        own = GPT(dataclasses.replace(config, vocab_size=50257)).state_dict()
    sources = {name: their_names(name) for name in own}
    shapes = {n: (own[name].size(0) // len(names), *own[name].shape[1:])
              for name, names in sources.items() for n in names}
    bad = [f"{n}, which is {tuple(theirs[n].shape)} and not {shape}" for n, shape in shapes.items()
           if n in theirs and theirs[n].shape != shape]
    for problem, names in (("lacks", [n for n in shapes if n not in theirs]),
                           ("has unknown", [n for n in theirs if n not in shapes]), ("has", bad)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{path} {problem} {', '.join(names[:3])}{more}")
    weights = {}
    for name, names in sources.items():
        parts = [theirs[n] for n in names]
        if len(parts) == 3:
            parts[:2] = (half_split(part, config.n_head) for part in parts[:2])
        elif name in ("token_embedding.weight", "head.weight"):
            parts.append(spare_rows(parts[0], config.vocab_size, loud=name != "head.weight"))
        weights[name] = torch.cat(parts)
    return weights


def their_names(name):
    """The original's names for what has one name here: three for q, k and v, else one."""
    for ours, original in NAMES.items():
        name = name.replace(ours, original)
    parts = ("query", "key", "value") if "attention.qkv" in name else ("",)
    return [name.replace("attention.qkv", f"multihead_attention.{part}_fc") for part in parts]


def half_split(weight, n_head):
    """Rows (H * D, C) of q or k, those that turn together moved from 2i, 2i + 1 to i, i + D/2."""
    return weight.unflatten(0, (n_head, -1, 2)).transpose(1, 2).flatten(0, 2)


def spare_rows(weight, n_rows, loud):
    """What brings weight (V, C) to n_rows: the mean row, where special tokens start from.

    In the head that makes their logits the mean logit: none is ever the likeliest, and each has at
    most 1/V of the probability, whatever the text (Jensen's inequality). In the embedding it is
    made as `loud` as words are, since LayerNorm turns quiet rows into large gradients.
    """
    mean = weight.mean(dim=0)
    factor = weight.norm(dim=1).mean() / mean.norm().clamp_min(1e-9) if loud else 1.0
    return (mean * factor).expand(n_rows - len(weight), -1)
