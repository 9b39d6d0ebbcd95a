"""The claims of benchmarks/baselines.py: what runs beside us computes the same, on the same chats,
in turn."""

import pytest
import torch
from test_model import neox_of

import tokenizer as tokenizers
from benchmarks.baselines import REPEATS, WARM, beside_nanogpt, freeze, llava_of, measure, unpack
from benchmarks.training import RandomChats
from clip import CLIPConfig, normalise
from common.device import Processor
from model import GPTConfig
from train.packing import Packed
from vision import VisionLanguageModel, image_spec

TOKENIZER = tokenizers.train(["a few words"], 300)
TEXT = GPTConfig(TOKENIZER.n_vocab, n_layer=2, n_head=2, n_embd=32, max_positions=128)
SIGHT = CLIPConfig(image_size=32, patch_size=16, vision_width=32, vision_layers=3, vision_heads=2,
                   text_width=32, text_layers=1, text_heads=2, vocab_size=64, embed_dim=32)


@pytest.fixture
def packed():
    chats = RandomChats(TOKENIZER, 12, 30, SIGHT.image_size)
    return Packed([chats], 100, TOKENIZER, image_spec(SIGHT))


def twins():
    """A vision model without a single weight at its initial value, and that of `transformers` with
    the same weights."""
    torch.manual_seed(0)
    ours = VisionLanguageModel(TEXT, SIGHT)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.normal_(mean=float("norm" in name and "weight" in name), std=0.25)
    theirs = llava_of(TEXT, SIGHT, TOKENIZER.image)
    theirs.model.vision_tower.load_state_dict(ours.vision_tower.state_dict())
    theirs.model.multi_modal_projector.load_state_dict(ours.projector.state_dict())
    neox = neox_of(ours.decoder)
    theirs.model.language_model.load_state_dict(neox.gpt_neox.state_dict())
    theirs.lm_head.load_state_dict(neox.lm_head.state_dict())
    return ours, theirs


def test_with_the_same_weights_the_llava_of_transformers_has_our_loss_and_gradients(packed):
    ours, theirs = twins()
    freeze(theirs, "vision_sft")
    batch = packed.batch(range(len(packed)))
    loss = ours(batch) / len(batch.targets)
    loss.backward()
    part = unpack(batch)
    part["pixel_values"] = normalise(part.pop("pixels"))
    their_loss = theirs(**part, num_items_in_batch=len(batch.targets), use_cache=False).loss
    their_loss.backward()
    assert loss.item() > 5  # the weights say something
    assert their_loss.item() == pytest.approx(loss.item(), abs=1e-3)
    projector, decoder = theirs.model.multi_modal_projector, theirs.model.language_model
    for mine, other in ((ours.projector.linear_1, projector.linear_1),
                        (ours.projector.linear_2, projector.linear_2),
                        (ours.decoder.token_embedding, decoder.embed_in),
                        (ours.decoder.head, theirs.lm_head)):
        torch.testing.assert_close(mine.weight.grad, other.weight.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stage", ["vision_pretrain", "vision_sft"])
def test_the_same_parameters_learn_in_both(stage):
    ours, theirs = VisionLanguageModel(TEXT, SIGHT), llava_of(TEXT, SIGHT, TOKENIZER.image)
    ours.decoder.requires_grad_(stage == "vision_sft")
    freeze(theirs, stage)
    mine, other = (sum(p.numel() for p in model.parameters() if p.requires_grad)
                   for model in (ours, theirs))
    biases = TEXT.n_layer * (3 + 4 + 1) * TEXT.n_embd  # of a NeoX: ours has none
    assert other == mine + biases * (stage == "vision_sft")


def test_a_packed_batch_comes_apart_into_its_chats(packed):
    part = unpack(packed.batch(range(len(packed))))
    order = [packed.chats["number"][c] for row in packed.rows for c in row]
    assert sorted(order) == list(range(12)) and len(part["input_ids"]) == len(part["pixels"]) == 12
    lengths = part["attention_mask"].sum(1).tolist()
    assert max(lengths) == part["input_ids"].size(1) and min(lengths) < max(lengths)
    for row, i in enumerate(order):
        chat, supervised = (torch.from_numpy(x) for x in packed.sources[0].chat(i))
        repeats = torch.where(chat == TOKENIZER.image, SIGHT.n_patches, 1)
        chat, supervised = chat.repeat_interleave(repeats), supervised.repeat_interleave(repeats)
        assert lengths[row] == len(chat)
        assert torch.equal(part["input_ids"][row, : len(chat)], chat)
        wanted = chat.where(supervised, torch.tensor(-100))
        assert torch.equal(part["labels"][row, : len(chat)], wanted)
        assert (part["labels"][row, len(chat) :] == -100).all()


def test_kinds_take_turns_and_are_readied_off_the_clock():
    said = []

    def kind(name):
        def prepare(i):
            said.append((name, i, "ready"))
            return lambda: said.append((name, i, "taken"))

        return lambda: prepare

    seconds, peaks = measure({"a": kind("a"), "b": kind("b")}, torch.device("cpu"), ["b"])
    assert [len(times) for times in seconds.values()] == [REPEATS, REPEATS]
    assert list(peaks) == ["b"] and peaks["b"] > 0
    turns = said[4:]  # behind the two steps whose memory is measured
    assert turns == [(name, i, what) for i in range(WARM + REPEATS) for name in "ab"
                     for what in ("ready", "taken")]


@pytest.mark.parametrize("bf16", [True, False])
def test_nanogpt_runs_only_in_precisions_that_the_processor_has(bf16, tmp_path, monkeypatch):
    def measured(kinds, device, alone, warm):
        return {name: [float(i)] for i, name in enumerate(kinds, 1)}, dict.fromkeys(alone, 1.0)

    monkeypatch.setattr("common.device.processor", lambda: Processor("some", bf16, False))
    monkeypatch.setattr("benchmarks.baselines.measure", measured)
    (tmp_path / "model.py").write_text("")
    found = beside_nanogpt(str(tmp_path / "model.py"))
    assert found["precision"] == ("bf16" if bf16 else "fp32")
    assert ("times_compiled_bf16" in found) == bf16
    assert (found["times_eager"], found["times_compiled"]) == (2.0, 3.0)
