"""The claims of export/to_gguf.py: llama.cpp reads our text into our ids and answers with our text.
"""

import json
import sys

import pytest
import torch
from test_decode import answer_of
from test_model import new_model
from test_tokenizer import HARD, TEXTS, say

import tokenizer as tokenizers
from clip import CLIPConfig
from common.config import UserError
from export.to_gguf import named_tensors, sharpness, write_gguf
from model import GPTConfig
from tokenizer import SPECIALS, render
from vision import VisionLanguageModel

gguf = pytest.importorskip("gguf", reason="GGUF files are written by a package: pip install gguf")

ODD = (*HARD.values(), "\n\n\na\n \n\n", "\t\ta \tb", "a\u00a0\u2003 b", "I'm he'll CAN'T 'tis",
       "1234567890 12,345.67 ½ ٣", "\ufffd", "".join(SPECIALS) + " <|end|> x<|user|>y")
TEMPLATE = ("{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>"
            "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


@pytest.fixture(scope="module")
def llama():
    """Opens a GGUF file with llama.cpp."""
    library = pytest.importorskip("llama_cpp", reason="llama.cpp takes 8 minutes to compile: "
                                  "pip install llama-cpp-python")

    def opened(path, kv="f16"):
        kind = {"f32": 0, "f16": 1}[kv]  # its KV cache is f16 if nothing is said
        return library.Llama(str(path), n_ctx=128, n_threads=1, n_threads_batch=1, type_k=kind,
                             type_v=kind, logits_all=True, verbose=False)

    return opened


@pytest.fixture(scope="module")
def vocabularies():
    return {"gpt2": tokenizers.load("gpt2"), "small": tokenizers.train(TEXTS * 5, 310)}


@pytest.fixture(params=["gpt2", "small"])
def tokenizer(request, vocabularies):
    return vocabularies[request.param]


def model_for(tokenizer, seed=1):
    """The demo's shape for the demo's kind of vocabulary, a small one for GPT-2's. The blocks'
    matrices are quieter in the wider one: at 0.25 its attention sees one position only, and any
    rounding tips it over to another."""
    shape = (2, 2, 64) if tokenizer.name == "gpt2" else (4, 4, 256)
    model = new_model(GPTConfig(tokenizer.n_vocab, *shape, max_positions=128), seed)
    with torch.no_grad():
        for p in model.blocks.parameters():
            p.mul_(8 * p.size(-1) ** -0.5 if p.dim() == 2 else 1)
    return model


def prompts_for(tokenizer):
    return [[tokenizer.end_of_text, *tokenizer.encode(text)]
            for text in (*TEXTS, HARD["code"], HARD["languages"])]


def logits_of(llm, ids):
    """llama.cpp's logits (T, V) at ids (T,)."""
    llm.reset()
    llm.eval(ids)
    return torch.tensor(llm.scores[: len(ids)])


def greedy(llm, ids, n):
    """llama.cpp's n likeliest ids after ids, one after the other."""
    found = [logits_of(llm, ids)[-1].argmax().item()]
    while len(found) < n:
        llm.eval(found[-1:])
        found.append(int(llm.scores[llm.n_tokens - 1].argmax()))
    return found


@torch.no_grad()
def lead(model, ids):
    """By how much the likeliest id after ids (a list) is ahead of the next, in logits."""
    first, second = model(torch.tensor([ids]))[0, -1].topk(2).values.tolist()
    return first - second


def read(path):
    """({key: value}, {name: tensor}) of a GGUF file."""
    reader = gguf.GGUFReader(path)
    return ({name: field.contents() for name, field in reader.fields.items()},
            {tensor.name: tensor for tensor in reader.tensors})


# ------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize(("dtype", "tie"), [("f32", 0.003), ("f16", 0.04)])
def test_llama_cpp_says_the_same_greedy_text(llama, tokenizer, dtype, tie, tmp_path):
    """All of 32 tokens of every text in f32. In f16 a text may part from ours where two tokens were
    likeliest within the rounding: 11 of 120 texts of 20 such random models do."""
    model = model_for(tokenizer)
    write_gguf(model, tokenizer, tmp_path / "it.gguf", dtype)
    llm, equal = llama(tmp_path / "it.gguf", kv=dtype), 0
    prompts = prompts_for(tokenizer)
    for ids in prompts:
        expected, found = answer_of(model, torch.tensor(ids), 32), greedy(llm, ids, 32)
        equal += found == expected
        if found != expected:
            parted = next(i for i in range(32) if found[i] != expected[i])
            assert lead(model, ids + expected[:parted]) < tie
    assert equal == len(prompts) if dtype == "f32" else equal > len(prompts) // 2


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "error"), [("f32", 2e-4), ("f16", 3e-3)])
@pytest.mark.parametrize("louder", [1, 40], ids=["", "large values"])
def test_llama_cpp_computes_the_same_logits(llama, tokenizer, dtype, error, louder, tmp_path):
    """Relative to their deviation. What f16 could not hold 256 times as large is scaled less."""
    model, ids = model_for(tokenizer), prompts_for(tokenizer)[-1]
    for block in model.blocks:
        block.mlp.up.weight.mul_(louder)
        block.mlp.down.weight.div_(louder)
    assert all((sharpness(block) == 256).all() == (louder == 1) for block in model.blocks)
    write_gguf(model, tokenizer, tmp_path / "it.gguf", dtype)
    expected = model(torch.tensor([ids]))[0]
    found = logits_of(llama(tmp_path / "it.gguf", kv=dtype), ids)
    assert expected.std() > 1  # the weights say something
    assert (found - expected).square().mean().sqrt() < error * expected.std()


