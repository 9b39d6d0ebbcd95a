"""Blocks compiled in place: how many graphs, with DDP and with packed rows of ever new shapes."""

import sys

import pytest
import torch
from faults.harness import start_together
from torch import nn

import model as gpt
from common.device import averaging, compile_blocks, setup
from data import Batch
from model import GPT, GPTConfig

SMALL = GPTConfig(vocab_size=64, n_layer=3, n_head=2, n_embd=32, max_positions=64)


def counted(patch):
    """A list of the graphs compiled from now on: forward ones, for which no code is generated."""
    found, compiled = [], nn.Module.compile

    def backend(graph, inputs):
        found.append(graph)
        return graph

    patch.setattr(nn.Module, "compile", lambda module: compiled(module, backend=backend))
    torch._dynamo.reset()
    return found


def packed(lengths, B=2, T=64):
    """A Batch of B rows of T positions with documents of these lengths in each."""
    ids = torch.randint(SMALL.vocab_size, (B, T))
    starts = torch.tensor([0, *lengths]).cumsum(0)
    segments = torch.searchsorted(starts, torch.arange(T), right=True).int().expand(B, T)
    bounds = torch.cat([starts[:-1] + b * T for b in range(B)] + [torch.tensor([B * T])]).int()
    return Batch(ids, ids.flatten(), positions=torch.arange(T).expand(B, T), segments=segments,
                 bounds=bounds, longest=max(lengths))


@pytest.mark.parametrize("kind", ["bounds", "apart"])
def test_rows_of_any_documents_need_two_graphs_in_training_and_two_in_evaluation(
        kind, monkeypatch):
    """One for the first shape, one for all others; the kernel for boundaries is a stand-in."""
    graphs = counted(monkeypatch)
    monkeypatch.setattr(gpt, "takes_bounds", lambda device, dtype, D: kind == "bounds")
    monkeypatch.setattr(gpt, "varlen_attn", lambda q, k, v, bounds, *more, **causal: (
        q + k + v + bounds.sum()))
    model = GPT(SMALL)
    compile_blocks(model)
    for lengths in ([16] * 4, [8] * 8, [12, 12, 16, 12, 12], [4] * 16, [5] * 12 + [4]):
        model(packed(lengths)).backward()
    assert len(graphs) == 2
    with torch.no_grad():
        for lengths in ([8] * 8, [16] * 4, [4] * 16):
            model(packed(lengths))
    assert len(graphs) <= 4


def graphs_in_ddp():
    """A forward and a backward pass of two blocks of full width in DDP; prints the graphs."""
    graphs, machine = counted(pytest.MonkeyPatch()), setup("cpu", "fp32")
    model = GPT(GPTConfig(64, n_layer=2, max_positions=16))
    compile_blocks(model)
    ids = torch.randint(64, (1, 16))
    averaging(model, machine.device)(Batch(ids, ids)).backward()
    print(f"{len(graphs)} graphs")
    machine.leave()


def test_a_block_inside_ddp_is_one_graph():
    """Otherwise PyTorch's DDPOptimizer makes 4 of it."""
    jobs = start_together(2, __file__)
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].said
    assert jobs[0].said == "1 graphs\n"


if __name__ == "__main__" and not sys.argv[1:]:
    graphs_in_ddp()
