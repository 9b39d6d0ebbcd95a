"""The claims of prep/toy_images.py: right in every answer, fair, and never a leak."""
import random
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from prep import toy_images

# Patterns for the words of colours, shapes, sizes, places, relations, for names of things, and for
# the statements of yes-or-no questions, "the ring is red" or "the ring red".
C, S, Z = "|".join(toy_images.COLOURS), "|".join(toy_images.SHAPES), "|".join(toy_images.SIZES)
P = "|".join(sorted((place for row in toy_images.PLACES for place in row), key=len, reverse=True))
R = "to the left of|to the right of|above|below"
NOUN = rf"(?:({Z}) )?(?:({C}) )?({S}|thing)(?: ({P}))?"
CLAIMS = {"pair": f"there (?:is )?a ({C}) ({S})", "shape": f"there (?:is )?a ({S})",
          "thing": f"there (?:is )?a ((?:{C}) thing)", "colour": f"(the .+?) (?:is )?({C})",
          "size": f"(the .+?) (?:is )?({Z})", "place": f"(the .+?) (?:is )?({P})",
          "relation": f"(the .+?) (?:is )?({R}) (the .+)"}


def scenes(n, pairs="train", seed=0):
    rng = random.Random(seed)
    return [(rng, toy_images.draw_scene(rng, pairs)) for _ in range(n)]


def meant(scene, text):
    """The things that 'large red circle', 'red thing' or 'thing in the middle' fits."""
    size, colour, shape, place = re.fullmatch(NOUN, text).groups()
    return [t for t in scene.things if size in (None, t.size) and colour in (None, t.colour)
            and shape in ("thing", t.shape) and place in (None, t.place)]


def the_one(scene, text):
    found = meant(scene, text.removeprefix("the "))
    assert len(found) == 1, f"{text!r} is not one thing"
    return found[0]


def parsed(question):
    """("colour", ("the ring", "red")) of "Is the ring red?", with or without "it true that"."""
    question = question.replace(" an ", " a ")
    for kind, pattern in CLAIMS.items():
        if found := re.fullmatch(rf"Is (?:it true that )?{pattern}\?", question):
            return kind, found.groups()
    raise AssertionError(question)


def is_true(scene, kind, words):
    """Our own reading of a yes-or-no question."""
    if kind in ("pair", "shape", "thing"):
        return bool(meant(scene, " ".join(words)))
    thing = the_one(scene, words[0])
    if kind != "relation":
        return words[1] in (thing.colour, thing.size, thing.place)
    other = the_one(scene, words[2])
    true = {"to the left of": thing.column < other.column, "above": thing.row < other.row,
            "to the right of": thing.column > other.column, "below": thing.row > other.row}
    return true[words[1]]


def test_questions_differ_and_held_out_pairs_are_never_drawn_or_named_in_training():
    assert sorted(shape for _, shape in toy_images.HELD_OUT) == sorted(toy_images.SHAPES)
    assert len({colour for colour, _ in toy_images.HELD_OUT}) == len(toy_images.HELD_OUT)
    for rng, scene in scenes(5000):
        chat = toy_images.conversation(rng, scene, 6)
        assert [m["role"] for m in chat] == ["user", "assistant"] * 6
        assert len({m["content"] for m in chat[::2]}) == 6
        text = " ".join([toy_images.caption(rng, scene), *(m["content"] for m in chat)]).lower()
        named = set(re.findall(rf"\b({C}) ({S})", text)) | {thing.pair for thing in scene.things}
        named |= {(c, s) for s, c in re.findall(rf"\b({S}) (?:is )?({C})\b", text)}
        assert not named & toy_images.HELD_OUT, text
    for _, scene in scenes(500, "held_out"):
        assert toy_images.HELD_OUT & {thing.pair for thing in scene.things}


