"""Chat with a checkpoint in the browser, about images if it is a vision model.

    python app.py out/demo/vision_sft                 # http://127.0.0.1:7860
    python app.py NAME/REPO --port=8080               # a checkpoint on the Hugging Face hub

Every question comes with the history of its page, from which the conversation is rebuilt; all
pending answers are decoded in one batch. Nothing about users is logged; uploads are deleted when
their page is closed and at the end.
"""

import asyncio
import atexit
import contextlib
import ctypes
import hashlib
import html
import ipaddress
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
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

UPLOADS = Path(tempfile.mkdtemp(prefix="nanogpt-vision-")).resolve()  # readable by users
EXAMPLES = UPLOADS / "examples"
os.environ["GRADIO_TEMP_DIR"] = str(UPLOADS)
os.environ["GRADIO_ANALYTICS_ENABLED"] = os.environ["GRADIO_RUN_HISTORY"] = "False"
os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = "1000000000"  # answers between two summaries
if "SPACE_ID" in os.environ:  # a Space's proxy, in this network, names its client to uvicorn
    os.environ.setdefault("FORWARDED_ALLOW_IPS", "127.0.0.1,::1,10.0.0.0/8")
atexit.register(shutil.rmtree, UPLOADS, ignore_errors=True)

# ruff: noqa: E402 (gradio reads those when it is imported)
import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse

from common.config import UserError, parse_checkpoint, run_main
from common.device import pick_device
from common.images import fit, read_image
from export.model_card import held_out_images
from inference.attention_page import attention_page
from inference.conversation import Conversation, EncodedImage, encode_images, open_for_chat
from inference.engine import Engine
from inference.generate import UNFINISHED, Generation, Sampler
from inference.quantized_linear import fastest_precision

SESSIONS = 256  # pages remembered; the least recently used is forgotten first
UPLOADS_KEPT = 3600  # seconds that an image outlives a page that was not closed properly
TITLE = "nanoGPT-Vision"
QUESTIONS = "What do you see?", "Describe the picture.", "How many things are there?"
REQUESTS = "Tell me a story.", "What is your name?"

# Endpoints of gradio that fetch other addresses, store unneeded data, or run programs
CLOSED = re.compile(r"/gradio_api/(file[=/]\s*https?:|proxy=|deep_link|process_recording)")


