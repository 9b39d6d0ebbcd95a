"""Pages to show: one Page becomes report.md and report.html, which therefore say the same.

report.html is one file: pictures and style lie inside it, it asks nothing of the network and runs
no script. report.md has its pictures beside it. Whatever a page quotes (what a model said, names of
files, settings) is escaped in both.
"""

import base64
import html
import io
import re
from dataclasses import dataclass, field
from pathlib import Path

LARGEST = 256  # pixels of the longer side of a sample's picture
FIGURE = re.compile(r"[-$]*[\d,.]+( ?[%×])?|–")
LITERAL = re.compile(r"[\\`*\[\]<|~]|(?<!\w)_|_(?!\w)|&(?=[#\w])")  # means something in Markdown
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
:root {{ color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --faint: #63686f;
  --line: #dfe2e6; --box: #f5f6f8; --accent: #2563eb }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e4e6e9; --paper: #15171a; --faint: #9aa1a9;
  --line: #33373d; --box: #1e2125; --accent: #7aa7ff }} }}
* {{ box-sizing: border-box }}
body {{ margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 46rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere }}
h1 {{ font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem }}
h2 {{ font-size: 1.15rem; margin: 2.5rem 0 .75rem; padding-top: .75rem;
  border-top: 1px solid var(--line) }}
.lead {{ font-size: 1.05rem; color: var(--faint); margin: 0 }}
.scroll {{ overflow-x: auto; margin: .75rem 0 }}
table {{ border-collapse: collapse; min-width: 100%; font-size: .9rem; overflow-wrap: normal }}
th, td {{ text-align: left; vertical-align: top; padding: .35rem .65rem .35rem 0;
  border-bottom: 1px solid var(--line) }}
th:last-child, td:last-child {{ padding-right: 0 }}
td {{ font-variant-numeric: tabular-nums; overflow-wrap: anywhere; min-width: 5.5rem }}
thead th {{ color: var(--faint); font-weight: 500 }}
tbody th {{ font-weight: 500; overflow-wrap: anywhere; min-width: 8.4rem }}
td.right, th.right {{ text-align: right; min-width: 0 }}
td.right {{ white-space: nowrap }}
.total > * {{ font-weight: 700; border-bottom: 0; border-top: 2px solid var(--line) }}
pre, dd {{ margin: 0; white-space: pre-wrap; overflow-wrap: anywhere }}
pre {{ background: var(--box); border-radius: 6px; padding: .75rem; margin: .75rem 0;
  font-size: .85rem }}
img {{ max-width: 100%; height: auto; display: block }}
.sample {{ display: flex; flex-wrap: wrap; align-items: flex-start; gap: .5rem 1rem;
  background: var(--box); border-radius: 6px; padding: .9rem; margin: .75rem 0 }}
.sample img {{ border-radius: 4px; width: 8rem }}
dl {{ flex: 1 1 16rem; min-width: 0; margin: 0 }}
dt {{ color: var(--faint); font-size: .8rem }}
dd {{ margin-bottom: .5rem }}
dd.said {{ border-left: 3px solid var(--accent); padding-left: .6rem }}
</style></head><body><main>
"""


def clean(text):
    """Text that can be written as UTF-8 and shown: other control characters become a mark."""
    text = str(text).replace("\r\n", "\n").encode("utf-8", "replace").decode()
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def as_html(text):
    return html.escape(clean(text))


def as_markdown(text):
    """On one line, and nothing in it is Markdown."""
    return LITERAL.sub(r"\\\g<0>", " ".join(clean(text).split()))


def fenced(text):
    """A code block that no backticks in it can end."""
    longest = max(map(len, re.findall("`+", clean(text))), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}text", clean(text), fence, ""]


@dataclass
class Table:
    """head and rows of cells; with total the last row sums up the others."""

    head: list
    rows: list
    total: bool = False

    def columns(self):
        """Whether each column is one of figures, which stand on the right."""
        return [all(FIGURE.fullmatch(str(cell)) for cell in column)
                for column in zip(*self.rows, strict=True)]

    def markdown(self):
        lines = [self.head, *self.rows]
        found = ["| " + " | ".join(map(as_markdown, line)) + " |" for line in lines]
        edge = "|".join("---:" if right else "---" for right in self.columns())
        return [found[0], f"|{edge}|", *found[1:], ""]

    def html(self):
        marks = [' class="right"' if right else "" for right in self.columns()]
        yield '<div class="scroll" tabindex="0"><table><thead><tr>'
        for cell, mark in zip(self.head, marks, strict=True):
            yield f'<th scope="col"{mark}>{as_html(cell)}</th>'
        yield "</tr></thead><tbody>"
        for number, (first, *others) in enumerate(self.rows, 1):
            last = ' class="total"' if self.total and number == len(self.rows) else ""
            cells = [f"<td{mark}>{as_html(cell)}</td>"
                     for cell, mark in zip(others, marks[1:], strict=True)]
            name = re.sub("[_/]", r"\g<0><wbr>", as_html(first))  # where a long one may break
            yield f'<tr{last}><th scope="row">{name}</th>{"".join(cells)}</tr>'
        yield "</tbody></table></div>"


@dataclass
class Notes:
    """Sentences, one a line."""

    lines: list

    def markdown(self):
        return [*(f"- {as_markdown(line)}" for line in self.lines), ""]

    def html(self):
        return ["<ul>", *(f"<li>{as_html(line)}</li>" for line in self.lines), "</ul>"]


@dataclass
class Code:
    """Something to be copied: a command."""

    text: str

    def markdown(self):
        return fenced(self.text)

    def html(self):
        return [f"<pre><code>{as_html(self.text)}</code></pre>"]


@dataclass
class Picture:
    """The bytes of a .png or .jpg file, and its name beside report.md."""

    name: str
    data: bytes
    alt: str

    def markdown(self):
        return [f"![{as_markdown(self.alt)}]({self.name})", ""]

    def html(self):
        kind = "jpeg" if self.name.endswith(".jpg") else "png"
        data = base64.b64encode(self.data).decode()
        return [f'<img src="data:image/{kind};base64,{data}" alt="{as_html(self.alt)}">']


@dataclass
class Sample:
    """What a model was given, what it made of that ("model") and what would be right: (label, text)
    each; and the PIL images that it saw."""

    parts: list
    images: list = field(default_factory=list)


class Samples:
    """Some Sample, with their pictures in samples/."""

    def __init__(self, samples):
        self.samples = list(samples)
        self.pictures = [[image_of(image, f"samples/{i}" + f"_{k}" * (k > 0))
                          for k, image in enumerate(sample.images)]
                         for i, sample in enumerate(self.samples)]

    def markdown(self):
        lines = []
        for i, (sample, pictures) in enumerate(zip(self.samples, self.pictures, strict=True), 1):
            lines += [f"### {i}", "", *(line for p in pictures for line in p.markdown())]
            for label, text in sample.parts:
                lines += [f"{as_markdown(label)}:", "", *fenced(text)]
        return lines

    def html(self):
        for sample, pictures in zip(self.samples, self.pictures, strict=True):
            yield '<div class="sample">'
            yield from (line for picture in pictures for line in picture.html())
            yield "<dl>"
            for label, text in sample.parts:
                said = ' class="said"' if label.startswith("model") else ""
                yield f"<dt>{as_html(label)}</dt><dd{said}>{as_html(text)}</dd>"
            yield "</dl></div>"


def image_of(image, name):
    """A PIL image as a small Picture: PNG or JPEG, whichever is smaller."""
    image, files = image.convert("RGB"), {}
    image.thumbnail((LARGEST, LARGEST))
    for ending, kind in (("png", "PNG"), ("jpg", "JPEG")):
        file = io.BytesIO()
        image.save(file, kind, quality=85, optimize=True)
        files[ending] = file.getvalue()
    ending = min(files, key=lambda ending: len(files[ending]))
    return Picture(f"{name}.{ending}", files[ending], "what the model saw")


@dataclass
class Page:
    """sections: heading -> blocks, which are Table, Notes, Code, Picture and Samples."""

    title: str
    lead: str
    sections: dict

    def markdown(self):
        lines = [f"# {as_markdown(self.title)}", "", as_markdown(self.lead), ""]
        for heading, blocks in self.sections.items():
            lines += [f"## {as_markdown(heading)}", ""]
            lines += [line for block in blocks for line in block.markdown()]
        return "\n".join(lines)

    def html(self):
        lines = [HEAD.format(title=as_html(self.title)) + f"<h1>{as_html(self.title)}</h1>",
                 f'<p class="lead">{as_html(self.lead)}</p>']
        for heading, blocks in self.sections.items():
            lines += [f"<section><h2>{as_html(heading)}</h2>",
                      *(line for block in blocks for line in block.html()), "</section>"]
        return "\n".join([*lines, "</main></body></html>", ""])

    def write(self, folder):
        """report.md and report.html, and the pictures of report.md."""
        pictures = []
        for block in (block for section in self.sections.values() for block in section):
            if isinstance(block, Picture):
                pictures.append(block)
            elif isinstance(block, Samples):
                pictures += [picture for some in block.pictures for picture in some]
        files = {picture.name: picture.data for picture in pictures}
        files |= {"report.md": self.markdown().encode(), "report.html": self.html().encode()}
        for name, data in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
