"""Supported forms of a row: a text, a chat, images; docs/data.md has an example of each.

A ValueError says why a row cannot be used.
"""

import base64
import json
import re
from pathlib import Path
from typing import NamedTuple

from tokenizer import END_OF_TEXT, IMAGE_MARK

ENDS = re.compile(r"\A(\s*<\|endoftext\|>)+|(<\|endoftext\|>\s*)+\Z")

# Names of columns and roles, in any case. Of several columns of a kind the first is read; a "text"
# asks or is said about an image, a "file" may be one, and text of "metadata" belongs into no turn.
WORDS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
COLUMNS = {kind: names.split() for kind, names in WORDS["columns"].items()}
METADATA = frozenset(WORDS["metadata"].split())
ROLES = {name: role for role, names in WORDS["roles"].items() for name in names.split()}
ROLE_KEYS, TEXT_KEYS = ("from", "role", "speaker"), ("value", "content", "text")
TURN_KEYS = {*ROLE_KEYS, *TEXT_KEYS, "weight", "tool_calls", "tool_call_id", "name", "markdown"}
BASE64 = re.compile(  # of a JPEG, PNG, GIF, WebP or TIFF, or of anything in a data: URL
    r"(?:data:[^,]*;base64,|(?=/9j/|iVBOR|R0lGOD|UklGR|SUkq|TU0A))([A-Za-z0-9+/\s]+)={0,2}\s*")
TOOLS = {"result": "user", "call": "assistant"}  # who says it in the chat template
NUMBERED = re.compile(r"(image|img)_?\d")  # columns
IMAGE_NAME = re.compile(r"\.(jpe?g|png|gif|webp|avif|bmp|tiff?|heic|heif)$|^data:image/", re.I)
# The place of an image: <image>, <IMAGE>, <img>, <image1>, <|image_1|>, <image_placeholder>, [IMG]
MARK = re.compile(
    r"<\|?(?:image|img|picture)(?:[ _-]?(?:(\d+)|placeholder|pad|token|soft_token|here))?\|?\s?/?>"
    r"(?:</im(?:age|g)>)?|\[(?:image|img)[ _-]?(\d*)\]|<start_of_image>", re.I)
OWN_LINE = re.compile(rf"^[ \t]*(?:{MARK.pattern})|(?:{MARK.pattern})[ \t]*$", re.I | re.M)
QUALITIES = ("very poor", "poor", "average", "good", "excellent")
MAX_IMAGES = 4  # of a row


class Chat(NamedTuple):
    """What is read of a row."""

    messages: list  # {"role", "content"}; "supervised": False where an answer is not learnt
    images: list  # each its name or bytes; one for each <image> mark, or without any mark


class Columns(dict):
    """A row by its column names in lower case; `used` are those that have been read."""

    def __init__(self, row):
        row = {"messages": row} if isinstance(row, list) else row
        if not isinstance(row, dict):
            raise ValueError("row is not a JSON object")
        super().__init__({str(name).lower(): value for name, value in row.items()})
        self.used = set()

    def take(self, kind):
        """The first column of a kind that has content, else the first that is there, else None."""
        if self.keys().isdisjoint(COLUMNS[kind]):
            return None
        name = first_of(self, COLUMNS[kind])
        self.used.add(name)
        return self.get(name)

    def unread(self, chats=()):
        """The columns with text or an image that were not read and do not repeat a turn of some
        Chats, or all of them."""
        found = [name for name in self.keys() - self.used - METADATA if has_content(self[name])]
        if found and chats:
            texts = {message["content"].replace(IMAGE_MARK, "").strip()
                     for chat in chats for message in chat.messages}
            found = [name for name in found if not isinstance(self[name], str) or not (
                self[name].strip() in texts
                or (len(texts - {""}) > 1 and all(map(self[name].count, texts))))]
        return sorted(found)


def first_of(row, names):
    """The first of some names that has content in a row, else the first in it, else None."""
    empty = None
    for name in names:
        value = row.get(name)
        if value or value is False or value == 0:
            return name
        if value is not None:
            empty = empty or name
    return empty


