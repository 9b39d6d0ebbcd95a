"""Rows of local files in any common form, which their content tells, else their name.

The readers hold one row at a time. To support another form, add a reader, and a line in `reader`.
"""

import codecs
import csv
import io
import json
import lzma
import os
import re
import tarfile
from itertools import chain, groupby, islice

from common.archives import BLOCK, MAGIC, decompressed
from common.config import UserError, one_line
from tokenizer import END_OF_TEXT

LONGEST_TEXT = 1 << 32  # characters of a document in a .txt file
SEPARATORS = re.compile(r"[\s,]*")
# What the first bytes of a file say.
ENCODINGS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32",
             codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
             codecs.BOM_UTF16_BE: "utf-16"}
FOREIGN = {b"PK\3\4": "a zip archive (.zip, .docx, .xlsx)", b"7z\xbc\xaf": "a 7z archive",
           b"Rar!": "a rar archive", b"%PDF": "a PDF", b"\xd0\xcf\x11\xe0": "an Office document",
           b"<!DOCTYPE html": "an HTML page", b"<html": "an HTML page",
           b"version https://git-lfs": "a pointer of Git LFS, which `git lfs pull` replaces"}
WRAPPERS = ("data", "rows", "train", "items", "examples", "samples", "questions", "annotations")
DAMAGED = (EOFError, lzma.LZMAError, tarfile.TarError)  # and OSError without a number
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "heic", "avif")  # in a tar


def rows_of(path, encoding=""):
    """Yield (row, bytes) of a file of text, CSV, JSON, parquet or WebDataset, maybe compressed.

    encoding: of a text without a byte-order mark. A UserError names the file.
    """
    try:
        with open(path, "rb", BLOCK) as file:
            codec = next((MAGIC[magic] for magic in MAGIC if file.peek(8).startswith(magic)), "zip")
            if codec != "zip":  # which is refused later, by name
                file = io.BufferedReader(decompressed(file, codec), BLOCK)
            yield from reader(path, file, encoding)
    except (OSError, ValueError, RecursionError, csv.Error, *DAMAGED) as error:
        damaged = isinstance(error, DAMAGED) or getattr(error, "errno", 0) is None
        hint = "; it is damaged, so make or download it again" if damaged else ""
        raise UserError(f"cannot read {one_line(path)}: {one_line(error)}{hint}") from None


def reader(path, file, encoding):
    """An iterable of (row, bytes) of a file, in the form that its first bytes or its name say."""
    start = file.peek(BLOCK)
    name = re.sub(r"(\.(gz|zst|bz2|xz))+$", "", path.name.lower())
    for magic, what in FOREIGN.items():
        if start[: len(magic)].lower() == magic.lower():
            raise ValueError(f"it is {what}; unpack or convert it")
    if start.startswith(b"PAR1") or name.endswith(".parquet"):
        return read_parquet(path)
    if start[257:262] == b"ustar" or name.endswith((".tar", ".tgz")):
        return read_samples(file)
    if not start:
        return [(ValueError("an empty file"), 0)]
    marked = (name for mark, name in ENCODINGS.items() if start.startswith(mark))
    encoding = next(marked, encoding or "utf-8")
    if name.endswith((".txt", ".md")):
        return read_text(file, encoding)
    if name.endswith((".csv", ".tsv")):
        return read_csv(file, encoding)
    has_lines = is_lines(start.decode(encoding, "replace"), name.endswith(("jsonl", "ndjson")))
    return (read_lines if has_lines else read_values)(file, encoding)


def text_blocks(file, encoding, whole_lines=True):
    """Yield a text in blocks of at least BLOCK characters, which may have to end with a line.

    ValueError for NUL and for more than a few characters that cannot be decoded; else they become
    U+FFFD.
    """
    n = wrong = 0
    with io.TextIOWrapper(file, encoding, "replace") as text:
        while block := text.read(BLOCK) + (text.readline() if whole_lines else ""):
            n, wrong = n + len(block), wrong + block.count("\ufffd")
            if "\0" in block or wrong > max(3, n / 10_000):
                what = "NUL characters" if "\0" in block else f"{wrong} unreadable characters"
                raise ValueError(f"it has {what}, read as {encoding}; say how it is encoded, with "
                                 "--encoding=cp1252, gbk, shift_jis, utf-16-le or another")
            yield block.replace("\ufeff", "")  # the marks of files that were joined