def test_things_differ_keep_to_their_places_and_are_painted_in_their_colours():
    def distance(one, other):
        return np.abs(np.subtract(one, other)).sum()

    for _, scene in scenes(500, "any"):
        image, things = toy_images.paint(scene), scene.things
        assert image.size == (64, 64) and image.mode == "RGB"
        assert len({t.pair for t in things}) == len(things)
        assert len({(t.row, t.column) for t in things}) == len(things)
        assert list(things) == sorted(things, key=lambda t: (t.row, t.column))
        for thing in things:
            x, y, r = toy_images.circle_of(thing, 64)
            for middle, index in ((x, thing.column), (y, thing.row)):
                assert index * 64 / 3 <= middle - r < middle + r <= (index + 1) * 64 / 3
            if thing.shape != "ring":  # its middle is a hole
                seen = image.getpixel((int(x), int(y)))
                assert distance(seen, toy_images.COLOURS[thing.colour]) == min(
                    distance(seen, colour) for colour in toy_images.COLOURS.values())
                assert min(distance(seen, ground) for ground in (scene.light, scene.dark)) > 60


def test_captions_are_true_and_name_every_thing():
    full = 0
    for rng, scene in scenes(2000, "any"):
        text = toy_images.caption(rng, scene)
        shapes = sorted(re.findall(rf"\b({S})\b", text))
        assert shapes == sorted(t.shape for t in scene.things), text
        told = sorted(re.findall(rf"({C}) ({S})\b", text))
        assert told in ([], sorted(t.pair for t in scene.things)), text
        places = Counter(re.findall(rf"({P})\b", text, flags=re.I))
        assert {p.lower() for p in places} <= {t.place for t in scene.things}, text
        full += sum(places.values()) == len(re.findall(rf"\b({Z}) ", text)) == len(scene.things)
    assert 0.5 < full / 2000 < 0.7


@pytest.mark.parametrize("pairs", ["train", "held_out", "any"])
@pytest.mark.parametrize("kind", toy_images.FREQUENCIES)
def test_every_kind_fits_every_scene_and_every_answer_is_right(kind, pairs):
    for rng, scene in scenes(400, pairs):
        text, answer = toy_images.question(rng, scene, kind)
        name = re.search(rf"\b(the (?:{NOUN}))(?: is\.| small or large\?|\?|\.)$", text)
        if kind == "yes_no":
            assert answer == ("Yes." if is_true(scene, *parsed(text)) else "No."), text
        elif kind == "describe":
            told = re.findall(rf"an? ({Z}) ({C}) ({S}) ({P})(?:, | and |\.)", answer)
            assert told == [(t.size, t.colour, t.shape, t.place) for t in scene.things]
        elif kind == "count":
            what = re.search(rf"(?:({C}|{Z}) )?({S}|thing)(?:e?s)\b", text).group(0)
            one = re.sub("(?<=s)es$|s$", "", what)
            n = toy_images.NUMBERS[len(meant(scene, one))]
            assert answer == (f"There is one {one}." if n == "one" else f"There are {n} {what}.")
        else:
            place = re.fullmatch(rf"What is ({P})\?", text)
            thing = the_one(scene, f"the thing {place[1]}" if place else name[1])
            subject = f"The {thing.shape}" if name and thing.shape in name[1] else "It"
            assert answer == {"colour": f"{subject} is {thing.colour}.",
                              "shape": f"It is a {thing.shape}.", "size": f"It is {thing.size}.",
                              "where": f"It is {thing.place}."}[kind], text


def test_yes_and_no_are_equally_likely_and_the_words_do_not_tell():
    by_kind, by_word = defaultdict(list), defaultdict(list)
    for rng, scene in scenes(40000):
        text, answer = toy_images.question(rng, scene, "yes_no")
        kind, words = parsed(text)
        by_kind[kind].append(answer == "Yes.")
        for word in words[1:2] if words[0].startswith("the ") else words:
            by_word[kind, word].append(answer == "Yes.")
    assert by_kind.keys() == CLAIMS.keys()
    for limit, groups in (0.03, by_kind), (0.10, by_word):
        for key, truths in groups.items():
            assert abs(sum(truths) / len(truths) - 0.5) < limit, key
