"""The picture world: the data set of the demo, drawn and written from a seed, nothing to download.

A picture shows one to three coloured shapes on a grid of three by three places. Because we drew it,
we know everything about it, so this file also writes its caption, asks questions about it and
knows the right answers. Two more functions write text without pictures: short stories to learn
English from, and chats to learn how to answer. All chance comes from the `random.Random` that you
pass in, so the same seed gives the same data everywhere. Six pairs of colour and shape (`HELD_OUT`)
are never drawn or named in training pictures: who knows them has learnt colour apart from shape.

    python world.py                          # one story, one chat, one conversation, and world.png
    python world.py --out sheet.png --seed 7
"""
import argparse
import math
import random
import re
import textwrap
from dataclasses import dataclass

from PIL import Image, ImageDraw

# ---- scenes -------------------------------------------------------------------------------------

COLOURS = {"red": (214, 28, 36), "orange": (250, 132, 10), "yellow": (248, 222, 40),
           "green": (28, 140, 48), "cyan": (40, 208, 220), "blue": (30, 62, 214),
           "purple": (146, 48, 196), "pink": (255, 146, 196)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 11, "large": 19}  # pixels across in a picture of 64; a place is 21 pixels wide
PLACES = (("at the top left", "at the top", "at the top right"),
          ("on the left", "in the middle", "on the right"),
          ("at the bottom left", "at the bottom", "at the bottom right"))
BACKGROUNDS = ("plain", "gradient", "stripes", "noise")
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
HELD_OUT = frozenset({("green", "circle"), ("yellow", "square"), ("purple", "triangle"),
                      ("blue", "star"), ("red", "cross"), ("pink", "ring")})
TRAIN_PAIRS = tuple(pair for pair in PAIRS if pair not in HELD_OUT)


@dataclass(frozen=True)
class Thing:
    colour: str
    shape: str
    size: str
    row: int  # 0 is the top
    column: int  # 0 is the left
    dx: float  # where in its place, -1 to 1
    dy: float
    scale: float  # no two large things are quite equally large
    rgb: tuple  # the colour as painted

    @property
    def pair(self):
        return self.colour, self.shape

    @property
    def place(self):
        return PLACES[self.row][self.column]


@dataclass(frozen=True)
class Scene:
    things: tuple  # in reading order: row by row, left to right
    background: str
    light: tuple  # the two colours of the background
    dark: tuple
    seed: int  # of its pattern


def shifted(rng, rgb, by):
    return tuple(min(255, max(0, c + rng.randint(-by, by))) for c in rgb)


def draw_scene(rng, pairs="train") -> Scene:
    """One to three things, all different in (colour, shape), each in a place of its own.

    pairs: "train" has no held-out pair, "held_out" has at least one, "any" takes what comes.
    """
    pool = {"train": TRAIN_PAIRS, "held_out": PAIRS, "any": PAIRS}[pairs]
    chosen = rng.sample(pool, rng.randint(1, 3))
    if pairs == "held_out" and not HELD_OUT.intersection(chosen):
        chosen[0] = rng.choice(sorted(HELD_OUT))
    things = []
    for (colour, shape), cell in zip(chosen, rng.sample(range(9), len(chosen))):
        things.append(Thing(colour, shape, rng.choice(list(SIZES)), cell // 3, cell % 3,
                            rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(0.95, 1.05),
                            shifted(rng, COLOURS[colour], 10)))
    things.sort(key=lambda thing: (thing.row, thing.column))
    # Pale or dark, never a middle grey and never a strong colour: every thing stands out from it.
    grey = rng.choice((rng.randint(15, 45), rng.randint(195, 240)))
    light = shifted(rng, (grey, grey, grey), 8)
    return Scene(tuple(things), rng.choice(BACKGROUNDS), light, shifted(rng, light, 14),
                 rng.randrange(2**32))


# ---- painting -----------------------------------------------------------------------------------

TURNS = [math.pi * k / 5 for k in range(10)]  # the ten corners of a star
POLYGONS = {  # corners in a square from -1 to 1
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0, -0.95), (1, 0.85), (-1, 0.85)],
    "star": [(math.sin(t) * r, -math.cos(t) * r) for t, r in zip(TURNS, (1, 0.42) * 5)],
    "cross": [(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3),
              (.3, 1), (-.3, 1), (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3)]}


