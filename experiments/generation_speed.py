"""The speed of generation: tokens per second of one conversation and of batches, the time to the
first token, and `generate` of transformers beside it, in turn and with the same weights.

    python experiments/generation_speed.py configs/full/vision_sft.py
    python experiments/generation_speed.py configs/small/pretrain.py --peer=transformers --n_layer=8
"""

import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import read_config, show
from benchmarks import REPEATS, WARM
from benchmarks.training import STAGES, build_model, jpeg, tokenizer_of
from common.config import run_main
from common.device import PRECISIONS, precision_name, setup
from common.images import read_image
from experiments.in_turn import in_turn
from export.to_transformers import their_model
from inference.conversation import Conversation, decoder_of, ready_to_chat
from inference.generate import Decoding, Sampler, Sampling, generate, pick
from inference.quantized_linear import fastest_precision, for_decoding

PROMPT, TOKENS = 128, 256  # of one conversation; a batch decodes a quarter of the tokens
BATCHES = (1, 8, 64)


def decode_speeds(cfg, stage, folder, peer):
    """{name: figure} of a stage's model; peer: whether to time transformers too."""
    machine, tokenizer = setup(cfg.device, cfg.precision), tokenizer_of(cfg)
    torch.manual_seed(0)
    model = build_model(cfg, stage, folder, tokenizer).to(machine.device)
    decoder, native = decoder_of(model), precision_name(machine.dtype)
    for block in decoder.blocks:  # initially zero, so that every block would be the identity
        torch.nn.init.normal_(block.attention.out.weight, std=0.02)
        torch.nn.init.normal_(block.mlp.down.weight, std=0.02)
    fastest, precisions = fastest_precision(machine.device), {native}
    if machine.device.type == "cpu":
        precisions |= {"fp32", "int8"} if fastest == "int8" else {"fp32"}
    chosen = fastest if cfg.precision == "auto" else native
    ids = torch.randint(decoder.config.vocab_size, (max(BATCHES), PROMPT), device=machine.device)
    kinds = {name: our_generate(copy.deepcopy(decoder), name, ids[:1])
             for name in sorted(precisions)}
    if peer:
        kinds |= {f"transformers_{name}": their_generate(decoder, name, ids[:1])
                  for name in sorted(precisions - {"int8"})}
    texts = {name: run() for name, run in kinds.items()}  # also warms up
    same = {"same_text": texts["fp32"] == texts["transformers_fp32"]} if peer else {}
    quick = for_decoding(copy.deepcopy(decoder), chosen)
    batches = {B: our_batch(quick, ids[:B]) for B in BATCHES}
    return {"decoding": f"{sum(p.numel() for p in decoder.parameters()) / 1e6:.1f} M",
            "machine": machine.name, "prompt": PROMPT, "tokens": TOKENS,
            **{f"{name}_tok_per_s": TOKENS / s for name, s in in_turn(kinds, REPEATS, 0).items()},
            **same,
            **{f"batch_{B}_tok_per_s": B * (TOKENS // 4) / s
               for B, s in in_turn(batches, REPEATS, 1).items()},
            **first_tokens(ready_to_chat(model, chosen), tokenizer)}


def our_generate(decoder, precision, ids):
    """A function that continues ids (1, T) greedily and returns a list of ids."""
    decoder = for_decoding(decoder, precision)
    decoding = Decoding(decoder, slots=PROMPT + TOKENS)

    def run():
        decoding.cut(0)
        x = decoder.token_embedding(ids)
        return list(generate(decoding, x, TOKENS, -1, Sampler(Sampling())))

    return run


def their_generate(decoder, precision, ids):
    """The same by `generate` of transformers' GPTNeoXForCausalLM with our weights."""
    model = their_model(decoder, None, PRECISIONS[precision]).to(ids.device)
    model.generation_config.eos_token_id = None  # as many tokens as requested

    @torch.inference_mode()
    def run():
        found = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
        return found[0, ids.size(1):].tolist()

    return run


def our_batch(decoder, ids):
    """A function that decodes TOKENS // 4 tokens for each of the prompts ids (B, T)."""
    decoding = Decoding(decoder, len(ids), PROMPT + TOKENS // 4)
    first = pick(decoding.prefill(decoder.token_embedding(ids)))

    def run():
        token = first
        for row in range(len(ids)):
            decoding.cut(PROMPT, row)
        for _ in range(TOKENS // 4):
            token = pick(decoding.step(token))
            token.tolist()  # as generate_batch does

    return run


def first_tokens(model, tokenizer):
    """Milliseconds to the first token of a question, and of one about a JPEG of 640 x 480."""
    conversation, photo = Conversation(model, tokenizer), jpeg(640, 480)

    def ask(files):
        conversation.turns = []
        if conversation.decoding:
            conversation.decoding.cut(0)
        images = [read_image(file) for file in files]
        next(conversation.ask("What do you see in this picture?", images, 1), None)

    kinds = {"first_token_ms": lambda: ask([])}
    if hasattr(model, "vision_tower"):
        kinds["first_token_image_ms"] = lambda: ask([photo])
    seconds = in_turn(kinds, 8 * REPEATS, WARM)  # they take milliseconds
    return {name: median * 1e3 for name, median in seconds.items()}


def main():
    argv = [flag for flag in sys.argv[1:] if flag != "--peer=transformers"]
    show(decode_speeds(*read_config(argv, STAGES[1:]), len(argv) < len(sys.argv[1:])))


if __name__ == "__main__":
    run_main(main)
