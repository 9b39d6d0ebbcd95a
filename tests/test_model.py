"""model.py: the same function as GPT-NeoX; packing, caching and batching do not change it."""

import contextlib
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import model as gpt
from data import Batch
from export.to_transformers import neox_config, neox_weights
from inference.kv_cache import KVCache
from model import GPT, GPTConfig

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
the_head_loss = gpt.head_loss
SMALL = GPTConfig(vocab_size=96, n_layer=3, n_head=2, n_embd=32, max_positions=64)


def new_model(config=SMALL, seed=0):
    """A model with all weights random, norms included, so that no layer is the identity."""
    model = GPT(config).eval()
    torch.manual_seed(seed)  # after the initial weights, however many numbers they took
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(mean=float("norm" in name and "weight" in name), std=0.25)
    return model


@pytest.fixture(params=["inference", "training"])
def mode(request):
    """With and without gradients: attention uses another kernel in training."""
    with torch.set_grad_enabled(request.param == "training"):
        yield


def some_ids(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SMALL.vocab_size, shape, generator=generator)


def test_logits_equal_those_of_gpt_neox(mode):
    model = new_model()
    ids = some_ids(2, SMALL.max_positions)
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**neox_config(SMALL))).eval()
    neox.load_state_dict(neox_weights(model.state_dict(), SMALL), strict=True)
    theirs = neox(ids).logits
    assert theirs.std() > 1
    torch.testing.assert_close(model.logits(ids), theirs, atol=1e-4, rtol=0)


def test_the_reference_size_is_522_million_parameters_and_3_gflop_per_token():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 522
    ids = torch.empty(1, 1024)
    assert round(model.flops(Batch(ids, ids)) / 1024 / 1e9, 2) == 3.06


@torch.no_grad()
def test_a_new_model_has_identity_blocks_and_uniform_predictions():
    torch.manual_seed(0)
    model = GPT(SMALL)
    ids = some_ids(4, 32)
    x = model.token_embedding(ids)
    assert torch.equal(model.hidden(x), model.final_norm(x))
    assert model(Batch(ids, ids)).item() / ids.numel() == pytest.approx(math.log(96), abs=0.1)


@torch.no_grad()
def test_hidden_with_where_returns_the_same_states():
    model, ids = new_model(), some_ids(3, 12)
    x, where = model.token_embedding(ids), torch.tensor([30, 0, 11, 12])
    torch.testing.assert_close(model.hidden(x, where=where),
                               model.hidden(x).flatten(0, 1)[where], atol=1e-5, rtol=0)


def test_every_parameter_gets_a_gradient():
    model = new_model()
    ids = some_ids(8, 32)
    model(Batch(ids[:, :-1], ids[:, 1:])).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


def test_packing_does_not_change_logits(mode):
    model, ids = new_model(), some_ids(2, 20)
    lengths = [[6, 9, 5], [11, 1, 4]]  # the second row ends in four positions of padding
    positions, segments = torch.zeros(2, 20).long(), torch.zeros(2, 20).int()
    parts = []
    for row in range(2):
        start = 0
        for number, n in enumerate(lengths[row], 1):
            part = row, slice(start, start + n)
            positions[part], segments[part] = torch.arange(n), number
            parts.append(part)
            start += n
    packed = model.logits(ids, positions=positions, segments=segments)
    for part in parts:
        alone = model.logits(ids[part][None])[0]
        torch.testing.assert_close(packed[part], alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_head_computes_only_supervised_positions(monkeypatch):
    model, ids, targets = new_model(), some_ids(3, 10), some_ids(3, 10, seed=2)
    where = torch.tensor([2, 3, 9, 17, 29])
    ignored = torch.full((30,), -100)
    ignored[where] = targets.flatten()[where]
    logits = model.logits(ids).flatten(0, 1)
    whole = F.cross_entropy(logits, ignored, ignore_index=-100, reduction="sum")
    seen = []

    def head_loss(x, weight, targets):
        seen.append(len(x))
        return the_head_loss(x, weight, targets)

    monkeypatch.setattr(gpt, "head_loss", head_loss)
    loss = model(Batch(ids, targets.flatten()[where], where))
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
    assert seen == [5]


@pytest.mark.parametrize("scale", [1.0, 15.0], ids=["uncertain", "confident"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_chunked_loss_has_the_value_and_gradients_of_cross_entropy(
    device, dtype, scale, monkeypatch
):
    monkeypatch.setitem(gpt.LOGITS_AT_ONCE, device, 300 * 70)  # 70 of 200 rows at a time
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 32, generator=generator).to(device)
    weight = torch.randn(300, 32, generator=generator).to(device) * 0.1 * scale
    targets = (x @ weight.T).argmax(-1)
    targets[::3] = torch.arange(len(targets[::3]), device=device)

    def gradients(loss_of, dtype):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = loss_of(*leaves, targets)
        (loss / len(x)).backward()
        return loss.item(), *(leaf.grad for leaf in leaves)

    def whole(x, weight, targets):
        return F.cross_entropy((x @ weight.T).float(), targets, reduction="sum")

    expected, found = gradients(whole, torch.float32), gradients(the_head_loss, dtype)
    ordinary = gradients(whole, dtype)  # no further from the truth than autocast's own error
    assert found[0] == pytest.approx(ordinary[0], rel=1e-4)
    for mine, exact, theirs in zip(found[1:], expected[1:], ordinary[1:], strict=True):
        error = (mine - exact).norm() / exact.norm()
        assert error < 1e-5 + 1.5 * (theirs - exact).norm() / exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "logit", "nats", "tolerance"), [
    (slice(7, 8), 12.0, math.log1p(1000 * math.exp(-12)), 0.01),
    (slice(2), 200.0, 200 + math.log(2), 1e-3)], ids=["confident", "impossible"])
