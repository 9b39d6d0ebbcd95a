"""What a row means: a text, a chat, a picture. A ValueError says why a row cannot be used."""

import zipfile
import zlib
from pathlib import Path

from common.config import UserError
from prep.sources import Piece, parsed

QUALITIES = ("very poor", "poor", "average", "good", "excellent")


def text_of(row, field):
    """The text of a row or a piece, or a ValueError."""
    if isinstance(row, Piece):
        if not (row or row.goes_on):
            raise ValueError("an empty file")
        return row
    text = row.get(field) if isinstance(row, dict) else None
    if not (isinstance(text, str) and text.strip()):
        raise ValueError(f"no text in the field {field}")
    return text


def texts_of(source, field, limit):
    """The first `limit` characters or so of the texts of a source, to train a vocabulary on."""
    for _, row, _ in source.rows():
        try:
            text = text_of(parsed(row), field)
        except ValueError:
            continue
        yield text
        limit -= len(text)
        if limit < 0:
            return


# ------------------------------------------------------------------------------------------- chats


def messages_of(row):
    """The turns of a chat row as role and content, whatever its form, or a ValueError."""
    if not isinstance(row, dict):
        raise ValueError("a row that is no object")
    turns = row.get("conversations") or row.get("messages")
    if turns:
        if not (isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)):
            raise ValueError("turns of another form")
        names = {"human": "user", "gpt": "assistant"}
        roles = [turn.get("from") or turn.get("role") for turn in turns]
        texts = [turn.get("value") or turn.get("content") for turn in turns]
        messages = [{"role": names.get(role, role), "content": text}
                    for role, text in zip(roles, texts, strict=True)]
    else:
        question = row.get("instruction") or row.get("prompt") or ""
        question += f"\n{row['input']}" if row.get("input") else ""
        answer = row.get("response") or row.get("output") or row.get("caption")
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if messages[-1]["role"] == "user" and len(messages) > 1:
        messages.pop()  # a question nobody answered
    body = messages[1:] if messages[0]["role"] == "system" else messages
    if [m["role"] for m in body] != ["user", "assistant"] * (len(body) // 2) or not body:
        raise ValueError("turns out of order")
    if not all(isinstance(m["content"], str) for m in messages):
        raise ValueError("a turn without text")
    if not all(m["content"].strip() for m in messages if m["role"] == "assistant"):
        raise ValueError("an empty answer")
    return messages


def check_quality(row, cfg):
    """ValueError if one of Magpie's columns, where the row has it, says that a chat is too poor.

    The columns are explained in arXiv 2406.08464, section 3. min_similar_uuid names the one row of
    a group of near-copies that stays.
    """
    quality, reward, language = map(row.get, ("input_quality", "instruct_reward", "language"))
    if quality in QUALITIES and QUALITIES.index(quality) < QUALITIES.index(cfg.min_quality):
        raise ValueError(f"input quality below {cfg.min_quality}")
    if isinstance(reward, int | float) and reward < cfg.min_reward:
        raise ValueError(f"instruct reward below {cfg.min_reward:g}")
    copied, own = row.get("min_similar_uuid"), row.get("uuid")
    if cfg.drop_duplicates and None not in (copied, own) and copied != own:
        raise ValueError("a near-copy of another row")
    if cfg.language and isinstance(language, str) and language.upper() != cfg.language.upper():
        raise ValueError(f"a language other than {cfg.language}")
    if cfg.safe_only and row.get("llama_guard_2") not in (None, "safe"):
        raise ValueError("not marked as safe")


# ---------------------------------------------------------------------------------------- pictures


def picture_finder(root):
    """A function from a row's picture name to its bytes, in a folder or a zip."""
    if str(root).endswith(".zip"):
        try:
            archive = zipfile.ZipFile(root)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"cannot read the pictures in {root}: {error}") from None
        names = {**{Path(name).name: name for name in archive.namelist()},
                 **{name: name for name in archive.namelist()}}

        def from_zip(name):
            found = names.get(name) or names.get(Path(name).name)
            if found is None:
                raise ValueError("a missing picture")
            try:
                return archive.read(found)
            except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError,
                    NotImplementedError):
                raise ValueError("an unreadable picture") from None

        return from_zip
    if not Path(root or ".").is_dir():
        raise UserError(f"there is no folder of pictures {root}; say --image_root=FOLDER or a .zip")

    def from_folder(name):
        for path in (Path(root or ".") / name, Path(root or ".") / Path(name).name):
            try:
                return path.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, ValueError):  # a ValueError for a name that no file can have
                raise ValueError("an unreadable picture") from None
        raise ValueError("a missing picture")

    return from_folder
