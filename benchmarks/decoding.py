"""The speed of generation: tokens per second of one conversation and of batches, time to the first
token, and `generate` of transformers in comparison.

    python bench.py decode configs/full/vision_sft.py
"""

import copy
import functools

import torch

from benchmarks import REPEATS, WARM, in_turn
from benchmarks.training import build_model, jpeg, tokenizer_of
from common.device import PRECISIONS, precision_name, setup
from common.images import read_image
from export.to_transformers import their_model
from inference.conversation import Conversation, decoder_of, ready_to_chat
from inference.generate import Decoding, Sampler, Sampling, generate, pick
from inference.quantized_linear import fastest_precision, for_decoding

PROMPT, TOKENS = 128, 256
BATCHES = (1, 8, 64)
QUESTIONS = "What do you see in this picture?", "And what is in the middle of it?"


def decode_speeds(cfg, stage, folder, peer):
    """{name: figure} of a stage's model. peer: "transformers" to measure its `generate` too."""
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
    kinds = {name: our_generate(copy.deepcopy(decoder), name) for name in sorted(precisions)}
    if peer:
        kinds |= {f"transformers_{name}": their_generate(decoder, name)
                  for name in sorted(precisions - {"int8"})}
    chosen = fastest if cfg.precision == "auto" else native
    return {"decoding": f"{sum(p.numel() for p in decoder.parameters()) / 1e6:.1f} M",
            "machine": machine.name, "prompt": PROMPT, "tokens": TOKENS,
            **single_speeds(kinds, machine.device, decoder.config.vocab_size),
            **batch_speeds(for_decoding(copy.deepcopy(decoder), chosen)),
            **first_tokens(ready_to_chat(model, chosen), tokenizer)}


def our_generate(decoder, precision):
    """A function that continues ids (1, T) greedily and returns a list of ids."""
    decoder = for_decoding(decoder, precision)
    decoding = Decoding(decoder, slots=PROMPT + TOKENS)

    def run(ids):
        decoding.cut(0)
        x = decoder.token_embedding(ids)
        return list(generate(decoding, x, TOKENS, -1, Sampler(Sampling())))

    return run


def their_generate(decoder, precision):
    """The same by `generate` of transformers' GPTNeoXForCausalLM with our weights."""
    model = their_model(decoder, None, PRECISIONS[precision])
    model.to(decoder.token_embedding.weight.device)
    model.generation_config.eos_token_id = None  # as many tokens as requested

    @torch.inference_mode()
    def run(ids):
        found = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
        return found[0, ids.size(1):].tolist()

    return run


def single_speeds(kinds, device, n_vocab):
    """Tokens per second of one conversation by each kind."""
    ids = torch.randint(n_vocab, (1, PROMPT), device=device)
    texts = {name: run(ids) for name, run in kinds.items()}  # also warms up
    seconds = in_turn({name: lambda i, run=run: functools.partial(run, ids)
                       for name, run in kinds.items()}, REPEATS, warm=0)
    figures = {f"{name}_tok_per_s": TOKENS / median for name, median in seconds.items()}
    if "transformers_fp32" in texts:
        figures["same_text"] = texts["fp32"] == texts["transformers_fp32"]
    return figures


def batch_speeds(decoder):
    """Tokens per second of batches, without the prompt."""
    device, rates, tokens = decoder.token_embedding.weight.device, {}, TOKENS // 4
    for B in BATCHES:
        decoding = Decoding(decoder, B, PROMPT + tokens)
        ids = torch.randint(decoder.config.vocab_size, (B, PROMPT), device=device)
        first = pick(decoding.prefill(decoder.token_embedding(ids)))

        def run(decoding=decoding, token=first, B=B):
            for row in range(B):
                decoding.cut(PROMPT, row)
            for _ in range(tokens):
                token = pick(decoding.step(token))
                token.tolist()  # as generate_batch does

        seconds = in_turn({"run": lambda i, run=run: run}, REPEATS, warm=1)["run"]
        rates[f"batch_{B}_tok_per_s"] = B * tokens / seconds
    return rates


def first_tokens(model, tokenizer):
    """Milliseconds to the first token: of a question, of one about an image (a JPEG of 640 x 480),
    and of the second question about it, which reuses the cache."""
    conversation, photo = Conversation(model, tokenizer), jpeg(640, 480)

    def first_token(question, files):
        next(conversation.ask(question, [read_image(file) for file in files], 1), None)

    def new(i, files=()):
        conversation.reset()
        return functools.partial(first_token, QUESTIONS[0], files)

    kinds = {"first_token_ms": new}
    if hasattr(model, "vision_tower"):
        kinds["first_token_image_ms"] = functools.partial(new, files=[photo])
    kinds["second_turn_ms"] = lambda i: functools.partial(first_token, QUESTIONS[1], ())
    seconds = in_turn(kinds, 8 * REPEATS, WARM)  # they take milliseconds
    return {name: median * 1e3 for name, median in seconds.items()}
