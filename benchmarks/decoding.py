"""How fast a model talks: tokens a second alone and many at once, the time to the first token, and
`transformers`' generate beside ours. `python bench.py decode CONFIG` prints it.

Every figure is the median of five, taken in turn, so that what else the machine does meets all.
"""

import copy
import io
import statistics
import time

import numpy as np
import torch
from PIL import Image

from benchmarks.baselines import REPEATS, load_transformers
from common.device import memory_bandwidth, setup
from common.images import read_image
from export.to_transformers import neox_config, neox_weights
from inference.conversation import Conversation, ready_to_chat
from inference.generate import Decoding, Sampler, Sampling, generate, pick
from inference.quantized_linear import (
    HalfLinear,
    Int8Linear,
    PackedLinear,
    fastest_precision,
    for_decoding,
)
from model import GPT
from vision import VisionLanguageModel

PROMPT, TOKENS = 128, 256
BATCHES = (1, 8, 64)
QUESTIONS = "What do you see in this picture?", "And what is in the middle of it?"


def decode_speeds(decoder_config, clip_config, tokenizer, cfg, peer):
    """All figures of a model of these sizes, as {name: figure}; clip_config is None for a decoder.

    cfg: a stage's settings, of which device and precision count.
    """
    machine = setup(cfg.device, cfg.precision)
    device, own = machine.device, str(machine.dtype)[6:]
    dtypes = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    precisions = [dtypes[own]] + [p for p in ("fp32", "int8") if device.type == "cpu"]
    torch.manual_seed(0)
    model = GPT(decoder_config) if clip_config is None else VisionLanguageModel(
        decoder_config, clip_config)
    speaking(model if clip_config is None else model.decoder)
    decoder = (model if clip_config is None else model.decoder).to(device)
    figures = {"decoding": f"{decoder.n_params() / 1e6:.1f} M", "machine": machine.name,
               "prompt": PROMPT, "tokens": TOKENS}
    kinds = {name: our_kind(copy.deepcopy(decoder), name) for name in dict.fromkeys(precisions)}
    if peer:
        kinds |= {f"transformers_{name}": their_kind(decoder, name)
                  for name in dict.fromkeys(precisions) if name != "int8"}
    figures |= alone(kinds, machine, decoder)
    chosen = fastest_precision(device) if cfg.precision == "auto" else dtypes[own]  # as to chat
    figures |= many(decoder, chosen)
    figures |= first_tokens(model.to(device), tokenizer, chosen)
    return figures


def speaking(decoder):
    """Draw the weights that begin at zero, or every block would be the identity."""
    for block in decoder.blocks:
        torch.nn.init.normal_(block.attention.out.weight, std=0.02)
        torch.nn.init.normal_(block.mlp.down.weight, std=0.02)


# ------------------------------------------------------------------------------------ one at a time


def our_kind(decoder, precision):
    """The function that goes on with ids (1, T) greedily; returns a list of ids."""
    decoder = for_decoding(decoder, precision)
    decoding = Decoding(decoder, slots=PROMPT + TOKENS)

    def speak(ids):
        decoding.cut(0)
        x = decoder.token_embedding(ids)
        return list(generate(decoding, x, TOKENS, -1, Sampler(Sampling())))

    speak.bytes = bytes_a_token(decoder, decoding.cache)
    return speak


def their_kind(decoder, precision):
    """The same by `generate` of transformers' GPTNeoXForCausalLM with our weights."""
    transformers = load_transformers()
    model = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**neox_config(decoder.config))).eval()
    model.load_state_dict(neox_weights(decoder.state_dict(), decoder.config), strict=True)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    model.to(decoder.token_embedding.weight.device, dtype)
    model.generation_config.eos_token_id = None  # as many tokens as were asked for

    @torch.inference_mode()
    def speak(ids):
        found = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
        return found[0, ids.size(1):].tolist()

    return speak


