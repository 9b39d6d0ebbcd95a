"""What is measured beside our steps computes the same on the same chats."""

import pytest
import torch

import tokenizer as tokenizers
from benchmarks.training import RandomChats
from clip import CLIPConfig, normalise
from common.config import TrainSettings
from common.device import Processor
from experiments.llava_speed import llava_step, unpack
from experiments.nanogpt_speed import beside_nanogpt
from export.to_transformers import their_model
from model import GPTConfig
from train.packing import Packed
from vision import VisionLanguageModel, image_spec

TOKENIZER = tokenizers.train(["a few words"], 300)
TEXT = GPTConfig(TOKENIZER.n_vocab, n_layer=2, n_head=2, n_embd=32, max_positions=128)
VISION = CLIPConfig(image_size=32, patch_size=16, vision_width=32, vision_layers=3, vision_heads=2,
                    text_width=32, text_layers=1, text_heads=2, vocab_size=64, embed_dim=32)


@pytest.mark.parametrize("stage", ["vision_pretrain", "vision_sft"])
def test_loss_gradients_and_trained_parameters_are_the_same(stage):
    torch.manual_seed(0)
    ours = VisionLanguageModel(TEXT, VISION)
    with torch.no_grad():
        for name, p in ours.named_parameters():  # no weight keeps its initial value
            p.normal_(mean=float("norm" in name and "weight" in name), std=0.25)
    chats = RandomChats(TOKENIZER, 30, VISION.image_size, n=12)
    packed = Packed([chats], 100, TOKENIZER, image_spec(VISION))
    batch = packed.batch(range(len(packed)))
    theirs, (pixels, inputs) = their_model(ours, TOKENIZER), unpack(batch)
    assert len(inputs["input_ids"]) == len(pixels) == 12 > len(packed)  # one chat per row
    llava_step(theirs, TrainSettings(), None, stage, [])
    ours.decoder.requires_grad_(stage == "vision_sft")
    loss = ours(batch) / len(batch.targets)
    loss.backward()
    their_loss = theirs(**inputs, pixel_values=normalise(pixels),
                        num_items_in_batch=len(batch.targets), use_cache=False).loss
    their_loss.backward()
    assert loss.item() > 5  # far from that of equal probabilities
    assert their_loss.item() == pytest.approx(loss.item(), abs=1e-3)
    projector, decoder = theirs.model.multi_modal_projector, theirs.model.language_model
    trained = [(ours.projector.linear_1, projector.linear_1)]
    if stage == "vision_sft":
        trained += [(ours.decoder.token_embedding, decoder.embed_in),
                    (ours.decoder.head, theirs.lm_head)]
    for one, other in trained:
        torch.testing.assert_close(one.weight.grad, other.weight.grad, rtol=1e-3, atol=1e-4)
    one, other = (sum(p.numel() for p in model.parameters() if p.requires_grad)
                  for model in (ours, theirs))
    biases = TEXT.n_layer * (3 + 4 + 1) * TEXT.n_embd  # of a NeoX: ours has none
    assert other == one + biases * (stage == "vision_sft")


@pytest.mark.parametrize("bf16", [True, False])
def test_nanogpt_runs_only_in_native_precisions(bf16, tmp_path, monkeypatch):
    monkeypatch.setattr("common.device.processor", lambda: Processor("some", bf16, False))
    monkeypatch.setattr("experiments.nanogpt_speed.compare", lambda kinds, *rest: kinds)
    (tmp_path / "model.py").write_text("")
    found = beside_nanogpt(str(tmp_path / "model.py"))
    assert list(found) == ["ours", "eager", "compiled", *["compiled_bf16"] * bf16]