def read_text(file, encoding):
    """Yield (text, characters) of the documents of a .txt file, which <|endoftext|> separates."""
    parts, separated = [], False
    for block in text_blocks(file, encoding):
        *ended, rest = block.split(END_OF_TEXT)
        for text in ended:
            text, parts, separated = "".join([*parts, text]).strip("\n"), [], True
            yield text or b"", len(text)
        parts.append(rest)
        if sum(map(len, parts)) > LONGEST_TEXT:
            raise ValueError(f"a document of more than {LONGEST_TEXT >> 30} GiB; split it")
    text = "".join(parts)
    yield (text.strip("\n") or b"") if separated else text, len(text)


def read_csv(file, encoding):
    """Yield (row, characters) of a file whose fields are separated by what its header has most of.

    A row with other fields than the header, or with a quote in a wrong place, is a ValueError.
    """
    csv.field_size_limit((1 << 31) - 1)
    lines = chain.from_iterable(map(io.StringIO, text_blocks(file, encoding)))
    header = next((line for line in lines if line.strip()), "")
    rows = csv.DictReader(chain([header], lines), strict=True,
                          delimiter=max("\t;|,", key=header.count))
    rows.fieldnames = names = [name.strip() for name in rows.fieldnames]
    if len(set(names)) < len(names):
        raise ValueError(f"two columns have the same name ({', '.join(names)})")
    row = None
    while True:
        n_lines = rows.reader.line_num
        try:
            row = next(rows)
            if None in row or None in row.values():
                row = ValueError("more or fewer fields than the header")
        except StopIteration:
            break
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise ValueError(f"line {n_lines + 1}: a quoted field has no end") from None
            row = ValueError(f"malformed CSV: {error}")
        yield row, size_of(row)
    if row is None:
        yield ValueError("a header without rows"), 0


def is_lines(start, by_name):
    """Whether a JSON file that starts with a text has a row in each line.

    by_name: whether its name says so, which counts if the first line is too long to tell.
    """
    lines = [line for line in map(str.strip, start.split("\n")) if line][:20]
    if len(lines) < 2:
        return by_name and start[:1] == "{" and len(start) >= BLOCK
    return lines[0][-1] not in "[{,:" and "\0" not in lines[0] and any(map(is_row, lines))