def has_content(value):
    """Whether there is text or bytes in a value, or nested in it."""
    if isinstance(value, str | bytes):
        return bool(value.strip())
    values = value.values() if isinstance(value, dict) else value
    return isinstance(value, list | dict) and any(map(has_content, values))


def columns_of(row):
    """The columns of a row, for messages."""
    names = sorted(str(name)[:40] for name in row) if isinstance(row, dict) else []
    return f"; its columns are {', '.join(names[:20])}" * bool(names)


def text_of(row, field):
    """The text of a row, which is in a field of it, or is the row itself (of a .txt file)."""
    text = row.get(field) if isinstance(row, dict) else row
    if isinstance(text, str) and END_OF_TEXT in text:  # around a document it is no text
        text = ENDS.sub("", text).strip("\n")
    if not (isinstance(text, str) and text.strip()):
        raise ValueError(f"no text in the field {field}{columns_of(row)}")
    return text


def chats_of(row, min_rating=(), answer=None):
    """([Chat], [name of a column with text or an image that is not used]) of a row.

    There are several Chats where the answer is a list, like the captions of one image. min_rating:
    (name, lowest) pairs; answers that the column <name>_ratings rates lower are left out. answer:
    stands for the last answer of a row that has none.
    """
    columns = Columns(row)
    images, turns = images_in(columns), from_json(columns.take("turns"))
    answers, unread = [[]], set()  # also the columns of turns
    if turns:
        turns = [t for item in rated(turns, columns, min_rating) for t in turns_in(item, unread)]
        if answer and turns[-1]["role"] in ("user", "result"):
            answers = [[{"role": "assistant", "content": answer}]]
    else:
        turns, answers = question_and_answers(columns, bool(images), answer, row)
    history = from_json(columns.take("history")) or []
    if not isinstance(history, list):
        raise ValueError("turns of another form")
    turns = [turn for item in history for turn in turns_in(item, unread)] + turns
    if turns[0]["role"] != "system" and (system := columns.take("system")):
        turns.insert(0, {"role": "system", "content": system})
    chats = [checked(turns + answer, images) for answer in answers]
    return chats, sorted(unread.union(columns.unread(chats)))


def chat_of(row, answer=None):
    """The Chat of a row that has only one; see chats_of."""
    chats, _ = chats_of(row, answer=answer)
    if len(chats) > 1:
        raise ValueError("several answers")
    return chats[0]


def question_and_answers(columns, has_image, default, row):
    """([the user's turn], [[the assistant's turn], ...]) of columns like instruction, response."""
    question, about, answer = map(columns.take, ("question", "input", "answer"))
    if answer is None:
        answer = columns.take("label") if isinstance(columns.get("label"), str) else default
    if question is None and about is None and answer is not None:
        question = columns.take("text")
    elif answer is None and has_image:
        answer = columns.take("text")
    if answer is None:
        raise ValueError(f"no chat and no answer in it{columns_of(row)}")
    parts = [part for part in (question, about) if part]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("a question that is not text")
    if not (parts or has_image):
        raise ValueError(f"an empty question{columns_of(row)}")
    answers = answer if isinstance(answer, list) and answer else [answer or ""]
    return [{"role": "user", "content": "\n".join(parts)}], [
        [{"role": "assistant", "content": text}] for text in answers]


def turns_in(item, unread):
    """The turns in an item of a list: one, or the two of a question and its answer. The columns of
    the item that nothing reads are added to `unread`."""
    role = isinstance(item, dict) and item.get(first_of(item, ROLE_KEYS))
    if role and item.keys() <= TURN_KEYS:
        return [turn_of(item, role)]
    if isinstance(item, dict):
        columns = Columns(item)
        if role:
            columns.used |= TURN_KEYS
            unread |= set(columns.unread())
            return [turn_of(item, role)]
        item = [columns.take("question"), columns.take("answer")]
        unread |= set(columns.unread())
    if not (isinstance(item, list) and len(item) == 2 and all(isinstance(t, str) for t in item)):
        raise ValueError("turns of another form")
    return [{"role": role, "content": text}
            for role, text in zip(("user", "assistant"), item, strict=True)]


