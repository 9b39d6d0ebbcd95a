"""Talk to a checkpoint in the browser, about pictures if it sees.

    python app.py out/demo/vision_sft                 # http://127.0.0.1:7860
    python app.py NAME/REPO --port=8080               # a checkpoint on the Hugging Face hub

As a Hugging Face Space it runs as it is: put the repository there, and the checkpoint into a folder
`checkpoint`, or its name into a variable CHECKPOINT. Every browser session has a conversation of
its own; all that wait for an answer are decoded together. Nothing about users is logged, uploads
are deleted when their page is closed and when the program ends.
"""

import asyncio
import atexit
import contextlib
import ctypes
import html
import json
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

UPLOADS = Path(tempfile.mkdtemp(prefix="nanogpt-vision-")).resolve()  # all that users can open
EXAMPLES = UPLOADS / "examples"
os.environ["GRADIO_TEMP_DIR"] = str(UPLOADS)
os.environ["GRADIO_ANALYTICS_ENABLED"] = os.environ["GRADIO_RUN_HISTORY"] = "False"
os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = "1000000000"  # answers between two summaries
atexit.register(shutil.rmtree, UPLOADS, ignore_errors=True)

import gradio as gr  # noqa: E402 (reads those when it is imported)
from starlette.middleware import Middleware  # noqa: E402
from starlette.middleware.base import BaseHTTPMiddleware  # noqa: E402
from starlette.responses import PlainTextResponse  # noqa: E402

from common.config import UserError, parse_checkpoint, run_main  # noqa: E402
from common.device import pick_device  # noqa: E402
from common.images import read_image  # noqa: E402
from export.model_card import held_out_images  # noqa: E402
from inference.conversation import Conversation, decoder_of, open_for_chat, pick_precision  # noqa: E402
from inference.engine import Engine  # noqa: E402
from inference.generate import Sampler, Sampling  # noqa: E402

SESSIONS = 256  # conversations remembered; the one silent longest is forgotten first
UPLOADS_KEPT = 3600  # seconds that a picture outlives a page that never said goodbye
QUESTIONS = "What do you see?", "Describe the picture.", "How many things are there?"
REQUESTS = "Tell me a story.", "What is your name?"

# Addresses of gradio's that fetch others, store what nobody asked for, or run programs
CLOSED = re.compile(r"/gradio_api/(file[=/]\s*https?:|proxy=|deep_link|process_recording)")

CSS = """
footer, .built-with { opacity: 0.6 }
footer .show-api-divider, button[title="Share"] { display: none !important }
.about p { text-align: center; margin: 0; opacity: 0.75; font-size: 0.85rem }
gradio-app .gradio-container { width: 100%; max-width: 860px !important; margin: 0 auto }
@media (max-width: 600px) {
  gradio-app .gradio-container main { padding: 6px !important }
  h1 { font-size: 1.25rem !important; margin: 0.2rem 0 !important }
}
"""


@dataclass
class Config(Sampling):
    # --- page
    title: str = "nanoGPT-Vision"
    examples: str = ""  # folder of pictures to try; empty: the demo's, where they are
    host: str = ""  # address to listen at; empty: 127.0.0.1, or what GRADIO_SERVER_NAME says
    port: int = 7860  # 0 for any free one

    # --- limits
    streams: int = 8  # answers made at once, in one batch
    queue: int = 32  # questions that may wait for their turn; more are refused
    per_minute: int = 20  # questions a minute of one session
    max_text: int = 4000  # characters of a question
    max_images: int = 4  # pictures of a question
    upload_mb: float = 5.0  # largest picture file, in megabytes
    upload_megapixels: float = 25.0  # largest picture, checked before it is decoded

    # --- sampling
    temperature: float = 0.0  # what the page starts with; 0 takes the likeliest token
    max_tokens: int = 256  # longest answer

    # --- hardware
    device: str = "auto"  # auto, cpu, cuda, mps
    # of weights and products; auto: the fastest here that costs a model under 0.01 nats
    precision: Literal["auto", "bf16", "fp16", "fp32", "int8"] = "auto"
    compile: bool = False  # torch.compile: much slower to start, then faster on a GPU

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_tokens", "streams", "queue", "per_minute", "max_text", "max_images",
                     "upload_mb", "upload_megapixels"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be above 0, not {getattr(self, name)}")


