"""Data, packing, loader: each row once an epoch, no chat lost, exactly the answers as targets."""

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT, encoded
from PIL import Image
from test_tokenizer import say

import tokenizer as tokenizers
from common.checkpoint import write_json
from common.config import UserError, seal
from common.device import Machine
from data import Chats, Documents, ImageSpec, Share, Text, check_tokenizer
from prep import writers
from prep.writers import write_manifest, write_shards
from tokenizer import render
from train.loader import Loader, shuffled, validation_loss
from train.packing import Captions, Packed, pack

WORDS = ["the cat sat on the mat", "a dog saw it", "and then the cat ran to the dog and sat", "no"]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(WORDS * 5, 310)


def machine(rank=0, ranks=1):
    """One process of several, without the others."""
    return Machine(torch.device("cpu"), torch.float32, rank, ranks)


def chat_of(number, n_turns=1, marks=()):
    """A chat that differs from those of other numbers; marks: turns that begin with an image."""
    messages = []
    for turn in range(n_turns):
        text = " ".join(WORDS[(number + k) % 4] for k in range(1 + (number + turn) % 3))
        mark = "<image>\n" * marks.count(turn) if marks else ""
        messages += say("user", f"{mark}{number} {text}?", "assistant", f"{text} {turn}")
    return messages


def write_chats(folder, tokenizer, chats, n_images=()):
    """The split train of a data folder; image k of chat i has the grey 10 * i + k."""
    items = [(messages, [encoded(Image.new("RGB", (8, 8), (10 * i + k,) * 3))
                         for k in range(n_images[i] if n_images else 0)])
             for i, messages in enumerate(chats)]
    counts = writers.write_chats(folder / "train", tokenizer, items)
    write_manifest(folder, "images", tokenizer, **counts)
    return Chats(folder, "train")


def flat(lists):
    return [number for part in lists for number in part]


@pytest.fixture
def numbers(tmp_path):
    """A Text of two shards, 23 windows of 4 ids: window i begins with the id 4 * i."""
    np.save(tmp_path / "a_train_0.npy", np.arange(4 * 9 + 1, dtype=np.uint16))
    np.save(tmp_path / "a_train_1.npy", np.arange(4 * 9, 4 * 24, dtype=np.uint16))
    return Text(tmp_path, "train", 4, 128)


