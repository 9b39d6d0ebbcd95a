"""The claims of prep/schema.py: a row is read completely in every common form, or refused."""

import base64
import json
import re
from pathlib import Path

import pytest

from prep.schema import ROLES, Columns, chat_of, chats_of, images_in
from tokenizer import image_slots

DOCS = Path(__file__).parents[2] / "docs/data.md"
FORMS = re.findall(r"^\| ([^|]+) \| `(.+)` \| (.+) \|$", DOCS.read_text(encoding="utf-8"), re.M)
ASK, RED = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "Red."}


def shown(chat):
    """A Chat as docs/data.md writes it."""
    images, turns = iter(chat.images), []
    for message, pieces in zip(chat.messages, image_slots(chat.messages, len(chat.images)),
                               strict=True):
        text = "".join(f"[{next(images)}]" if piece is None else piece for piece in pieces)
        turn = f"{message['role']}: {text}".replace("\n", "\\n")
        supervised = message["role"] == "assistant" and message.get("supervised", True)
        turns.append(f"**{turn}**" if supervised else turn)
    return " ".join(turns)


@pytest.mark.parametrize("name, row, expected", FORMS, ids=[form[0] for form in FORMS])
def test_a_form_becomes_what_the_documentation_says(name, row, expected):
    chats, unread = chats_of(json.loads(row))
    assert " and ".join(map(shown, chats)).replace("] **", "] **") == expected
    assert unread == []


@pytest.mark.parametrize("row", [row for _, row, _ in FORMS if row[0] == "{"])
def test_no_column_with_text_or_an_image_is_unread_in_silence(row):
    row = json.loads(row)
    for value in "Some notes.", ["nested", {"text": "notes"}], {"bytes": b"\x89PNG"}, "7", "红色":
        assert chats_of({**row, "notes": value})[1] == ["notes"]
    for name, value in {"notes": "", "width": 640, "id": "a b", "category": "closed", "url": "http",
                        "flag": True, "nothing": None, "empty": [None, ""]}.items():
        assert chats_of({**row, name: value})[1] == []


def test_text_beside_a_turn_or_a_part_is_named_or_read():
    assert chats_of([ASK, {**RED, "reasoning": "It looks red."}])[1] == ["reasoning"]
    texts = [{"user": "What?", "assistant": "Red.", "hint": "Look at the sky.", "source": "x"}]
    assert chats_of({"texts": texts})[1] == ["hint"]
    assert chats_of({"question": "", "image": "p.jpg", "answer": "a", "notes": "A fair day"})[1]
    ask = {**ASK, "content": [{"type": "image", "image": "p.jpg", "text": "What?"}]}
    assert shown(chat_of([ask, RED])) == "user: [p.jpg]What? **assistant: Red.**"
    call = {"role": "assistant", "content": "I add.", "tool_calls": ["add"]}
    answers = chat_of([ASK, call, {"role": "tool", "content": "3"}, RED]).messages[1]["content"]
    assert answers == 'I add.\n["add"]'


def test_what_repeats_the_chat_is_not_called_unread():
    row = {"conversations": [ASK, RED], "problem": "What?", "final": " Red.\n",
           "text": "### Question: What? ### Answer: Red."}
    assert chats_of(row)[1] == []
    assert chats_of({**row, "prompt": "Who?"})[1] == ["prompt"]
    named = {"image": "a/p.jpg", "caption": "Red.", "file_name": "p.jpg", "image_path": "b/p.jpg"}
    assert chats_of(named)[1] == [] and chats_of({**named, "img": "b/q.jpg"})[1] == ["img"]
    assert chats_of({"image": b"content", "caption": "Red.", "image_url": "http://x/p"})[1] == []
    assert chats_of({"image": "p.jpg", "caption": "Red.", "img": {"bytes": b"x"}})[1] == ["img"]


@pytest.mark.parametrize("column", ["query", "problem", "Instruction", "PROMPT", "user", "input"])
@pytest.mark.parametrize("answer", ["response", "output", "answer", "completion", "solution"])
def test_a_question_is_read_under_every_common_name(column, answer):
    assert shown(chat_of({column: "What?", answer: "Red."})) == "user: What? **assistant: Red.**"


@pytest.mark.parametrize("value", [
    "p.jpg", ["p.jpg"], {"path": "p.jpg", "bytes": None}, [{"url": "p.jpg"}], '["p.jpg"]',
    {"image_url": {"url": "p.jpg"}}, [{"path": "p.jpg"}, None]])
@pytest.mark.parametrize("column", ["image", "Images", "image_path", "image_file", "img", "jpg",
                                    "image_url", "picture", "image_1", "file_name"])
def test_an_image_is_read_under_every_common_name(column, value):
    if column == "file_name":
        value = "p.jpg"
    chats, unread = chats_of({column: value, "caption": "Red."})
    assert shown(chats[0]) == "user: [p.jpg] **assistant: Red.**" and unread == []


def test_images_in_base64_are_decoded():
    content = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 3
    text = base64.b64encode(content).decode()
    for value in text, f"data:image/png;base64,{text}", {"url": f"data:image/png;base64,{text}"}:
        assert images_in(Columns({"image": value})) == [content]
    assert images_in(Columns({"image": "no" * 300})) == ["no" * 300]
    for value in "data:image/png;base64", "data:image/png;base64,a.b", "data:,x":
        with pytest.raises(ValueError, match="a malformed data: URL"):
            images_in(Columns({"image": value}))