@dataclass
class Config(Generation):
    # --- page
    host: str = ""  # address to listen at; empty: 127.0.0.1, or GRADIO_SERVER_NAME
    port: int = 7860  # 0 for any free one

    # --- limits
    streams: int = 8  # answers decoded at the same time, in one batch
    queue: int = 32  # questions that may wait; more are refused
    per_minute: int = 20  # questions per minute from one address
    uploads_per_hour: int = 120  # uploads per hour from one address
    max_text: int = 4000  # characters of a question
    max_images: int = 4  # images of a question
    upload_mb: float = 5.0  # largest image file, in megabytes
    upload_megapixels: float = 25.0  # largest image, checked before it is decoded

    def __post_init__(self):
        super().__post_init__()
        for name in ("streams", "queue", "per_minute", "uploads_per_hour", "max_text", "max_images",
                     "upload_mb", "upload_megapixels"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be above 0, not {getattr(self, name)}")
        if not 0 <= self.port < 2**16:
            raise UserError(f"port must be 0 to {2**16 - 1}, not {self.port}")


@dataclass
class Session:
    """What is kept of one page beside its history, which the page sends."""

    files: set = field(default_factory=set)  # its uploads
    images: dict = field(default_factory=dict)  # sha256 of a file -> EncodedImage
    last: Conversation | None = None  # with its answer, for the tab Look inside


class App:
    """The page and the sessions behind it."""

    def __init__(self, model, tokenizer, info, cfg):
        self.model, self.tokenizer, self.info, self.cfg = model, tokenizer, info, cfg
        self.engine = Engine(model, cfg.streams)
        self.sessions = OrderedDict()
        self.recent = defaultdict(list)  # what is limited -> [(time, address)]
        self.reading = threading.Lock()  # a large image takes up to 400 MB until it is fitted
        os.environ["GRADIO_TEMP_DIR"] = str(UPLOADS)  # a second import of this file changes it

    async def respond(self, message, history, temperature, top_p, penalty, max_tokens,
                      request: gr.Request):
        """What gradio calls for a question: yield the growing answer, as the page shows it."""
        try:
            self.count("questions a minute", request, self.cfg.per_minute, 60)
            cfg = replace(self.cfg, temperature=float(temperature), top_p=float(top_p),
                          repetition_penalty=float(penalty), seed=secrets.randbits(48),
                          max_tokens=max(1, min(int(max_tokens), self.cfg.max_tokens)))
            answers = self.answer(request.session_hash, message, history, cfg)
            async with contextlib.aclosing(answers):
                async for answer in answers:
                    yield html.escape(answer, quote=False)  # gradio renders what looks like HTML
        except Exception as error:  # if it left this function, the text box would stay disabled
            gr.Warning(html.escape(explain(error), quote=False), title="Not answered")

    def count(self, what, request, most, seconds):
        """Count a request of a client's address; UserError if there are too many."""
        now, address = time.monotonic(), address_of(request)
        self.recent[what] = [entry for entry in self.recent[what] if entry[0] > now - seconds]
        times = [at for at, by in self.recent[what] if by == address]
        if len(times) >= most:
            raise UserError(f"At most {most} {what} from one address; "
                            f"wait {int(times[0] + seconds + 1 - now)} seconds")
        self.recent[what].append((now, address))

    async def answer(self, session_name, message, history, cfg):
        """Yield the growing answer after each token; UserError if the question is refused."""
        self.sessions[session_name] = session = self.sessions.pop(session_name, None) or Session()
        if len(self.sessions) > SESSIONS:
            self.close(next(iter(self.sessions)))
        conversation = await asyncio.to_thread(self.conversation, session, message, history, cfg)
        sampler = Sampler(cfg, self.engine.decoding.device)
        tokens = self.engine.generate(conversation, cfg.max_tokens, sampler)
        session.last, ids = conversation, conversation.turns[-1].answer
        async with contextlib.aclosing(tokens):
            async for token in tokens:
                ids.append(token)
                yield self.tokenizer.decode(ids).removesuffix(UNFINISHED)
        if ids:
            yield self.tokenizer.decode(ids)  # with the beginning of a character, if it ends so
        else:
            gr.Info("The model gave an empty answer.")

    def conversation(self, session, message, history, cfg):
        """The Conversation of a page: its questions since the last new image, then `message`."""
        text, files = message.get("text") or "", message.get("files") or []
        if not text.strip() and not files:
            raise UserError("Type a question, or choose an image")
        if len(text) > cfg.max_text:
            raise UserError(f"{len(text):,} characters are too many; at most {cfg.max_text:,}")
        turns = answered(history)
        if files and turns:  # models are trained on images at the start of a conversation
            gr.Info("A new image starts a new conversation.")
        turns = [*turns, (text, files, "")]
        start = max((i for i, (_, shown, _) in enumerate(turns) if shown), default=0)
        n_images = len(turns[start][1])  # which the page's history names, too
        if n_images > cfg.max_images:
            raise UserError(f"{n_images} images are too many; at most {cfg.max_images}")
        conversation, images = Conversation(self.model, self.tokenizer), {}
        turns = [conversation.turn(text, [self.encode_upload(session, file, images, cfg)
                                          for file in files], self.tokenizer.encode(answer))
                 for text, files, answer in turns[start:]]
        session.images = images
        if n := conversation.fit(turns, cfg.max_tokens):
            gr.Info(f"The context is full: the {n} oldest questions are not remembered.")
        return conversation

    def encode_upload(self, session, file, images, cfg):
        """The EncodedImage of an upload, whose size gradio has limited; also put in `images`."""
        path = Path(file["path"] if isinstance(file, dict) else file).resolve()
        if not path.is_relative_to(UPLOADS) or not path.is_file():
            raise UserError("That file is not here any more; choose it again")
        name, data = f"the file {path.name}", path.read_bytes()
        if path.parent != EXAMPLES:
            session.files.add(path)
        key = hashlib.sha256(data).digest()
        images[key] = images.get(key) or session.images.get(key)
        if not images[key]:
            with self.reading:
                image = fit(read_image(data, name, max_pixels=int(cfg.upload_megapixels * 1e6)),
                            *self.model.image_spec[1:])
            images[key] = EncodedImage(encode_images(self.model, [image])[0], image)
        return images[key]

    def close(self, name):
        """Drop a session, and delete its uploads that no other session has."""
        session = self.sessions.pop(name, Session())
        for file in session.files.difference(*(s.files for s in self.sessions.values())):
            file.unlink(missing_ok=True)

    async def look(self, request: gr.Request):
        """What gradio calls for the tab Look inside: a page about the last answer."""
        self.count("questions a minute", request, self.cfg.per_minute, 60)
        session = self.sessions.get(request.session_hash)
        if not session or not session.last:
            raise UserError("First ask something")
        page = await asyncio.to_thread(attention_page, session.last, self.info)
        return (f'<iframe sandbox="allow-scripts" srcdoc="{html.escape(page)}" '
                'title="attention" style="width: 100%; height: 75vh; border: 0"></iframe>')

    async def left(self, request: gr.Request):
        self.close(request.session_hash)

    async def gate(self, request, call_next):
        """Middleware that refuses unused addresses and large requests, and explains errors."""
        if CLOSED.search(request.url.path):
            return PlainTextResponse("There is nothing here.", 404)
        size = request.headers.get("content-length", "inf" if request.method == "POST" else "0")
        upload = request.url.path.endswith("/upload")
        if float(size) > 1e6 * (1 + upload * self.cfg.max_images * self.cfg.upload_mb):
            return PlainTextResponse("That is too much at once.", 413)
        try:
            if upload:
                self.count("uploads an hour", request, self.cfg.uploads_per_hour, 3600)
            response = await call_next(request)
        except Exception as error:
            return PlainTextResponse(explain(error), 400)
        response.status_code = 400 if response.status_code == 500 else response.status_code
        return response

    def page(self):
        """The gradio page."""
        cfg, vision = self.cfg, self.info["kind"] == "vision"
        box = gr.MultimodalTextbox(
            placeholder="Ask about an image, or just chat" if vision else "Ask something",
            file_types=["image"], file_count="multiple", sources=["upload"] if vision else [],
            show_label=False, autofocus=True, stop_btn=True, max_plain_text_length=10**9)
        chatbot = gr.Chatbot(
            show_label=False, render_markdown=False, scale=1, buttons=["copy"],
            placeholder="Choose an image and ask." if vision else "Ask something.")
        settings = [
            gr.Slider(0, max(2, cfg.temperature), cfg.temperature, step=0.05, label="Temperature",
                      info="0 gives the most likely answer, higher is more random"),
            gr.Slider(min(0.05, cfg.top_p), 1, cfg.top_p, step=0.05, label="Top-p",
                      info="sample from the most likely tokens that make up this probability"),
            gr.Slider(min(1, cfg.repetition_penalty), max(2, cfg.repetition_penalty),
                      cfg.repetition_penalty, step=0.05, label="Repetition penalty"),
            gr.Slider(1, max(2, cfg.max_tokens), cfg.max_tokens, step=1,
                      label="Longest answer, in tokens")]
        with Page(title=TITLE, analytics_enabled=False, fill_height=True,
                  delete_cache=(600, UPLOADS_KEPT)) as page:
            with gr.Tab("Chat", scale=1):
                gr.ChatInterface(
                    self.respond, multimodal=True, chatbot=chatbot, textbox=box, title=TITLE,
                    examples=[[example, *[None] * len(settings)]
                              for example in self.examples(vision)],
                    run_examples_on_click=True, cache_examples=False, additional_inputs=settings,
                    additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
                    concurrency_limit=cfg.streams, flagging_mode="never", fill_height=True,
                    api_name="chat")
            with gr.Tab("Look inside") as tab:
                inside = gr.HTML()
                tab.select(self.look, None, inside, show_progress="hidden", api_name=False)
            gr.Markdown("**{stage}** after {step:,} steps: {parameters:,} parameters".format(
                **self.info), elem_classes="about")
            page.unload(self.left)
        return page.queue(max_size=cfg.queue, default_concurrency_limit=cfg.streams)

    def examples(self, vision):
        """Messages to try."""
        if not vision:
            return [{"text": text, "files": []} for text in REQUESTS]
        files = sorted(Path("examples").glob("*.png")) or held_out_images(self.info)
        EXAMPLES.mkdir(exist_ok=True)  # the first are those of upload.py --space
        return [{"text": text, "files": [shutil.copy(path, EXAMPLES)]}
                for path, text in zip(files, QUESTIONS, strict=False)]

    def launch(self):
        """Serve the page, in a thread; returns what has to be closed."""
        cfg, page = self.cfg, self.page()
        theme = gr.themes.Soft(primary_hue="indigo", font=["system-ui", "sans-serif"],
                               font_mono=["ui-monospace", "monospace"])
        try:
            page.launch(
                server_name=cfg.host or None, server_port=cfg.port or None, share=False, quiet=True,
                theme=theme, css_paths=Path(__file__).parent / "inference" / "app.css",
                ssr_mode=False, enable_monitoring=False, footer_links=["gradio", "settings"],
                prevent_thread_lock=True, max_file_size=int(cfg.upload_mb * 1e6),
                state_session_capacity=SESSIONS,
                app_kwargs={"middleware": [Middleware(BaseHTTPMiddleware, self.gate)]})
        except OSError as error:
            raise UserError(f"cannot listen at port {cfg.port}: {error}; try --port=0") from None
        print(f"{page.local_url}  (Ctrl-C ends)", flush=True)
        return page


class Page(gr.Blocks):
    """gr.Blocks that downloads nothing, and reports every error in a sentence."""

    async def process_api(self, block_fn, inputs, *args, **kwargs):
        try:
            if re.search(r'"path": "\s*\w+://', json.dumps(inputs)):
                raise UserError("Only uploaded images are read, no addresses")
            return await super().process_api(block_fn, inputs, *args, **kwargs)
        except Exception as error:
            text = html.escape(explain(error), quote=False)
            raise gr.Error(text, print_exception=False) from None


def address_of(request):
    """The address for which a request counts, of IPv6 the /64 network, as one client has it all.
    uvicorn reads X-Forwarded-For if FORWARDED_ALLOW_IPS has the proxy that sends it."""
    host = request.client.host if request.client else ""
    with contextlib.suppress(ValueError):
        ip = ipaddress.IPv6Address(host)
        host = str(ip.ipv4_mapped or ipaddress.ip_network((ip, 64), strict=False))
    return host


def explain(error):
    """An error as a sentence for the user. An unexpected one is logged without the user's text."""
    if not isinstance(error, gr.Error | UserError):
        at = traceback.extract_tb(error.__traceback__)[-1]
        print(f"{type(error).__name__} at {at.filename}:{at.lineno}", file=sys.stderr, flush=True)
        error = "That could not be understood. Reload the page and try again"
    text = str(getattr(error, "message", error)).strip().rstrip(".")
    return text[:1].upper() + text[1:] + "."


def answered(history):
    """(question, its files, answer) of the questions in a page's history that have an answer."""
    turns, question = [], ("", [])
    for message in history:
        content = message["content"]
        parts = [{"text": part} if isinstance(part, str) else part.get("file") or part
                 for part in (content if isinstance(content, list) else [content])]
        text = "\n".join(part["text"] for part in parts if part.get("text"))
        if message["role"] == "assistant":
            turns.append((*question, html.unescape(text)))
        else:
            question = text, [part for part in parts if "path" in part]
    return turns


def main():
    with contextlib.suppress(AttributeError):  # glibc: return freed blocks of 8 MB and more
        ctypes.CDLL(None).mallopt(-3, 2**23)  # M_MMAP_THRESHOLD
    name, cfg = parse_checkpoint(Config, default=os.environ.get("CHECKPOINT", "checkpoint"))
    device = pick_device(cfg.device)
    model, tokenizer, info = open_for_chat(name, device,
                                           fastest_precision(device, cfg.precision))
    if info["stage"] == "pretrain":
        raise UserError(f"{name} is a pretrained checkpoint, which continues text and does not "
                        "chat: use sample.py, or train it to chat with sft.py")
    page = App(model, tokenizer, info, cfg).launch()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        page.block_thread()
    finally:
        page.close()


if __name__ == "__main__":
    run_main(main)