def test_a_chat_is_answered_as_by_us(llama, tokenizer, tmp_path):
    """Through llama.cpp's own template and sampling, f32; an answer ends at <|end|>."""
    model = model_for(tokenizer)
    messages = say("user", TEXTS[0], "assistant", TEXTS[1], "user", TEXTS[2])
    ids = [*render(tokenizer, messages).ids, tokenizer.assistant]
    said = answer_of(model, torch.tensor(ids), 16)
    end = max(i for i in range(16) if said[i] not in said[:i])
    with torch.no_grad():  # what would be said there becomes <|end|>
        model.head.weight[[said[end], tokenizer.end]] = model.head.weight[
            [tokenizer.end, said[end]]]
    write_gguf(model, tokenizer, tmp_path / "it.gguf", "f32", TEMPLATE)
    llm = llama(tmp_path / "it.gguf", kv="f32")
    answer = llm.create_chat_completion(messages, temperature=0, max_tokens=16)["choices"][0]
    assert answer["finish_reason"] == "stop" and end > 8
    expected = tokenizer.decode(said[:end]).replace("\ufffd", "")  # it leaves half characters out
    assert answer["message"]["content"] == expected


# --------------------------------------------------------------------------------------- vocabulary


@pytest.fixture
def vocabulary(llama, tokenizer, tmp_path):
    write_gguf(model_for(tokenizer), tokenizer, tmp_path / "it.gguf", chat_template=TEMPLATE)
    return llama(tmp_path / "it.gguf")


def test_llama_cpp_cuts_text_into_our_ids(vocabulary, tokenizer):
    """What looks like a special token is text there too, where parse_special is off."""
    for text in ODD:
        found = vocabulary.tokenize(text.encode(), add_bos=False, special=False)
        assert found == tokenizer.encode(text), text
        assert vocabulary.detokenize(found).decode() == text


def test_special_tokens_have_our_ids_and_no_text(vocabulary, tokenizer):
    for text, i in tokenizer.specials.items():
        assert vocabulary.tokenize(text.encode(), add_bos=False, special=True) == [i]
        assert vocabulary.detokenize([i]) == b""
        assert vocabulary.detokenize([i], special=True).decode() == text
    assert vocabulary.tokenize(b"", add_bos=True) == [tokenizer.end_of_text]
    assert vocabulary.token_eos() == tokenizer.end
    assert vocabulary.n_vocab() == tokenizer.n_vocab