def circle_of(thing, size):
    """(x, y, radius) in pixels: where a thing lies, always inside its own place."""
    place, radius = size / 3, SIZES[thing.size] * thing.scale * size / 64 / 2
    slack = 0.7 * (place / 2 - radius)
    return ((thing.column + 0.5) * place + thing.dx * slack,
            (thing.row + 0.5) * place + thing.dy * slack, radius)


def paint_background(scene, size):
    """Two colours of the background mixed by a mask, which is the pattern."""
    light, dark = (Image.new("RGB", (size, size), rgb) for rgb in (scene.light, scene.dark))
    if scene.background == "plain":
        return light
    rng = random.Random(scene.seed)
    if scene.background == "gradient":
        mask = Image.linear_gradient("L")
    elif scene.background == "stripes":
        n = rng.randint(3, 8)
        mask = Image.frombytes("L", (1, 2 * n), bytes((0, 255)) * n)
    else:
        mask = Image.frombytes("L", (32, 32), rng.randbytes(32 * 32))
    if rng.random() < 0.5:
        mask = mask.transpose(Image.Transpose.ROTATE_90)
    smooth = scene.background == "gradient"
    resampling = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return Image.composite(dark, light, mask.resize((size, size), resampling))


def paint(scene, size=64) -> Image.Image:
    """The scene as an RGB picture; it is painted four times as large and shrunk: smooth edges."""
    big = 4 * size
    image = paint_background(scene, big)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        x, y, r = circle_of(thing, big)
        edge, width = tuple(c // 2 for c in thing.rgb), max(1, big // 100)
        if thing.shape in POLYGONS:
            corners = [(x + r * u, y + r * v) for u, v in POLYGONS[thing.shape]]
            pen.polygon(corners, fill=thing.rgb)
            pen.line([*corners, corners[0], corners[1]], fill=edge, width=width, joint="curve")
            continue
        box, hole = ((x - s, y - s, x + s, y + s) for s in (r, 0.5 * r))
        if thing.shape == "circle":
            pen.ellipse(box, fill=thing.rgb, outline=edge, width=width)
        else:  # a ring is a circle that one can look through
            pen.ellipse(box, outline=thing.rgb, width=math.ceil(r / 2))
            pen.ellipse(box, outline=edge, width=width)
            pen.ellipse(hole, outline=edge, width=width)
    return image.reduce(4)


# ---- words --------------------------------------------------------------------------------------

NUMBERS = "no one two three four five six seven eight nine ten".split()


def grammar(text):
    """'a orange' -> 'an orange', and a capital letter at the start of every sentence."""
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    start = r'(^"?|[.!?] "?|\." "?|[?!]" ")([a-z])'  # but not in '"Where?" asked Mia'
    return re.sub(start, lambda match: match[1] + match[2].upper(), text)


def listed(parts):
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def plural(noun):
    return noun + ("es" if noun.endswith("s") else "s")


def counted(n, noun):
    return f"{NUMBERS[n]} {noun if n == 1 else plural(noun)}"


def phrase(thing, size=True, place=True):
    """'a large red circle at the top left', with or without its size and its place."""
    words = ("a", size and thing.size, thing.colour, thing.shape, place and thing.place)
    return " ".join(word for word in words if word)


def relations(thing, other):
    """How the one lies from the other; nothing doubtful, so never for things in one line."""
    if thing.column != other.column:
        yield "to the left of" if thing.column < other.column else "to the right of"
    if thing.row != other.row:
        yield "above" if thing.row < other.row else "below"


CAPTION_REQUESTS = ("Write a caption.", "Give this picture a caption.", "Caption this picture.")


def caption(rng, scene) -> str:
    """One sentence with every colour and shape; three in four have every size and place too."""
    things = rng.sample(scene.things, len(scene.things))
    style = rng.random()
    if style < 0.25:  # places first
        parts = [f"{t.place} there is {phrase(t, place=False)}" for t in things]
        return grammar(listed(parts) + ".")
    if style < 0.75:
        parts = [phrase(t) for t in things]
    elif style < 0.9:  # sometimes less: a caption from the wild never says it all
        parts = [phrase(t, rng.random() < 0.5, rng.random() < 0.5) for t in things]
    else:
        parts = [phrase(t) for t in things]
        if len(things) > 1:
            how = rng.choice(list(relations(things[1], things[0])))
            parts[1] = f"{phrase(things[1], place=False)} {how} it"
    opening = rng.choice(("", "there is ", "a picture of ", "this picture shows ", "we can see "))
    return grammar(opening + listed(parts) + ".")


# ---- questions ----------------------------------------------------------------------------------

WORDINGS = {
    "colour": ("What colour is {}?", "Which colour is {}?", "Tell me the colour of {}."),
    "shape": ("What shape is {}?", "Which shape is {}?", "Tell me the shape of {}.",
              "What is {}?"),
    "size": ("How big is {}?", "What size is {}?", "Is {} small or large?"),
    "count": ("How many {} are there?", "How many {} do you see?", "Count the {}."),
    "where": ("Where is {}?", "Where do you see {}?", "Tell me where {} is."),
    "yes_no": ("Is {}?", "Is it true that {}?"),
    "describe": ("What do you see?", "Describe the picture.", "What is in the picture?",
                 "Tell me what you see.")}
QUESTION_KINDS = tuple(WORDINGS)
OPPOSITE = {"to the left of": "to the right of", "to the right of": "to the left of",
            "above": "below", "below": "above"}


def names(scene, thing, hide):
    """All phrases that mean this thing and no other in the scene and do not tell its `hide`."""
    found = [] if hide == "where" else [f"the thing {thing.place}"]
    for keys in (["shape"], ["colour"], ["colour", "shape"], ["size", "shape"]):
        words = [getattr(thing, key) for key in keys]
        alike = [t for t in scene.things if [getattr(t, key) for key in keys] == words]
        if hide not in keys and len(alike) == 1:
            found.append(" ".join(["the", *words, *(["thing"] if "shape" not in keys else [])]))
    return found


def decoy(rng, options, tempting):
    """Something wrong to ask about: every second time one that the picture itself suggests."""
    tempting = [option for option in options if option in tempting]
    return rng.choice(tempting if tempting and rng.random() < 0.5 else options)


def statement(rng, scene, truth):
    """Something to be asked about, as (subject, rest), e.g. ("the circle", "red"), true or not.

    What is wrong is drawn from the same pool as what is right, so that the words of a question
    alone do not give its answer away, and held-out pairs are not named where they are not drawn.
    """
    here = [thing.pair for thing in scene.things]
    pool = PAIRS if HELD_OUT.intersection(here) else TRAIN_PAIRS
    thing, *others = rng.sample(scene.things, len(here))
    colours, shapes = zip(*here)
    places = [place for row in PLACES for place in row if place != thing.place]
    near = [(c, s) for c, s in pool if (c, s) not in here and (c in colours or s in shapes)]
    name = {hide: rng.choice(names(scene, thing, hide)) for hide in ("colour", "size", "where")}
    cases = [  # subject, what is true of it, all that is not, the part of it that is tempting
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
        how = rng.choice(list(relations(thing, others[0])))
        cases.append((name["where"], f"{how} {other}", [f"{OPPOSITE[how]} {other}"], ()))
    subject, right, wrong, tempting = rng.choice(cases)
    return subject, right if truth else decoy(rng, wrong, tempting)


def ask(rng, scene, kind):
    """What to put into the wording of a question of this kind, and the answer."""
    thing = rng.choice(scene.things)
    if kind == "describe":
        return "", f"There is {listed([phrase(t) for t in scene.things])}."
    if kind == "yes_no":
        truth = rng.random() < 0.5
        return statement(rng, scene, truth), "Yes." if truth else "No."
    if kind == "count":
        each = [(t.shape, f"{t.colour} thing", f"{t.size} thing", "thing") for t in scene.things]
        some = rng.choice(each)
        none = (rng.choice(SHAPES), f"{rng.choice(list(COLOURS))} thing")  # mostly "no"
        what = rng.choice(rng.choice((some, some, none)))
        n = sum(what in kinds for kinds in each)
        return plural(what), f"There {'is' if n == 1 else 'are'} {counted(n, what)}."
    name = rng.choice(names(scene, thing, kind))
    if kind == "colour":
        subject = f"the {thing.shape}" if thing.shape in name else "it"
        return name, f"{subject} is {thing.colour}."
    return name, {"shape": f"It is a {thing.shape}.", "size": f"It is {thing.size}.",
                  "where": f"It is {thing.place}."}[kind]


def question(rng, scene, kind) -> tuple:
    """(question, answer); the answer follows from question and scene and has only one wording."""
    content, answer = ask(rng, scene, kind)
    wording = rng.choice(WORDINGS[kind])
    if kind == "yes_no":
        subject, rest = content
        content = f"{subject} {rest}" if wording == "Is {}?" else f"{subject} is {rest}"
    text = wording.format(content).replace("What is the thing ", "What is ")  # "at the top left?"
    return grammar(text), grammar(answer)


def turns(*pairs):
    """(user, assistant) pairs -> the messages of a chat."""
    return [{"role": role, "content": content}
            for pair in pairs for role, content in zip(("user", "assistant"), pair)]


def conversation(rng, scene, n_questions) -> list:
    """A chat about the picture: different questions, their kinds drawn evenly."""
    asked = {}
    while len(asked) < n_questions:
        text, answer = question(rng, scene, rng.choice(QUESTION_KINDS))
        asked.setdefault(text, answer)
    return turns(*asked.items())


# ---- text without pictures ----------------------------------------------------------------------

NAMES = {"Mia": "she", "Tom": "he", "Anna": "she", "Ben": "he", "Lily": "she", "Sam": "he",
         "Rosa": "she", "Max": "he", "Nina": "she", "Leo": "he", "Emma": "she", "Jack": "he",
         "Ella": "she", "Finn": "he", "Kate": "she", "Paul": "he"}
TOYS = "ball book cup hat car boat doll kite apple flower shell stone spoon coat bell drum".split()
PETS = "dog cat bird rabbit horse duck".split()
PET_NAMES = "Bella Rocky Coco Lucky Daisy Toby Molly Rex Honey Snowy".split()
PRONOUNS = {"he": {"he": "he", "his": "his", "him": "him"},
            "she": {"he": "she", "his": "her", "him": "her"}}
BY_SIZE = "ant mouse rabbit cat dog sheep horse elephant whale".split()  # from small to large
COMPARISONS = ("a {large} is bigger than a {small}.", "a {small} is smaller than a {large}.",
               "which is bigger, a {large} or a {small}? a {large} is bigger.")
SPOTS = ["under the bed", "in the box", "on the table", "behind the door", "next to the tree",
         "under the chair", "in the garden", "on the roof", "by the river", "in the kitchen"]
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
FACTS = {  # question: answer; stories tell them, chats ask for them
    "How many sides does a triangle have?": "A triangle has three sides.",
    "How many sides does a square have?": "A square has four sides.",
    "How many points does a star have?": "A star has five points.",
    "How many arms does a cross have?": "A cross has four arms.",
    "Does a circle have corners?": "A circle has no corners.",
    "What is in the middle of a ring?": "A ring has a hole in the middle.",
    "How many legs does a dog have?": "A dog has four legs.",
    "How many legs does a bird have?": "A bird has two legs.",
    "How many legs does an ant have?": "An ant has six legs.",
    "How many days are there in a week?": "There are seven days in a week.",
    "What colour is grass?": "Grass is green.", "What colour is the sky?": "The sky is blue.",
    "What colour is the sun?": "The sun is yellow.", "What colour is blood?": "Blood is red.",
    "What do you get from red and blue?": "Red and blue make purple.",
    "What do you get from red and yellow?": "Red and yellow make orange.",
    "What do you get from blue and yellow?": "Blue and yellow make green.",
    "What do you get from red and white?": "Red and white make pink.",
    "What does a cat drink?": "A cat drinks milk.",
    "Where does a fish live?": "A fish lives in water.",
    "When does the sun shine?": "The sun shines in the day.",
    "When do we see the moon?": "We see the moon at night.",
    "Is snow hot or cold?": "Snow is cold.", "Is fire hot or cold?": "Fire is hot."}

# A tale is a row of sentences with / between them; | stands between wordings of the same sentence.
# One cast fills all the slots of a tale, so what is told at its start is still true at its end.
TALES = """
one {day} {name} lost {his} {colour} {toy}. | {name} had a {size} {colour} {toy}, but now it was
gone. / {he} looked {spot2}, but it was not there. | first {he} looked {spot2} and found only a
{colour2} {toy2}. / {he} was sad. | "oh no!" said {name}. | {he} began to cry. / then {friend} came
to help. | {pet} the {kind} came to help too. / they looked for a long time, and then they saw
something {colour} {spot}. | "look {spot}!" said {friend}. / it was the {toy}! {name} was very
happy. | there was the {colour} {toy}! {name} laughed. / where did they find the {toy}? they found
it {spot}. | what colour was the {toy}? it was {colour}.

{name} had {n} {colour} {toys} and {m} {colour2} {toys}. | on {day} {name} found {n} {colour} {toys}
and {m} {colour2} {toys} {spot}. / {he} put them all on the floor and began to count. | {friend} sat
down next to {him} and they began to count. / {n} and {m} make {total}. | first {he} counted the
{colour} {toys}: {n}. then {he} counted the {colour2} {toys}: {m}. / how many {toys} did {name}
have? {he} had {total} {toys}. | so {name} had {total} {toys}. / "that is a lot!" said {friend}. |
{friend} had only one {toy2}. / then they put the {toys} {spot2}. | then they played until night. /
how many of the {toys} were {colour2}? {m} {toys} were {colour2}.

{name} had {total} {toys}. {friend} had no {toys}. | {friend} wanted a {toy}. {name} had {total}
{toys}. / "you can have {m} of my {toys}," said {name}. | {name} was kind. {he} gave {m} {toys} to
{friend}. / "thank you!" said {friend} and smiled. | {friend} was very happy and said thank you. /
how many {toys} did {name} have now? {total} take away {m} is {n}. {he} had {n} {toys}. / the next
day {friend} gave {him} a {colour} {toy2}. | later {friend} made a {colour} {toy2} for {him}. /
"this is for you, {name}," said {friend}. they were good friends. | it is good to give.

{name} likes to paint. | it is {day} and {name} wants to paint a picture. | "let us paint!" says
{name}. / first {he} paints a {size} {colour} {shape} at the top left. | at the top left {he} paints
a {size} {colour} {shape}. / then {he} paints a {colour2} {shape2} at the top right. | to the right
of it {he} paints a {colour2} {shape2}. / "what is the {colour} thing?" asks {friend}. "it is a
{shape}," says {name}. | "how many things are there?" asks {friend}. "there are two things," says
{name}. / "what colour is the {shape2}?" asks {friend}. "the {shape2} is {colour2}," says {name}. |
"is there a {colour2} {shape2}?" asks {friend}. "yes," says {name}. / "where is the {colour}
{shape}?" "it is at the top left." | "is the {colour} {shape} {size}?" "yes." / the picture is now
{spot}. | {friend} likes the picture very much.

{name} has a {kind} called {pet}. | {pet} is a {kind} and lives with {name}. / {pet} likes to sleep
{spot} and to run {spot2}. | every {day} they walk to the river. / one day {pet} found a {size}
{colour} {toy}. | today {pet} came home with a {colour} {toy}. / "where did you find that?" asked
{name}, but a {kind} can not talk. | "good {pet}!" said {name}. / so they went to {friend} and asked
about the {toy}. | {name} asked everyone. the {toy} was not {his}. / {friend} was happy to see the
{toy} again. | "yes, that is my {toy}!" said {friend}. / what is the {kind} called? the {kind} is
called {pet}. | who has a {kind}? {name} has a {kind}.

{name} has {n} {toys} and {friend} has {p} {toys}. | there are {n} {toys} in the bag of {name} and
{p} {toys} in the bag of {friend}. / "who has more?" asks {name}. | they want to know who has more.
/ they put them in two lines and look. | they count: {n} and {p}. | "let us count," says {friend}. /
who has more {toys}? {more} has more {toys}. / who has fewer {toys}? {fewer} has fewer {toys}. / "it
does not matter," says {friend}. "we can play together {spot}." | then {pet} the {kind} takes one of
the {toys} and runs away!

dear {friend}, how are you? I am well. | dear {friend}, today is {day} and it is warm. | dear
{friend}, thank you for the {toy}. / I live in a {size} {colour} house by the sea. | our house has a
{colour} door and {n} windows. / my {kind} {pet} is {spot} and sleeps. | I have a new {kind}. it is
called {pet}. / yesterday I made a {colour2} {toy2} for you. | I found your {colour2} {toy2}. it was
{spot2}. / my favourite colour is {colour}. what is your favourite colour? / my mother and my father
are well too. | we eat soup and bread, and I drink milk. / please come and see me on {day}. your
friend {name}

"let us play a game," said {name}. | it was {day}, and it rained. {name} and {friend} played a game.
/ "I hide a {colour} {toy}, and you look for it." | {name} had a {colour} {toy} and wanted to hide
it. / "is it {spot2}?" asked {friend}. "no," said {name}. | {friend} looked {spot2}. "it is cold
there," said {name}. / "is it {spot}?" asked {friend}. "yes!" said {name}. | {friend} looked {spot}.
"hot! very hot!" said {name}. / and there was the {colour} {toy}. | {friend} took the {toy} and
laughed. / then {friend} wanted to hide a {colour2} {toy2}. | they played {m} more games and went
home to eat.

{name} goes to the shop. {he} has a list. | here is a list of what {name} needs. | mother gives
{name} a list for the shop. / on the list there are {n} {toys}, a {colour} {toy2} and {m} {size}
boxes. | the list says: {n} {toys}, a {colour} {toy2}, {m} boxes. / "good morning," says {name}.
"how can I help you?" says the man. / {he} takes {n} {colour2} {toys} and puts them in {his} bag. |
"{n} {toys}, please," says {name}. / "do you have a {colour} {toy2}?" "yes, here it is." | the
{colour} {toy2} is very nice. / how many {toys} does {name} buy? {he} buys {n} {toys}. / {he} pays
and walks home with {friend}. | "goodbye!" says the man.

a {colour} {toy} and a {colour2} {toy2} are on the shelf. | look at the shelf of {name}. there is a
{colour} {toy} and a {colour2} {toy2}. / the {toy} is to the left of the {toy2}. so the {toy2} is to
the right of the {toy}. / a {kind} is below the shelf and a lamp is above it. | {pet} the {kind}
sits below the shelf. / now {name} takes the {colour} {toy} and puts it {spot}. | {name} comes and
takes the {colour} {toy}. {he} puts it {spot}. / where is the {toy} now? it is {spot}. / what is
still on the shelf? the {colour2} {toy2} is still on the shelf."""
TALES = [[sentence.split("|") for sentence in tale.split("/")] for tale in TALES.split("\n\n")]


def cast(rng):
    """Who and what a tale or a chat is about: a value for every slot."""
    name, friend = rng.sample(list(NAMES), 2)
    n = rng.randint(2, 8)
    m = rng.randint(2, 10 - n)
    p = rng.choice([p for p in range(2, 9) if p != n])
    small, large = sorted(rng.sample(BY_SIZE, 2), key=BY_SIZE.index)
    slots = {"name": name, "friend": friend, **PRONOUNS[NAMES[name]],
             "n": NUMBERS[n], "m": NUMBERS[m], "p": NUMBERS[p], "total": NUMBERS[n + m],
             "more": name if n > p else friend, "fewer": friend if n > p else name,
             "small": small, "large": large, "size": rng.choice(list(SIZES)),
             "day": rng.choice(DAYS), "pet": rng.choice(PET_NAMES), "kind": rng.choice(PETS)}
    two_of = {"colour": list(COLOURS), "shape": SHAPES, "toy": TOYS, "spot": SPOTS}
    for slot, words in two_of.items():
        slots[slot], slots[slot + "2"] = rng.sample(words, 2)
    return {**slots, "toys": plural(slots["toy"])}


def story(rng) -> str:
    """One document of the text corpus, 40 to 150 words: a tale, facts, or a picture in words."""
    who, genre = cast(rng), rng.randrange(len(TALES) + 3)
    if genre < len(TALES):
        lines = [rng.choice(wordings) for wordings in TALES[genre]]
    elif genre == len(TALES):  # facts, every second one as the answer to its question
        facts = rng.sample(list(FACTS.items()), rng.randint(9, 11))
        lines = [rng.choice((answer, f"{asked} {answer}")) for asked, answer in facts]
    elif genre == len(TALES) + 1:  # which animal is bigger
        lines = [rng.choice(COMPARISONS).format(**cast(rng)) for _ in range(7)]
    else:
        scene = draw_scene(rng, "any")
        lines = [rng.choice(("{name} has a picture.", "look at the picture of {name}."))]
        lines += [grammar(ask(rng, scene, "describe")[1])]
        lines += [turn["content"] for turn in conversation(rng, scene, 5)]
    return grammar(" ".join(" ".join(lines).split()).format(**who))


# ---- chats without pictures ---------------------------------------------------------------------

MEMORIES = (  # the user tells, the assistant replies; later the user asks, and the answer is known
    ("my name is {name}.", "hello, {name}.", "what is my name?", "your name is {name}."),
    ("my favourite colour is {colour}.", "{colour} is a nice colour.",
     "what is my favourite colour?", "your favourite colour is {colour}."),
    ("I have a {kind} called {pet}.", "{pet} is a nice name.",
     "what is my {kind} called?", "your {kind} is called {pet}."),
    ("I put the {colour} {toy} {spot}.", "good, the {colour} {toy} is {spot}.",
     "where is the {colour} {toy}?", "it is {spot}."),
    ("I gave my {toy} to {friend}.", "that is kind of you.",
     "who has my {toy}?", "{friend} has your {toy}."))
SUMS = (
    ("I have {n} {colour} {toys} and {m} {colour2} {toys}. how many {toys} do I have?",
     "you have {total} {toys}."),
    ("I had {total} {toys} and gave {m} to {friend}. how many {toys} do I have now?",
     "you have {n} {toys}."),
    ("{name} has {n} {toys} and {friend} has {p} {toys}. who has more?", "{more} has more {toys}."),
    ("{name} has {n} {toys} and {friend} has {p} {toys}. who has fewer?",
     "{fewer} has fewer {toys}."))
SIZE_QUESTIONS = (
    ("which is bigger, a {large} or a {small}?", "a {large} is bigger."),
    ("which is bigger, a {small} or a {large}?", "a {large} is bigger."),
    ("which is smaller, a {large} or a {small}?", "a {small} is smaller."),
    ("which is smaller, a {small} or a {large}?", "a {small} is smaller."))
HELLOS = (("hello!", "hello! how can I help you?"), ("good morning!", "good morning!"),
          ("how are you?", "I am well, thank you."))
THANKS = (("thank you.", "you are welcome."), ("goodbye!", "goodbye! see you soon."))


def text_chat(rng) -> list:
    """Two to four turns: sums, comparisons, facts, and often something to keep in mind."""
    who = cast(rng)
    *told, asked, known = rng.choice(MEMORIES)
    easy = rng.choice((rng.choice(SIZE_QUESTIONS), rng.choice(list(FACTS.items()))))
    chat = [rng.choice(SUMS), easy][:rng.randint(1, 2)]  # always a sum: so few chats are ever equal
    rng.shuffle(chat)
    casts = cast(rng), cast(rng)
    chat = [[text.format(**now) for text in pair] for pair, now in zip(chat, casts)]
    if len(chat) == 1 or rng.random() < 0.6:
        chat = [told, *chat, (asked, known)]
    if len(chat) < 4 and rng.random() < 0.4:
        chat = rng.choice(([rng.choice(HELLOS), *chat], [*chat, rng.choice(THANKS)]))
    return turns(*[[grammar(text.format(**who)) for text in pair] for pair in chat])


def main():
    parser = argparse.ArgumentParser(description="Look at the picture world.")
    parser.add_argument("--out", default="world.png", help="where the sheet of 32 pictures goes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    sheet = Image.new("RGB", (8 * 210, 4 * 270), "white")
    for k in range(32):
        scene, x, y = draw_scene(rng), k % 8 * 210 + 9, k // 8 * 270 + 8
        sheet.paste(paint(scene).resize((192, 192), Image.Resampling.NEAREST), (x, y))
        text = "\n".join(textwrap.wrap(caption(rng, scene), 33))
        ImageDraw.Draw(sheet).text((x, y + 196), text, fill="black")
    sheet.save(args.out)
    print(story(rng))
    for title, chat in ("chat", text_chat(rng)), ("the last picture", conversation(rng, scene, 4)):
        print(f"\n-- {title}", *(f"{turn['role']}: {turn['content']}" for turn in chat), sep="\n")


if __name__ == "__main__":
    main()
