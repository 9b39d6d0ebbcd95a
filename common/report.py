"""Reports: report.md, written once as Markdown, and report.html, which is rendered from it.

report.html is one file: images and style are embedded, it loads nothing from the network and runs
no script. report.md has its images beside it. Quoted text (model output, names of files, settings)
is escaped, so that nothing in it is Markdown or HTML.
"""

import base64
import html
import io
import re
from dataclasses import dataclass
from pathlib import Path
from string import Template

from common.config import read_json

LARGEST = 256  # pixels of the longer side of a sample's image
FIGURE = re.compile(r"[-$]*[\d,.]+( ?[%×])?|–")
SPECIAL = re.compile(r"[\\`*\[\]<|~]|(?<!\w)_|_(?!\w)|&(?=[#\w])")  # inline Markdown
LINE_START = re.compile(r"^(#*|\d*)([-+#.)])(?= |-|$)")  # a list, a heading or a rule
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def clean(text):
    """`text` without control characters and half surrogate pairs."""
    text = str(text).replace("\r\n", "\n").encode("utf-8", "replace").decode()
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def escape(text):
    """`text` on one line, with everything escaped that Markdown would interpret."""
    text = SPECIAL.sub(r"\\\g<0>", " ".join(clean(text).split()))
    return LINE_START.sub(r"\1\\\2", text)


def code(text):
    """A code block, which no backticks in `text` can end."""
    text = clean(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def table(head, rows, total=False):
    """Columns of figures are aligned to the right; with `total` the last row is bold."""
    lines = [list(map(escape, row)) for row in (head, *rows)]
    if total:
        lines[-1] = [f"**{cell}**" for cell in lines[-1]]
    right = [all(FIGURE.fullmatch(str(cell)) for cell in column)
             for column in zip(*rows, strict=True)]
    lines.insert(1, ["---:" if figures else "---" for figures in right])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def lineage_table(stages):
    """Validation loss and costs of each stage and their total; imported stages have none."""
    columns = {"val_loss": (1, 4), "tflop": (1, 1), "seconds": (60, 1), "dollars": (1, 2)}
    total = {key: sum(stage["metrics"].get(key, 0) for stage in stages) for key in columns}
    del total["val_loss"]
    rows = [[stage["stage"], f"{stage['step']:,}", stage["metrics"]] for stage in stages]
    rows = [[name, steps, *(f"{m[key] / unit:,.{digits}f}" if key in m else "–"
                            for key, (unit, digits) in columns.items())]
            for name, steps, m in [*rows, ["total", "–", total]]]
    return table(["stage", "steps", "validation loss", "TFLOP", "min", "$"], rows, total=True)


def found_scores(path, digest):
    """The content of a report.json or eval.json, if there is one; {} for that of another checkpoint
    than the one whose manifest has the sha256 `digest`."""
    found = read_json(path) if path.is_file() else {}
    if found and found.get("sha256") != digest:
        print(f"({path} is of another checkpoint: its scores are left out; run eval.py again)")
        return {}
    return found


def score_texts(scores):
    """{name: "value ± error"} of the scores in a report.json, whose errors are NAME_error."""
    texts = {name: f"{value:.4g}" for name, value in scores.items()
             if not isinstance(value, str) and not name.endswith("_error")}
    for name in texts:
        if f"{name}_error" in scores:
            texts[name] += f" ± {scores[f'{name}_error']:.2g}"
    return texts


@dataclass
class ReportImage:
    """The content of a .png or .jpg file, and its path relative to report.md."""

    name: str
    data: bytes
    alt: str

    def __str__(self):
        return f"![{escape(self.alt)}]({self.name})"


def sample_blocks(samples):
    """The blocks of a report that show samples of a model's input and output, each a list of
    (label, text) and one of PIL images, which go into samples/."""
    blocks = []
    for i, (parts, images) in enumerate(samples):
        blocks.append(f"### {i + 1}")
        for k, image in enumerate(images):
            image, file = image.convert("RGB"), io.BytesIO()
            image.thumbnail((LARGEST, LARGEST))
            image.save(file, "JPEG", quality=90, optimize=True)
            name = f"samples/{i}" + f"_{k}" * (k > 0) + ".jpg"
            blocks.append(ReportImage(name, file.getvalue(), "model input"))
        blocks += [f"{escape(label)}:\n\n{code(text)}" for label, text in parts]
    return blocks


def write_report(folder, title, lead, sections):
    """Write report.md, its images and report.html into `folder`. sections: {heading: blocks}; a
    block is Markdown or a ReportImage."""
    blocks = [f"# {escape(title)}", escape(lead)]
    for heading, content in sections.items():
        blocks += [f"## {escape(heading)}", *content]
    images = [block for block in blocks if isinstance(block, ReportImage)]
    text = "\n\n".join(map(str, blocks)) + "\n"
    files = {image.name: image.data for image in images}
    files |= {"report.md": text.encode(), "report.html": page_of(title, text, images).encode()}
    for name, data in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def page_of(title, text, images):
    """The HTML page of a Markdown text; images: its ReportImage, in order."""
    from markdown_it import MarkdownIt

    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = renderer.parse(text)
    inline = [child for token in tokens for child in token.children or ()]
    for link, image in zip((t for t in inline if t.type == "image"), images, strict=True):
        kind = "jpeg" if image.name.endswith(".jpg") else "png"
        link.attrs["src"] = f"data:image/{kind};base64,{base64.b64encode(image.data).decode()}"
    body = renderer.renderer.render(tokens, renderer.options, {})
    template = Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")
    return Template(template).substitute(title=html.escape(clean(title)), body=body)