# ---------------------------------------------------------------------------------------- the file


def test_the_file_says_what_llama_cpp_would_guess_wrong(vocabularies, tmp_path):
    tokenizer = vocabularies["small"]
    model = model_for(tokenizer)
    write_gguf(model, tokenizer, tmp_path / "it.gguf")
    values, tensors = read(tmp_path / "it.gguf")
    c = model.config
    assert values["general.architecture"] == "gptneox"
    assert values["gptneox.rope.freq_base"] == c.rope_theta
    assert values["gptneox.rope.dimension_count"] == c.n_embd // c.n_head
    assert values["gptneox.context_length"] == 128
    assert values["gptneox.use_parallel_residual"] is False
    assert values["tokenizer.ggml.eos_token_id"] == tokenizer.end_of_text  # no chats
    assert "tokenizer.chat_template" not in values
    assert len(tensors) == 4 + 12 * c.n_layer  # no product but the head lacks its bias
    assert {t.tensor_type.name for t in tensors.values() if len(t.shape) == 2} == {"F16"}
    assert {t.tensor_type.name for t in tensors.values() if len(t.shape) == 1} == {"F32"}
    assert [file.name for file in tmp_path.iterdir()] == ["it.gguf"]


def test_scaling_for_the_gelu_loses_no_digit(vocabularies):
    """A power of two, so that fp32 weights come back as they were."""
    model = model_for(vocabularies["small"])
    block = model.blocks[1]
    with torch.no_grad():
        block.mlp.up.weight.mul_(torch.logspace(-3, 2, len(block.mlp.up.weight))[:, None])
    named, s = named_tensors(model), sharpness(block)
    assert s.max() == 256 and s.min() < 64
    assert torch.equal(named["blk.1.ffn_up.weight"] / s[:, None], block.mlp.up.weight)
    assert torch.equal(named["blk.1.ffn_down.weight"] * s, block.mlp.down.weight)


# ----------------------------------------------------------------------------------------- refusals


@pytest.fixture
def small(vocabularies):
    return vocabularies["small"]


def test_a_vision_model_is_refused(small, tmp_path):
    model = VisionLanguageModel(GPTConfig(small.n_vocab, 1, 2, 32, 64),
                                CLIPConfig(32, 8, 32, 2, 2, 32, 1, 2))
    with pytest.raises(UserError, match="only a text model becomes a GGUF file"):
        write_gguf(model, small, tmp_path / "it.gguf")


@pytest.mark.parametrize("dtype", ["q8_0", "bf16", "int8"])
def test_types_that_change_the_text_are_refused(small, dtype, tmp_path):
    with pytest.raises(UserError, match=f"one of f32, f16, not {dtype}: coarser weights change"):
        write_gguf(model_for(small), small, tmp_path / "it.gguf", dtype)


@torch.no_grad()
def test_numbers_beyond_f16_are_refused_where_they_matter(small, tmp_path):
    model = model_for(small)
    model.head.weight[3, 5] = 1e5
    with pytest.raises(UserError, match=r"output\.weight has numbers that f16 cannot"):
        write_gguf(model, small, tmp_path / "it.gguf")
    write_gguf(model, small, tmp_path / "it.gguf", "f32")
    model.blocks[1].mlp.up.weight[7] = 1e3
    with pytest.raises(UserError, match="GELU does not come to our ReLU"):
        write_gguf(model, small, tmp_path / "it.gguf", "f32")


@pytest.mark.parametrize("change", [
    {"normalizer": {"type": "Lowercase"}}, {"pre_tokenizer": None},
    {"pre_tokenizer": {"type": "Whitespace"}},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                       "use_regex": True}}], ids=str)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(small, change, tmp_path):
    other = tokenizers.from_json(json.dumps(json.loads(small.source) | change))
    with pytest.raises(UserError, match=r"splits text otherwise than this tokenizer\.json"):
        write_gguf(model_for(small), other, tmp_path / "it.gguf")


def test_a_missing_package_is_named(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        write_gguf(model_for(small), small, tmp_path / "it.gguf")