def bytes_a_token(decoder, cache):
    """What a token must read: every weight but the embedding table, and the cache as far as it is
    filled in the mean."""
    size, linears = decoder.token_embedding.weight.element_size(), {
        torch.nn.Linear: None, PackedLinear: None, HalfLinear: 2, Int8Linear: 1}
    weights = sum(module.in_features * module.out_features * (linears[type(module)] or size)
                  for module in decoder.modules() if type(module) in linears)
    filled = 2 * cache.keys[:, :1, :, : PROMPT + TOKENS // 2].numel()
    return weights + filled * cache.keys.element_size()


def alone(kinds, machine, decoder):
    """Tokens a second of one conversation by each kind, and what they are of each other."""
    ids = torch.randint(decoder.config.vocab_size, (1, PROMPT), device=machine.device)
    texts = {name: speak(ids) for name, speak in kinds.items()}  # warms up, too
    seconds = {name: [] for name in kinds}
    for _ in range(REPEATS):
        for name, speak in kinds.items():
            began = time.perf_counter()
            speak(ids)
            seconds[name].append(time.perf_counter() - began)
    rates = {name: TOKENS / statistics.median(some) for name, some in seconds.items()}
    bandwidth = memory_bandwidth(machine)
    figures = {f"{name}_tok_per_s": rate for name, rate in rates.items()}
    for name, speak in kinds.items():
        if hasattr(speak, "bytes"):
            figures[f"{name}_share_of_bandwidth"] = speak.bytes * rates[name] / bandwidth
        for theirs in ("fp32", "bf16", "fp16"):
            peer = rates.get(f"transformers_{theirs}")
            if peer and name in (theirs, "int8"):
                figures[f"{name}_times_transformers_{theirs}"] = rates[name] / peer
                if name == theirs == "fp32":
                    figures["same_text"] = texts[name] == texts[f"transformers_{theirs}"]
    return figures


# ------------------------------------------------------------------------------------ many at once


def many(decoder, precision):
    """Tokens a second of batches, the prompt not counted, and how many times one row that is."""
    decoder = for_decoding(copy.deepcopy(decoder), precision)
    device, rates, tokens = decoder.token_embedding.weight.device, {}, TOKENS // 4
    for B in BATCHES:
        decoding, seconds = Decoding(decoder, B, PROMPT + tokens), []
        ids = torch.randint(decoder.config.vocab_size, (B, PROMPT), device=device)
        first = pick(decoding.prefill(decoder.token_embedding(ids)))
        for _ in range(REPEATS + 1):
            for row in range(B):
                decoding.cut(PROMPT, row)
            token, began = first, time.perf_counter()
            for _ in range(tokens):
                token = pick(decoding.step(token))
                token.tolist()  # as generate_batch does
            seconds.append(time.perf_counter() - began)
        rates[B] = B * tokens / statistics.median(seconds[1:])  # the first one warms up
    figures = {f"{precision}_batch_{B}_tok_per_s": rate for B, rate in rates.items()}
    return figures | {f"batch_{B}_times_one": rates[B] / rates[1] for B in BATCHES[1:]}


def first_tokens(model, tokenizer, precision):
    """Milliseconds to the first token: of a question, of one about a picture (a JPEG of 640 x 480),
    and of the second question about it, whose answer costs its own tokens only."""
    conversation = Conversation(ready_to_chat(copy.deepcopy(model), precision), tokenizer)
    sees = conversation.sees
    photo = jpeg(640, 480)
    found = {"first_token_ms": [], "first_token_image_ms": [], "second_turn_ms": []}
    for _ in range(8 * REPEATS):  # they take milliseconds, and the first ones longer
        conversation.reset()
        found["first_token_ms"].append(first_token(conversation, QUESTIONS[0], []))
        if sees:
            conversation.reset()
            found["first_token_image_ms"].append(
                first_token(conversation, QUESTIONS[0], [photo]))
        found["second_turn_ms"].append(first_token(conversation, QUESTIONS[1], []))
    figures = {name: statistics.median(times) for name, times in found.items() if times}
    first = figures.get("first_token_image_ms", figures["first_token_ms"])
    return figures | {"second_of_first_turn": figures["second_turn_ms"] / first}


def first_token(conversation, text, files):
    began = time.perf_counter()
    conversation.hear(text, [read_image(file) for file in files], 1)
    for _ in conversation.answer(1):
        break
    return (time.perf_counter() - began) * 1e3


def jpeg(width, height):
    """A JPEG file of quality 90, with coarse and fine detail about as in a photo."""
    rng, photo = np.random.default_rng(0), np.zeros((height, width, 3), np.float32)
    for scale in (64, 16, 4, 1):
        shape = (-(-height // scale), -(-width // scale), 3)
        grain = Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8))
        photo += np.asarray(grain.resize((width, height), Image.BICUBIC)) * scale**0.5
    file = io.BytesIO()
    Image.fromarray((photo / 15).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()