def rows_read(loader, step):
    """The windows of a step's batches, by micro-batch."""
    return [(batch.ids[:, 0] // 4).tolist() for batch in loader.step(step)]


def test_every_epoch_reads_each_row_once_in_an_order_of_seed_and_step_alone(numbers):
    """So resuming at step 7 needs no state."""
    loader, later, other = (Loader(numbers, 6, 3, machine(), seed=seed) for seed in (1, 1, 2))
    steps = [rows_read(loader, step) for step in range(23)]  # 6 epochs of 23 rows
    assert [rows_read(later, step) for step in range(7, 23)] == steps[7:]
    assert [rows_read(other, step) for step in range(23)] != steps
    read = flat(flat(steps))
    epochs = [tuple(read[i : i + 23]) for i in range(0, len(read), 23)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len(set(epochs)) == 6 and tuple(range(23)) not in epochs


def test_shuffle_is_a_permutation_and_uniform_over_seeds():
    """Chi-squared of 8 numbers at 8 places over 1,000 seeds."""
    for n in (1, 2, 3, 7, 64, 65, 1000, 4097):
        assert sorted(shuffled(np.arange(n), n, seed=3)) == list(range(n))
    n, draws = 8, 1000
    counts = np.zeros((n, n))
    for seed in range(draws):
        counts[np.arange(n), shuffled(np.arange(n), n, seed)] += 1
    chi_squared = ((counts - draws / n) ** 2 / (draws / n)).sum()
    freedom = (n - 1) ** 2
    assert abs(chi_squared - freedom) < 5 * np.sqrt(2 * freedom)


def test_shards_being_downloaded_are_read_in_doubling_groups(tmp_path):
    """So that the first steps need the first shard alone."""
    write_json(tmp_path / "shards.json", seal({"files": [
        {"name": f"a_train_{i}.npy", "size": 128 + 2 * (4 * 6 + 1), "sha256": ""}
        for i in range(7)]}))
    loader = Loader(Text(tmp_path, "train", 4, 2**16), 6, 6, machine(), seed=5)
    shards = [set((loader.rows_of(step) // 6).tolist()) for step in range(7)]
    assert shards[:2] == [{0}, {1}]
    assert set().union(*shards[2:4]) == {2, 3} and set().union(*shards[4:]) == {4, 5, 6}
    assert sorted(flat(loader.rows_of(step).tolist() for step in range(7))) == list(range(42))


@pytest.mark.parametrize("coming", [False, True])
def test_no_shard_is_in_two_splits(coming, tmp_path):
    names = ["pretrain_val_000.npy", "train_medieval_001.npy"]
    for name in names:
        np.save(tmp_path / name, np.arange(20, dtype=np.uint16))
    if coming:
        write_json(tmp_path / "shards.json", seal({"files": [
            {"name": f"pretrain/{name}", "size": 168, "sha256": ""} for name in names]}))
    found = [Text(tmp_path, split, 4, 128).paths for split in ("val", "train")]
    assert [[path.name for path in paths] for paths in found] == [names[:1], names[1:]]
    if not coming:
        np.save(tmp_path / "train_val_0.npy", np.arange(20, dtype=np.uint16))
        with pytest.raises(UserError, match=r"train_val_0\.npy has the words of two splits, train"):
            Text(tmp_path, "train", 4, 128)


def test_memory_does_not_grow_with_the_tokens_read(tmp_path):
    """Sparse shards; the windows read after step 1 cover at least 60 MB of pages."""
    for shard in range(20):
        header = {"descr": "<u2", "fortran_order": False, "shape": (10**8,)}
        with open(tmp_path / f"a_train_{shard:02d}.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + 2 * 10**8)
    program = f"""
import resource, sys
from data import Text
from train.loader import Loader
sys.path.insert(0, 'tests')
from test_data import machine
loader = Loader(Text({str(tmp_path)!r}, "train", 2048, 50304), 512, 64, machine(), seed=0)
for step in range(16):
    for batch in loader.step(step):
        pass
    if step in (1, 15):
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                            env=environment, check=True)
    early, late = map(float, result.stdout.split())
    assert late < early + 20, f"{early:.0f} MB, then {late:.0f} MB"


@pytest.mark.parametrize(("ranks", "micro_rows"), [(1, 4), (2, 6), (2, 2), (3, 4), (4, 1)])
def test_any_number_of_processes_reads_the_same_rows(numbers, ranks, micro_rows):
    alone = Loader(numbers, 12, 12, machine(), seed=1)
    loaders = [Loader(numbers, 12, micro_rows, machine(rank, ranks), 1) for rank in range(ranks)]
    for step in range(5):
        (expected,) = rows_read(alone, step)
        parts = [rows_read(loader, step) for loader in loaders]
        assert {len(micro) for part in parts for micro in part} == {min(micro_rows, 12 // ranks)}
        assert sorted(flat(flat(parts))) == sorted(expected)


def test_micro_batches_know_the_targets_of_the_complete_step(tokenizer, tmp_path):
    packed = Packed([write_chats(tmp_path, tokenizer, map(chat_of, range(40)))], 64, tokenizer)
    loaders = [Loader(packed, 4, 1, machine(rank, 2), seed=0) for rank in range(2)]
    for step in range(3):
        batches = [batch for loader in loaders for batch in loader.step(step)]
        assert {batch.n_targets for batch in batches} == {sum(len(b.targets) for b in batches)}
        assert [batch.is_last for batch in batches] == [False, True] * 2


def test_validation_loss_is_the_mean_over_the_same_first_rows(numbers):
    """Each row counts the same, also in a last batch that is shorter."""
    def mean_id(rows):
        return validation_loss(machine(), numbers, rows, lambda batch: batch.targets.sum(), 10)
    expected = np.mean([numbers.window(i)[1:] for i in range(10)])
    assert [mean_id(n) for n in (10, 4, 3)] == pytest.approx([expected] * 3)


def test_windows_contain_every_token_as_a_target_once(tokenizer, tmp_path):
    documents = [f"{WORDS[i % 4]} {i}" for i in range(50)]
    stream = [i for text in documents for i in (tokenizer.end_of_text, *tokenizer.encode(text))]
    n = write_shards(tmp_path, "train", [stream])
    text = Text(tmp_path, "train", 8, tokenizer.n_vocab)
    batch = text.batch(range(len(text)))
    assert n == len(stream) and len(text) == (n - 1) // 8
    assert batch.ids.flatten().tolist() == stream[: 8 * len(text)]
    assert batch.targets.flatten().tolist() == stream[1 : 8 * len(text) + 1]


def test_documents_among_chats_are_supervised_to_the_last_token(tokenizer, tmp_path):
    tokens = np.arange(60, dtype=np.uint16)
    np.save(tmp_path / "a_train_0.npy", tokens)
    packed = Packed([Documents(tmp_path, "train", 10, tokenizer)], 24, tokenizer)
    batch = packed.batch([*range(len(packed))])
    assert sorted(batch.targets.tolist()) == tokens[1:51].tolist()
    assert (batch.ids.flatten()[batch.where] + 1).equal(batch.targets)
    assert packed.left_out == packed.chats["truncated"].sum() == 0


@pytest.mark.parametrize(("typical", "spread"), [(60, 0.8), (200, 0.6), (300, 0.9)])
def test_packing_is_seeded_keeps_all_chats_mixes_them_and_fills_97_percent(typical, spread):
    """5,000 chats, more than a window, with log-normal lengths in rows of 1,024."""
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(np.log(typical), spread, 5000).astype(int).clip(1, 1024).tolist()
    rows = pack(lengths, 1024, seed=3)
    assert sorted(flat(rows)) == list(range(5000))
    sums = [sum(lengths[c] for c in row) for row in rows]
    assert max(sums) <= 1024 and sum(sums) / (1024 * len(rows)) >= 0.97
    assert rows == pack(lengths, 1024, seed=3) != pack(lengths, 1024, seed=4)
    assert all(max(row) - min(row) > 20 for row in rows if len(row) > 5)  # mixed


def unpacked(batch):
    """The chats of a batch as (input ids, positions, {position: target})."""
    T = batch.ids.size(1)
    targets = dict(zip(batch.where.tolist(), batch.targets.tolist(), strict=True))
    assert len(targets) == len(batch.where)  # no position twice
    found = []
    for row, segments in enumerate(batch.segments):
        for number in range(1, int(segments.max()) + 1):
            (places,) = (segments == number).nonzero(as_tuple=True)
            own = {t: targets.pop(row * T + place) for t, place in enumerate(places.tolist())
                   if row * T + place in targets}
            found.append((batch.ids[row, places].tolist(), batch.positions[row, places].tolist(),
                          own))
    assert not targets  # none is in the padding
    return found


def targets_of(chat):
    """{position: the supervised id after it} of a Rendered."""
    return {i - 1: chat.ids[i] for i in range(1, len(chat.ids)) if chat.supervised[i]}


def test_targets_are_exactly_the_answers(tokenizer, tmp_path):
    """Against the chats as rendered one by one: ids, positions from 0, targets and their places."""
    chats = [chat_of(i, 1 + i % 3) for i in range(60)]
    packed = Packed([write_chats(tmp_path, tokenizer, chats)], 160, tokenizer)
    assert packed.left_out == 0 and packed.n_targets([0, 1]) == len(packed.batch([0, 1]).targets)
    rendered = {tuple((chat := render(tokenizer, messages)).ids[:-1]): chat for messages in chats}
    seen = Counter()
    for start in range(0, len(packed), 3):
        batch = packed.batch(range(start, min(start + 3, len(packed))))
        for ids, positions, targets in unpacked(batch):
            assert positions == list(range(len(ids)))
            assert targets == targets_of(rendered[tuple(ids)])
            seen[tuple(ids)] += 1
        assert set(batch.ids[batch.segments == 0].tolist()) <= {tokenizer.end_of_text}
    assert seen == Counter(rendered.keys())


def test_long_chats_are_truncated_after_the_last_answer_that_fits(tokenizer, tmp_path):
    chat = chat_of(1, n_turns=3)
    complete, two = render(tokenizer, chat), render(tokenizer, chat[:4])
    chats = write_chats(tmp_path, tokenizer, [chat])
    for T, expected in ((len(complete.ids) - 1, complete), (len(complete.ids) - 2, two),
                        (len(two.ids) - 1, two)):
        packed = Packed([chats], T, tokenizer)
        ((ids, _, targets),) = unpacked(packed.batch([0]))
        assert ids == expected.ids[:-1] and targets == targets_of(expected)
        assert targets[len(ids) - 1] == tokenizer.end and packed.left_out == 0


def test_chats_without_an_answer_that_fits_are_left_out(tokenizer, tmp_path):
    first = len(render(tokenizer, chat_of(2)).ids)
    chats = write_chats(tmp_path, tokenizer, [chat_of(2), chat_of(3), chat_of(2)[:1]])
    assert len(render(tokenizer, chat_of(3)).ids) < first
    packed = Packed([chats], first - 2, tokenizer)
    assert len(packed) == 1 and packed.left_out == 2 and "2 left out" in packed.note()


def test_a_share_is_seeded_and_repeats_chats_where_they_are_too_few(tokenizer, tmp_path):
    chats = write_chats(tmp_path, tokenizer, map(chat_of, range(10)))

    def drawn(count, seed):
        share = Share(chats, count, seed)
        return [tuple(share.chat(i)[0].tolist()) for i in range(len(share))]

    assert drawn(6, 1) == drawn(6, 1) != drawn(6, 2) and len(set(drawn(6, 1))) == 6
    assert sorted(Counter(drawn(25, 1)).values()) == [2] * 5 + [3] * 5
    assert drawn(0, 1) == []


def test_image_positions_are_the_patches_of_their_images(tokenizer, tmp_path):
    """Chats with no, one and two images, mixed with chats of a text-only source."""
    P, counts = 4, [i % 3 for i in range(12)]
    chats = [chat_of(i, 1 + i % 2, (0,) * counts[i] if i % 2 else ()) for i in range(12)]
    sources = [write_chats(tmp_path / "images", tokenizer, chats, counts),
               write_chats(tmp_path / "texts", tokenizer, map(chat_of, range(20, 26)))]
    packed = Packed(sources, 128, tokenizer, ImageSpec(P, 8))
    greys = {}  # the ids of a chat, one for each patch -> the greys of its images
    for i, messages in enumerate(chats):
        ids = render(tokenizer, messages, counts[i]).ids[:-1]
        expanded = flat([id] * (P if id == tokenizer.image else 1) for id in ids)
        greys[tuple(expanded)] = [10 * i + k for k in range(counts[i])]
    batch = packed.batch(range(len(packed)))
    is_image = batch.ids.flatten() == tokenizer.image
    assert batch.pixels.shape == (sum(counts), 8, 8, 3)
    assert sorted(batch.image_positions.tolist()) == is_image.nonzero()[:, 0].tolist()
    expected = flat(greys.get(tuple(ids), []) for ids, *_ in unpacked(batch))
    assert batch.pixels[:, 0, 0, 0].tolist() == expected
    by_image = batch.image_positions.view(-1, P)
    assert (by_image.diff(dim=1) == 1).all() and (by_image[:, 0].diff() > 0).all()
    assert {tuple(ids) for ids, *_ in unpacked(batch)} >= greys.keys()
    assert packed.n_targets(range(len(packed))) == len(batch.targets)


def test_targets_are_counted_as_they_are_in_the_loss(tokenizer, tmp_path):
    """Also where a supervised image id is repeated for each patch."""
    chats = write_chats(tmp_path, tokenizer, map(chat_of, range(9), [1] * 9, [(0,)] * 9), [1] * 9)
    supervised = np.ones_like(chats.supervised)
    chats.supervised = supervised
    packed = Packed([chats], 128, tokenizer, ImageSpec(4, 8))
    assert [packed.n_targets([row]) for row in range(len(packed))] == [
        len(packed.batch([row]).targets) for row in range(len(packed))]


def test_an_image_takes_a_position_for_each_patch_unless_it_is_truncated(tokenizer, tmp_path):
    chats = write_chats(tmp_path, tokenizer, [chat_of(3)], [1])
    n = len(render(tokenizer, chat_of(3), 1).ids) - 1 + 63
    assert len(Packed([chats], n, tokenizer, ImageSpec(64, 8))) == 1
    with pytest.raises(UserError, match=r"of 1 chats none fits --context.* image alone takes 64"):
        Packed([chats], n - 1, tokenizer, ImageSpec(64, 8))
    messages = chat_of(1, n_turns=2, marks=(0, 1))
    chats = write_chats(tmp_path / "two", tokenizer, [messages], [2])
    T = len(render(tokenizer, messages[:2], 1).ids) + 4
    batch = Packed([chats], T, tokenizer, ImageSpec(4, 8)).batch([0])
    assert batch.pixels[:, 0, 0, 0].tolist() == [0] and len(batch.image_positions) == 4


def test_captions_are_first_answers_truncated_and_equal_ones_share_a_key(tokenizer, tmp_path):
    texts = ["a cat", "a dog saw it", "a cat", "no"]
    chats = [[*say("user", f"What is {i}?", "assistant", text), *chat_of(i)]
             for i, text in enumerate(texts)]
    chats = write_chats(tmp_path, tokenizer, chats, [1, 1, 1, 0])
    captions = Captions(chats, tokenizer, ImageSpec(1, 8), 16)
    batch = captions.batch(range(len(captions)))  # the last has no image
    assert [tokenizer.decode(ids).split("<|end|>")[0] for ids in batch.ids.tolist()] == [
        f"<|endoftext|>{text}" for text in texts[:3]]
    assert (batch.ids == tokenizer.end).any(-1).all() and batch.ids.shape == (3, 8)
    assert batch.keys[0] == batch.keys[2] != batch.keys[1]
    assert batch.pixels[:, 0, 0, 0].tolist() == [0, 10, 20]
    (ids,) = Captions(chats, tokenizer, ImageSpec(1, 8), context=5).batch([1]).ids.tolist()
    assert len(ids) == 5 and ids[-1] == tokenizer.end and ids.count(tokenizer.end) == 1


def resave(convert):
    return lambda path: np.save(path, convert(np.load(path)))


@pytest.mark.parametrize("spoil", [
    lambda path: path.write_bytes(path.read_bytes()[:-10]),
    lambda path: path.write_bytes(b"not numpy at all"),
    resave(lambda a: a.astype(np.float32)), resave(lambda a: a.reshape(1, -1)),
    resave(lambda a: np.array([print, None])),
], ids=["truncated", "text", "floats", "2-D", "objects"])
@pytest.mark.parametrize("file", ["train_000000.npy", "train/ids.npy", "train/supervised.npy",
                                  "train/offsets.npy", "train/first_image.npy"])
def test_a_malformed_array_is_named(tokenizer, tmp_path, file, spoil):
    write_chats(tmp_path, tokenizer, [chat_of(0), chat_of(1)], [1, 1])
    write_shards(tmp_path, "train", [tokenizer.encode(text) for text in WORDS * 5])
    spoil(tmp_path / file)
    with pytest.raises(UserError, match=rf"{file} (is not a complete .npy file|holds .*expected)"):
        if "/" in file:
            Chats(tmp_path, "train")
        else:
            Text(tmp_path, "train", 8, tokenizer.n_vocab)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    tokens = np.zeros(160_000, np.uint16)
    tokens[8001] = 400
    np.save(tmp_path / "train_0.npy", tokens)
    text = Text(tmp_path, "train", 4, 320)
    with pytest.raises(UserError, match=rf"{tmp_path.name}.* the id 400"):
        text.batch([0, 2000])
    assert text.batch([1]).ids.tolist() == [[0, 0, 0, 0]]
    loader = Loader(text, 40_000 - 1, 40_000, machine(), seed=0)  # by the thread that reads ahead
    with pytest.raises(UserError, match="the id 400"):
        next(loader.step(0))


@pytest.mark.parametrize(("open_data", "message"), [
    (check_tokenizer, "no data folder .*nowhere"),
    (lambda folder: Text(folder, "train", 8, 64), r"nowhere has the word train in"),
    (lambda folder: Chats(folder, "train"), r"nowhere/train/ids\.npy")])
def test_missing_data_is_named(tmp_path, open_data, message):
    with pytest.raises(UserError, match=message):
        open_data(tmp_path / "nowhere")


def test_data_that_cannot_fill_a_step_is_refused(tokenizer, numbers, tmp_path):
    with pytest.raises(UserError, match="6 rows does not divide by 4 processes"):
        Loader(numbers, 6, 1, machine(0, 4), seed=0)
    with pytest.raises(UserError, match=r"\(train\) is empty"):
        Text(tmp_path, "train", 64, 128)
    chats = write_chats(tmp_path / "chats", tokenizer, [chat_of(0)])
    with pytest.raises(UserError, match="no images"):
        Captions(chats, tokenizer, ImageSpec(1, 8), 16)


def test_data_has_the_tokenizer_it_was_made_with(tokenizer, tmp_path):
    write_chats(tmp_path, tokenizer, [chat_of(0)])
    assert check_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    assert check_tokenizer(tmp_path, tokenizer) is tokenizer
    for other in (tokenizers.train(WORDS[:2] * 5, 310), tokenizers.load("gpt2")):
        with pytest.raises(UserError, match=f"{tmp_path.name}.* another tokenizer"):
            check_tokenizer(tmp_path, other)
    (tmp_path / "manifest.json").write_text('{"seconds": 1.0}')  # as that of data/demo
    with pytest.raises(UserError, match=tmp_path.name):
        check_tokenizer(tmp_path)
    (tmp_path / "manifest.json").unlink()  # as in the public token shards
    assert check_tokenizer(tmp_path).name == "gpt2"
    with pytest.raises(UserError, match=f"{tmp_path.name}.*tokenizer"):
        check_tokenizer(tmp_path, tokenizer)
