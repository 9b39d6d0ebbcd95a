"""Random changes to files and values, and a count of how the changed ones are taken."""

import contextlib
import signal
import time
from collections import Counter

from common.config import UserError

SECONDS = 10  # of computing for one mutant
NASTY = (None, True, -1, 0, 2**70, 1e308, float("nan"), "", " ", "\0", "\ud800", "<image>" * 6,
         "<|end|>", "../../x.png", "/dev/zero", "a" * 9999, "é\u202e\n\x1b[31m", [], {}, [[[]]],
         [None], {"bytes": None}, {"path": 3}, [{}], {"from": "gpt"})


def mutated(content, generator, other=b""):
    """`content` (bytes) changed at one to four places; half of the places are among the first."""
    for _ in range(generator.choice((1, 1, 1, 2, 4))):
        at = generator.randrange(max(1, min(len(content), generator.choice((64, len(content))))))
        n = generator.choice((1, 2, 4, 30))
        noise = bytes(generator.choices((0, 255, 127, 128, generator.randrange(256)), k=n))
        content = generator.choice((
            content[:at] + noise + content[at + n :],  # replaced
            content[:at] + noise + content[at:],  # put in
            content[:at] + content[at + n :],  # taken out
            content[:at] + content[at : at + n] * 40 + content[at:],  # repeated
            content[:at] + bytes(c ^ 1 << n % 8 for c in content[at : at + 1]) + content[at + 1 :],
            content[:at] + other[at // 2 :],  # spliced
            content[: at + len(content) // 2],  # cut off
        ))
    return content


def mutated_value(value, generator):
    """A JSON value with something in it replaced, left out, doubled or renamed."""
    if isinstance(value, dict | list) and value and generator.random() < 0.8:
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        i = generator.randrange(len(items))
        key, inner = items[i]
        kind = generator.randrange(6)
        items[i : i + 1] = ([] if kind == 0 else [items[i]] * 2 if kind == 1
                            else [(str(key)[::-1], inner)] if kind == 2
                            else [(key, mutated_value(inner, generator))])
        return dict(items) if isinstance(value, dict) else [inner for _, inner in items]
    return generator.choice(NASTY)


class Hang(BaseException):
    """Nobody who catches errors catches this."""


@contextlib.contextmanager
def limited(what):
    """A mutant has SECONDS of computing, and a minute in all where it waits for something."""
    def stop(number, frame):
        raise Hang(what)

    before, began = signal.signal(signal.SIGALRM, stop), time.process_time()
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - began < SECONDS, what


class Tally:
    """How many mutants of a kind were tried, and how they were taken; whole() is taken first."""

    def __init__(self, kind, whole):
        self.kind, self.counts = kind, Counter()
        whole()

    def attempt(self, names, call):
        """Call it; a refusal has to be one line with one of the names in it, for a terminal."""
        self.counts["tried"] += 1
        with limited(f"{self.kind} {self.counts['tried']}"):
            try:
                call()
            except UserError as error:
                self.counts["refused"] += 1
                said = str(error)
                assert any(name in said for name in names), said
                assert len(said.splitlines()) == 1 and said.encode() and len(said) < 1000, said
            else:
                self.counts["accepted"] += 1

    def show(self):
        print(f"{self.kind}: {dict(self.counts)}")
        assert self.counts["refused"] > self.counts["tried"] / 10, self.counts
