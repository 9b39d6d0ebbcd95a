"""The claims of prep/toy_images.py: the same from a seed, right in every answer, fair, and never a
leak."""
import random
import re
from collections import Counter

import pytest

from prep import toy_images

# Patterns for the words of colours, shapes, sizes, places, relations, and for names of things.
C, S, Z = "|".join(toy_images.COLOURS), "|".join(toy_images.SHAPES), "|".join(toy_images.SIZES)
P = "|".join(sorted((place for row in toy_images.PLACES for place in row), key=len, reverse=True))
R = "to the left of|to the right of|above|below"
NOUN = rf"(?:({Z}) )?(?:({C}) )?({S}|thing)(?: ({P}))?"
WORDS = ["no", "one", "two", "three"]
PAIRS = ("train", "held_out", "any")


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


def is_true(scene, claim):
    """Our own reading of 'there is a red ring', 'the ring is red', 'the ring is above the star'."""
    claim = claim.replace(" an ", " a ")
    if claim.startswith("there is a "):
        return bool(meant(scene, claim.removeprefix("there is a ")))
    subject, rest = re.fullmatch(rf"(the {NOUN}) is (.+)", claim).group(1, 6)
    thing = the_one(scene, subject)
    relation = re.fullmatch(rf"({R}) (the .+)", rest)
    if not relation:
        return rest in (thing.colour, thing.size, thing.place)
    other = the_one(scene, relation[2])
    return {"to the left of": thing.column < other.column, "above": thing.row < other.row,
            "to the right of": thing.column > other.column,
            "below": thing.row > other.row}[relation[1]]


def claim_of(question):
    """'Is the ring red?' and 'Is it true that the ring is red?' -> 'the ring is red'."""
    if found := re.fullmatch(r"Is it true that (.+)\?", question):
        return found[1]
    if found := re.fullmatch(r"Is there (.+)\?", question):
        return f"there is {found[1]}"
    subject, rest = re.fullmatch(
        rf"Is (the thing (?:{P})|the (?:(?:{Z}|{C}) )*(?:{S}|thing)) (.+)\?", question).groups()
    return f"{subject} is {rest}"


def sub_kind(claim):
    claim = re.sub(r"\ban\b", "a", claim)
    for name, pattern in {"pair": f"there is a ({C}) ({S})", "a shape": f"there is a ({S})",
                          "a colour": f"there is a ({C}) thing", "colour": f".* is ({C})",
                          "size": f".* is ({Z})", "place": f".* is ({P})",
                          "relation": rf".* is ({R}) .*"}.items():
        if found := re.fullmatch(pattern, claim):
            return name, found.groups()
    raise AssertionError(claim)


def all_text(rng, scene):
    chat = toy_images.conversation(rng, scene, 4)
    return " ".join([toy_images.caption(rng, scene)] + [m["content"] for m in chat])


def test_held_out_pairs_are_never_drawn_or_named_in_training():
    assert sorted(shape for _, shape in toy_images.HELD_OUT) == sorted(toy_images.SHAPES)
    assert len({colour for colour, _ in toy_images.HELD_OUT}) == len(toy_images.HELD_OUT)
    for rng, scene in scenes(5000):
        text = all_text(rng, scene).lower()
        named = set(re.findall(rf"\b({C}) ({S})", text))
        named |= {(c, s) for s, c in re.findall(rf"\b({S}) (?:is )?({C})\b", text)}
        named |= {thing.pair for thing in scene.things}
        assert not named & toy_images.HELD_OUT, text


def test_held_out_scenes_show_a_held_out_pair():
    for _, scene in scenes(500, "held_out"):
        assert toy_images.HELD_OUT & {t.pair for t in scene.things}


