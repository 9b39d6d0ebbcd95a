"""Text without pictures for the picture world: stories to learn English from, and short chats.

A story is a tale of a few sentences about children, pets and toys, or a handful of facts, or a
picture of prep/toy_images.py told in words. A chat asks for a sum, often for a comparison or a
fact, and often for something that the user said before. The English is small (under 400 different
words) and what is told agrees with itself: sums are right, and what was hidden in the box is found
there. All chance comes from the `random.Random` that you pass in (`rng`), so the same seed gives
the same text everywhere. Pairs of colour and shape are held out of pictures only: a story may name
all of them.

    python prep/toy_stories.py                 # three stories and three chats
    python prep/toy_stories.py --n=10 --seed=7
"""
import argparse
import random
import textwrap

from prep import toy_images

# ---- words --------------------------------------------------------------------------------------

NAMES = {"Mia": "she", "Tom": "he", "Anna": "she", "Ben": "he", "Lily": "she", "Sam": "he",
         "Rosa": "she", "Max": "he", "Nina": "she", "Leo": "he", "Emma": "she", "Jack": "he",
         "Ella": "she", "Finn": "he", "Kate": "she", "Paul": "he"}
PRONOUNS = {"he": {"he": "he", "his": "his", "him": "him"},
            "she": {"he": "she", "his": "her", "him": "her"}}
TOYS = ("ball", "book", "cup", "hat", "car", "boat", "doll", "kite", "apple", "flower", "shell",
        "stone", "spoon", "coat", "bell", "drum")
PETS = ("dog", "cat", "bird", "rabbit", "horse", "duck")
PET_NAMES = ("Bella", "Rocky", "Coco", "Lucky", "Daisy", "Toby", "Molly", "Rex", "Honey", "Snowy")
# From small to large:
BY_SIZE = ("ant", "mouse", "rabbit", "cat", "dog", "sheep", "horse", "elephant", "whale")
SPOTS = ("under the bed", "in the box", "on the table", "behind the door", "next to the tree",
         "under the chair", "in the garden", "on the roof", "by the river", "in the kitchen")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
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

# ---- slots --------------------------------------------------------------------------------------

# All texts below are templates. {toy} is a slot: cast() draws what fills it. Sentences start with
# small letters and "a" stands for "an" too, as nobody knows yet which words will meet there:
# toy_images.grammar() puts both right in the end.


def cast(rng):
    """A dict with words for every slot: who and what one tale or chat is about.

    {he}, {his} and {him} speak of {name}, and become "she" and "her". {n} and {m} make {total},
    which is at most ten. Where {name} has {n} things and {friend} has {p}, {more} is the name of
    who has more. A {kind} is a sort of pet, {toys} are more than one {toy}, and {toy2} is another.
    """
    name, friend = rng.sample(list(NAMES), 2)
    n = rng.randint(2, 8)
    m = rng.randint(2, 10 - n)
    p = rng.choice([p for p in range(2, 9) if p != n])  # never equal: one of the two has more
    small, large = sorted(rng.sample(BY_SIZE, 2), key=BY_SIZE.index)
    numbers = {"n": n, "m": m, "p": p, "total": n + m}
    slots = {"name": name, "friend": friend, **PRONOUNS[NAMES[name]],
             **{slot: toy_images.NUMBERS[number] for slot, number in numbers.items()},
             "more": name if n > p else friend, "fewer": friend if n > p else name,
             "small": small, "large": large, "size": rng.choice(list(toy_images.SIZES)),
             "day": rng.choice(DAYS), "pet": rng.choice(PET_NAMES), "kind": rng.choice(PETS)}
    two_of = {"colour": list(toy_images.COLOURS), "shape": toy_images.SHAPES, "toy": TOYS,
              "spot": SPOTS}
    for slot, words in two_of.items():
        slots[slot], slots[slot + "2"] = rng.sample(words, 2)
    return {**slots, "toys": toy_images.plural(slots["toy"])}


# ---- stories ------------------------------------------------------------------------------------

