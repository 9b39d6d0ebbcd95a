"""Supported forms of a row: a text, a chat, images. A ValueError says why a row cannot be used."""

from tokenizer import IMAGE_MARK

QUALITIES = ("very poor", "poor", "average", "good", "excellent")
MAX_IMAGES = 4  # of a row


def text_of(row, field):
    """The text of a row, which is in a field of it, or is the row itself (of a .txt file)."""
    text = row.get(field) if isinstance(row, dict) else row
    if not (isinstance(text, str) and text.strip()):
        raise ValueError(f"no text in the field {field}")
    return text


def messages_of(row):
    """The turns of a chat row as [{"role", "content"}], from any of the supported forms."""
    if not isinstance(row, dict):
        raise ValueError("row is not a JSON object")
    turns = row.get("conversations") or row.get("messages") or instruction_turns(row)
    if not (isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)):
        raise ValueError("turns of another form")
    messages = [{"role": first_of(turn, "from", "role"),
                 "content": first_of(turn, "value", "content")} for turn in turns]
    if not all(isinstance(m["role"], str) for m in messages):
        raise ValueError("turns of another form")
    for m in messages:
        m["role"] = {"human": "user", "gpt": "assistant"}.get(m["role"], m["role"])
    if messages[-1]["role"] == "user" and len(messages) > 1:
        messages.pop()  # a question without an answer
    body = messages[1:] if messages[0]["role"] == "system" else messages
    if [m["role"] for m in body] != ["user", "assistant"] * (len(body) // 2) or not body:
        raise ValueError("turns out of order")
    if not all(isinstance(m["content"], str) for m in messages):
        raise ValueError("a turn without text")
    if not all(m["content"].strip() for m in messages if m["role"] == "assistant"):
        raise ValueError("an empty answer")
    return messages


def first_of(row, *names):
    """The first of some fields that has content, else the first that is there, else None."""
    found = [row[name] for name in names if row.get(name) is not None]
    return max(found, key=bool, default=None)  # of equals max gives the first


def instruction_turns(row):
    """The two turns of a row with columns like instruction and response, or image and caption."""
    question = first_of(row, "instruction", "prompt") or ""
    if not isinstance(question, str):
        raise ValueError("a question that is not text")
    question += f"\n{row['input']}" if row.get("input") else ""
    answer = first_of(row, "response", "output", "caption")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


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


def images_of(row, messages):
    """The images of a row, each its name or bytes, from the field image, images or image_path.

    Where the messages have <image> marks, there must be one for each image.
    """
    fields = map(row.get, ("image", "images", "image_path"))
    found = next((value for value in fields if value not in (None, "", [])), [])
    found = [image_of(item) for item in (found if isinstance(found, list) else [found])]
    if len(found) > MAX_IMAGES:
        raise ValueError(f"more than {MAX_IMAGES} images")
    marks = sum(m["content"].count(IMAGE_MARK) for m in messages if m["role"] == "user")
    if marks not in (0, len(found)):
        raise ValueError(f"images and {IMAGE_MARK} marks do not match")
    return found


def image_of(item):
    """The name or bytes of one image; parquet files and the hub have {bytes, path}."""
    if isinstance(item, dict):
        item = item.get("path") if item.get("bytes") is None else item["bytes"]
    if not isinstance(item, str | bytes) or item == "":
        raise ValueError("an image that is neither a name nor bytes")
    return item