def test_loss_of_a_confident_model_is_exact(dtype, rows, logit, nats, tolerance):
    """In any dtype: 0.0061 nats for 1,000 other logits at e^-12, and those of a target that is 200
    below two equal logits, though e^-200 is no number in any of them."""
    weight = torch.zeros(1001, 8)
    weight[rows, 0] = logit
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = the_head_loss(torch.eye(1, 8), weight, torch.tensor([7]))
    assert loss.item() == pytest.approx(nats, rel=tolerance)


def test_the_loss_can_be_backpropagated_twice():
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    loss = the_head_loss(x, weight, torch.arange(5))
    loss.backward(retain_graph=True)
    once = x.grad.clone(), weight.grad.clone()
    loss.backward()
    torch.testing.assert_close((x.grad, weight.grad), (2 * once[0], 2 * once[1]))


def test_fp16_gradients_are_scaled_before_they_are_rounded():
    """64 positions with 999 probabilities of about e^-16, two steps of fp16: rounded by 6 %."""
    weight = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)) * 0.01
    weight[7, 0], grads = 16.0, []
    for dtype in torch.float32, torch.float16:
        x, leaf = torch.eye(1, 8).expand(64, 8), weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            (the_head_loss(x, leaf, torch.full((64,), 7)) * 2.0**16).backward()
        grads.append(leaf.grad[8:])
    assert (grads[1] - grads[0]).norm() < 0.01 * grads[0].norm()


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations on whole tensors, but for products, read and write."""

    n_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if not re.search("mm|index|empty", str(func)) and not func.is_view:
            self.n_bytes += sum(x.nbytes for x in tree_leaves((args, found))  # not out= again
                                if isinstance(x, torch.Tensor))
        return found


@pytest.mark.parametrize(("dtype", "n_bytes"), [(torch.float16, 24), (torch.bfloat16, 8)], ids=str)
def test_bytes_that_the_loss_moves_for_a_logit(dtype, n_bytes):
    """Of fp16, 8 are a conversion that a GPU's softmax includes."""
    x, weight = torch.randn(512, 8, requires_grad=True), torch.randn(4096, 8)
    with torch.autocast("cpu", dtype), Traffic() as traffic:
        the_head_loss(x, weight, torch.arange(512))
    assert traffic.n_bytes / (512 * 4096) == pytest.approx(n_bytes, rel=0.05)


def test_no_supervised_positions_give_zero_loss_and_gradient():
    model = new_model()
    ids, none = some_ids(2, 5), torch.zeros(0, dtype=torch.long)
    loss = model(Batch(ids, none, none))
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[1] * 12, [5, 7], [1, 11], [4, 1, 6, 1], [12]], ids=str)
def test_the_cache_does_not_change_logits(cuts):
    model, ids = new_model(), some_ids(2, 12)
    cache, pieces = KVCache(model, 2), model.token_embedding(ids).split(cuts, dim=1)
    found = torch.cat([model.head(model.hidden(x, cache=cache)) for x in pieces], dim=1)
    torch.testing.assert_close(found, model.logits(ids), atol=1e-5, rtol=0)


