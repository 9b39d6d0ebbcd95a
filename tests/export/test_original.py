"""The claims of export/from_original.py: a checkpoint of the original is imported exactly, and no
code in it is run."""

import json
import os
import pickle
import re
import shutil

import pytest
import torch
from conftest import COMMON, TINY, newest, run, run_stage
from torch import nn

from common import checkpoint
from common.config import UserError
from export.from_original import import_original
from vision import open_model

V, C, H, LAYERS, POSITIONS, THETA = 50257, 64, 2, 2, 256, 5e4
CONFIG = {"batch_size": 32, "input_sequence_length": 64, "max_sequence_length": POSITIONS,
          "embedding_dim": C, "hidden_dim": 4 * C, "num_attention_heads": H,
          "layer_count": LAYERS, "rope_theta": THETA, "vocab_size": V, "device_type": "cuda",
          "autocast_dtype": torch.bfloat16}
EMBEDDING = "token_embedding_layer.token_embedding_table.weight"


# ----------------------------------------------------------- the original's modules, rewritten


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


def some_ids(*shape, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def original():
    """The model after three steps, so that norms and biases are not the initial 1 and 0."""
    torch.manual_seed(0)
    model = Original()
    with torch.no_grad():
        for part in model.blocks:  # sharper attention, or positions hardly matter
            part["multihead_attention"].query_fc.weight *= 3
            part["multihead_attention"].key_fc.weight *= 3
    model.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        ids = some_ids(2, 33, seed=step)
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        model.optimizer.zero_grad()
        loss.backward()
        model.optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def saved(original, tmp_path_factory):
    """The file that the original's trainer writes: of the compiled model."""
    path = tmp_path_factory.mktemp("original") / "checkpoint_035000.pt"
    torch.save({"current_step": 35000, "model_state_dict": torch.compile(original).state_dict(),
                "optimizer_state_dict": original.optimizer.state_dict(), "config": CONFIG}, path)
    return path


@pytest.fixture(scope="module")
def imported(saved):
    import_original(saved, saved.parent / "imported")
    return saved.parent / "imported"


def small(original, **changes):
    """What a file holds, without the optimizer; changes to it, None to leave a key out."""
    found = {"current_step": 35000, "model_state_dict": dict(original.state_dict()),
             "config": dict(CONFIG), **changes}
    return {key: value for key, value in found.items() if value is not None}


# ------------------------------------------------------------------------------------- imports


@torch.no_grad()
def test_an_imported_checkpoint_has_the_same_logits(original, imported):
    model, tokenizer, info = open_model(imported)
    ids = some_ids(2, 200, seed=9)
    found, expected = model.logits(ids), original(ids)
    torch.testing.assert_close(found[..., :V], expected, atol=1e-4, rtol=0)
    assert (original(ids.flip(1)).flip(1) - expected).std() > 0.1  # where a word stands matters
    assert (info["stage"], info["step"], tokenizer.n_vocab) == ("pretrain", 35000, found.size(-1))
    assert newest(imported).name == "step_00035000"
    assert info["imported_from"]["file"] == "checkpoint_035000.pt"


@torch.no_grad()
def test_spare_ids_are_unlikely_and_of_mean_norm(imported):
    model = open_model(imported)[0]
    shares = model.logits(some_ids(4, 50)).softmax(-1)[..., V:]
    assert shares.min() > 0 and shares.max() <= 1 / V
    norms = model.token_embedding.weight.norm(dim=1)
    torch.testing.assert_close(norms[V:].mean(), norms[:V].mean())


def test_sample_and_sft_continue_from_it_and_pretrain_refuses(imported, tmp_path):
    """pretrain.py has no optimizer state to resume with."""
    answer = run("sample.py", imported, "--prompt=Once upon a", "--max_tokens=5", "--device=cpu")
    assert answer.status == 0 and answer.out.startswith("Once upon a")
    assert len(answer.out) > len("Once upon a") + 5
    rows = [{"messages": [{"role": "user", "content": f"How many are {i} and 1?"},
                          {"role": "assistant", "content": f"They are {i + 1}."}]}
            for i in range(60)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for kind, name, text in ("chat", "chats.jsonl", lines), ("text", "text.txt", lines * 3):
        (tmp_path / name).write_text(text, encoding="utf-8")
        made = run("prepare.py", kind, f"--files={tmp_path}/{name}", "--tokenizer=gpt2",
                   "--val_share=0.2", f"--out={tmp_path}/{kind}")
        assert made.status == 0, made.err
    run_stage("sft", *COMMON, *TINY["sft"], "--max_steps=4", "--eval_every=0", "--save_every=0",
              f"--data={tmp_path}/chat", f"--init_from={imported}", f"--out={tmp_path}/sft")
    info = checkpoint.read(tmp_path / "sft")[0]
    assert [parent["stage"] for parent in info["lineage"]] == ["pretrain"]
    shutil.copytree(imported, tmp_path / "copy")
    more = run("pretrain.py", *COMMON, *TINY["pretrain"], f"--n_embd={C}", "--max_steps=40000",
               f"--data={tmp_path}/text", f"--out={tmp_path}/copy")
    assert "another --out" in more.refusal


def test_wrappers_of_names_and_buffers_are_ignored(original, imported, tmp_path):
    weights = {f"module._orig_mod.{name}": tensor
               for name, tensor in original.state_dict().items()}
    weights |= {"module._orig_mod.blocks.0.multihead_attention.rotary_emb.cos_cached":
                torch.ones(3), "module._orig_mod.blocks.1.multihead_attention.causal_mask":
                torch.ones(3, 3).bool()}
    torch.save(small(original, model_state_dict=weights), tmp_path / "a.pt",
               _use_new_zipfile_serialization=False)
    found = checkpoint.read(import_original(tmp_path / "a.pt", tmp_path / "a"))[1]
    expected = checkpoint.read(imported)[1]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_folder_is_overwritten_only_if_asked(saved, original, tmp_path):
    torch.save(small(original, current_step=40000), tmp_path / "late.pt")
    out = tmp_path / "out"
    import_original(tmp_path / "late.pt", out)
    with pytest.raises(UserError, match="is not empty"):
        import_original(saved, out)
    (out / "note").write_text("mine")
    folder = import_original(saved, out, overwrite=True)
    assert folder == checkpoint.locate(out) and checkpoint.steps_in(out).keys() == {35000}
    assert (out / "note").read_text() == "mine"
    with pytest.raises(UserError, match="the folder of a model"):
        import_original(saved, folder, overwrite=True)


# ---------------------------------------------------------------------------------- bad input


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["in the config", "in the weights", "old format", "bare pickle",
                                 "new pickle"])
def test_code_in_a_file_is_not_run(how, original, tmp_path):
    trap, path, out = Trap(tmp_path / "sprung"), tmp_path / "a.pt", tmp_path / "out"
    held = small(original, config={**CONFIG, "device_type": trap})
    if how == "in the weights":
        held = small(original, model_state_dict={**original.state_dict(), "more": trap})
    if "pickle" in how:
        path.write_bytes(pickle.dumps({"config": trap}, protocol=2 if how == "bare pickle" else 5))
    else:
        torch.save(held, path, _use_new_zipfile_serialization=how != "old format")
    with pytest.raises(UserError, match="not a complete file of torch.save" if how == "new pickle"
                       else r"wants to run code \(\w+\.mkdir\), which was not run"):
        import_original(path, out)
    assert not trap.path.exists() and not out.exists()
    if "pickle" in how:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert trap.path.exists()  # or the trap does not work


@pytest.mark.parametrize("share", [0.001, 0.5, 0.99999])
def test_an_incomplete_file_is_refused(share, saved, tmp_path):
    complete = saved.read_bytes()
    (tmp_path / "a.pt").write_bytes(complete[: int(share * len(complete))])
    with pytest.raises(UserError, match=r"a\.pt is not a complete file of torch\.save"):
        import_original(tmp_path / "a.pt", tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"hello\n", bytes(1000), b"\x80\x02}q\0."])