def is_row(line):
    """Whether a line is a JSON object, or a list of turns."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) or (isinstance(value, list) and any(map(is_turn, value[:1])))


def is_turn(value):
    return isinstance(value, dict) and ("role" in value or {"from", "value"} <= value.keys())


def read_lines(file, encoding):
    """Yield (line, bytes) of a file, the lines stripped of white space, as UTF-8."""
    if file.peek(3).startswith(codecs.BOM_UTF8):
        file.read(3)
    elif not encoding.startswith("utf-8"):
        text = io.TextIOWrapper(file, encoding, "surrogateescape", newline="\n")
        file = (line.encode("utf-8", "surrogateescape") for line in text)
    for line in file:
        yield line.strip(), len(line)


def read_values(file, encoding):
    """Yield (row, characters) of a file of JSON objects, or of lists of rows or turns, holding one
    row at a time.

    Not by ijson, which changes numbers and lone surrogates, and whose memory explodes on deeply
    nested lists.
    """
    decoder, buffer, at, line, first = json.JSONDecoder(), "", 0, 1, True
    in_list, chat = False, None  # of a list: False, or the turns so far
    blocks = chain(text_blocks(file, encoding, whole_lines=False), " ")
    while True:
        at = SEPARATORS.match(buffer, at).end()
        if buffer[at : at + 1] == "[]"[in_list]:
            if chat:
                yield chat, sum(map(size_of, chat))
            at, in_list, chat, first = at + 1, not in_list, None, False
            continue
        problem = "the list has no end"
        try:
            row, end = decoder.raw_decode(buffer, at)
            if not in_list and not isinstance(row, dict):
                raise json.JSONDecodeError("neither an object nor a list", buffer, at)
        except json.JSONDecodeError as error:
            problem, end = error.msg, len(buffer)
            if error.pos < end - 20 and not problem.startswith("Unterminated"):
                blocks = iter(())  # as it is not merely cut
        if end == len(buffer):
            if more := "".join(islice(blocks, 1 + (end - at) // BLOCK)):
                line, buffer, at = line + buffer.count("\n", 0, at), buffer[at:] + more, 0
                continue
            if in_list or at < end:
                line += buffer.count("\n", 0, at)
                hint = "; or is it a text (.txt) or table (.csv)?" if first else ""
                raise ValueError(f"malformed JSON in line {line}: {problem}{hint}")
            return
        if in_list:
            if chat is None:
                chat = [row] if is_turn(row) else False
            elif chat:
                chat.append(row)
            rows = [] if chat else [row]
        else:
            buffer += next(blocks, "") if first else ""
            rows = [row] if not first or buffer[end:].strip() else unwrapped(row)
        yield from ((row, (end - at) / len(rows)) for row in rows)
        at, first = end, False


def unwrapped(value):
    """The rows in an object that is a complete file: COCO's captions, the objects of its list data
    (or of another WRAPPER), or those of the list that is all it has, unless they are turns; else it
    is a row itself."""
    lists = {name: items for name, items in value.items() if items and isinstance(items, list)
             and all(isinstance(item, dict) for item in items)}
    if {"images", "annotations"} <= lists.keys() and "caption" in lists["annotations"][0]:
        files = {str(image.get("id")): image.get("file_name") for image in lists["images"]}
        pairs = [(files.get(str(a.get("image_id"))), a.get("caption"))
                 for a in lists["annotations"]]
        return [{"image": file, "caption": caption} if file else
                ValueError("a caption of an image that is not listed") for file, caption in pairs]
    (name, rows), *others = [*lists.items(), ("", [value])]
    wraps = len(value) == 1 or (name in WRAPPERS and not any("image" in key for key in value))
    turns = {"role", "from", "user"} & rows[0].keys()
    return rows if len(others) == 1 and wraps and not turns else [value]


def read_samples(file):
    """Yield (row, bytes) of the samples of a WebDataset tar, whose members follow one another."""
    with tarfile.open(fileobj=file, mode="r|") as archive:
        members = (member for member in archive if not member.isdir() and key_of(member)[1])
        for _, sample in groupby(members, key_of):
            row, columns, images = {}, "{}", []
            for member in sample:
                archive.members = []  # else tarfile keeps all of them in memory
                if not member.isreg():
                    raise ValueError(f"{member.name} is a link; pack it with --hard-dereference")
                ending = os.path.basename(member.name).partition(".")[2].lower()
                content = archive.extractfile(member).read()
                if ending in IMAGES:
                    images.append(content)
                elif ending == "json":
                    columns = content
                else:
                    text = content.decode("utf-8-sig", "replace").strip()
                    row["caption" if ending == "txt" else ending] = text
            row = {"image": images, **row} if images else row
            try:
                row = {**json.loads(columns), **row}
            except (TypeError, ValueError, RecursionError):
                row = ValueError("a sample whose .json is not a JSON object")
            yield row, size_of(row)
        rest = archive.fileobj.read(BLOCK)
        if not rest or rest.strip(b"\0"):
            raise tarfile.ReadError("a header is missing or wrong")


def key_of(member):
    """(folder, base name without its endings) of a member of a tar."""
    folder, name = os.path.split(member.name)
    return folder, name.partition(".")[0]


def read_parquet(path):
    """Yield (row, bytes) of a .parquet file."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            size = path.stat().st_size / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(max(1, min(256, int(16 * BLOCK / size)))):
                for row in batch.to_pylist():
                    yield row, size
    except pyarrow.ArrowException as error:
        raise ValueError(error) from None


def size_of(value):
    """Approximate number of bytes of text and images in a row."""
    if isinstance(value, str | bytes):
        return len(value)
    values = list(value.values()) if isinstance(value, dict) else value
    return sum(map(size_of, values)) if isinstance(values, list) else 0
