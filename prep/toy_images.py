"""The toy world: images drawn from a seed, their captions, and questions about them.

An image shows one to three coloured shapes on a grid of three by three places. All randomness comes
from the `random.Random` that is passed in (`rng`), so a seed gives the same data everywhere. Six
pairs of colour and shape (`HELD_OUT`) are never drawn or named in training data: a model that names
them correctly has learnt colour independently of shape. The words are in prep/toy_images.json.
"""
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

WORDS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
COLOURS, PLACES, NUMBERS = WORDS["colours"], WORDS["places"], WORDS["numbers"]
NAMES = WORDS["names"]  # of a thing t, each with the kinds of questions whose answers it contains
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 13, "large": 19}  # diameter in pixels in an image of 64; a place is 21 wide
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
HELD_OUT = frozenset({("green", "circle"), ("yellow", "square"), ("purple", "triangle"),
                      ("blue", "star"), ("red", "cross"), ("pink", "ring")})
TRAIN_PAIRS = [pair for pair in PAIRS if pair not in HELD_OUT]


@dataclass
class Thing:
    """One coloured shape and its position."""

    pair: tuple  # colour, shape
    size: str
    row: int  # 0 is the top
    column: int  # 0 is the left
    dx: float  # offset within its place, -1 to 1
    dy: float
    scale: float  # so that sizes vary a little
    rgb: tuple  # the colour as painted

    def __post_init__(self):
        self.colour, self.shape = self.pair
        self.place = PLACES[self.row][self.column]


@dataclass
class Scene:
    """The content of an image."""

    things: list  # in reading order: row by row, left to right
    background: str
    light: tuple  # the two background colours
    dark: tuple
    seed: int  # of the background pattern


def shifted(rng, rgb, by):
    """An RGB colour (0 to 255), each channel changed by at most `by`."""
    return tuple(min(255, max(0, c + rng.randint(-by, by))) for c in rgb)


def draw_scene(rng, pairs="train") -> Scene:
    """A scene of one to three things, no two alike in (colour, shape), each in its own place.

    pairs: "train" has no held-out pair, "held_out" has at least one, "any" may have some.
    """
    pool = {"train": TRAIN_PAIRS, "held_out": PAIRS, "any": PAIRS}[pairs]
    chosen = rng.sample(pool, rng.randint(1, 3))
    if pairs == "held_out" and not HELD_OUT.intersection(chosen):
        chosen[0] = rng.choice(sorted(HELD_OUT))
    things = [Thing(pair, rng.choice(list(SIZES)), *divmod(cell, 3), rng.uniform(-0.6, 0.6),
                    rng.uniform(-0.6, 0.6), rng.uniform(0.95, 1.05),
                    shifted(rng, COLOURS[pair[0]], 10))
              for pair, cell in zip(chosen, rng.sample(range(9), len(chosen)), strict=True)]
    things.sort(key=lambda thing: (thing.row, thing.column))
    # A pale or dark grey, from which every colour stands out.
    grey = rng.choice((rng.randint(15, 45), rng.randint(195, 240)))
    light = shifted(rng, (grey, grey, grey), 8)
    background = rng.choice(("plain", "gradient", "stripes", "noise"))
    return Scene(things, background, light, shifted(rng, light, 14), rng.randrange(2**32))


# Corners (x, y) in a square from -1 to 1, y points down; a star's outer and inner ones alternate.
POLYGONS = WORDS["polygons"] | {"star": [
    (math.sin(math.pi * k / 5) * r, -math.cos(math.pi * k / 5) * r)
    for k, r in enumerate((1, 0.42) * 5)]}


def circle_of(thing, size):
    """(x, y, radius) in pixels of a thing in an image of `size`; always within its place."""
    place, radius = size / 3, SIZES[thing.size] * thing.scale * size / 64 / 2
    slack = 0.7 * (place / 2 - radius)  # below 1, so that neighbours never touch
    return ((thing.column + 0.5) * place + thing.dx * slack,
            (thing.row + 0.5) * place + thing.dy * slack, radius)


def paint_background(scene, size):
    """An RGB image of the two background colours, mixed by a pattern."""
    light, dark = (Image.new("RGB", (size, size), rgb) for rgb in (scene.light, scene.dark))
    if scene.background == "plain":
        return light
    rng, resampling = random.Random(scene.seed), Image.Resampling.NEAREST
    if scene.background == "gradient":
        mask, resampling = Image.linear_gradient("L"), Image.Resampling.BILINEAR
    elif scene.background == "stripes":
        n = rng.randint(3, 8)
        mask = Image.frombytes("L", (1, 2 * n), bytes((0, 255)) * n)
    else:
        mask = Image.frombytes("L", (32, 32), rng.randbytes(32 * 32))
    if rng.random() < 0.5:
        mask = mask.transpose(Image.Transpose.ROTATE_90)
    return Image.composite(dark, light, mask.resize((size, size), resampling))


