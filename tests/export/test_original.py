"""experiments/import_original.py imports a checkpoint of the original exactly and runs no code in
it."""

import os

import pytest
import torch
from conftest import newest, run
from torch import nn

from vision import open_model

V, C, H, LAYERS, POSITIONS, THETA = 50257, 64, 2, 2, 256, 5e4
CONFIG = {"batch_size": 32, "input_sequence_length": 64, "max_sequence_length": POSITIONS,
          "embedding_dim": C, "hidden_dim": 4 * C, "num_attention_heads": H,
          "layer_count": LAYERS, "rope_theta": THETA, "vocab_size": V, "device_type": "cuda",
          "autocast_dtype": torch.bfloat16}
EMBEDDING = "token_embedding_layer.token_embedding_table.weight"
BIAS = "vocab_projection.vocab_projection.bias"
KEY = "blocks.1.multihead_attention.key_fc.weight"


class MultiHeadAttention(nn.Module):
    """Adjacent columns of q and k form a complex number, rotated by the position."""

    def __init__(self):
        super().__init__()
        self.query_fc, self.key_fc, self.value_fc = (nn.Linear(C, C, bias=False) for _ in range(3))
        self.output_projection = nn.Linear(C, C)

    def forward(self, x):
        B, T, D = len(x), x.size(1), C // H
        q, k, v = (fc(x).view(B, T, H, D) for fc in (self.query_fc, self.key_fc, self.value_fc))
        angles = torch.outer(torch.arange(T), THETA ** (-torch.arange(0, D, 2) / D))
        turns = torch.polar(torch.ones_like(angles), angles)[:, None]  # (T, 1, D / 2)
        q, k = (torch.view_as_complex(z.view(B, T, H, D // 2, 2)) * turns for z in (q, k))
        scores = torch.einsum("bihd,bjhd->bhij", q, k.conj()).real / D**0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        y = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
        return self.output_projection(y.reshape(B, T, C))


def block():
    net = nn.Sequential(nn.Linear(C, 4 * C, bias=False), nn.ReLU(), nn.Linear(4 * C, C, bias=False))
    return nn.ModuleDict({
        "layer_norm1": nn.LayerNorm(C), "multihead_attention": MultiHeadAttention(),
        "layer_norm2": nn.LayerNorm(C), "feed_forward": nn.ModuleDict({"net": net})})


class Original(nn.Module):
    def __init__(self):
        super().__init__()
        self.token_embedding_layer = nn.ModuleDict({"token_embedding_table": nn.Embedding(V, C)})
        self.blocks = nn.ModuleList(block() for _ in range(LAYERS))
        self.vocab_projection = nn.ModuleDict({
            "output_norm": nn.LayerNorm(C), "vocab_projection": nn.Linear(C, V, bias=False)})

    def forward(self, ids):
        x = self.token_embedding_layer["token_embedding_table"](ids)
        for part in self.blocks:
            x = x + part["multihead_attention"](part["layer_norm1"](x))
            x = x + part["feed_forward"]["net"](part["layer_norm2"](x))
        return self.vocab_projection["vocab_projection"](self.vocab_projection["output_norm"](x))


@pytest.fixture(scope="module")
def original():
    """A model in which no weight has its initial value."""
    torch.manual_seed(0)
    model = Original().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for part in model.blocks:  # sharper attention, or positions hardly matter
            part["multihead_attention"].query_fc.weight *= 3
    return model


def held(original, **changes):
    """What a file holds, without the optimizer; changes to it, None to leave a key out."""
    found = {"current_step": 35000, "model_state_dict": dict(original.state_dict()),
             "config": dict(CONFIG), **changes}
    return {key: value for key, value in found.items() if value is not None}


def imports(path, *flags):
    return run("experiments/import_original.py", path, f"--out={path.parent}/imported", *flags)


@torch.no_grad()
def test_an_imported_checkpoint_has_the_same_logits_and_is_replaced_only_if_asked(
        original, tmp_path):
    """From the file that the original's trainer writes: of a compiled model in DDP."""
    weights = {f"module._orig_mod.{name}": w for name, w in original.state_dict().items()}
    weights["module._orig_mod.blocks.1.multihead_attention.causal_mask"] = torch.ones(3).bool()
    path = tmp_path / "checkpoint_035000.pt"
    torch.save(held(original, model_state_dict=weights, optimizer_state_dict={"state": {}}), path)
    result = imports(path)
    assert result.status == 0, result.err
    assert newest(tmp_path / "imported").name == "step_00035000"
    model, tokenizer, info = open_model(tmp_path / "imported")
    ids = torch.randint(V, (2, 200))
    found, expected = model.logits(ids), original(ids)
    torch.testing.assert_close(found[..., :V], expected, atol=1e-4, rtol=0)
    assert (original(ids.flip(1)).flip(1) - expected).std() > 0.1  # where a word stands matters
    assert (info["stage"], info["step"], tokenizer.n_vocab) == ("pretrain", 35000, found.size(-1))
    assert info["imported_from"]["file"] == path.name
    shares, norms = found.softmax(-1)[..., V:], model.token_embedding.weight.norm(dim=1)
    assert shares.min() > 0 and shares.max() <= 1 / V  # of special tokens
    torch.testing.assert_close(norms[V:].mean(), norms[:V].mean())
    answer = run("sample.py", tmp_path / "imported", "--prompt=Once upon a", "--max_tokens=5",
                 "--device=cpu")
    assert answer.status == 0 and len(answer.out) > len("Once upon a") + 5
    assert "is not empty" in imports(path).refusal
    assert imports(path, "--overwrite=True").status == 0


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(zipped, original, tmp_path):
    trap, path = Trap(tmp_path / "sprung"), tmp_path / "a.pt"
    torch.save(held(original, config={**CONFIG, "device_type": trap}), path,
               _use_new_zipfile_serialization=zipped)
    refusal = imports(path).refusal
    assert "wants to run code (" in refusal and "mkdir), which was not run" in refusal
    assert not trap.path.exists() and not (tmp_path / "imported").exists()
    torch.load(path, weights_only=False)
    assert trap.path.exists()  # or the trap does not work
