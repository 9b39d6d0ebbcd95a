"""What the demo's data set is drawn from: stories, chats, captioned and questioned pictures.

Everything comes from one random generator in a fixed order, so a seed gives the same data set in
any process; prepare.py demo writes it down.
"""

import io

import world


def distinct(draw, n):
    """n different results of draw(), in the order drawn."""
    found = {}
    while len(found) < n:
        found.setdefault(draw())
    return list(found)


def words_of(rng, stories, chats):
    """Strings of every kind the vocabulary has to spell."""
    yield from stories
    for chat in chats:
        yield from (message["content"] for message in chat)
    for _ in range(4000):
        scene = world.draw_scene(rng, "any")
        yield world.caption(rng, scene)
        yield from (message["content"] for message in world.conversation(rng, scene, 5))


def captioned(rng, pairs, cfg, split):
    """(messages, [encoded picture]): a request for a caption, and the caption."""
    scene = world.draw_scene(rng, pairs)
    messages = [{"role": "user", "content": rng.choice(world.CAPTION_REQUESTS)},
                {"role": "assistant", "content": world.caption(rng, scene)}]
    return messages, [png(scene, cfg.image_size)]


def questioned(rng, pairs, cfg, split):
    """A picture with a chat; validation pictures have one question each, kinds in equal parts."""
    scene = world.draw_scene(rng, pairs)
    if split == "train":
        return world.conversation(rng, scene, cfg.questions), [png(scene, cfg.image_size)]
    kind = rng.choice(world.QUESTION_KINDS)
    question, answer = world.question(rng, scene, kind)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages, [png(scene, cfg.image_size)], kind


def png(scene, size):
    """The scene as the bytes of a PNG file."""
    file = io.BytesIO()
    world.paint(scene, size).save(file, "PNG", compress_level=1)
    return file.getvalue()