def documents_apart(q, k, v, bounds, bounds_k, longest, longest_k, **causal):
    """A reference for PyTorch's varlen_attn: one document after the other."""
    assert bounds is bounds_k and longest == longest_k and causal == {"window_size": (-1, 0)}
    assert (bounds.diff() > 0).all() and bounds.diff().max() <= longest
    parts = [torch.nn.functional.scaled_dot_product_attention(
        *(x[a:b].transpose(0, 1)[None] for x in (q, k, v)), is_causal=True)[0].transpose(0, 1)
        for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
    return torch.cat(parts)


@pytest.mark.parametrize("kind", ["bounds", "apart"])
@pytest.mark.parametrize("T", [24, 240])
def test_attention_in_documents_equals_the_mask(T, kind, monkeypatch):
    """By a GPU's kernel for document boundaries, here its reference, and as rows of a batch."""
    monkeypatch.setattr(gpt, "varlen_attn", documents_apart)
    monkeypatch.setattr(gpt, "takes_bounds", lambda device, dtype, D: kind == "bounds")
    torch.manual_seed(0)
    lengths = [[T // 6, T // 8, T // 6, T // 12], [T // 7] * 3]
    segments, bounds = torch.zeros(2, T, dtype=torch.int32), []
    for b, some in enumerate(lengths):
        starts = [sum(some[:i]) for i in range(len(some) + 1)]
        for i, length in enumerate(some):
            segments[b, starts[i] : starts[i] + length] = i + 1
        bounds += [b * T + at for at in [*starts, *range(starts[-1] + T // 6, T, T // 6)]]
    bounds = torch.tensor([*bounds, 2 * T], dtype=torch.int32)
    qkv = torch.randn(3, 2, 2, T, 8, requires_grad=True)
    masks = gpt.packed_mask(segments), gpt.packed_mask(segments, bounds, T // 6)
    assert masks[0].dtype == torch.bool and isinstance(masks[1], gpt.Apart) == (kind == "apart")
    some = (segments > 0)[:, None, :, None]
    found = [gpt.attend(*qkv.unbind(), mask) * some for mask in masks]
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
    gradients = [torch.autograd.grad(y.square().sum(), qkv)[0] for y in found]
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-3)


def test_the_kernel_for_boundaries_is_tried_with_the_models_own_head_size(monkeypatch):
    sizes = []
    monkeypatch.setattr(torch, "randn", lambda *shape, **more: sizes.append(shape[-1]) or 1 / 0)
    for D in 64, 128, 20:  # PyTorch's kernel takes multiples of 8
        with contextlib.suppress(ZeroDivisionError):
            assert not gpt.takes_bounds.__wrapped__(torch.device("cuda"), torch.bfloat16, D)
    monkeypatch.setattr(gpt, "takes_bounds", lambda device, dtype, D: sizes.append(D))
    ids, bounds = some_ids(1, 8), torch.tensor([0, 8], dtype=torch.int32)
    new_model()(Batch(ids, ids, segments=torch.ones(1, 8).int(), bounds=bounds, longest=8))
    assert sizes == [64, 128, SMALL.n_embd // SMALL.n_head]


@pytest.mark.parametrize("masked", [False, True])
def test_written_out_attention_equals_the_fused_kernel(masked):
    """Training in half precision on a CPU uses the written-out formula."""
    torch.manual_seed(0)
    mask = torch.ones(12, 12, dtype=torch.bool).tril()[None, None] if masked else None
    qkv = torch.randn(3, 2, 2, 12, 8).bfloat16()

    def attended(qkv):
        y = gpt.attend(*qkv.requires_grad_().unbind(), mask, causal=not masked)
        return y, torch.autograd.grad(y.square().sum(), qkv)[0]

    for found, expected in zip(attended(qkv.clone()), attended(qkv.float()), strict=True):
        assert found.dtype == torch.bfloat16 and expected.dtype == torch.float32
        assert (found - expected).norm() < 0.01 * expected.norm()
