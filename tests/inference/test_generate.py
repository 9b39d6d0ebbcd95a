"""The claims of inference/generate.py and inference/quantized_linear.py: the same text, faster,
alone or many at once."""

import copy
import functools
import itertools
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_model import changed, new_model, some_ids
from torch.utils import deterministic
from transformers import RepetitionPenaltyLogitsProcessor

from common.config import UserError
from common.device import processor
from inference.generate import (
    Decoding,
    FixedSlots,
    Sampler,
    Sampling,
    call_block,
    generate,
    generate_batch,
    pick,
)
from inference.quantized_linear import (
    HalfLinear,
    Int8Linear,
    PackedLinear,
    fastest_precision,
    for_decoding,
)

GREEDY = Sampling()


def answer_of(model, prompt, n, stop=-1, sampling=GREEDY):
    """The first n ids after prompt (T,), or those before `stop`; no id is -1."""
    x = model.token_embedding(prompt[None])
    return list(generate(Decoding(model), x, n, stop, Sampler(sampling)))


def ended_by_stop(model, prompt):
    """(prompt's answer up to an id that it says once only, that id)."""
    answer = answer_of(model, prompt, 20)
    n = next(i for i in range(3, 20) if answer[i] not in answer[:i])
    return answer[:n], answer[n]


def likeliest(model, ids):
    """The greedy continuation, without any cache: every logit from the whole text."""
    return model.logits(ids[None])[0, -1].argmax().item()


# ---------------------------------------------------------------------------------------- the text


@torch.no_grad()
def test_generation_says_what_the_model_without_a_cache_says():
    model, ids = new_model(seed=3), some_ids(5)
    for token in answer_of(model, ids, 20):
        assert token == likeliest(model, ids)
        ids = torch.cat((ids, torch.tensor([token])))


def test_rows_of_one_batch_get_the_answers_they_get_alone():
    """Lengths differ, one row ends early at `stop`, and another runs to the limit."""
    model = new_model(seed=3)
    lengths, ids = [3, 9, 6, 1], some_ids(4, 9)
    _, stop = ended_by_stop(model, ids[0, :3])
    alone = [answer_of(model, ids[b, :n], 8, stop) for b, n in enumerate(lengths)]
    assert min(map(len, alone)) < 8 == max(map(len, alone))
    decoding = Decoding(model, rows=5)
    for _ in range(2):  # the rows can be used again
        assert generate_batch(decoding, model.token_embedding(ids), lengths, 8, stop) == alone


def test_rows_of_one_batch_draw_as_they_draw_alone():
    model, lengths, ids = new_model(seed=3), [3, 9], some_ids(2, 9)
    some = [Sampling(temperature=1.0, seed=5), Sampling(temperature=0.5, top_k=9, seed=6)]
    alone = [answer_of(model, ids[b, :n], 8, -1, some[b]) for b, n in enumerate(lengths)]
    found = generate_batch(Decoding(model, rows=2), model.token_embedding(ids), lengths, 8, -1,
                           [Sampler(sampling) for sampling in some])
    assert found == alone
    assert alone != [answer_of(model, ids[b, :n], 8) for b, n in enumerate(lengths)]


def test_memory_that_nobody_wrote_cannot_reach_an_answer():
    """Slots of a cache that a short row leaves empty may hold anything, NaN included."""
    model = new_model(seed=3)
    lengths, ids = [2, 9], some_ids(2, 9)
    alone = [answer_of(model, ids[b, :n], 4) for b, n in enumerate(lengths)]
    assert deterministic.fill_uninitialized_memory  # PyTorch's default: new memory is NaN
    torch.use_deterministic_algorithms(True)
    try:
        found = generate_batch(Decoding(model, 2), model.token_embedding(ids), lengths, 4, -1)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == alone


def test_a_full_cache_ends_generation_without_an_error():
    model, prompt = new_model(), some_ids(6)
    decoding = Decoding(model, slots=10)
    x = model.token_embedding(prompt[None])
    answer = list(generate(decoding, x, 100, -1, Sampler(GREEDY)))
    assert answer == answer_of(model, prompt, 5)
    assert (decoding.length(), decoding.room()) == (10, 0)
    found = generate_batch(Decoding(model, 2, 10), model.token_embedding(some_ids(2, 6)), [6, 3],
                           100, -1)
    assert list(map(len, found)) == [5, 8]
    with pytest.raises(ValueError, match="12 positions do not fit a cache of 11"):
        decoding.prefill(model.token_embedding(prompt[None, :2]))