def paint(scene, size=64) -> Image.Image:
    """The scene as an RGB image, `size` pixels square."""
    big = 4 * size  # painted four times as large and reduced at the end, for smooth edges
    image = paint_background(scene, size).resize((big, big), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        x, y, r = circle_of(thing, big)
        edge, width = tuple(c // 2 for c in thing.rgb), max(1, big // 100)
        box, hole = ((x - s, y - s, x + s, y + s) for s in (r, 0.5 * r))
        if thing.shape in POLYGONS:
            corners = [(x + r * u, y + r * v) for u, v in POLYGONS[thing.shape]]
            pen.polygon(corners, fill=thing.rgb)
            pen.line([*corners, *corners[:2]], fill=edge, width=width, joint="curve")  # closed
        elif thing.shape == "circle":
            pen.ellipse(box, fill=thing.rgb, outline=edge, width=width)
        else:  # a ring
            pen.ellipse(box, outline=thing.rgb, width=math.ceil(r / 2))
            pen.ellipse(box, outline=edge, width=width)
            pen.ellipse(hole, outline=edge, width=width)
    return image.reduce(4)


SENTENCE_START = re.compile(r'(^"?|[.!?] "?|\." "?|[?!]" ")([a-z])')  # not in '"Where?" asked Mia'


def grammar(text):
    """'a orange' -> 'an orange', and a capital letter at the start of every sentence."""
    text = re.sub(r"\ba (?=[aeiou])", "an ", text)
    return SENTENCE_START.sub(lambda match: match[1] + match[2].upper(), text)


def listed(parts):
    """["a", "b", "c"] -> 'a, b and c'."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def plural(noun):
    """'cross' -> 'crosses'"""
    return noun + ("es" if noun.endswith("s") else "s")


def phrase(thing, size=True, place=True, colour=True):
    """'a large red circle at the top left', or less where size, place or colour is False."""
    words = ("a", size and thing.size, colour and thing.colour, thing.shape, place and thing.place)
    return " ".join(word for word in words if word)


def relations(thing, other):
    """The relations of thing to other, like ["to the left of", "above"]."""
    holds = {"to the left of": thing.column < other.column,
             "to the right of": thing.column > other.column,
             "above": thing.row < other.row, "below": thing.row > other.row}
    return [relation for relation in holds if holds[relation]]


def caption(rng, scene) -> str:
    """One sentence that names every shape; three in five also every colour, size and place.

    The rest omit colours and most places, so that an encoder has to learn shapes to tell them apart
    (docs/log.md).
    """
    things = rng.sample(scene.things, len(scene.things))
    style = rng.random()
    if style < 0.2:  # places first
        parts = [f"{t.place} there is {phrase(t, place=False)}" for t in things]
        return grammar(listed(parts) + ".")
    parts = [phrase(t) for t in things]
    if style >= 0.6:
        size, place = rng.random() < 0.4, rng.random() < 0.5
        parts = [phrase(t, size, place, colour=False) for t in things]
    elif style >= 0.5 and len(things) > 1:
        how = rng.choice(relations(things[1], things[0]))
        parts[1] = f"{phrase(things[1], place=False)} {how} it"
    return grammar(rng.choice(WORDS["caption_openings"]) + listed(parts) + ".")


# Kinds of questions, and how often a chat asks each: more often what takes longest to learn
# (docs/log.md). In validation and test all kinds are equally frequent.
FREQUENCIES = {"colour": 1, "shape": 1, "size": 1, "count": 2, "where": 1.5, "yes_no": 4,
               "describe": 1}


def names(scene, thing, hide):
    """All phrases that mean this thing and no other in the scene, like "the red ring".

    hide: the kind of question they are for; no phrase contains its answer. At least one exists:
    the place alone is unique, and so is the pair of colour and shape.
    """
    found = []
    for phrase, answers in NAMES.items():
        text = phrase.format(t=thing)
        others = (phrase.format(t=other) for other in scene.things if other is not thing)
        if hide not in answers and text not in others:
            found.append(text)
    return found


def statement(rng, scene, truth):
    """(subject, rest) of a yes-or-no question, like ("the circle", "red"), true or not.

    True and false statements use the same words, so that a question alone does not reveal its
    answer, and held-out pairs are named only where they are drawn.
    """
    here = [thing.pair for thing in scene.things]
    colours, shapes = zip(*here, strict=True)
    pool = PAIRS if HELD_OUT.intersection(here) else TRAIN_PAIRS
    thing, *others = rng.sample(scene.things, len(here))
    places = [place for row in PLACES for place in row if place != thing.place]
    near = [(c, s) for c, s in pool if (c, s) not in here and (c in colours or s in shapes)]
    name = {hide: rng.choice(names(scene, thing, hide)) for hide in ("colour", "size", "where")}
    cases = [  # subject, true rest, false rests, those of them that the image suggests
        (name["colour"], thing.colour,
         [c for c, s in pool if s == thing.shape and c != thing.colour], colours),
        (name["size"], thing.size, [size for size in SIZES if size != thing.size], ()),
        (name["where"], thing.place, places, [other.place for other in others]),
        ("there", f"a {thing.shape}", [f"a {s}" for s in SHAPES if s not in shapes], ()),
        ("there", f"a {thing.colour} thing",
         [f"a {c} thing" for c, s in pool if c not in colours], ()),
        ("there", f"a {thing.colour} {thing.shape}", [f"a {c} {s}" for c, s in near],
         [f"a {c} {s}" for c, s in near if c in colours and s in shapes])]
    if others:
        other = rng.choice(names(scene, others[0], "where"))
        k = rng.choice(range(len(relations(thing, others[0]))))
        true, false = relations(thing, others[0])[k], relations(others[0], thing)[k]
        cases.append((name["where"], f"{true} {other}", [f"{false} {other}"], ()))
    subject, right, wrong, suggested = rng.choice(cases)
    if truth:
        return subject, right
    suggested = [rest for rest in wrong if rest in suggested]
    return subject, rng.choice(suggested if suggested and rng.random() < 0.5 else wrong)


def ask(rng, scene, kind):
    """(what a question of this kind is about, answer); for "yes_no" it is a statement()."""
    thing = rng.choice(scene.things)
    if kind == "describe":
        return "", f"There is {listed([phrase(t) for t in scene.things])}."
    if kind == "yes_no":
        truth = rng.random() < 0.5
        return statement(rng, scene, truth), "Yes." if truth else "No."
    if kind == "count":
        each = [(t.shape, f"{t.colour} thing", f"{t.size} thing", "thing") for t in scene.things]
        some = rng.choice(each)
        none = (rng.choice(SHAPES), f"{rng.choice(list(COLOURS))} thing")  # mostly absent
        what = rng.choice(rng.choice((some, some, none)))
        n = sum(what in kinds for kinds in each)
        answer = f"is one {what}" if n == 1 else f"are {NUMBERS[n]} {plural(what)}"
        return plural(what), f"There {answer}."
    name = rng.choice(names(scene, thing, kind))
    subject = f"the {thing.shape}" if thing.shape in name else "it"
    return name, WORDS["answers"][kind].format(subject=subject, t=thing)


def question(rng, scene, kind) -> tuple:
    """(question, answer) of a kind; only one wording of the answer is correct."""
    content, answer = ask(rng, scene, kind)
    wording = rng.choice(WORDS["questions"][kind])
    if kind == "yes_no":  # "Is the ring red?", but "Is it true that the ring is red?"
        content = (" " if wording == "Is {}?" else " is ").join(content)
    text = wording.format(content).replace("What is the thing ", "What is ")  # ... the top?"
    return grammar(text), grammar(answer)


def turns(*pairs):
    """(question, answer) pairs -> the messages of a chat, as {"role", "content"}."""
    return [{"role": role, "content": content} for pair in pairs
            for role, content in zip(("user", "assistant"), pair, strict=True)]


def conversation(rng, scene, n_questions) -> list:
    """The messages of a chat with n_questions different questions about the image.

    A description comes first or last, because what follows it can be answered without the image.
    """
    asked = {}  # text -> (kind, (text, answer))
    while len(asked) < n_questions:
        [kind] = rng.choices(list(FREQUENCIES), FREQUENCIES.values())
        pair = question(rng, scene, kind)
        asked.setdefault(pair[0], (kind, pair))
    first, *rest = asked.values()
    rest.sort(key=lambda item: item[0] == "describe")
    return turns(*(pair for _, pair in (first, *rest)))