def test_a_file_of_another_format_is_refused(content, tmp_path):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.pt is not a complete file of torch\.save"):
        import_original(tmp_path / "a.pt", tmp_path / "out")


def test_a_missing_file_or_folder_is_named(saved, tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*missing\.pt: No such file"):
        import_original(tmp_path / "missing.pt", tmp_path / "out")
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
        import_original(tmp_path, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .* into .*file: .*Not a directory"):
        import_original(saved, tmp_path / "file")


BIAS = "vocab_projection.vocab_projection.bias"
KEY = "blocks.1.multihead_attention.key_fc.weight"


@pytest.mark.parametrize(("changes", "message"), [
    ({"current_step": None}, "lacks current_step"),
    ({"current_step": -5}, "current_step=-5"),
    ({"model_state_dict": None}, "lacks model_state_dict"),
    ({"model_state_dict": [1]}, "lacks model_state_dict"),
    ({"config": None}, "lacks config"),
    ({"weights": {EMBEDDING: None}}, f"lacks the matrix {EMBEDDING}"),
    ({"weights": {KEY: None}}, f"lacks {KEY}"),
    ({"weights": {BIAS: torch.zeros(V)}}, f"has unknown {BIAS}"),
    ({"weights": {"blocks.0.rope.weight": torch.zeros(2)}}, "has unknown blocks.0.rope.weight"),
    ({"weights": {KEY: torch.zeros(C, 32)}}, f"has {KEY}, which is (64, 32) and not (64, 64)"),
    ({"weights": {EMBEDDING: torch.zeros(50304, C)}},
     f"has {EMBEDDING}, which is (50304, 64) and not (50257, 64)"),
    ({"weights": {KEY: torch.zeros(C, C).long()}}, f"{KEY} is not a tensor of finite"),
    ({"weights": {KEY: torch.full((C, C), torch.nan)}}, f"{KEY} is not a tensor of finite"),
    ({"weights": {KEY: "text"}}, f"{KEY} is not a tensor of finite"),
    ({"sizes": {"num_attention_heads": 0}}, "num_attention_heads=0"),
    ({"sizes": {"num_attention_heads": 2.0}}, "num_attention_heads=2.0"),
    ({"sizes": {"num_attention_heads": 64}}, "64 heads of an even size"),
    ({"sizes": {"max_sequence_length": 10**12}}, "max_sequence_length=1000000000000"),
    ({"sizes": {"rope_theta": float("nan")}}, "rope_theta=nan"),
    ({"config": {"num_attention_heads": 2}}, "max_sequence_length=None"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_checkpoint_of_another_model_is_refused(changes, message, original, tmp_path):
    weights, sizes = changes.pop("weights", {}), changes.pop("sizes", {})
    held = small(original, **changes)
    if weights:
        named = held["model_state_dict"] | weights
        held["model_state_dict"] = {f"_orig_mod.{name}": w for name, w in named.items()
                                    if w is not None}
    if sizes:
        held["config"] |= sizes
    torch.save(held, tmp_path / "a.pt")
    with pytest.raises(UserError, match=re.escape(message)) as refusal:
        import_original(tmp_path / "a.pt", tmp_path / "out")
    assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()


def test_a_file_without_a_dictionary_is_refused(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "a.pt")
    with pytest.raises(UserError, match="not a checkpoint of the original"):
        import_original(tmp_path / "a.pt", tmp_path / "out")
