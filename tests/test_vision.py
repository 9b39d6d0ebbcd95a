"""vision.py: image features replace image tokens; CLIP checkpoints of transformers open."""

import pytest
import torch
from test_clip import new_clip

import tokenizer as tokenizers
from clip import CLIPConfig
from common import checkpoint
from data import Batch
from model import GPT, GPTConfig
from vision import VisionLanguageModel, describe, join

TEXT = GPTConfig(vocab_size=320, n_layer=2, n_head=2, n_embd=32, max_positions=64)
SIGHT = CLIPConfig(image_size=32, patch_size=16, vision_width=32, vision_layers=3, vision_heads=2,
                   text_width=32, text_layers=1, text_heads=2, vocab_size=64, embed_dim=32)
IMAGE = 60  # the id of an image token here


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VisionLanguageModel(TEXT, SIGHT)


def test_image_tokens_are_replaced_by_features(model):
    pixels = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    ids = torch.tensor([[1, IMAGE, IMAGE, IMAGE, IMAGE, 2, 3]])
    slots = (ids.flatten() == IMAGE).nonzero()[:, 0]
    x = model.embed(ids, pixels, slots)
    assert torch.equal(x[0, 1:5], model.image_tokens(pixels)[0])
    assert torch.equal(x[0, [0, 5, 6]], model.decoder.token_embedding(ids)[0, [0, 5, 6]])


def test_a_text_only_batch_gives_the_projector_a_zero_gradient(model):
    """Without one DDP hangs."""
    ids = torch.randint(0, 60, (2, 8))
    model(Batch(ids, ids.flatten(), torch.arange(16))).backward()
    gradients = [p.grad for p in model.projector.parameters()]
    assert all(g is not None and not g.any() for g in gradients)


def test_join_opens_a_clip_of_transformers(tmp_path):
    _, theirs = new_clip(SIGHT)
    theirs.save_pretrained(tmp_path / "clip")
    tokenizer = tokenizers.train(["a few words"], 300)
    decoder = GPT(TEXT)
    info = dict(stage="sft", **describe(decoder), tokenizer=tokenizer.fingerprint,
                tokenizer_name=tokenizer.name, step=1, settings={}, metrics={})
    checkpoint.save(tmp_path / "sft", 1, decoder.state_dict(), info, tokenizer, {"step": 1})

    model, _, parents = join(tmp_path / "sft", tmp_path / "clip")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = theirs.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        assert torch.allclose(model.vision_tower.patches(pixels), wanted, atol=1e-5)
    assert parents[1]["stage"] == "transformers"