def turn_of(item, role):
    """A turn: its role in ROLES, its content and whether it is supervised."""
    if not isinstance(role, str):
        raise ValueError("turns of another form")
    if role.strip().lower() not in ROLES:
        raise ValueError(f"unknown role {role[:40]!r}")
    content, calls = item.get(first_of(item, TEXT_KEYS)), item.get("tool_calls")
    if calls:
        said, calls = content_of(content or "", []), json.dumps(calls, ensure_ascii=False)
        role, content = "tool_call", f"{said}\n{calls}" if said else calls
    weight = item.get("weight")
    if weight not in (None, 0, 1):
        raise ValueError("a turn whose weight is neither 0 nor 1")
    turn = {"role": ROLES[role.strip().lower()], "content": content}
    return {**turn, "supervised": False} if weight == 0 else turn


def rated(turns, columns, min_rating):
    """The items of a list of turns without those that are rated too low."""
    if not isinstance(turns, list):
        raise ValueError("turns of another form")
    keep = [True] * len(turns)
    for name, lowest in min_rating:
        ratings = columns.get(f"{name}_ratings")
        if not isinstance(ratings, list) or len(ratings) != len(turns):
            raise ValueError(f"no {name}_ratings, or another number of them than of turns")
        keep = [k and (n is None or n >= lowest) for k, n in zip(keep, ratings, strict=True)]
    if not any(keep):
        raise ValueError("ratings below --min_rating")
    return [turn for turn, k in zip(turns, keep, strict=True) if k]


