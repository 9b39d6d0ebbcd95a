"""What prepare.py check shows: its figures, rows as a contact sheet, a row token by token."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLUMNS, TILE, MARGIN = 4, (300, 340), 8  # tiles beside each other, pixels
PICTURE, LINE = 176, 15  # pixels: the height of a tile's picture, and of a line of its text
INDENT = " " * 10
INK, GREY, RED, BLUE = "#202020", "#808080", "#b00020", "#1a4fa0"


# --------------------------------------------------------------------------------------- figures


def print_figures(figures):
    """The figures of check.Tally, aligned."""
    good, left_out = figures["good"], figures["rows"] - figures["good"]["rows"]
    part = f", the first {figures['items']:,} rows alone" if figures["items"] else ""
    print(f"{figures['data']}{part}\n")
    for name, n in (("rows", figures["rows"]), ("  left out", left_out),
                    ("  good", good["rows"]), ("    without a picture", good["no picture"]),
                    ("    with one picture", good["one picture"]),
                    ("    with several pictures", good["several"]),
                    ("turns in good rows", good["turns"]), ("  of them answers", good["answers"]),
                    ("pictures in good rows", good["pictures"])):
        print(f"{name:<26}{n:>12,}")
    for title, reasons in (("left out", figures["left_out"]),
                           ("left out when it was made", figures["left_out_when_made"]),
                           ("kept, and worth knowing", figures["notes"])):
        print_reasons(title, reasons)
    print_percentiles(figures)
    epoch = figures["epoch"]
    print(f"\nan epoch: {epoch['steps']:,} steps of {epoch['batch_tokens']:,} positions "
          f"({epoch['training_rows']:,} packed rows of {epoch['context']:,}, "
          f"{epoch['filled']:.1%} filled)")
    print(f"rows lost: {figures['share_lost']:.2%}")


def print_reasons(title, reasons):
    if reasons:
        print(f"\n{title}")
    for reason, found in reasons.items():
        names = [name.replace(" ", "\0") for name in found["first"]]  # a name is not broken
        names = ", ".join(names + ["..."] * (found["rows"] > len(names)))
        print(f"{found['rows']:>8,}  {reason}")
        print(textwrap.fill(names, 96, initial_indent=INDENT, subsequent_indent=INDENT,
                            break_long_words=False).replace("\0", " "))


def print_percentiles(figures):
    table = figures["percentiles"]
    if not table:
        return
    print(f"\n{'percentiles':<22}" + "".join(f"{q:>8}" for q in next(iter(table.values()))))
    for name, values in table.items():
        print(f"{name:<22}" + "".join(f"{n:>8,}" for n in values.values()))
    if figures["good"]["pictures"]:
        print(f"(an id a picture; {figures['patches']} positions a picture)")
        print(f"{figures['pictures_enlarged']:,} pictures are smaller than "
              f"{figures['image_size']} pixels and are enlarged")


# ----------------------------------------------------------------------------------- a row's ids


def print_tokens(tokenizer, row, patches):
    """The ids of a look.Row one a line: where, what, and whether the assistant learns to say it.

    Special tokens stand bare, ordinary text in quotes: a data set cannot write the former.
    """
    n, special = len(row.ids), set(tokenizer.specials.values())
    n_images = np.count_nonzero(row.ids == tokenizer.image)
    print(f"{row.name}: {n:,} ids, {n_images} of them a picture, {n + n_images * (patches - 1):,} "
          f"positions, {np.count_nonzero(row.supervised):,} of them learnt\n")
    print(f"{'position':>13}  {'id':>6}  {'learnt':<6}  token")
    at = 0
    for i, learnt in zip(row.ids.tolist(), row.supervised.tolist(), strict=True):
        width = patches if i == tokenizer.image else 1
        where = f"{at:,}" if width == 1 else f"{at:,}-{at + width - 1:,}"
        text = tokenizer.decode([i])
        text = text if i in special else repr(text)
        times = f" x {width}" if i == tokenizer.image else ""
        print(f"{where:>13}  {i:>6}  {'yes' if learnt else '-':<6}  {text}{times}")
        at += width


def turns_of(tokenizer, ids):
    """[(role, text)] of a chat's ids."""
    roles, turns = {i: role for role, i in tokenizer.role_ids.items()}, []
    for i in ids.tolist():
        if i in roles:
            turns.append((roles[i], []))
        elif turns and i not in (tokenizer.end, tokenizer.image):
            turns[-1][1].append(i)
    return [(role, tokenizer.decode(part)) for role, part in turns]


