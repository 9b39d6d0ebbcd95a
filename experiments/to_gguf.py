"""Export a decoder as one GGUF file, for llama.cpp and the programs that build on it.

    python experiments/to_gguf.py out/demo/sft --out=model.gguf     # pip install gguf

Its architecture there, gptneox, has GELU where we have ReLU. GELU(s x) / s approaches ReLU(x) as s
grows, so the matrix before it is multiplied by s and the one after it by 1/s (`gelu_scale`). q, k
and v are stored as ours are, not interleaved by head as in `transformers`; every product except the
head has a bias. Programs parse special tokens in a whole chat, what a user typed too, and drop no
character; so a noncharacter is part of these tokens' names, and the template removes it from text.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.atomic import check_output, writing
from common.config import UserError, parse_checkpoint, run_main
from export.to_transformers import APART, chat_template
from model import GPT
from tokenizer import gpt2_files
from vision import open_model

CHAT_TEMPLATE = chat_template(OPEN=f"<{APART}", TYPED=APART, SHOWN="", BETWEEN="")
DTYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16"}  # of matrices, and the file type in GGUF
F16_MAX = 65504.0
# On the demo's decoders a scale of 256 changes logits by 6e-4 at most in f32; one of 16 by 0.06,
# and 38 of 40 greedy texts are the same. In f16, 64 to 1024 are equal; 16,384 overflows to NaN.
MAX_SCALE, MIN_SCALE = 256, 16
PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
BPE_OPTIONS = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
               "byte_fallback", "ignore_merges")  # llama.cpp has none of them


@dataclass
class Config:
    # --- output
    out: str = "model.gguf"  # a new file
    dtype: Literal["f16", "f32"] = "f16"  # of the matrices


def main():
    name, cfg = parse_checkpoint(Config)
    path = Path(cfg.out)
    check_output(path, "--out=")
    if path.exists():
        raise UserError(f"{path} exists already; choose another --out")
    model, tokenizer, info = open_model(name, kinds=("decoder", "vision"))
    with writing(path, "--out="):
        write_gguf(model, tokenizer, path, cfg.dtype, chats=info["stage"] != "pretrain")
    print(f"written: {path}")


def write_gguf(model, tokenizer, path, dtype="f16", chats=True):
    """Write a decoder (a GPT) and its tokenizer to the file `path`.

    dtype: "f32" or "f16", of the matrices; vectors are f32 (lower precision changes greedy text:
    q8_0 5 and bf16 3 of the demo's 40). chats: the file has the chat template, and answers end
    with <|end|>; otherwise text ends with <|endoftext|>.
    """
    if not isinstance(model, GPT):
        raise UserError("only a text-only model can be a GGUF file, as llama.cpp's gptneox takes "
                        "no images: use a pretrain or sft checkpoint")
    try:
        import gguf
    except ImportError:
        raise UserError("--gguf needs a package that is not installed: pip install gguf") from None
    part, c = Path(f"{path}.part"), model.config  # a file under its own name is complete
    writer = gguf.GGUFWriter(part, "gptneox")
    writer.add_name("nanoGPT-Vision")
    writer.add_file_type(gguf.LlamaFileType[DTYPES[dtype]])
    writer.add_context_length(c.max_positions)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(4 * c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_head_count(c.n_head)
    writer.add_rope_dimension_count(c.n_embd // c.n_head)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_eps(model.final_norm.eps)
    writer.add_parallel_residual(False)
    add_tokenizer(writer, gguf.TokenType, tokenizer, c.vocab_size, chats)
    for tensor_name, tensor in named_tensors(model).items():
        if dtype == "f16" and tensor.dim() == 2:
            if not tensor.abs().max() <= F16_MAX:
                raise UserError(f"{tensor_name} has numbers that f16 cannot hold: use f32")
            tensor = tensor.half()
        writer.add_tensor(tensor_name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(path)


def named_tensors(model):
    """All tensors of a GPT as fp32 on the CPU, under llama.cpp's names."""
    own = {name: p.detach().to("cpu", torch.float32) for name, p in model.named_parameters()}
    named = {"token_embd.weight": own["token_embedding.weight"],
             "output.weight": own["head.weight"]}
    same = {"output_norm": "final_norm"}
    for i, block in enumerate(model.blocks):
        a, b, s = f"blk.{i}.", f"blocks.{i}.", gelu_scale(block)
        same |= {f"{a}attn_norm": f"{b}norm1", f"{a}ffn_norm": f"{b}norm2",
                 f"{a}attn_output": f"{b}attention.out"}
        for theirs, weight in (("attn_qkv", own[f"{b}attention.qkv.weight"]),
                               ("ffn_up", own[f"{b}mlp.up.weight"] * s[:, None]),
                               ("ffn_down", own[f"{b}mlp.down.weight"] / s)):
            named |= {f"{a}{theirs}.weight": weight, f"{a}{theirs}.bias": torch.zeros(len(weight))}
    return named | {f"{theirs}.{kind}": own[f"{ours}.{kind}"]
                    for theirs, ours in same.items() for kind in ("weight", "bias")}


@torch.no_grad()
def gelu_scale(block):
    """The scales s of the (4 * C,) GELU inputs of a block: powers of two.

    A larger scale is closer to ReLU; but llama.cpp multiplies f16 matrices by f16 vectors, so
    nothing may exceed F16_MAX. Before its gain, the output of a norm has length sqrt(C) at most, C
    the width, which bounds every product.
    """
    norm, up = block.norm2, block.mlp.up.weight.float()
    bound = (up * norm.weight).norm(dim=1) * up.size(1) ** 0.5 + (up @ norm.bias.float()).abs()
    largest = torch.maximum(bound, up.abs().amax(dim=1))
    if not MIN_SCALE * largest.max() <= F16_MAX:
        raise UserError("the activations of this model's MLP can become too large for f16, in "
                        "which llama.cpp's GELU replaces ReLU")
    return (F16_MAX / largest).log2().floor().exp2().clamp(max=MAX_SCALE).cpu()


def add_tokenizer(writer, kinds, tokenizer, n_rows, chats):
    """Add the vocabulary, padded to the n_rows of the embedding; kinds: gguf's TokenType."""
    vocabulary, merges = bpe_of(tokenizer)
    tokens = {i: (text, kinds.NORMAL) for text, i in vocabulary.items()}
    tokens |= {i: (text.replace("<", f"<{APART}"), kinds.CONTROL)
               for text, i in tokenizer.specials.items()}
    rows = [tokens.get(i, (f"<|unused {i}|>", kinds.UNUSED)) for i in range(n_rows)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([text for text, _ in rows])
    writer.add_token_types([kind for _, kind in rows])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(tokenizer.end if chats else tokenizer.end_of_text)
    writer.add_eot_token_id(tokenizer.end_of_text)  # ends text too
    writer.add_add_bos_token(True)
    if chats:
        writer.add_chat_template(CHAT_TEMPLATE)


def bpe_of(tokenizer):
    """({token: id}, ["left right", ...] in order) of a byte-level BPE, in GPT-2's letters."""
    if tokenizer.name == "gpt2":
        vocabulary, merges = (path.read_text(encoding="utf-8") for path in gpt2_files())
        return json.loads(vocabulary), merges.splitlines()[1:]  # the first line is a version
    source = json.loads(tokenizer.source)
    bpe, splits = source["model"], {"use_regex": True} | (source["pre_tokenizer"] or {})
    if (bpe["type"] != "BPE" or any(bpe.get(key) for key in BPE_OPTIONS) or source["normalizer"]
            or source["added_tokens"] or not PRE_TOKENIZER.items() <= splits.items()):
        raise UserError("llama.cpp does not split text like this tokenizer.json: only a plain "
                        "byte-level BPE, such as prepare.py trains, can be in a GGUF file")
    return bpe["vocab"], [m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]]


if __name__ == "__main__":
    run_main(main)