COMPARISONS = ("a {large} is bigger than a {small}.", "a {small} is smaller than a {large}.",
               "which is bigger, a {large} or a {small}? a {large} is bigger.")

# The tales, in a small language of their own: / stands between the steps of a tale, | between the
# wordings of a step, of which story() takes one, and an empty line between two tales. So
#     {name} had a {toy}. | {friend} gave {name} a {toy}. / {he} put it {spot}.
# may become "Mia had a kite. She put it in the box." or "Sam gave Leo a drum. He put it on the
# roof." One cast fills a whole tale: what is true at its start is still true at its end.
TALE_TEXT = """
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
TALES = [[step.split("|") for step in tale.split("/")] for tale in TALE_TEXT.split("\n\n")]


SHOWN = ("{name} has a picture.", "{name} shows {friend} a picture.", "{name} likes this picture.",
         "look at the picture of {name}.", "on {day} {name} finds a picture.",
         "{friend} asks {name} about a picture.")
PICTURES = 0.4  # share of the stories that describe an image and ask about it: the decoder learns
# to answer such questions from words, before it has to find the answers in images


def story(rng) -> str:
    """One document of the text corpus, 40 to 150 words: a tale, facts, or an image in words."""
    who, genre = cast(rng), rng.randrange(len(TALES) + 2)
    if rng.random() < PICTURES:
        scene = toy_images.draw_scene(rng, "any")
        parts = [rng.choice(SHOWN)]
        parts += [toy_images.grammar(toy_images.ask(rng, scene, "describe")[1])]
        parts += [message["content"] for message in toy_images.conversation(rng, scene, 5)]
    elif genre < len(TALES):
        parts = [rng.choice(wordings) for wordings in TALES[genre]]
    elif genre == len(TALES):  # facts, half of them as answers to their questions
        facts = rng.sample(list(FACTS.items()), rng.randint(9, 11))
        parts = [rng.choice((answer, f"{asked} {answer}")) for asked, answer in facts]
    else:  # which animal is bigger, for seven casts
        parts = [rng.choice(COMPARISONS).format(**cast(rng)) for _ in range(7)]
    text = " ".join(" ".join(parts).split())  # the line breaks of TALE_TEXT become spaces
    return toy_images.grammar(text.format(**who))


# ---- chats --------------------------------------------------------------------------------------

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
SUMS = (  # here and below: (question, answer)
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
    """The messages of a chat: two to four questions or remarks, each with its answer.

    There is always a sum, because sums have so many values that chats are hardly ever equal; with
    it a comparison, a fact, something to keep in mind (asked for after all that), or a greeting.
    """
    who = cast(rng)
    *told, asked, known = rng.choice(MEMORIES)
    easy = rng.choice((rng.choice(SIZE_QUESTIONS), rng.choice(list(FACTS.items()))))
    pairs = [rng.choice(SUMS), easy][:rng.randint(1, 2)]
    rng.shuffle(pairs)
    # Casts of their own, or every name and colour in a chat would be the one to keep in mind. Both
    # are drawn even if there is one pair, which then takes the first.
    casts = [cast(rng), cast(rng)]
    pairs = [[text.format(**own) for text in pair]
             for pair, own in zip(pairs, casts, strict=False)]
    if len(pairs) == 1 or rng.random() < 0.6:
        pairs = [told, *pairs, (asked, known)]
    if len(pairs) < 4 and rng.random() < 0.4:
        pairs = rng.choice(([rng.choice(HELLOS), *pairs], [*pairs, rng.choice(THANKS)]))
    return toy_images.turns(*[[toy_images.grammar(text.format(**who)) for text in pair]
                              for pair in pairs])


def main():
    parser = argparse.ArgumentParser(description="Read some stories and chats.")
    parser.add_argument("--n", type=int, default=3, help="how many of each")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    for _ in range(args.n):
        print(textwrap.fill(story(rng), 100), end="\n\n")
    for _ in range(args.n):
        for message in text_chat(rng):
            print(f"{message['role']}: {message['content']}")
        print()


if __name__ == "__main__":
    main()