@torch.no_grad()
def test_a_cut_cache_goes_on_as_if_nothing_had_been_behind_the_cut():
    model, prompt, turn = new_model(seed=3), some_ids(5), some_ids(1, 4, seed=9)
    decoding = Decoding(model)
    stopped = generate(decoding, model.token_embedding(prompt[None]), 20, -1, Sampler(GREEDY))
    said = list(itertools.islice(stopped, 7))
    decoding.cut(5 + 3)
    logits = decoding.prefill(model.token_embedding(turn))
    whole = torch.tensor([[*prompt.tolist(), *said[:3], *turn[0].tolist()]])
    torch.testing.assert_close(logits, model.logits(whole)[:, -1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_that_wait_are_not_touched():
    """A step of rows 0 to 2, of which row 1 waits: what row 1 holds stays what it was."""
    model, ids = new_model(seed=3), some_ids(3, 7)
    decoding = Decoding(model, rows=4)
    for row, n in enumerate((2, 6, 4)):
        decoding.prefill(model.token_embedding(ids[row : row + 1, :n]), row)
    logits = decoding.step(ids[:, 6], waiting={1})
    assert [decoding.length(row) for row in range(4)] == [3, 6, 5, 0]
    for row, n in ((0, 2), (2, 4)):
        whole = torch.cat((ids[row, :n], ids[row, 6:]))
        torch.testing.assert_close(logits[row], model.logits(whole[None])[0, -1], atol=1e-5, rtol=0)
    alone = decoding.step(ids[1:2, 6], row=1)
    torch.testing.assert_close(alone, model.logits(ids[1:2])[:, -1], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("end", [8, 16, 64])
def test_a_step_of_fixed_shapes_says_the_same(end):
    """What a CUDA graph replays: positions in a tensor, more slots looked at than are used."""
    model, ids = new_model(seed=3), some_ids(2, 7)
    decoding = Decoding(model, rows=2)
    for row, n in enumerate((3, 7)):
        decoding.prefill(model.token_embedding(ids[row : row + 1, :n]), row)
    decoding.cut(6, 1)
    fixed = FixedSlots(decoding.cache, torch.tensor([3, 6]), end)
    found = decoding._step(ids[:, 6], fixed)
    torch.testing.assert_close(found, decoding.step(ids[:, 6]), atol=1e-5, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_graph_says_what_a_cpu_says():
    model = new_model(seed=3)
    lengths, ids = [3, 9, 6, 1], some_ids(4, 9)
    expected = generate_batch(Decoding(model, 4), model.token_embedding(ids), lengths, 20, -1)
    model.to("cuda")
    x = model.token_embedding(ids.to("cuda"))
    assert generate_batch(Decoding(model, 4), x, lengths, 20, -1) == expected


@torch.no_grad()
def test_a_compiled_step_says_the_same_and_is_compiled_once_for_all_layers(monkeypatch):
    model, prompt = new_model(seed=3), some_ids(1, 5)
    plain, compiled = Decoding(model), Decoding(model)
    # Its cache on disk would take code made for AVX-512 on an emulated AVX2 processor, and say NaN.
    monkeypatch.setattr("torch._inductor.config.fx_graph_cache", False)
    compiled.run = torch.compile(call_block)  # as on a GPU
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters
    counted.clear()
    for decoding in plain, compiled:
        decoding.prefill(model.token_embedding(prompt))
    caches = [FixedSlots(d.cache, torch.tensor([5]), 16) for d in (plain, compiled)]
    a, b = (d._step(prompt[:, 0], cache)
            for d, cache in zip((plain, compiled), caches, strict=True))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert counted["stats"]["unique_graphs"] == 1 and not counted["graph_break"]


# ------------------------------------------------------------------------------------------ drawing

SHARES = torch.tensor([0.15, 0.5, 0.05, 0.3])  # probabilities, in no order


def drawn(shares=SHARES, n=20_000, seed=0, **sampling):
    """How often each id is drawn, as shares (V,)."""
    rows = shares.log().expand(n, -1)
    ids = pick(rows, generator=torch.Generator().manual_seed(seed), **sampling)
    return ids.bincount(minlength=len(shares)) / n


def test_temperature_0_picks_the_likeliest_of_each_row():
    assert pick(torch.stack((SHARES, SHARES.flip(0)))).tolist() == [1, 2]


@pytest.mark.parametrize(("sampling", "expected"), [
    ({"temperature": 1.0}, SHARES),
    ({"temperature": 0.5}, SHARES**2 / (SHARES**2).sum()),
    ({"temperature": 2.0}, SHARES**0.5 / (SHARES**0.5).sum()),
    ({"temperature": 1.0, "top_k": 1}, torch.tensor([0, 1, 0, 0])),
    ({"temperature": 1.0, "top_k": 2}, torch.tensor([0, 5 / 8, 0, 3 / 8])),
    ({"temperature": 1.0, "top_k": 9}, SHARES),
    ({"temperature": 1.0, "top_p": 0.35}, torch.tensor([0, 1, 0, 0])),
    ({"temperature": 1.0, "top_p": 0.55}, torch.tensor([0, 5 / 8, 0, 3 / 8])),
    ({"temperature": 1.0, "top_p": 0.85}, torch.tensor([3 / 19, 10 / 19, 0, 6 / 19])),
    ({"temperature": 1.0, "top_k": 2, "top_p": 0.6}, torch.tensor([0, 1, 0, 0])),
], ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_draws_have_the_shares_that_the_settings_leave(sampling, expected):
    found = drawn(**sampling)
    assert found.bool().tolist() == expected.bool().tolist()
    torch.testing.assert_close(found, expected.float(), atol=0.02, rtol=0)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_top_p_leaves_what_sorting_the_whole_vocabulary_leaves(top_p):
    """A thousand ids nearly alike: many are needed, or few."""
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    p, order = logits.softmax(-1).sort(descending=True)
    wanted = order[p.cumsum(-1) - p < top_p]
    ids = pick(logits.expand(100_000, -1), 1.0, top_p=top_p,
               generator=torch.Generator().manual_seed(1))
    assert set(ids.tolist()) <= set(wanted.tolist())
    shares = ids.bincount(minlength=1000)[wanted] / len(ids)
    torch.testing.assert_close(shares, p[0, : len(wanted)] / p[0, : len(wanted)].sum(), atol=4e-3,
                               rtol=0)


def test_each_row_of_a_batch_is_cut_by_itself():
    rows = torch.stack((SHARES, SHARES.roll(1))).log().repeat(500, 1)
    for sampling in ({"top_k": 2}, {"top_p": 0.6}):
        ids = pick(rows, temperature=1.0, **sampling)
        assert set(ids[::2].tolist()) == {1, 3} and set(ids[1::2].tolist()) == {2, 0}


def test_the_same_seed_draws_the_same():
    rows = some_ids(200, 96).float() / 50
    a, b, c = (pick(rows, 1.0, generator=torch.Generator().manual_seed(s)) for s in (4, 4, 5))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_penalty_is_that_of_transformers(penalty):
    """What was read and what was said already is less likely (above 1), the rest as it was."""
    read, logits = [3, 5, 5], torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(Sampling(repetition_penalty=penalty))
    sampler.begin(read)
    theirs, context = RepetitionPenaltyLogitsProcessor(penalty), list(read)
    for row in logits[:, None]:
        expected = theirs(torch.tensor([context]), row.clone()).argmax(-1)
        found = sampler(row)
        assert torch.equal(found, expected)
        context.append(found.item())
    assert len(set(context)) > 5


@pytest.mark.parametrize("setting", [
    {"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0},
    {"top_p": 1.5}, {"repetition_penalty": 0.0}, {"seed": -1}], ids=str)
def test_settings_that_mean_nothing_are_refused_by_name(setting):
    with pytest.raises(UserError, match=f"{next(iter(setting))} must be"):
        Sampling(**setting)


# ------------------------------------------------------------------------------------------ weights

CPU = torch.device("cpu")
FBGEMM = HalfLinear.works(CPU)
KINDS = ["fp32", *(["bf16", "fp16", "int8"] if FBGEMM else [])]
CLOSE = {"fp32": 1e-5, "fp16": 3e-3, "bf16": 0.03, "int8": 0.05}  # of the logits' deviation
LINEARS = {"packed": (PackedLinear, 1e-6), "fp16": (HalfLinear, 1e-3),
           "bf16": (functools.partial(HalfLinear, dtype=torch.bfloat16), 5e-3),
           "int8": (Int8Linear, 0.015)}  # and the relative error of a product
fbgemm = pytest.mark.skipif(not FBGEMM, reason="this PyTorch or this processor has no FBGEMM")


def largest_error(found, expected):
    """That of any row, relative to the row."""
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("name", LINEARS)
def test_a_linear_layer_of_another_kind_gives_the_same_products(name, rows, bias):
    works = PackedLinear.works(CPU, torch.float32)
    if not (works if name == "packed" else FBGEMM):
        pytest.skip("this PyTorch or this processor lacks that product")
    kind, error = LINEARS[name]
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48, bias=bias).requires_grad_(False)
    x = torch.randn(1, rows, 64)
    expected, found = linear(x), kind(linear)(x)
    assert (found - expected).norm() < error * expected.norm()


def test_a_large_row_leaves_the_others_their_digits():
    """The first token of a text often has values a hundred times as large as the others'."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48).requires_grad_(False)
    eight, x = Int8Linear(linear), torch.randn(5, 64)
    x[0] *= 1000
    assert largest_error(eight(x), linear(x)) < 0.015


def test_a_weight_in_two_fp16_numbers_is_as_exact_as_fp32():
    """Of any size that training leaves weights in, one row as exact as many."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(512, 48, bias=False).requires_grad_(False)
    linear.weight *= torch.logspace(-4, 3, 48)[:, None]
    x = torch.randn(1, 512)
    expected = x.double() @ linear.weight.double().T
    found = PackedLinear(linear)(x)
    # one rounding of a sum of 512 terms for each term, of which most undo one another
    assert ((found - expected).abs() < 2e-6 * (x.abs() @ linear.weight.abs().T)).all()


@fbgemm
def test_sums_of_8_bits_do_not_saturate():
    """Where products of 8 bits are added in pairs in 16 bits, they do, unless weights see to it."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(512, 64, bias=False).requires_grad_(False)
    x = torch.rand(3, 512) * 0.1 + 0.9  # all large, all of one sign
    for weight in (torch.ones(64, 512), torch.rand(64, 512) + 0.2,
                   torch.randn(64, 512).abs(), torch.randn(64, 512).abs() ** 0.2):
        for sign in 1, -1:
            linear.weight.copy_(sign * weight)
            eight, expected = Int8Linear(linear), linear(x)
            assert largest_error(eight(x), expected) < 0.01
            assert largest_error(eight(x[:1]), expected[:1]) < 0.01


@fbgemm
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_the_processor_says_of_its_8_bits_is_so():
    """Weights of 127 and inputs of 255: exact with VNNI, a half of it where FBGEMM has none."""
    weight = torch.quantize_per_tensor(torch.ones(32, 64), 1 / 127, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    found = torch.ops.quantized.linear_dynamic(torch.ones(1, 64), packed).mean().item()
    saturated = pytest.approx(found) == 64 * 32767 / (2 * 255 * 127)
    assert saturated or found == pytest.approx(64)
    assert not (saturated and processor().vnni)
    if os.environ.get("FBGEMM_ENABLE_INSTRUCTIONS"):  # as the test of older processors sets it
        assert saturated != processor().vnni


@torch.no_grad()
@pytest.mark.parametrize("precision", KINDS)
def test_every_precision_says_nearly_the_same(precision):
    model, ids = new_model(seed=3), some_ids(2, 30)
    expected = model.logits(ids)
    fast = for_decoding(copy.deepcopy(model), precision)
    found = fast.logits(ids).float()
    assert (found - expected).square().mean().sqrt() < CLOSE[precision] * expected.std()
    assert not any(isinstance(module, torch.nn.Linear) for module in fast.modules())
    decoding = Decoding(fast)
    decoding.prefill(fast.token_embedding(ids[:1, :-1]))
    one = decoding.step(ids[:1, -1]).float()
    assert (one - expected[:1, -1]).square().mean().sqrt() < CLOSE[precision] * expected.std()


@torch.no_grad()
@pytest.mark.parametrize("precision", KINDS)
def test_no_precision_costs_a_hundredth_of_a_nat(precision):
    """The loss on text that the model itself would write, less what it is in fp32."""
    model, ids = new_model(seed=3), some_ids(4, 60)
    expected = model.logits(ids).log_softmax(-1)
    found = for_decoding(copy.deepcopy(model), precision).logits(ids).float().log_softmax(-1)
    cost = (expected.exp() * (expected - found)).sum(-1).mean()
    assert abs(cost) < 0.01
    assert (expected.exp() * expected).sum(-1).mean() > -4  # it is sure of something: log(96) = 4.6


@fbgemm
def test_auto_chooses_8_bits_where_there_are_such_products():
    """bench.py decode measures that they are the fastest: docs/log.md."""
    assert fastest_precision(CPU) == "int8"


def test_scores_are_made_in_the_type_of_training():
    fast = for_decoding(new_model())
    assert not any(isinstance(module, Int8Linear) for module in fast.modules())


AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}
AVX512 = {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
          "MKL_ENABLE_INSTRUCTIONS": "AVX512", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX512"}


@fbgemm
@pytest.mark.skipif(not processor().vnni, reason="only a newer processor can be held to those")
@pytest.mark.parametrize("variables", [AVX2, AVX512], ids=["AVX2", "AVX512"])
def test_older_processors_give_the_same_products(variables):
    """The tests of products above, in a process that is held to older instructions."""
    names = "kind_gives or digits or two_fp16 or bits or says_nearly or nat or auto or scores"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", names],
        cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_different_text_gets_a_different_answer():
    """Or the tests above could pass with a model that reads nothing."""
    model, ids = new_model(seed=3), some_ids(1, 6)
    assert answer_of(model, ids[0], 8) != answer_of(model, changed(ids, 0, 2)[0], 8)
