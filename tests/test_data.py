"""The claims of data.py: every row once an epoch, no chat lost, exactly the answers learnt."""

import io
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import tokenizer as tokenizers
from common.checkpoint import write_json
from common.config import UserError
from common.device import Machine
from data import Chats, Documents, ImageSpec, Share, Text, check_tokenizer
from prep.writers import ChatWriter, write_manifest, write_text
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


def chat_of(number, n_turns=1):
    """A chat that is unlike the chats of other numbers."""
    messages = []
    for turn in range(n_turns):
        text = " ".join(WORDS[(number + k) % 4] for k in range(1 + (number + turn) % 3))
        messages += [{"role": "user", "content": f"{number} {text}?"},
                     {"role": "assistant", "content": f"{text} {turn}"}]
    return messages


def painted(shade):
    """The bytes of a small picture all of one grey."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


def write_chats(folder, tokenizer, chats, shades=()):
    """The split train of a data folder; chat i has shades[i] pictures, of the greys 10 * i + k."""
    writer = ChatWriter(folder / "train", tokenizer)
    for i, messages in enumerate(chats):
        n = shades[i] if shades else 0
        writer.add(messages, [painted(10 * i + k) for k in range(n)])
    write_manifest(folder, tokenizer, **writer.close())
    return Chats(folder, "train")


# ------------------------------------------------------------------------------------ order of rows


@pytest.fixture
def numbers(tmp_path):
    """A Text of two shards, 23 windows of 4 ids: window i begins with the id 4 * i."""
    np.save(tmp_path / "a_train_0.npy", np.arange(4 * 9 + 1, dtype=np.uint16))
    np.save(tmp_path / "a_train_1.npy", np.arange(4 * 9, 4 * 24, dtype=np.uint16))
    return Text(tmp_path, "train", 4, 128)


def rows_read(loader, step):
    """The numbers of the windows in a step's batches, micro-batch by micro-batch."""
    return [(batch.ids[:, 0] // 4).tolist() for batch in loader.step(step)]


def flat(lists):
    return [number for some in lists for number in some]


def test_every_row_is_read_once_an_epoch_and_each_epoch_has_its_own_order(numbers):
    loader = Loader(numbers, 6, 3, machine(), seed=1)
    read = flat(flat(rows_read(loader, step)) for step in range(23))  # 6 epochs of 23 rows
    epochs = [tuple(read[i : i + 23]) for i in range(0, len(read), 23)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len(set(epochs)) == 6 and tuple(range(23)) not in epochs


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_a_shuffle_holds_every_number_once(n):
    assert sorted(shuffled(np.arange(n), n, seed=3)) == list(range(n))


def test_a_shuffle_is_even_and_another_for_every_seed():
    """Each of 20 numbers comes to each of 20 places alike: chi-squared over 4,000 seeds."""
    n, draws = 20, 4000
    counts = np.zeros((n, n))
    for seed in range(draws):
        counts[np.arange(n), shuffled(np.arange(n), n, seed)] += 1
    expected = draws / n
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    freedom = (n - 1) ** 2
    assert abs(chi_squared - freedom) < 5 * np.sqrt(2 * freedom)


def test_neighbours_are_strangers_after_a_shuffle():
    found = shuffled(np.arange(10**5), 10**7, seed=0)  # of 10 B tokens, say
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.02
    assert abs(found.mean() / 10**7 - 0.5) < 0.01


def test_shards_to_come_are_read_in_doubling_groups(tmp_path):
    """So that the first steps need the first shard alone; and nothing is read twice."""
    tokens = [4 * 6 + 1] * 7
    write_json(tmp_path / "shards.json", {"files": [
        {"name": f"a_train_{i}.npy", "size": 128 + 2 * n, "sha256": ""}
        for i, n in enumerate(tokens)]})
    text = Text(tmp_path, "train", 4, 2**16)
    loader = Loader(text, 6, 6, machine(), seed=5)
    shards = [set((loader.rows_of(step) // 6).tolist()) for step in range(7)]
    assert shards[:2] == [{0}, {1}]
    assert set().union(*shards[2:4]) == {2, 3} and set().union(*shards[4:]) == {4, 5, 6}
    assert sorted(flat(loader.rows_of(step).tolist() for step in range(7))) == list(range(42))


def test_memory_does_not_grow_with_what_was_read(tmp_path):
    """10 B tokens in sparse files: a process that read them all would need 20 GB."""
    for shard in range(100):
        header = {"descr": "<u2", "fortran_order": False, "shape": (10**8,)}
        with open(tmp_path / f"a_train_{shard:02d}.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + 2 * 10**8)
    program = f"""
import resource, sys
import torch
from data import Text
from train.loader import Loader
sys.path.insert(0, 'tests')
from test_data import machine
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
loader = Loader(Text({str(tmp_path)!r}, "train", 1024, 50304), 512, 64, machine(), seed=0)
for step in (*range(3), *range(18_000, 18_030)):
    for batch in loader.step(step):
        pass
    if step == 2:
        early = peak()
print(len(loader.dataset) * 1024, early, peak())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                            env=environment, check=True)
    tokens, early, late = map(float, result.stdout.split())
    assert tokens > 9.99e9
    assert late < early + 20, f"{early:.0f} MB, then {late:.0f} MB"


def test_the_rows_of_a_step_depend_on_seed_and_step_alone(numbers):
    """So that a run that goes on at step 7 needs to remember nothing."""
    loader = Loader(numbers, 6, 3, machine(), seed=1)
    whole = [rows_read(loader, step) for step in range(12)]
    late = Loader(numbers, 6, 3, machine(), seed=1)
    assert [rows_read(late, step) for step in range(7, 12)] == whole[7:]
    other = Loader(numbers, 6, 3, machine(), seed=2)
    assert [rows_read(other, step) for step in range(12)] != whole


@pytest.mark.parametrize(("ranks", "micro_rows"), [(1, 4), (2, 6), (2, 2), (3, 4), (4, 1)])
def test_any_number_of_processes_reads_the_same_rows(numbers, ranks, micro_rows):
    alone = Loader(numbers, 12, 12, machine(), seed=1)
    shares = [Loader(numbers, 12, micro_rows, machine(rank, ranks), seed=1)
              for rank in range(ranks)]
    for step in range(5):
        (everyone,) = rows_read(alone, step)
        parts = [rows_read(loader, step) for loader in shares]
        assert {len(micro) for part in parts for micro in part} == {min(micro_rows, 12 // ranks)}
        assert sorted(flat(flat(parts))) == sorted(everyone)


def test_each_micro_batch_knows_how_much_the_whole_step_learns(tokenizer, tmp_path):
    packed = Packed([write_chats(tmp_path, tokenizer, map(chat_of, range(40)))], 64, tokenizer)
    shares = [Loader(packed, 4, 1, machine(rank, 2), seed=0) for rank in range(2)]
    for step in range(3):
        batches = [batch for loader in shares for batch in loader.step(step)]
        assert {batch.n_targets for batch in batches} == {sum(len(b.targets) for b in batches)}


def test_rows_that_processes_cannot_share_evenly_are_refused(numbers):
    with pytest.raises(UserError, match="a batch of 6 rows does not divide by 4 processes"):
        Loader(numbers, 6, 1, machine(0, 4), seed=0)


def test_the_validation_loss_is_the_mean_over_the_same_first_rows(numbers):
    """Each row counts alike, also in the last batch, which is shorter."""
    def mean_id(rows):
        return validation_loss(machine(), numbers, rows, lambda b: b.targets.sum(), 10)
    expected = np.mean([numbers.window(i)[1:] for i in range(10)])
    assert [mean_id(n) for n in (10, 4, 3)] == pytest.approx([expected] * 3)


# --------------------------------------------------------------------------------------------- text


def test_windows_learn_every_token_of_a_document_once(tokenizer, tmp_path):
    documents = [f"{WORDS[i % 4]} {i}" for i in range(50)]
    n = write_text(tmp_path, "train", documents, tokenizer)
    stream = [i for text in documents for i in (tokenizer.end_of_text, *tokenizer.encode(text))]
    text = Text(tmp_path, "train", 8, tokenizer.n_vocab)
    batch = text.batch(range(len(text)))
    assert n == len(stream) and len(text) == (n - 1) // 8
    assert batch.ids.flatten().tolist() == stream[: 8 * len(text)]
    assert batch.targets.flatten().tolist() == stream[1 : 8 * len(text) + 1]


def test_shards_hold_all_tokens_in_order(tokenizer, tmp_path):
    documents = WORDS * 10
    n = write_text(tmp_path, "val", documents, tokenizer, shard_tokens=64)
    shards = [np.load(path) for path in sorted(tmp_path.glob("*.npy"))]
    assert len(shards) == -(-n // 64) > 2 and all(len(shard) == 64 for shard in shards[:-1])
    assert tokenizer.decode(np.concatenate(shards)) == "".join(
        f"<|endoftext|>{text}" for text in documents)


# ------------------------------------------------------------------------------------------ packing


@pytest.mark.parametrize(("typical", "spread"), [(60, 0.8), (200, 0.6), (300, 0.9)])
def test_packing_loses_nothing_exceeds_nothing_and_fills_97_percent(typical, spread):
    """4,000 chats, their lengths log-normal about `typical`, in rows of 1,024."""
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(np.log(typical), spread, 4000).astype(int).clip(1, 1024).tolist()
    rows = pack(lengths, 1024, seed=3)
    assert sorted(flat(rows)) == list(range(4000))
    sums = [sum(lengths[c] for c in row) for row in rows]
    assert max(sums) <= 1024 and sum(sums) / (1024 * len(rows)) >= 0.97


def test_packing_is_seeded_and_mixes():
    lengths = [100 + i % 7 for i in range(400)]
    assert pack(lengths, 1024, 1) == pack(lengths, 1024, 1) != pack(lengths, 1024, 2)
    assert all(max(row) - min(row) > 20 for row in pack(lengths, 1024, 1) if len(row) > 5)


def test_packing_more_than_one_window_of_chats_loses_nothing():
    lengths = np.random.default_rng(0).integers(1, 60, 500).tolist()
    rows = pack(lengths, 64, seed=0, window=128)
    assert sorted(flat(rows)) == list(range(500))
    assert max(sum(lengths[c] for c in row) for row in rows) <= 64


def unpacked(batch, packed):
    """The documents of a batch as (input ids, positions, {where in the document: target}, row)."""
    T = batch.ids.size(1)
    targets = dict(zip(batch.where.tolist(), batch.targets.tolist(), strict=True))
    assert len(targets) == len(batch.where)  # no position twice
    found = []
    for row, segments in enumerate(batch.segments):
        for number in range(1, int(segments.max()) + 1):
            (places,) = (segments == number).nonzero(as_tuple=True)
            learnt = {t: targets.pop(row * T + place) for t, place in enumerate(places.tolist())
                      if row * T + place in targets}
            found.append((batch.ids[row, places].tolist(), batch.positions[row, places].tolist(),
                          learnt, row))
    assert not targets  # none lies in the padding
    return found


def learnt_of(chat):
    """{position: the supervised id that follows it} of a Rendered."""
    return {i - 1: chat.ids[i] for i in range(1, len(chat.ids)) if chat.supervised[i]}


def test_a_batch_learns_exactly_the_answers_of_its_chats(tokenizer, tmp_path):
    """Against the chats as rendered, one by one: ids, positions from 0, targets, their places."""
    chats = [chat_of(i, 1 + i % 3) for i in range(60)]
    packed = Packed([write_chats(tmp_path, tokenizer, chats)], 160, tokenizer)
    assert packed.left_out == 0 and packed.n_targets([0, 1]) == len(packed.batch([0, 1]).targets)
    rendered = {tuple((chat := render(tokenizer, messages)).ids[:-1]): chat for messages in chats}
    seen = Counter()
    for start in range(0, len(packed), 3):
        batch = packed.batch(range(start, min(start + 3, len(packed))))
        for ids, positions, learnt, _ in unpacked(batch, packed):
            assert positions == list(range(len(ids)))
            assert learnt == learnt_of(rendered[tuple(ids)])
            seen[tuple(ids)] += 1
        assert set(batch.ids[batch.segments == 0].tolist()) <= {tokenizer.end_of_text}
    assert seen == Counter(rendered.keys())


def test_a_long_chat_is_cut_behind_its_last_answer_that_fits(tokenizer, tmp_path):
    chat = chat_of(1, n_turns=3)
    whole, two = render(tokenizer, chat), render(tokenizer, chat[:4])
    chats = write_chats(tmp_path, tokenizer, [chat])
    for T, expected in ((len(whole.ids) - 1, whole), (len(whole.ids) - 2, two),
                        (len(two.ids) - 1, two)):
        packed = Packed([chats], T, tokenizer)
        ((ids, _, learnt, _),) = unpacked(packed.batch([0]), packed)
        assert ids == expected.ids[:-1] and learnt == learnt_of(expected)
        assert learnt[len(ids) - 1] == tokenizer.end and packed.left_out == 0


def test_a_chat_whose_first_answer_does_not_fit_or_is_not_there_is_left_out(tokenizer, tmp_path):
    first = len(render(tokenizer, chat_of(2)).ids)
    chats = write_chats(tmp_path, tokenizer, [chat_of(2), chat_of(3), chat_of(2)[:1]])
    assert len(render(tokenizer, chat_of(3)).ids) < first
    packed = Packed([chats], first - 2, tokenizer)
    assert len(packed) == 1 and packed.left_out == 2
    assert "2 left out: too long" in packed.notes()[0]


def test_a_share_of_chats_is_seeded_and_goes_round_when_there_are_too_few(tokenizer, tmp_path):
    chats = write_chats(tmp_path, tokenizer, map(chat_of, range(10)))
    def drawn(count, seed):
        share = Share(chats, count, seed)
        return [tuple(share.chat(i)[0].tolist()) for i in range(len(share))]
    assert drawn(6, 1) == drawn(6, 1) != drawn(6, 2) and len(set(drawn(6, 1))) == 6
    assert sorted(Counter(drawn(25, 1)).values()) == [2] * 5 + [3] * 5
    assert drawn(0, 1) == []


# ----------------------------------------------------------------------------------------- pictures


def test_image_slots_are_one_id_a_patch_and_point_at_the_right_picture(tokenizer, tmp_path):
    """Chats with no, one and two pictures, mixed with chats from a source that has none."""
    shades = [i % 3 for i in range(12)]
    chats = [chat_of(i, 1 + i % 2) for i in range(12)]
    for i, messages in enumerate(chats):  # one mark a picture, here and there in the text
        messages[0]["content"] = ("<image>\n" * shades[i] if i % 2 else "") + messages[0]["content"]
    sources = [write_chats(tmp_path / "seen", tokenizer, chats, shades),
               write_chats(tmp_path / "told", tokenizer, map(chat_of, range(20, 26)))]
    P = 4
    packed = Packed(sources, 128, tokenizer, ImageSpec(P, 8))
    shade_of = {}  # the ids of a chat, one for each picture's patch -> the shades of its pictures
    for i, messages in enumerate(chats):
        ids = render(tokenizer, messages, shades[i]).ids[:-1]
        long = flat([id] * (P if id == tokenizer.image else 1) for id in ids)
        shade_of[tuple(long)] = [10 * i + k for k in range(shades[i])]
    batch = packed.batch(range(len(packed)))
    is_image = batch.ids.flatten() == tokenizer.image
    assert len(batch.pixels) == sum(shades) and batch.pixels.shape[1:] == (8, 8, 3)
    assert sorted(batch.image_positions.tolist()) == is_image.nonzero()[:, 0].tolist()
    expected = flat(shade_of.get(tuple(ids), []) for ids, *_ in unpacked(batch, packed))
    assert batch.pixels[:, 0, 0, 0].tolist() == expected
    runs = batch.image_positions.view(-1, P)  # picture by picture, and in order
    assert (runs.diff(dim=1) == 1).all() and (runs[:, 0].diff() > 0).all()
    assert {tuple(ids) for ids, *_ in unpacked(batch, packed)} >= shade_of.keys()


def test_a_picture_counts_as_many_positions_as_it_has_patches(tokenizer, tmp_path):
    messages = chat_of(3)
    chats = write_chats(tmp_path, tokenizer, [messages], [1])
    n = len(render(tokenizer, messages, 1).ids) - 1 + 63
    assert len(Packed([chats], n, tokenizer, ImageSpec(64, 8))) == 1
    with pytest.raises(UserError, match=r"of 1 chats none fits .* an image alone takes 64"):
        Packed([chats], n - 1, tokenizer, ImageSpec(64, 8))


def test_pictures_behind_the_cut_of_a_chat_are_left_out(tokenizer, tmp_path):
    messages = chat_of(1, n_turns=2)
    for turn in (0, 2):
        messages[turn]["content"] = "<image>\n" + messages[turn]["content"]
    chats = write_chats(tmp_path, tokenizer, [messages], [2])
    packed = Packed([chats], len(render(tokenizer, messages[:2], 1).ids) + 4, tokenizer,
                    ImageSpec(4, 8))
    batch = packed.batch([0])
    assert batch.pixels[:, 0, 0, 0].tolist() == [0] and len(batch.image_positions) == 4


def test_captions_are_the_first_answers_and_identical_ones_share_a_key(tokenizer, tmp_path):
    texts = ["a cat", "a dog saw it", "a cat", "no"]
    chats = [[{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": text},
              *chat_of(i)] for i, text in enumerate(texts)]
    chats = write_chats(tmp_path, tokenizer, chats, [1, 1, 1, 0])
    captions = Captions(chats, tokenizer, ImageSpec(1, 8), 16)
    batch = captions.batch(range(len(captions)))  # the last has no picture
    assert [tokenizer.decode(ids).split("<|end|>")[0] for ids in batch.ids.tolist()] == [
        f"<|endoftext|>{text}" for text in texts[:3]]
    assert (batch.ids == tokenizer.end).any(-1).all() and batch.ids.shape == (3, 8)
    assert batch.keys[0] == batch.keys[2] != batch.keys[1]
    assert batch.pixels[:, 0, 0, 0].tolist() == [0, 10, 20]


def test_a_long_caption_is_cut_and_still_ends(tokenizer, tmp_path):
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": WORDS[2] * 9}]
    captions = Captions(write_chats(tmp_path, tokenizer, [chat], [1]), tokenizer,
                        ImageSpec(1, 8), context=12)
    (ids,) = captions.batch([0]).ids.tolist()
    assert len(ids) == 12 and ids[-1] == tokenizer.end and ids.count(tokenizer.end) == 1


def test_clip_cannot_learn_from_chats_without_pictures(tokenizer, tmp_path):
    with pytest.raises(UserError, match="holds no images, so it cannot train CLIP"):
        Captions(write_chats(tmp_path, tokenizer, [chat_of(0)]), tokenizer, ImageSpec(1, 8), 16)


# ----------------------------------------------------------------------------------------- refusals


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def resave(convert):
    return lambda path: np.save(path, convert(np.load(path)))


@pytest.mark.parametrize(("spoil", "complaint"), [
    (cut, "is not a complete .npy file"),
    (lambda path: path.write_bytes(b""), "is not a complete .npy file"),
    (lambda path: path.write_bytes(b"not numpy at all"), "is not a complete .npy file"),
    (resave(lambda a: a.astype(np.float32)), "holds 1-D float32, expected 1-D "),
    (resave(lambda a: a.reshape(1, -1)), "holds 2-D [a-z0-9]+, expected 1-D "),
    (resave(lambda a: np.array([print, None])), "is not a complete .npy file"),
], ids=["cut", "empty", "text", "floats", "2-D", "objects"])
@pytest.mark.parametrize("file", ["train_000000.npy", "train/ids.npy", "train/supervised.npy",
                                  "train/offsets.npy", "train/first_image.npy"])
def test_a_broken_array_is_named(tokenizer, tmp_path, file, spoil, complaint):
    write_chats(tmp_path, tokenizer, [chat_of(0), chat_of(1)], [1, 1])
    write_text(tmp_path, "train", WORDS * 5, tokenizer)
    spoil(tmp_path / file)
    with pytest.raises(UserError, match=rf"{file} {complaint}"):
        if "/" in file:
            Chats(tmp_path, "train")
        else:
            Text(tmp_path, "train", 8, tokenizer.n_vocab)


def test_a_single_id_beyond_the_vocabulary_is_refused_when_it_is_read(tmp_path):
    tokens = np.zeros(160_000, np.uint16)
    tokens[8001] = 400  # not where a first look at the shard falls
    np.save(tmp_path / "train_0.npy", tokens)
    text = Text(tmp_path, "train", 4, 320)
    with pytest.raises(UserError, match="holds the id 400"):
        text.batch([0, 2000])
    assert text.batch([1]).ids.tolist() == [[0, 0, 0, 0]]
    loader = Loader(text, 40_000 - 1, 40_000, machine(), seed=0)  # the thread that reads ahead
    with pytest.raises(UserError, match="holds the id 400"):
        next(loader.step(0))


def test_a_data_set_that_is_not_there_is_named(tmp_path):
    where = tmp_path / "nowhere"
    with pytest.raises(UserError, match=r"there is no data folder .*nowhere; prepare\.py makes it"):
        check_tokenizer(where)
    with pytest.raises(UserError, match=r"no \*train\*\.npy in .*nowhere"):
        Text(where, "train", 8, 64)
    with pytest.raises(UserError, match=r"nowhere/train/ids\.npy"):
        Chats(where, "train")


def test_data_too_short_for_one_row_is_refused(tokenizer, tmp_path):
    write_text(tmp_path, "train", ["no"], tokenizer)
    with pytest.raises(UserError, match=r"the data set .*\(train\) is empty"):
        Loader(Text(tmp_path, "train", 64, tokenizer.n_vocab), 1, 1, machine(), seed=0)


def test_data_remember_their_tokenizer(tokenizer, tmp_path):
    write_chats(tmp_path, tokenizer, [chat_of(0)])
    assert check_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    assert check_tokenizer(tmp_path, tokenizer) is tokenizer


def test_data_of_another_tokenizer_are_refused(tokenizer, tmp_path):
    write_chats(tmp_path, tokenizer, [chat_of(0)])
    other = tokenizers.train(WORDS[:2] * 5, 310)
    for model_has in (other, tokenizers.load("gpt2")):
        with pytest.raises(UserError, match=rf"data in .*{tmp_path.name} was made with another"):
            check_tokenizer(tmp_path, model_has)


def test_shards_without_a_manifest_are_gpt2s(tmp_path):
    assert check_tokenizer(tmp_path).name == "gpt2"


def test_shards_without_a_manifest_are_nobody_elses(tokenizer, tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path.name}.*tokenizer"):
        check_tokenizer(tmp_path, tokenizer)


def test_the_folder_above_several_data_sets_is_refused_with_a_sentence(tmp_path):
    """As data/demo, which has a manifest of its own, and whose text lies in data/demo/text."""
    (tmp_path / "manifest.json").write_text('{"seconds": 1.0}\n', encoding="utf-8")
    with pytest.raises(UserError, match=tmp_path.name):
        check_tokenizer(tmp_path)


def test_plain_text_among_chats_is_learnt_to_its_last_token(tokenizer, tmp_path):
    tokens = np.arange(60, dtype=np.uint16)
    np.save(tmp_path / "a_train_0.npy", tokens)
    packed = Packed([Documents(tmp_path, "train", 10, tokenizer)], 24, tokenizer)
    batch = packed.batch([*range(len(packed))])
    assert sorted(batch.targets.tolist()) == tokens[1:51].tolist()
    assert (batch.ids.flatten()[batch.where] + 1).equal(batch.targets)
    assert packed.left_out == packed.chats["truncated"].sum() == 0
