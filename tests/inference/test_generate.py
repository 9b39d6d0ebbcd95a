"""The claims of inference/generate.py and inference/quantized_linear.py: the same text, faster,
alone or many at once."""

import copy
import functools
import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_model import new_model, some_ids
from torch.utils import deterministic
from transformers import RepetitionPenaltyLogitsProcessor

from common.config import UserError
from common.device import processor
from inference.generate import Decoding, Sampler, Sampling, generate, generate_batch, pick
from inference.quantized_linear import (
    Int8Linear,
    PackedLinear,
    fastest_precision,
    for_decoding,
    has_fbgemm,
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


@pytest.mark.parametrize("sampling", [
    {}, {"temperature": 1.0, "seed": 5}, {"temperature": 0.5, "top_k": 9, "seed": 6}], ids=str)
def test_batched_generation_equals_single(sampling):
    """Lengths differ, one row ends early at `stop`, and another reaches the limit."""
    model, lengths, ids = new_model(seed=3), [3, 9, 6, 1], some_ids(4, 9)
    _, stop = ended_by_stop(model, ids[0, :3])
    sampling = Sampling(**sampling)
    alone = [answer_of(model, ids[b, :n], 8, stop, sampling) for b, n in enumerate(lengths)]
    assert len(set(map(tuple, alone))) == 4
    decoding, x = Decoding(model, rows=5), model.token_embedding(ids)
    for _ in range(2):  # the rows can be used again
        assert generate_batch(decoding, x, lengths, 8, stop,
                              [Sampler(sampling) for _ in lengths]) == alone
    if sampling == GREEDY:
        assert min(map(len, alone)) < 8 == max(map(len, alone))
        assert generate_batch(decoding, x, lengths, 8, stop) == alone


def test_uninitialized_memory_does_not_reach_an_answer():
    model, lengths, ids = new_model(seed=3), [2, 9], some_ids(2, 9)
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
    assert decoding.cache.lengths == [10] and decoding.room() == 0
    found = generate_batch(Decoding(model, 2, 10), model.token_embedding(some_ids(2, 6)), [6, 3],
                           100, -1)
    assert list(map(len, found)) == [5, 8]
    with pytest.raises(ValueError, match="12 positions do not fit a cache of 11"):
        decoding.prefill(model.token_embedding(prompt[None, :2]))


@torch.no_grad()
def test_waiting_rows_are_not_changed():
    """A step of rows 0 to 2, of which row 1 waits."""
    model, ids = new_model(seed=3), some_ids(3, 7)
    decoding = Decoding(model, rows=4)
    for row, n in enumerate((2, 6, 4)):
        decoding.prefill(model.token_embedding(ids[row : row + 1, :n]), row)
    logits = decoding.step(ids[:, 6], waiting={1})
    assert decoding.cache.lengths == [3, 6, 5, 0]
    for row, n in ((0, 2), (2, 4)):
        whole = torch.cat((ids[row, :n], ids[row, 6:]))
        torch.testing.assert_close(logits[row], model.logits(whole[None])[0, -1], atol=1e-5, rtol=0)
    alone = decoding.step(ids[1:2, 6], row=1)
    torch.testing.assert_close(alone, model.logits(ids[1:2])[:, -1], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("end", [8, 16, 64])
def test_a_step_with_fixed_shapes_gives_the_same_logits(end):
    """What a CUDA graph replays: positions in a tensor, more slots than are used."""
    model, ids = new_model(seed=3), some_ids(2, 7)
    decoding = Decoding(model, rows=2)
    for row, n in enumerate((3, 7)):
        decoding.prefill(model.token_embedding(ids[row : row + 1, :n]), row)
    decoding.cut(6, 1)
    positions = torch.tensor([[3], [6]])
    fixed = SimpleNamespace(extend=lambda T: decoding.cache.place(positions, end))
    found = decoding._step(ids[:, 6], fixed)
    torch.testing.assert_close(found, decoding.step(ids[:, 6]), atol=1e-5, rtol=0)


def test_every_number_of_slots_in_a_cuda_graph_is_a_multiple_of_64():
    decoding = Decoding(new_model(), slots=2048)
    assert decoding.ends == [256, 512, 1024, 2048, 2112]  # one spare slot
    assert decoding.cache.keys.size(3) == 2112


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_cuda_graph_equals_the_cpu():
    model = new_model(seed=3)
    lengths, ids = [3, 9, 6, 1], some_ids(4, 9)
    expected = generate_batch(Decoding(model, 4), model.token_embedding(ids), lengths, 20, -1)
    model.to("cuda")
    x = model.token_embedding(ids.to("cuda"))
    assert generate_batch(Decoding(model, 4), x, lengths, 20, -1) == expected


SHARES = torch.tensor([0.15, 0.5, 0.05, 0.3])  # probabilities, in no order


def drawn(shares=SHARES, n=20_000, seed=0, **sampling):
    """How often each id is drawn, as shares (V,)."""
    rows = shares.log().expand(n, -1)
    ids = pick(rows, generator=torch.Generator().manual_seed(seed), **sampling)
    return ids.bincount(minlength=len(shares)) / n


@pytest.mark.parametrize(("sampling", "expected"), [
    ({"temperature": 1.0}, SHARES),
    ({"temperature": 0.5}, SHARES**2 / (SHARES**2).sum()),
    ({"temperature": 1.0, "top_k": 1}, torch.tensor([0, 1, 0, 0])),
    ({"temperature": 1.0, "top_k": 2}, torch.tensor([0, 5 / 8, 0, 3 / 8])),
    ({"temperature": 1.0, "top_k": 9}, SHARES),
    ({"temperature": 1.0, "top_p": 0.35}, torch.tensor([0, 1, 0, 0])),
    ({"temperature": 1.0, "top_p": 0.55}, torch.tensor([0, 5 / 8, 0, 3 / 8])),
    ({"temperature": 1.0, "top_p": 0.85}, torch.tensor([3 / 19, 10 / 19, 0, 6 / 19])),
    ({"temperature": 1.0, "top_k": 2, "top_p": 0.6}, torch.tensor([0, 1, 0, 0])),
], ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_samples_have_the_expected_frequencies(sampling, expected):
    found = drawn(**sampling)
    assert found.bool().tolist() == expected.bool().tolist()
    torch.testing.assert_close(found, expected.float(), atol=0.02, rtol=0)


def test_top_p_equals_sorting_the_whole_vocabulary():
    top_p, logits = 0.9, torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    p, order = logits.softmax(-1).sort(descending=True)
    wanted = order[p.cumsum(-1) - p < top_p]
    ids = pick(logits.expand(20_000, -1), 1.0, top_p=top_p,
               generator=torch.Generator().manual_seed(1))
    assert set(ids.tolist()) <= set(wanted.tolist())
    shares = ids.bincount(minlength=1000)[wanted] / len(ids)
    torch.testing.assert_close(shares, p[0, : len(wanted)] / p[0, : len(wanted)].sum(), atol=0.01,
                               rtol=0)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_equals_transformers(penalty):
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


@pytest.mark.parametrize("logits", [torch.tensor([[90.0, -90, 0, 89]]), torch.zeros(1, 4)])
@pytest.mark.parametrize(("temperature", "penalty", "top_k", "top_p"), list(itertools.product(
    (1e-9, 1e-5, 1e9), (1e-9, 1e9), (0, 1, 10**9), (1e-9, 1 - 1e-9, 1))))
def test_extreme_settings_draw_ids_that_they_allow(temperature, penalty, top_k, top_p, logits):
    sampler = Sampler(Sampling(temperature, top_k, top_p, penalty))
    sampler.begin([1])
    best = (logits * torch.tensor([1, penalty, 1, 1])).argmax().item()  # id 1 is negative or 0
    drawn = [sampler(logits).item() for _ in range(9)]
    assert set(drawn) <= set(range(4))
    if logits.any() and (temperature < 1 or top_k == 1 or top_p == 1e-9):
        assert drawn[0] == best


@pytest.mark.parametrize("setting", [
    {"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0},
    {"top_p": 1e-50}, {"top_p": 1.5}, {"temperature": 1e10}, {"repetition_penalty": 0.0},
    {"repetition_penalty": float("inf")}, {"seed": -1}], ids=str)
def test_invalid_settings_are_refused_by_name(setting):
    with pytest.raises(UserError, match=f"{next(iter(setting))} must be"):
        Sampling(**setting)


CPU = torch.device("cpu")
FBGEMM = has_fbgemm(CPU)
KINDS = ["fp32", *(["bf16", "fp16", "int8"] if FBGEMM else [])]
CLOSE = {"fp32": 1e-5, "fp16": 3e-3, "bf16": 0.03, "int8": 0.05}  # of the logits' deviation
LINEARS = {"fp32": (PackedLinear, 1e-6), "int8": (Int8Linear, 0.015),
           "fp16": (functools.partial(PackedLinear, dtype=torch.float16), 1e-3),
           "bf16": (functools.partial(PackedLinear, dtype=torch.bfloat16), 5e-3)}  # relative error
fbgemm = pytest.mark.skipif(not FBGEMM, reason="this PyTorch or this processor has no FBGEMM")


def largest_error(found, expected):
    """That of any row, relative to the row."""
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


@fbgemm
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("name", LINEARS)
def test_quantized_linear_gives_nearly_the_same_products(name, rows, bias):
    kind, error = LINEARS[name]
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48, bias=bias).requires_grad_(False)
    x = torch.randn(1, rows, 64)
    expected, found = linear(x), kind(linear)(x)
    assert (found - expected).norm() < error * expected.norm()


@fbgemm
def test_int8_rows_are_normalized_separately():
    """The first token of a text often has values a hundred times as large as the others'."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48).requires_grad_(False)
    eight, x = Int8Linear(linear), torch.randn(5, 64)
    x[0] *= 1000
    assert largest_error(eight(x), linear(x)) < 0.015


@fbgemm
def test_weights_as_two_fp16_numbers_are_as_exact_as_fp32():
    torch.manual_seed(0)
    linear = torch.nn.Linear(512, 48, bias=False).requires_grad_(False)
    linear.weight *= torch.logspace(-4, 3, 48)[:, None]
    x = torch.randn(1, 512)
    expected = x.double() @ linear.weight.double().T
    found = PackedLinear(linear)(x)
    assert ((found - expected).abs() < 2e-6 * (x.abs() @ linear.weight.abs().T)).all()


@fbgemm
def test_int8_sums_do_not_saturate():
    """Without VNNI, pairs of products are added in saturating int16."""
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
def test_vnni_detection_agrees_with_the_products():
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
def test_every_precision_gives_nearly_the_same_logits(precision):
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
    log_p = expected.log_softmax(-1)
    cost = (log_p.exp() * (log_p - found.log_softmax(-1))).sum(-1).mean()
    assert abs(cost) < 0.01  # the loss on text that the model itself would write
    assert not any(isinstance(module, Int8Linear) for module in for_decoding(model).modules())
    assert not FBGEMM or fastest_precision(CPU) == "int8"


AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}


@pytest.mark.slow
@fbgemm
@pytest.mark.skipif(not processor().vnni, reason="only a newer processor can be held to those")
def test_an_older_processor_gives_the_same_products():
    """The tests of products above, in a process that is held to older instructions."""
    names = "linear or int8 or two_fp16 or vnni or every_precision"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", names],
        cwd=ROOT, env={**os.environ, **AVX2}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