def checked(turns, images):
    """The Chat of turns and the images of the row; ValueError if they do not fit together."""
    messages, shown, previous = [], [], None
    for turn in turns:
        role = TOOLS.get(turn["role"], turn["role"])
        content = content_of(turn["content"], shown)
        if role != "user" and content is not turn["content"] and IMAGE_MARK in content:
            raise ValueError("an image mark outside of a user's turn")
        if role == "system" and isinstance(content, str) and not content.strip():
            continue
        if messages and role == messages[-1]["role"] and TOOLS.keys() & {turn["role"], previous}:
            messages[-1]["content"] = f"{messages[-1]['content']}\n{content}"
        else:
            messages.append({**turn, "role": role, "content": content})
        previous = turn["role"]
    if len(messages) > 1 and messages[-1]["role"] == "user":
        messages.pop()  # a question without an answer
    body = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if [m["role"] for m in body] != ["user", "assistant"] * (len(body) // 2) or not body:
        raise ValueError("turns out of order")
    if not all(isinstance(m["content"], str) for m in messages):
        raise ValueError("a turn without text")
    answers = [m for m in messages if m["role"] == "assistant"]
    if not all(m["content"].strip() for m in answers):
        raise ValueError("an empty answer")
    if not any(m.get("supervised", True) for m in answers):
        raise ValueError("no answer with a weight of 1")
    images = placed(messages, shown or images)
    questions = [m["content"].strip() for m in body[::2]]
    first_has_image = images and not any(IMAGE_MARK in question for question in questions)
    if not all(questions[1:]) or not (questions[0] or first_has_image):
        raise ValueError("an empty question")
    return Chat(messages, images)


def content_of(content, images):
    """The text of a turn; of a list of parts with IMAGE_MARK for each image, which is appended to
    `images` unless it is in a column of the row."""
    if not isinstance(content, list | dict):
        return content
    text = ""
    for part in content if isinstance(content, list) else [content]:
        part = part if isinstance(part, dict) else {"text": part}
        kind, found = str(part.get("type")), images_in(Columns(part))
        if found or "image" in kind:
            text += IMAGE_MARK + (part.get("text") or "")
            images += found
        elif isinstance(part.get("text"), str):
            text += part["text"]
        else:
            raise ValueError(f"a part of a turn of the type {kind[:40]}")
    return text


def placed(messages, images):
    """The images in the order of their marks, which all become IMAGE_MARK in the messages."""
    if len(images) > MAX_IMAGES:
        raise ValueError(f"more than {MAX_IMAGES} images")
    numbers = []  # of the marks; None for those without
    for message in messages:
        text = message["content"]
        if images and message["role"] == "user":
            numbers += [a or b for a, b in MARK.findall(text)]
            message["content"] = MARK.sub(IMAGE_MARK, text)
        elif ("<" in text or "[" in text) and OWN_LINE.search(text):
            raise ValueError("an image mark outside of a user's turn" if images
                             else "an image mark, but no image")
    if len(numbers) not in (0, len(images)):
        raise ValueError("another number of images than of marks in the text")
    if not any(numbers):
        return images
    first = "1" if "0" not in numbers else "0"
    if sorted(numbers) != [str(int(first) + i) for i in range(len(images))]:
        raise ValueError("image marks that are not numbered in sequence")
    return [images[int(number) - int(first)] for number in numbers]


def images_in(columns):
    """The images in a row or a part of a turn, each its name or bytes."""
    found = images_of(columns.take("image"))
    if not found:  # several columns: image_1, image_2, ...
        names = sorted(filter(NUMBERED.fullmatch, columns))
        columns.used |= set(names)
        found = [image for name in names for image in images_of(columns[name])]
    if not found:
        names = [name for name in COLUMNS["file"]
                 if name in columns and IMAGE_NAME.search(str(columns[name]))]
        found = images_of([columns[name] for name in names[:1]])
    if found:
        names = {base_name(image) for image in found if isinstance(image, str)}
        columns.used |= {  # other names of the same images
            name for name in COLUMNS["image"] if isinstance(columns.get(name), str)
            and (len(names) < len(found) or base_name(columns[name]) in names)}
    return found


def base_name(path):
    return path.replace("\\", "/").split("/")[-1]


def images_of(value):
    """The images in a value: a name, bytes, base64, a dict as in parquet files or OpenAI's form, or
    a list of them."""
    value = from_json(value)
    if isinstance(value, list):
        return [image for item in value for image in images_of(item)]
    if value in (None, ""):
        return []
    if isinstance(value, dict):
        names = ("bytes", "url", "path", "image_url", "image", "file_name")
        return images_of(value.get(first_of(value, names)) or 0)
    if not isinstance(value, str | bytes):
        raise ValueError("an image that is neither a name nor bytes")
    if isinstance(value, str) and (data := BASE64.fullmatch(value)):
        return [base64.b64decode(data[1] + "==")]
    if isinstance(value, str) and value.startswith("data:"):
        raise ValueError("a malformed data: URL")
    return [value]


def from_json(value):
    """A value, parsed if it is a string with a list or object in JSON."""
    try:
        return json.loads(value) if isinstance(value, str) and value[:1] in ("[", "{") else value
    except (ValueError, RecursionError):
        return value


def check_quality(row, cfg):
    """ValueError if a chat is too poor by Magpie's columns (arXiv 2406.08464, section 3), where the
    row has them. min_similar_uuid names the one row of a group of near-duplicates that is kept."""
    quality, reward, language = map(row.get, ("input_quality", "instruct_reward", "language"))
    if quality in QUALITIES and QUALITIES.index(quality) < QUALITIES.index(cfg.min_quality):
        raise ValueError(f"input quality below {cfg.min_quality}")
    if isinstance(reward, int | float) and reward < cfg.min_reward:
        raise ValueError(f"instruct reward below {cfg.min_reward:g}")
    similar, own = row.get("min_similar_uuid"), row.get("uuid")
    if cfg.drop_duplicates and None not in (similar, own) and similar != own:
        raise ValueError("a near-duplicate of another row")
    if cfg.language and isinstance(language, str) and language.upper() != cfg.language.upper():
        raise ValueError(f"a language other than {cfg.language}")
    if cfg.safe_only and row.get("llama_guard_2") not in (None, "safe"):
        raise ValueError("not marked as safe")
