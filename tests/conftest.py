"""What the tests share: scripts run as by a command line, a tiny world, a run of every stage."""

import contextlib
import fcntl
import io
import itertools
import json
import os
import runpy
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

# Before PyTorch is imported, here and in the processes that tests start: two threads that wait for
# each other inside tiny products cost 20 times the time as soon as something else uses the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# `make test &` in a script starts with Ctrl-C ignored, and so would what the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("clip_pretrain", "pretrain", "sft", "vision_pretrain", "vision_sft")  # in working order
STEPS = 6

DEMO = ("--stories=400", "--chats=150", "--captions=120", "--conversations=120", "--questions=3",
        "--held_out=64", "--vocabulary=512", "--image_size=32")
COMMON = (f"--max_steps={STEPS}", "--save_every=2", "--eval_every=3", "--log_every=1",
          "--device=cpu", "--precision=fp32")
ROWS = ("--micro_rows=4", "--val_rows=8")
PICTURES = ("--micro_rows=4", "--val_chats=24", "--workers=0")
TINY = {
    "clip_pretrain": ("--image_size=32", "--patch_size=8", "--vision_width=32",
                      "--vision_layers=2", "--vision_heads=2", "--text_width=32",
                      "--text_layers=2", "--text_heads=2", "--embed_dim=32", "--context=64",
                      "--batch_pairs=16", "--workers=0"),
    "pretrain": ("--n_layer=2", "--n_head=2", "--n_embd=32", "--max_positions=256",
                 "--context=64", "--batch_tokens=512", "--muon_lr=0.02", "--momentum=0.95",
                 "--lr=0.003", "--embedding_lr=0", *ROWS),
    "sft": ("--context=128", "--batch_tokens=1024", *ROWS),
    "vision_pretrain": ("--context=128", "--batch_tokens=1024", *PICTURES),
    "vision_sft": ("--context=128", "--batch_tokens=1024", "--text_share=0.5", *PICTURES),
}


@dataclass
class Result:
    """What a script leaves on the terminal."""

    status: int
    out: str
    err: str

    @property
    def refusal(self):
        """The one line of a script that ended with a sentence for the user."""
        assert self.status == 1, f"status {self.status}\n{self.out}\n{self.err}"
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        return lines[0]


def run(script, *argv, stdin=""):
    """Run a script of this project in this process, as its command line would; returns its Result.

    Importing PyTorch takes seconds, so only a few tests start a process of their own.
    """
    out, err, status = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, argv)])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return Result(status, out.getvalue(), err.getvalue())


def encoded(image, kind="PNG", **options):
    """The bytes of a file of a PIL image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def run_stage(stage, *flags):
    """Run a stage to its end; returns what it printed."""
    result = run(f"{stage}.py", *flags)
    assert result.status == 0, result.err
    return result.out


def log_rows(folder):
    """The rows of a run's log.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def logged(folder, *names):
    """{(step, name): figure} of some figures in a run's log.jsonl."""
    return {(row["step"], name): row[name]
            for row in log_rows(folder) for name in names if name in row}


def newest(folder):
    """The newest checkpoint in a run's folder."""
    return sorted(Path(folder).glob("step_*"))[-1]


@dataclass
class Pipeline:
    """A finished run of every stage. Tests read it, and copy what they want to change."""

    data: Path  # what prepare.py demo made
    folder: Path  # with a run in each <stage>/

    def flags(self, stage):
        """All flags of a stage's command but --out."""
        kind = {"pretrain": "text", "sft": "chats", "vision_sft": "scenes"}.get(stage, "captions")
        parents = {"sft": ("--init_from=pretrain",),
                   "vision_pretrain": ("--init_from=sft", "--clip=clip_pretrain"),
                   "vision_sft": ("--init_from=vision_pretrain",)}.get(stage, ())
        parents = [flag.replace("=", f"={self.folder}/") for flag in parents]
        texts = [f"--text_data={self.data}/chats"] if stage == "vision_sft" else []
        return [*COMMON, *TINY[stage], f"--data={self.data}/{kind}", *texts, *parents]

    def run_stage(self, stage, out, *more):
        return run_stage(stage, *self.flags(stage), f"--out={out}", *more)


@pytest.fixture(scope="session", autouse=True)
def quick_start():
    """A run measures the machine's peak speed for half a second; here nobody reads the figure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.device.peak_flops", lambda machine: 1e12)
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """shared(name, make): a folder that make(folder) fills, once for all workers of pytest-xdist.

    Whichever worker needs it first makes it, the others wait. No test may change it.
    """
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent

    def folder(name, make):
        found, done = place / name, place / f"{name}.done"
        with open(place / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
            if not done.exists():
                shutil.rmtree(found, ignore_errors=True)  # left by a worker that failed
                found.mkdir()
                make(found)
                done.touch()
        return found

    return folder


@pytest.fixture(scope="session")
def world_data(shared):
    """The folder of a tiny `prepare.py demo`."""
    def make(folder):
        result = run("prepare.py", "demo", f"--out={folder}/demo", *DEMO)
        assert result.status == 0, result.err

    return shared("data", make) / "demo"


@pytest.fixture(scope="session")
def pipeline(world_data, shared):
    """All five stages, tiny, each from the one before."""
    def make(folder):
        for stage in STAGES:
            Pipeline(world_data, folder).run_stage(stage, folder / stage)

    return Pipeline(world_data, shared("out", make))


@pytest.fixture(scope="session")
def vocabulary(shared):
    """The folder of a small byte-level tokenizer."""
    import tokenizer as tokenizers

    texts = ["the quick brown fox jumps over the lazy dog. What is it? It is red. Story 1."] * 20
    return shared("vocabulary", tokenizers.train(texts, 300).save)


@pytest.fixture
def interrupted(monkeypatch):
    """interrupted(*argv): prepare.py, ended by Ctrl-C after 64 rows; gives the Result."""
    from prep import resumable

    monkeypatch.setattr(resumable, "BATCH_ROWS", 16)
    monkeypatch.setattr(resumable, "COMMIT_SECONDS", 0)

    def interrupted(*argv):
        commit, commits = resumable.Records.commit, itertools.count(1)

        def ending(records, complete=False):
            if next(commits) > 4:
                raise KeyboardInterrupt
            commit(records, complete)

        with monkeypatch.context() as patch:
            patch.setattr(resumable.Records, "commit", ending)
            return run("prepare.py", *argv)

    return interrupted