def test_things_differ_and_keep_to_their_own_places():
    for size in (64, 224):
        for _, scene in scenes(1000, "any"):
            assert len({t.pair for t in scene.things}) == len(scene.things)
            assert len({(t.row, t.column) for t in scene.things}) == len(scene.things)
            assert list(scene.things) == sorted(scene.things, key=lambda t: (t.row, t.column))
            for thing in scene.things:
                x, y, r = toy_images.circle_of(thing, size)
                for middle, index in ((x, thing.column), (y, thing.row)):
                    assert index * size / 3 <= middle - r < middle + r <= (index + 1) * size / 3


def test_things_are_painted_in_their_colours_and_stand_out():
    for _, scene in scenes(300, "any"):
        image = toy_images.paint(scene)
        assert image.size == (64, 64) and image.mode == "RGB"
        for thing in scene.things:
            if thing.shape == "ring":
                continue  # its middle is a hole
            x, y, _ = toy_images.circle_of(thing, 64)
            seen = image.getpixel((int(x), int(y)))
            nearest = min(toy_images.COLOURS, key=lambda c: sum(
                (a - b) ** 2 for a, b in zip(toy_images.COLOURS[c], seen, strict=True)))
            assert nearest == thing.colour
            for ground in (scene.light, scene.dark):
                assert sum(abs(a - b) for a, b in zip(ground, seen, strict=True)) > 60


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


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("kind", toy_images.QUESTION_KINDS)
def test_every_kind_fits_every_scene_and_every_answer_is_right(kind, pairs):
    for rng, scene in scenes(400, pairs):
        text, answer = toy_images.question(rng, scene, kind)
        name = re.search(rf"\b(the (?:{NOUN}))(?: is\.| small or large\?|\?|\.)$", text)
        if kind == "yes_no":
            assert answer == ("Yes." if is_true(scene, claim_of(text)) else "No."), text
        elif kind == "describe":
            told = re.findall(rf"an? ({Z}) ({C}) ({S}) ({P})(?:, | and |\.)", answer)
            assert told == [(t.size, t.colour, t.shape, t.place) for t in scene.things]
        elif kind == "count":
            what = re.search(rf"(?:({C}|{Z}) )?({S}|thing)(?:e?s)\b", text).group(0)
            n = len(meant(scene, re.sub("(?<=s)es$|s$", "", what)))
            what = what if n != 1 else re.sub("(?<=s)es$|s$", "", what)
            assert answer == f"There {'is' if n == 1 else 'are'} {WORDS[n]} {what}."
        else:
            place = re.fullmatch(rf"What is ({P})\?", text)
            thing = the_one(scene, f"the thing {place[1]}" if place else name[1])
            subject = f"The {thing.shape}" if name and thing.shape in name[1] else "It"
            assert answer == {"colour": f"{subject} is {thing.colour}.",
                              "shape": f"It is a {thing.shape}.", "size": f"It is {thing.size}.",
                              "where": f"It is {thing.place}."}[kind], text


def test_yes_and_no_are_equally_likely_and_the_words_do_not_tell():
    answers, by_kind, by_word = Counter(), {}, {}
    for rng, scene in scenes(40000):
        text, answer = toy_images.question(rng, scene, "yes_no")
        name, words = sub_kind(claim_of(text))
        answers[answer] += 1
        by_kind.setdefault(name, []).append(answer == "Yes.")
        for word in words:
            by_word.setdefault((name, word), []).append(answer == "Yes.")
    assert abs(answers["Yes."] / 40000 - 0.5) < 0.03
    assert len(by_kind) == 7
    for name, truths in by_kind.items():
        assert abs(sum(truths) / len(truths) - 0.5) < 0.03, name
    for key, truths in by_word.items():
        assert abs(sum(truths) / len(truths) - 0.5) < 0.10, key


def test_conversations_ask_different_questions_of_all_kinds():
    for rng, scene in scenes(500):
        chat = toy_images.conversation(rng, scene, 6)
        assert [m["role"] for m in chat] == ["user", "assistant"] * 6
        assert len({m["content"] for m in chat[::2]}) == 6