class Session:
    """One browser page: its conversation, and which question of the page made which turn of it.

    A page may take questions back, ask them again or start over; then its history is shorter than
    `asked`, and the conversation is taken back as far before the next question.
    """

    def __init__(self, held):
        self.engine = held.engine
        self.conversation = Conversation(held.model, held.tokenizer, held.engine.decoding,
                                         held.engine.generate)
        self.conversation.row = None
        self.asked = []  # (words, turns in all behind it) of each question on the page
        self.files, self.n_forgotten = set(), 0  # uploads shown; turns there was no more room for
        self.times, self.lock = deque(), threading.Lock()

    def answer(self, texts, text, files, cfg):
        """Yield the answer so far, again and again, to a question; `texts` are those before it."""
        with self.lock:
            lost = self.rewind(texts)
            try:
                self.count(cfg)
                with self.engine.seat(self.conversation):
                    # Not before: the row may have become another's.
                    self.engine.decoding.cut(len(self.conversation.ids()), self.conversation.row)
                    notes = ["(What was said here before is lost; this is a new start.)"] * lost
                    notes += self.hear(text, files, cfg)
                    shown = "\n".join([*notes, ""])
                    sampler = Sampler(cfg, self.engine.decoding.device)
                    for piece in self.conversation.answer(cfg.max_tokens, sampler):
                        shown += piece
                        yield shown
                    if shown == "":
                        yield "(The model has nothing to say.)"
            except UserError as error:
                yield f"({explain(error)})"
            finally:
                n_turns = len(self.conversation.turns) + self.n_forgotten
                self.asked.append((text.split(), n_turns))

    def hear(self, text, files, cfg):
        """Add the question to the conversation; returns what the user should know."""
        if not text.strip() and not files:
            raise UserError("Say something, or show a picture")
        if len(text) > cfg.max_text:
            raise UserError(f"{len(text):,} characters are too many; at most {cfg.max_text:,}")
        if len(files) > cfg.max_images:
            raise UserError(f"{len(files)} pictures are too many; at most {cfg.max_images}")
        pictures = [self.read_upload(file, cfg) for file in files]
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        notes = []
        if pictures and self.conversation.turns:  # models are trained on pictures at the start
            self.n_forgotten += len(self.conversation.turns)
            self.conversation.reset()
            notes.append("(A new picture, a new conversation.)")
        n = self.conversation.hear(text, pictures, cfg.max_tokens)
        self.n_forgotten += n
        if n:
            which = f"{n} questions are" if n > 1 else "question is"
            notes.append(f"(This is longer than I can remember; the oldest {which} forgotten.)")
        return notes

    def read_upload(self, file, cfg):
        """The PIL image of an uploaded file; UserError if it is too large, or no picture."""
        path = Path(file["path"] if isinstance(file, dict) else file).resolve()  # dict: Retry
        if not path.is_relative_to(UPLOADS) or not path.is_file():
            raise UserError("That file is not here (any more); choose it once more")
        name, self.files = f"the file {path.name}", self.files | ({path} - set(EXAMPLES.glob("*")))
        if path.stat().st_size > cfg.upload_mb * 1e6:
            raise UserError(f"{name} is larger than {cfg.upload_mb:g} MB")
        return read_image(path.read_bytes(), name, max_pixels=int(cfg.upload_megapixels * 1e6))

    def count(self, cfg):
        """Note the time of a question; UserError if there were too many within a minute."""
        now = time.monotonic()
        while self.times and self.times[0] < now - 60:
            self.times.popleft()
        if len(self.times) >= cfg.per_minute:
            wait = int(self.times[0] + 60 - now) + 1
            raise UserError(f"At most {cfg.per_minute} questions a minute; wait {wait} seconds")
        self.times.append(now)

    def rewind(self, texts):
        """Take back what is not on the page any more; says whether all that is there is lost."""
        kept = 0
        for text in texts:  # some may never have come here: stopped while they waited, say
            kept += self.asked[kept : kept + 1] != [] and self.asked[kept][0] == text.split()
        del self.asked[kept:]
        n_turns = self.asked[-1][1] if kept else 0
        if n_turns > self.n_forgotten:
            del self.conversation.turns[n_turns - self.n_forgotten :]
            return False
        self.engine.leave(self.conversation)
        self.conversation.turns, self.conversation.row, self.n_forgotten = [], None, 0
        self.asked = [(words, 0) for words, _ in self.asked]
        return n_turns > 0 or len(texts) > kept == 0


