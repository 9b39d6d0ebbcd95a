"""The claims of prep/toy_stories.py: small varied English, and right in every answer."""
import random
import re
from collections import Counter

from prep import toy_images, toy_stories


def test_stories_are_small_english_and_varied():
    rng = random.Random(0)
    stories = [toy_stories.story(rng) for _ in range(2000)]
    words = Counter(re.findall(r"[a-z]+", " ".join(stories).lower()))
    assert 250 <= len(words) <= 600
    assert all(40 <= len(text.split()) <= 150 for text in stories)
    assert len(set(stories)) > 0.99 * len(stories)
    openings = Counter(" ".join(text.split()[:5]) for text in stories)
    assert openings.most_common(1)[0][1] < 0.1 * len(stories)
    assert not re.search(r"[{}|/]|\ba [aeiou]|  ", " ".join(stories), flags=re.I)
    assert not re.search(r"(^|[.!?] |\.\" )\"?[a-z]", "\n".join(stories))


def test_chats_sum_compare_and_remember_correctly():
    rng, seen = random.Random(0), set()
    for _ in range(3000):
        chat = toy_stories.text_chat(rng)
        assert [m["role"] for m in chat] == ["user", "assistant"] * (len(chat) // 2)
        assert 2 <= len(chat) // 2 <= 4
        said = [m["content"] for m in chat]
        seen.add(tuple(said))
        for at, (text, answer) in enumerate(zip(said[::2], said[1::2], strict=True)):
            numbers = [toy_images.NUMBERS.index(w) for w in text.split() if w in toy_images.NUMBERS]
            who = re.fullmatch(r"(\w+) has .* and (\w+) has .*\. Who has (more|fewer)\?", text)
            which = re.fullmatch(r"Which is (bigger|smaller), an? (\w+) or an? (\w+)\?", text)
            if "How many" in text and len(numbers) == 2:
                n = numbers[0] - numbers[1] if "gave" in text else sum(numbers)
                assert answer.startswith(f"You have {toy_images.NUMBERS[n]} ")
            elif who:
                first = (numbers[0] > numbers[1]) == (who[3] == "more")
                assert answer.startswith(f"{who[1] if first else who[2]} has {who[3]} ")
            elif which:
                pick = max if which[1] == "bigger" else min
                animal = pick(which.group(2, 3), key=toy_stories.ANIMALS.index)
                assert f" {animal} is {which[1]}" in answer
            elif re.search(r"\bmy\b.*\?|^Where is the \w+ \w+\?", text) and at:
                value = re.search(r"(?:is|called|Your \w+ is|It is) ([^.]+)\.|^(\w+) has", answer)
                assert (value[1] or value[2]).split()[-1] in " ".join(said[:2 * at])
    assert len(seen) > 0.99 * 3000