MARKS = ["<image>", "<IMAGE>", "<img>", "<image1>", "<image_1>", "<Image-1>", "<image 1>", "<img/>",
         "<image_placeholder>", "<|image|>", "<|image_1|>", "<|image_pad|>", "[IMG]", "[image]",
         "<image></image>", "<start_of_image>", "<ImageHere>", "<image_soft_token>", "<picture>"]


@pytest.mark.parametrize("mark", MARKS)
def test_a_mark_is_the_place_of_an_image_or_refused(mark):
    ask = {"role": "user", "content": f"Look: {mark}"}
    assert shown(chat_of({"image": "p.jpg", "messages": [ask, RED]})) == (
        "user: Look: [p.jpg] **assistant: Red.**")
    answer = {"role": "assistant", "content": f"{mark}\nRed."}
    for row, reason in (
            ({"messages": [ask, RED]}, "an image mark, but no image"),
            ({"image": ["p.jpg", "q.jpg"], "messages": [ask, RED]}, "another number of images"),
            ({"image": "p.jpg", "messages": [ASK, answer]}, "outside of a user's turn")):
        with pytest.raises(ValueError, match=reason):
            chat_of(row)


@pytest.mark.parametrize("marks, order", [("<image1> <image2>", "ab"), ("<image2> <image1>", "ba"),
                                          ("<image_1> <image_0>", "ba"), ("<image> <img>", "ab")])
def test_numbered_marks_order_the_images(marks, order):
    row = {"images": ["a", "b"], "question": marks, "answer": "x"}
    assert "".join(chat_of(row).images) == order


def test_html_in_a_text_is_ordinary_text():
    chat = chat_of({"question": "What does the <img> tag do? <image", "answer": "Use <img> here."})
    assert chat.messages[0]["content"].startswith("What does the <img>") and not chat.images


@pytest.mark.parametrize("role", sorted({*ROLES, "Human", " GPT ", "ChatGPT", "User"}))
def test_roles_are_known_in_any_case(role):
    kind = ROLES[role.strip().lower()]
    turns = [{"role": role, "content": "A"}, {"role": "user", "content": "B"}, RED]
    if kind in ("user", "result"):
        turns = [turns[0], RED]
    elif kind in ("assistant", "call"):
        turns = [ASK, turns[0]]
    assert [m["role"] for m in chat_of(turns).messages][-2:] == ["user", "assistant"]


@pytest.mark.parametrize("row, reason", [
    ({"instruction": "", "input": "", "output": "x"}, "an empty question; its columns are input"),
    ({"notes": "What?", "output": "x"}, "an empty question; its columns are notes, output"),
    ({"notes": "What?", "remarks": "x"}, "no chat and no answer in it; its columns are notes"),
    ([ASK, RED, {**ASK, "content": ""}, RED], "an empty question"),
    ({"image": "p.jpg", "turns": [ASK, RED, {**ASK, "content": " "}, RED]}, "an empty question"),
    ({"image": "p.jpg", "turns": [{**ASK, "content": ""}, RED, {**ASK, "content": "<image>"}, RED]},
     "an empty question"),
    ([{"role": "narrator", "content": "x"}, RED], "unknown role 'narrator'"),
    ({"image": "p.jpg", "caption": []}, "an empty answer"),
    ({"instruction": "x", "output": "y", "history": "Hi"}, "turns of another form"),
    ([ASK, {**RED, "content": [{"type": "image", "image": "p.jpg"}]}], "outside of a user's turn"),
    ([{"role": "system", "content": 7}, ASK, RED], "a turn without text"),
    ([ASK, {**RED, "weight": 0}], "no answer with a weight of 1"),
    ([ASK, {**RED, "weight": 0.5}], "neither 0 nor 1"),
    ([{**ASK, "content": [{"type": "video", "video": "a.mp4"}]}, RED], "of the type video"),
    ({"image": ["p.jpg"] * 5, "caption": "x"}, "more than 4 images"),
    ({"images": ["a", "b"], "question": "<image1> <image1>", "answer": "x"}, "not numbered"),
    ({"question": "x", "answer": {"text": ["a"]}}, "a part of a turn"),
    ({"conversations": "What? Red."}, "turns of another form"),
    ({"conversations": {"from": "human"}}, "turns of another form"),
    ({"conversations": [ASK, RED], "history": "x"}, "turns of another form"),
])
def test_a_row_that_would_lose_something_is_refused(row, reason):
    with pytest.raises(ValueError, match=reason):
        chats_of(row)


def test_answers_are_chosen_by_their_ratings():
    turns = [{"user": f"Q{i}", "assistant": f"A{i}"} for i in range(4)]
    row = {"images": ["p.jpg"], "texts": turns, "relevance_ratings": [5, 3, 4, None],
           "formatting_ratings": [5, 5, 2, 5], "relevance_min": 3}
    for wanted, kept in (((), "0123"), ((("relevance", 4),), "023"),
                         ((("relevance", 4), ("formatting", 3)), "03")):
        (chat,), _ = chats_of(row, wanted)
        assert [m["content"] for m in chat.messages[1::2]] == [f"A{i}" for i in kept]
    for wanted, reason in ((("relevance", 6),), None), ((("beauty", 1),), "no beauty_ratings"):
        rows = row | {"relevance_ratings": [1] * 4}
        with pytest.raises(ValueError, match=reason or "below --min_rating"):
            chats_of(rows, wanted)
