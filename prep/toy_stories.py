"""Text-only documents of the toy world: short stories and chats, generated from a seed.

A story is a tale about children, pets and toys, a list of facts, or a scene of prep/toy_images.py
described in words. A chat asks for a sum, often for a comparison or a fact, and often for something
that the user said earlier. There are under 400 different words, and every answer is correct. Only
images hold out pairs of colour and shape: a story may name all of them.
"""
import json
from pathlib import Path

from prep import toy_images

# All texts are templates: {toy} is a slot that fill_slots() fills. Sentences start with small
# letters and "a" stands for "an" too, because the next word is unknown until the slots are filled:
# toy_images.grammar() corrects both.
WORDS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
ANIMALS = WORDS["animals_by_size"]  # smallest first
FACTS = WORDS["facts"]  # (question, answer)
# In the file an empty line separates tales, a line is a sentence of a tale and | separates its
# wordings; a line that begins with | continues the line before.
TALES = [[line.split(" | ") for line in tale.replace("\n|", " |").splitlines()] for tale in
         Path(__file__).with_name("toy_tales.txt").read_text(encoding="utf-8").split("\n\n")]
IMAGE_SHARE = 0.4  # share of stories that describe an image and ask about it, so that the decoder
# learns to answer such questions from text before it has to answer them from images


def fill_slots(rng):
    """{slot: words} for one tale or chat.

    {he}, {his} and {him} refer to {name}. {n} and {m} add up to {total}, at most ten. {name} has
    {n} things, {friend} has {p}; {more} and {fewer} are the names of who has more and fewer. {pet}
    is the name of a {kind} of animal, {toys} is the plural of {toy}, and {toy2} is another toy.
    """
    name, friend = rng.sample(list(WORDS["names"]), 2)
    n = rng.randint(2, 8)
    m = rng.randint(2, 10 - n)
    p = rng.choice([p for p in range(2, 9) if p != n])  # never equal: one of the two has more
    small, large = sorted(rng.sample(ANIMALS, 2), key=ANIMALS.index)
    numbers = {"n": n, "m": m, "p": p, "total": n + m}
    slots = {"name": name, "friend": friend, **WORDS["pronouns"][WORDS["names"][name]],
             **{slot: toy_images.NUMBERS[number] for slot, number in numbers.items()},
             "more": name if n > p else friend, "fewer": friend if n > p else name,
             "small": small, "large": large, "size": rng.choice(list(toy_images.SIZES)),
             "day": rng.choice(WORDS["days"]), "pet": rng.choice(WORDS["pet_names"]),
             "kind": rng.choice(WORDS["pets"])}
    two_of = {"colour": list(toy_images.COLOURS), "shape": toy_images.SHAPES,
              "toy": WORDS["toys"], "spot": WORDS["spots"]}
    for slot, words in two_of.items():
        slots[slot], slots[slot + "2"] = rng.sample(words, 2)
    return {**slots, "toys": toy_images.plural(slots["toy"])}


def story(rng) -> str:
    """One document of the text corpus, 40 to 150 words: a tale, facts, or an image in words."""
    slots, genre = fill_slots(rng), rng.randrange(len(TALES) + 2)
    if rng.random() < IMAGE_SHARE:
        scene = toy_images.draw_scene(rng, "any")
        parts = [rng.choice(WORDS["image_openings"])]
        parts += [toy_images.grammar(toy_images.ask(rng, scene, "describe")[1])]
        parts += [message["content"] for message in toy_images.conversation(rng, scene, 5)]
    elif genre < len(TALES):
        parts = [rng.choice(wordings) for wordings in TALES[genre]]
    elif genre == len(TALES):  # facts, half of them as answers to their questions
        facts = rng.sample(FACTS, rng.randint(9, 11))
        parts = [rng.choice((answer, f"{asked} {answer}")) for asked, answer in facts]
    else:  # which animal is bigger, seven times
        parts = [rng.choice(WORDS["comparisons"]).format_map(fill_slots(rng)) for _ in range(7)]
    return toy_images.grammar(" ".join(parts).format_map(slots))


def text_chat(rng) -> list:
    """The messages of a chat: two to four questions or remarks, each with its answer.

    There is always a sum, as sums have so many values that chats are hardly ever equal. Added are a
    comparison or a fact, something to remember that is asked for at the end, or a greeting.
    """
    slots = fill_slots(rng)
    *told, asked, known = rng.choice(WORDS["memories"])
    easy = rng.choice((rng.choice(WORDS["size_questions"]), rng.choice(FACTS)))
    pairs = [rng.choice(WORDS["sums"]), easy][:rng.randint(1, 2)]
    rng.shuffle(pairs)
    # Each pair has slots of its own, or every name and colour in a chat would be the one to
    # remember. Both are always drawn, so that the random numbers do not depend on their count.
    own_slots = [fill_slots(rng), fill_slots(rng)]
    pairs = [[text.format_map(own) for text in pair]
             for pair, own in zip(pairs, own_slots, strict=False)]
    if len(pairs) == 1 or rng.random() < 0.6:
        pairs = [told, *pairs, (asked, known)]
    if len(pairs) < 4 and rng.random() < 0.4:
        pairs = rng.choice(([rng.choice(WORDS["greetings"]), *pairs],
                            [*pairs, rng.choice(WORDS["thanks"])]))
    return toy_images.turns(*[[toy_images.grammar(text.format_map(slots)) for text in pair]
                              for pair in pairs])