# --------------------------------------------------------------------------------- contact sheet


def draw_sheet(path, tokenizer, rows):
    """A PNG of some look.Rows: a tile each, the pictures on top, the turns below."""
    from matplotlib import font_manager  # its font has accents and Greek; Pillow's has not

    n_lines = -(-len(rows) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * TILE[0], n_lines * TILE[1]), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 11)
    for number, row in enumerate(rows):
        left, top = number % COLUMNS * TILE[0], number // COLUMNS * TILE[1]
        draw.rectangle((left, top, left + TILE[0] - 1, top + TILE[1] - 1), outline="#d0d0d0")
        x, y, bottom = left + MARGIN, top + MARGIN, top + TILE[1] - MARGIN
        width = TILE[0] - 2 * MARGIN
        y = write(draw, font, (x, y), row.name, width, 1, GREY) + 3
        if row.images:
            y += paste(sheet, row.images, (x, y), width) + 4
        if row.problem:
            y = write(draw, font, (x, y), f"left out: {row.problem}", width, 3, RED)
            y = write(draw, font, (x, y + 3), row.text, width, 8, GREY) if row.text else y
        turns = [] if row.ids is None else turns_of(tokenizer, row.ids)
        for i, (role, text) in enumerate(turns):
            room = (bottom - y) // LINE
            if room < 1:
                break
            if role != "assistant" and i + 1 < len(turns):
                room = max(1, room // 2)  # an answer must be seen too
            colour = BLUE if role == "assistant" else INK
            y = write(draw, font, (x, y), f"{role[0].upper()}: {text}", width, room, colour)
    sheet.save(path, "PNG")


def paste(sheet, images, at, width):
    """Pictures beside each other, as large as their share of the width; returns their height."""
    share, highest = width // len(images), 0
    for i, image in enumerate(images):
        scale = min((share - 4) / image.width, PICTURE / image.height)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        sheet.paste(image.resize(size), (at[0] + i * share, at[1]))
        highest = max(highest, size[1])
    return highest


def write(draw, font, at, text, width, lines, colour):
    """Text in at most so many lines, ended by ... if there is more; returns where it ends."""
    words, wrapped = text[:1000].split(), [""]
    for word in words:
        while word and len(wrapped) <= lines:
            line = f"{wrapped[-1]} {word}".strip()
            if font.getlength(line) <= width:
                wrapped[-1], word = line, ""
            elif wrapped[-1]:
                wrapped.append("")
            else:  # a word wider than the tile
                n = next(n for n in range(min(len(word), width // 2), 0, -1)
                         if n == 1 or font.getlength(word[:n]) <= width)
                wrapped[-1], word = word[:n], word[n:]
                wrapped += [""] if word else []
        if len(wrapped) > lines:
            wrapped[-1] = word
            break
    if len(wrapped) > lines:
        wrapped[lines - 1 :] = [" ".join(wrapped[lines - 1 :])[: width // 2]]
        while font.getlength(f"{wrapped[-1]} ...") > width:
            wrapped[-1] = wrapped[-1][:-1]
        wrapped[-1] += " ..."
    for i, line in enumerate(wrapped):
        draw.text((at[0], at[1] + i * LINE), line, colour, font)
    return at[1] + len(wrapped) * LINE
