"""Generation by `generate` of transformers beside ours: one process, in turn, the same weights.

    python experiments/transformers_speed.py configs/small/pretrain.py --n_layer=8 --n_embd=512
"""

import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import read_config, show
from benchmarks.decoding import TOKENS, decode_speeds, our_generate
from benchmarks.training import STAGES
from common.config import run_main
from common.device import PRECISIONS
from export.to_transformers import their_model


def their_generate(decoder, precision, ids):
    """As benchmarks.decoding.our_generate, by transformers' GPTNeoXForCausalLM with our weights."""
    model = their_model(decoder, None, PRECISIONS[precision]).to(ids.device)
    model.generation_config.eos_token_id = None  # as many tokens as requested

    @torch.inference_mode()
    def run():
        found = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
        return found[0, ids.size(1):].tolist()

    return run


def main():
    same = []

    def others(decoder, precisions, ids):
        kinds = {f"transformers_{name}": their_generate(decoder, name, ids)
                 for name in sorted(precisions - {"int8"})}
        ours = our_generate(copy.deepcopy(decoder), "fp32", ids)
        same.append(ours() == their_generate(decoder, "fp32", ids)())
        return kinds

    speeds = decode_speeds(*read_config(sys.argv[1:], STAGES[1:]), others)
    show({**speeds, "same_text": same[0]})


if __name__ == "__main__":
    run_main(main)
