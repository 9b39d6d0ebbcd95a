"""The speed of generation: tokens per second of one conversation and of batches, time to the first
token, and `generate` of transformers in comparison.

    python bench.py decode configs/full/vision_sft.py

Every figure is the median of five.
"""

import copy
import functools
import statistics

import torch

from benchmarks import REPEATS, elapsed, in_turn
from benchmarks.baselines import load_transformers
from benchmarks.training import build_model, jpeg, tokenizer_of
from common.device import setup
from common.images import read_image
from export.to_transformers import their_model
from inference.conversation import Conversation, ready_to_chat
from inference.generate import Decoding, Sampler, Sampling, generate, pick
from inference.quantized_linear import fastest_precision, for_decoding

PROMPT, TOKENS = 128, 256
BATCHES = (1, 8, 64)
QUESTIONS = "What do you see in this picture?", "And what is in the middle of it?"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def decode_speeds(cfg, stage, folder, peer):
    """{name: figure} of a stage's model. peer: "transformers" to measure its `generate` too."""
    machine, tokenizer = setup(cfg.device, cfg.precision), tokenizer_of(cfg)
    torch.manual_seed(0)
    model = build_model(cfg, stage, folder, tokenizer)
    decoder = getattr(model, "decoder", model).to(machine.device)
    for block in decoder.blocks:  # initially zero, so that every block would be the identity
        torch.nn.init.normal_(block.attention.out.weight, std=0.02)
        torch.nn.init.normal_(block.mlp.down.weight, std=0.02)
    [native] = (name for name, dtype in DTYPES.items() if dtype == machine.dtype)
    precisions = {native, "fp32", "int8"} if machine.device.type == "cpu" else {native}
    kinds = {name: our_generate(copy.deepcopy(decoder), name) for name in sorted(precisions)}
    if peer:
        kinds |= {f"transformers_{name}": their_generate(decoder, name)
                  for name in sorted(precisions - {"int8"})}
    chosen = fastest_precision(machine.device) if cfg.precision == "auto" else native
    return {"decoding": f"{decoder.n_params() / 1e6:.1f} M", "machine": machine.name,
            "prompt": PROMPT, "tokens": TOKENS,
            **single_speeds(kinds, machine.device, decoder.config.vocab_size),
            **batch_speeds(for_decoding(copy.deepcopy(decoder), chosen)),
            **first_tokens(model.to(machine.device), tokenizer, chosen)}


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
    load_transformers()
    model = their_model(decoder, None, DTYPES[precision])
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
    prepares = {name: lambda i, run=run: functools.partial(run, ids) for name, run in kinds.items()}
    rates = {name: TOKENS / statistics.median(seconds)
             for name, seconds in in_turn(prepares, REPEATS, warm=0).items()}
    figures = {f"{name}_tok_per_s": rate for name, rate in rates.items()}
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

        seconds = [elapsed(run) for _ in range(REPEATS + 1)][1:]  # the first one warms up
        rates[f"batch_{B}_tok_per_s"] = B * tokens / statistics.median(seconds)
    return rates


def first_tokens(model, tokenizer, precision):
    """Milliseconds to the first token: of a question, of one about an image (a JPEG of 640 x 480),
    and of the second question about it, which reuses the cache."""
    conversation = Conversation(ready_to_chat(copy.deepcopy(model), precision), tokenizer)
    photo, found = jpeg(640, 480), {}

    def first_token(question, files):
        next(conversation.ask(question, [read_image(file) for file in files], 1), None)

    def measure(name, question, files=()):
        found.setdefault(name, []).append(elapsed(first_token, question, files) * 1e3)

    for _ in range(8 * REPEATS):  # they take milliseconds, the first ones longer
        conversation.reset()
        measure("first_token_ms", QUESTIONS[0])
        if hasattr(model, "vision_tower"):
            conversation.reset()
            measure("first_token_image_ms", QUESTIONS[0], [photo])
        measure("second_turn_ms", QUESTIONS[1])
    return {name: statistics.median(times) for name, times in found.items()}