class App:
    """The page and the sessions behind it."""

    def __init__(self, model, tokenizer, info, cfg):
        self.model, self.tokenizer, self.info, self.cfg = model, tokenizer, info, cfg
        self.engine = Engine(decoder_of(model), cfg.streams, cfg.compile)
        self.sessions, self.lock = OrderedDict(), threading.Lock()
        self.threads = ThreadPoolExecutor(2 * cfg.streams, "answer")

    def session(self, name):
        """The session of that name, new if it has none."""
        with self.lock:
            session = self.sessions.pop(name, None) or Session(self)
            self.sessions[name] = session
            oldest = next(iter(self.sessions)) if len(self.sessions) > SESSIONS else None
        self.close(oldest)
        return session

    def close(self, name):
        """Forget a session; its row is free, and uploads that no other session shows are gone."""
        with self.lock:
            session = self.sessions.pop(name, None)
            shown = set().union(*(other.files for other in self.sessions.values()))
        if session:
            self.engine.leave(session.conversation)
            for file in session.files - shown:
                file.unlink(missing_ok=True)

    def left(self, request: gr.Request):
        self.close(request.session_hash)

    async def gate(self, request, call_next):
        """Refuse what the page has no use for, and say in a sentence where gradio would fail."""
        if CLOSED.search(request.url.path):
            return PlainTextResponse("There is nothing here.", 404)
        size = request.headers.get("content-length", "inf" if request.method == "POST" else "0")
        n_files = self.cfg.max_images if request.url.path.endswith("/upload") else 0
        if float(size) > 1e6 * (1 + n_files * self.cfg.upload_mb):
            return PlainTextResponse("That is too much at once.", 413)
        try:
            response = await call_next(request)
        except Exception as error:
            return PlainTextResponse(explain(error), 400)
        response.status_code = 400 if response.status_code == 500 else response.status_code
        return response

    async def respond(self, message, history, temperature, top_p, penalty, max_tokens,
                      request: gr.Request):
        """Answer a question in the browser, word by word."""
        texts = [said(m["content"]) for m in history if m["role"] == "user"]
        cfg = replace(self.cfg, temperature=float(temperature), top_p=float(top_p),
                      repetition_penalty=float(penalty), seed=secrets.randbits(48),
                      max_tokens=max(1, min(int(max_tokens), self.cfg.max_tokens)))
        text, files = message.get("text") or "", message.get("files") or []
        pieces = self.session(request.session_hash).answer(texts, text, files, cfg)
        async for shown in iterate(pieces, self.threads):
            yield html.escape(shown, quote=False)  # gradio takes what looks like HTML for HTML

    def page(self):
        """The gradio page."""
        cfg, sees = self.cfg, self.info["kind"] == "vision"
        box = gr.MultimodalTextbox(
            placeholder="Ask about a picture, or just talk" if sees else "Say something",
            file_types=["image"], file_count="multiple", sources=["upload"] if sees else [],
            show_label=False, autofocus=True, stop_btn=True, max_plain_text_length=10**9)
        chatbot = gr.Chatbot(show_label=False, render_markdown=False, scale=1, buttons=["copy"],
                             placeholder="Show a picture and ask." if sees else "Say something.")
        settings = [
            gr.Slider(0, max(2, cfg.temperature), cfg.temperature, step=0.05, label="Temperature",
                      info="0 gives the likeliest answer, higher a wilder one"),
            gr.Slider(min(0.05, cfg.top_p), 1, cfg.top_p, step=0.05, label="Top-p",
                      info="draw from the likeliest tokens that make up this probability"),
            gr.Slider(min(1, cfg.repetition_penalty), max(2, cfg.repetition_penalty),
                      cfg.repetition_penalty, step=0.05, label="Repetition penalty"),
            gr.Slider(1, max(2, cfg.max_tokens), cfg.max_tokens, step=1,
                      label="Longest answer, in tokens")]
        with Page(title=cfg.title, analytics_enabled=False, fill_height=True,
                  delete_cache=(600, UPLOADS_KEPT)) as page:
            gr.ChatInterface(
                self.respond, multimodal=True, chatbot=chatbot, textbox=box, title=cfg.title,
                examples=self.examples(sees, len(settings)), run_examples_on_click=True,
                cache_examples=False, additional_inputs=settings,
                additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
                concurrency_limit=cfg.streams, flagging_mode="never", fill_height=True,
                api_name="chat")
            gr.Markdown(describe(self.info), elem_classes="about")
            page.unload(self.left)
        return page.queue(max_size=cfg.queue, default_concurrency_limit=cfg.streams)

    def examples(self, sees, n_settings):
        """Messages to try, as the chat interface wants them."""
        if not sees:
            return [[{"text": text, "files": []}, *[None] * n_settings] for text in REQUESTS]
        folder = Path(self.cfg.examples or "examples")
        if self.cfg.examples and not folder.is_dir():
            raise UserError(f"there is no folder --examples={folder}")
        files = sorted(path for path in folder.glob("*")
                       if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
        files = files or held_out_images(self.info)
        EXAMPLES.mkdir(exist_ok=True)
        return [[{"text": text, "files": [shutil.copy(path, EXAMPLES)]}, *[None] * n_settings]
                for path, text in zip(files, QUESTIONS, strict=False)]

    def launch(self):
        """Serve the page, in a thread; returns what has to be closed."""
        cfg = self.cfg
        theme = gr.themes.Soft(primary_hue="indigo", font=["system-ui", "sans-serif"],
                               font_mono=["ui-monospace", "monospace"])
        page = self.page()
        try:
            page.launch(server_name=cfg.host or None, server_port=cfg.port or None, share=False,
                        quiet=True, theme=theme, css=CSS, ssr_mode=False, enable_monitoring=False,
                        footer_links=["gradio", "settings"], prevent_thread_lock=True,
                        max_file_size=int(cfg.upload_mb * 1e6), state_session_capacity=SESSIONS,
                        app_kwargs={"middleware": [Middleware(BaseHTTPMiddleware, self.gate)]})
        except OSError as error:
            raise UserError(f"cannot listen at port {cfg.port}: {error}; try --port=0") from None
        print(f"{page.local_url}  (Ctrl-C ends)", flush=True)
        return page


class Page(gr.Blocks):
    """gr.Blocks that fetches no address, and refuses in a sentence whatever it stumbles over."""

    async def process_api(self, block_fn, inputs, *args, **kwargs):
        try:
            if re.search(r'"path": "\s*\w+://', json.dumps(inputs)):
                raise UserError("Only uploaded pictures are looked at, no addresses")
            return await super().process_api(block_fn, inputs, *args, **kwargs)
        except Exception as error:
            raise gr.Error(explain(error), print_exception=False) from None


def explain(error):
    """An error as a sentence for the user. One that nobody foresaw is noted for the host, without a
    word of what the user said."""
    if not isinstance(error, gr.Error | UserError):
        at = traceback.extract_tb(error.__traceback__)[-1]
        print(f"{type(error).__name__} at {at.filename}:{at.lineno}", file=sys.stderr, flush=True)
        error = "That could not be understood. Reload the page and try again"
    text = str(getattr(error, "message", error)).strip().rstrip(".")
    return text[:1].upper() + text[1:] + "."


async def iterate(pieces, threads):
    """An ordinary generator, run in threads; closed there, too, however this one ends."""
    step = threads.submit(next, pieces, None)
    try:
        while (piece := await asyncio.shield(asyncio.wrap_future(step))) is not None:
            yield piece
            step = threads.submit(next, pieces, None)
    finally:
        def close():
            with contextlib.suppress(BaseException):
                step.result()
            pieces.close()

        threading.Thread(target=close, daemon=True).start()


def said(content):
    """The text of a message of the page's history: a string, or a list with files among it."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "\n".join(text for text in texts if isinstance(text, str))


def describe(info):
    """Which checkpoint this is, in a line of Markdown: stage, size, where it comes from."""
    parents = ", ".join(f"{p['stage']} ({p['step']:,} steps)" for p in info.get("lineage", []))
    behind = f", behind it {parents}" if parents else ""
    width = f"{info['decoder']['n_layer']} layers of width {info['decoder']['n_embd']}"
    return (f"**{info['stage']}** after {info['step']:,} steps: {info['parameters'] / 1e6:.1f} M "
            f"parameters, {width}{behind}")


def return_large_memory():
    """Have glibc give blocks of 8 MB and more back to the system as soon as they are free.

    By itself it keeps, thread by thread, blocks of up to 32 MB once it has seen such a one freed.
    """
    m_mmap_threshold = -3  # as malloc.h calls it
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**23)


def main():
    return_large_memory()
    name, cfg = parse_checkpoint(Config, default=os.environ.get("CHECKPOINT", "checkpoint"))
    device = pick_device(cfg.device)
    model, tokenizer, info = open_for_chat(name, device, pick_precision(device, cfg.precision))
    if info["stage"] == "pretrain":
        raise UserError(f"{name} is a pretrained checkpoint, which continues text and does not "
                        "chat: python sample.py continues text; sft.py teaches it to chat")
    page = App(model, tokenizer, info, cfg).launch()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        page.block_thread()
    finally:
        page.close()


if __name__ == "__main__":
    run_main(main)
