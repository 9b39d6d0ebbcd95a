"""What benchmarks/baselines.py measures beside ours computes the same on the same chats."""

import pytest
import torch

import tokenizer as tokenizers
from benchmarks import REPEATS, WARM
from benchmarks.baselines import beside_nanogpt, llava_of, measure, unpack
from benchmarks.training import RandomChats
from clip import CLIPConfig, normalise
from common.device import Processor
from export.to_transformers import their_model
from model import GPTConfig
from train.packing import Packed
from vision import VisionLanguageModel, image_spec

TOKENIZER = tokenizers.train(["a few words"], 300)
TEXT = GPTConfig(TOKENIZER.n_vocab, n_layer=2, n_head=2, n_embd=32, max_positions=128)
VISION = CLIPConfig(image_size=32, patch_size=16, vision_width=32, vision_layers=3, vision_heads=2,
                    text_width=32, text_layers=1, text_heads=2, vocab_size=64, embed_dim=32)


@pytest.fixture
def packed():
    chats = RandomChats(TOKENIZER, 12, 30, VISION.image_size)
    return Packed([chats], 100, TOKENIZER, image_spec(VISION))


def test_with_the_same_weights_loss_and_gradients_are_the_same(packed):
    torch.manual_seed(0)
    ours = VisionLanguageModel(TEXT, VISION)
    theirs = llava_of(TEXT, VISION, TOKENIZER.image, "vision_sft")
    with torch.no_grad():
        for name, p in ours.named_parameters():  # no weight keeps its initial value
            p.normal_(mean=float("norm" in name and "weight" in name), std=0.25)
    theirs.load_state_dict(their_model(ours, TOKENIZER).state_dict())
    batch = packed.batch(range(len(packed)))
    loss = ours(batch) / len(batch.targets)
    loss.backward()
    part = unpack(batch)
    part["pixel_values"] = normalise(part.pop("pixels"))
    their_loss = theirs(**part, num_items_in_batch=len(batch.targets), use_cache=False).loss
    their_loss.backward()
    assert loss.item() > 5  # far from that of equal probabilities
    assert their_loss.item() == pytest.approx(loss.item(), abs=1e-3)
    projector, decoder = theirs.model.multi_modal_projector, theirs.model.language_model
    for one, other in ((ours.projector.linear_1, projector.linear_1),
                       (ours.decoder.token_embedding, decoder.embed_in),
                       (ours.decoder.head, theirs.lm_head)):
        torch.testing.assert_close(one.weight.grad, other.weight.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stage", ["vision_pretrain", "vision_sft"])
def test_both_train_the_same_parameters(stage):
    ours = VisionLanguageModel(TEXT, VISION)
    theirs = llava_of(TEXT, VISION, TOKENIZER.image, stage)
    ours.decoder.requires_grad_(stage == "vision_sft")
    one, other = (sum(p.numel() for p in model.parameters() if p.requires_grad)
                  for model in (ours, theirs))
    biases = TEXT.n_layer * (3 + 4 + 1) * TEXT.n_embd  # of a NeoX: ours has none
    assert other == one + biases * (stage == "vision_sft")


def test_an_unpacked_batch_has_one_padded_chat_per_row(packed):
    part = unpack(packed.batch(range(len(packed))))
    order = [packed.chats["number"][c] for row in packed.rows for c in row]
    assert sorted(order) == list(range(12)) and len(part["input_ids"]) == len(part["pixels"]) == 12
    lengths = part["attention_mask"].sum(1).tolist()
    assert max(lengths) == part["input_ids"].size(1) and min(lengths) < max(lengths)
    for row, i in enumerate(order):
        chat, supervised = (torch.from_numpy(x) for x in packed.sources[0].chat(i))
        repeats = torch.where(chat == TOKENIZER.image, VISION.n_patches, 1)
        chat, supervised = chat.repeat_interleave(repeats), supervised.repeat_interleave(repeats)
        assert torch.equal(part["input_ids"][row, : len(chat)], chat)
        wanted = chat.where(supervised, torch.tensor(-100))
        assert torch.equal(part["labels"][row, : len(chat)], wanted)
        assert (part["labels"][row, len(chat) :] == -100).all() and lengths[row] == len(chat)


def test_kinds_take_turns():
    events = []

    def kind(name):
        def prepare(i):
            return lambda: events.append((name, i))

        return lambda: prepare

    seconds, peaks = measure({"a": kind("a"), "b": kind("b")}, torch.device("cpu"), ["b"], WARM)
    assert [len(times) for times in seconds.values()] == [REPEATS, REPEATS]
    assert list(peaks) == ["b"] and peaks["b"] > 0
    turns = events[2:]  # after the two steps whose memory is measured
    assert turns == [(name, i) for i in range(WARM + REPEATS) for name in "ab"]


@pytest.mark.parametrize("bf16", [True, False])
def test_nanogpt_runs_only_in_native_precisions(bf16, tmp_path, monkeypatch):
    def measured(kinds, device, alone, warm):
        return ({name: [float(i)] * REPEATS for i, name in enumerate(kinds, 1)},
                dict.fromkeys(alone, 1.0))

    monkeypatch.setattr("common.device.processor", lambda: Processor("some", bf16, False))
    monkeypatch.setattr("benchmarks.baselines.measure", measured)
    (tmp_path / "model.py").write_text("")
    found = beside_nanogpt(str(tmp_path / "model.py"))
    assert found["precision"] == ("bf16" if bf16 else "fp32")
    assert ("times_compiled_bf16" in found) == bf16
    assert (found["times_eager"], found["times_compiled"]) == (2.0, 3.0)
