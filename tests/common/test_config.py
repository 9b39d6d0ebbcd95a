"""common/config.py: unknown settings are refused, config files are not executed, flags win."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from common.config import TrainSettings, UserError, parse, parse_checkpoint

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(ROOT.glob("configs/*/*.py"))


@dataclass
class Config(TrainSettings):
    # --- data
    data: str = "data/text"  # folder of token shards
    # a help text that is longer than one line of the source: all of it
    # is shown, 100 % of it
    size: Literal["small", "large"] = "small"
    image: tuple[str, ...] = ()  # an image; can be repeated

    # --- model
    n_layer: int = 20


@pytest.fixture
def written(tmp_path):
    """Write a config file and return its path."""
    def write(text):
        path = tmp_path / "settings.py"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)
    return write


def test_flags_override_the_file_and_the_file_the_defaults(written):
    assert parse(Config, []) == Config()
    path = written('\ufeff"""Words."""\nmax_steps = 7  # few\nlr = 1e-4\ndata = "here"\nout = ""\n')
    assert parse(Config, [path]) == Config(max_steps=7, lr=1e-4, data="here", out="")
    cfg = parse(Config, [path, "--max_steps=9", "--data=there"])
    assert cfg == Config(max_steps=9, lr=1e-4, data="there", out="")
    assert parse(Config, ["--image=a", "--image=b"]).image == ("a", "b")


def test_a_config_file_may_have_a_mark_and_windows_lines_and_paths_begin_with_home(
        written, monkeypatch):
    monkeypatch.setenv("HOME", "/home/mia")
    path = written(b"\xef\xbb\xbf# few\r\nmax_steps = 7\r\ndata = '~/a'\r\n")
    assert parse(Config, [path, "--image=~/b", "--out=a/~/c"]) == Config(
        max_steps=7, data="/home/mia/a", image=("/home/mia/b",), out="a/~/c")
    assert parse_checkpoint(Config, ["~/run"])[0] == "/home/mia/run"


def test_windows_is_refused_by_the_first_import(monkeypatch):
    """Modules that only Unix has are imported in common/ alone, whose __init__ comes first."""
    for path in {*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")}:
        lines = {*path.read_text(encoding="utf-8").splitlines()}
        assert path.parent.name in ("common", "tests") or lines.isdisjoint(
            ("import fcntl", "import resource"))
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(SystemExit, match="Linux and macOS"):
        importlib.reload(importlib.import_module("common"))


@pytest.mark.parametrize(("text", "value"), [
    ("weight_decay = -0.5", -0.5), ("seed = 1_000", 1000), ("compile = True", True),
    ("resume = False", False), ("size = 'large'", "large"),
    ("data = '--odd name=1'", "--odd name=1"), ("data = 'größe 日本'", "größe 日本"),
    ("lr = 1", 1.0), ("data = '7'", "7"),
])
def test_files_and_flags_hold_numbers_strings_and_booleans(written, text, value):
    name, plain = text.split(" = ")
    for argv in ([written(text)], [f"--{name}=" + plain.strip("'")]):
        found = getattr(parse(Config, argv), name)
        assert found == value and type(found) is type(value)


def test_a_checkpoint_comes_before_the_settings():
    assert parse_checkpoint(Config, ["out/x", "--seed=3"]) == ("out/x", Config(seed=3))
    assert parse_checkpoint(Config, ["--seed=3"], default="here") == ("here", Config(seed=3))
    with pytest.raises(UserError, match="name a checkpoint"):
        parse_checkpoint(Config, ["--seed=3"])


@pytest.mark.parametrize(("flag", "nearest"), [
    ("--max_step=5", "max_steps"), ("--n_layers=2", "n_layer"), ("--warm_up", "warmup"),
    ("--max-steps=5", "max_steps"), ("--no-resume", "resume"), ("--zzz=1", "--help"),
])
def test_an_unknown_flag_names_the_nearest_setting(flag, nearest):
    with pytest.raises(UserError, match=f"command line.*{nearest}"):
        parse(Config, ["--lr=1", flag])


def test_an_unknown_name_in_a_file_names_the_line_and_the_nearest_setting(written):
    with pytest.raises(UserError, match=r"'muon_ir' \(in .*settings\.py, line 3\).*mean muon_lr\?"):
        parse(Config, [written("max_steps = 5\n\nmuon_ir = 0.1\n")])


@pytest.mark.parametrize("flag", [
    "--max_steps=many", "--max_steps=5.5", "--max_steps=", "--lr=fast", "--lr=nan", "--lr=-inf",
    "--lr=1e999", "--seed=-" + "9" * 30, "--max_steps=9223372036854775808", "--size=medium",
    "--resume=maybe", "--resume", "--max_steps", "--data=\ud800", "stray.py"])
def test_a_value_of_the_wrong_type_is_named(written, flag):
    with pytest.raises(UserError, match=flag.split("=")[0]):
        parse(Config, [written("max_steps = 5"), flag])


def test_help_shows_groups_and_complete_comments(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parse(Config, ["--help"])
    shown = capsys.readouterr().out
    assert "all of it is shown, 100 % of it (default: small)" in shown
    words = "\ndata:\n", "--data", "\nmodel:\n", "--n_layer", "\noptimization:\n", "\nrun:\n"
    places = [shown.index(word) for word in words]
    assert places == sorted(places)


@pytest.mark.parametrize("line", [
    "max_steps = 1 + len(open({bait!r}, 'w').name)",
    'data = f"{{open({bait!r}, chr(119))}}"',
    "__import__('pathlib').Path({bait!r}).touch()",
    "import pathlib; pathlib.Path({bait!r}).touch()",
    "open({bait!r}, 'w').attribute = 3",
    "(data := open({bait!r}, 'w'))",
    "max_steps = [open({bait!r}, 'w') for _ in '1'][0]",
    "if open({bait!r}, 'w'):\n    max_steps = 3",
    "def max_steps(x=open({bait!r}, 'w')): pass",
    "data = lr",
    "max_steps += 1",
    "max_steps: int = 5",
    "max_steps, lr = 5, 1",
    "max_steps = n_layer = 5",
    "data = {{[]: 1}}",
    "data = 'a\\0b'",
    "data = '\\ud800'",
])
def test_a_config_file_is_not_executed(written, tmp_path, line):
    bait = tmp_path / "it_ran"
    path = written("seed = 3\n" + line.format(bait=str(bait)) + "\n")
    with pytest.raises(UserError, match=r"settings\.py, line 2: .*only lines like"):
        parse(Config, [path])
    assert not bait.exists()


@pytest.mark.parametrize("content", [b"max_steps = ", b"max_steps 5", b"\xff\xfe", b"out = '\x00'",
                                     b"seed = " + b"-" * 5000 + b"1"], ids=lambda text: text[:14])
def test_a_file_that_cannot_be_read_is_named(written, tmp_path, content):
    for path in written(content), str(tmp_path), str(tmp_path / "nowhere.py"):
        with pytest.raises(UserError, match=path):
            parse(Config, [path])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_config_file_fits_its_stage(path):
    """configs/demo/pretrain.py is one of pretrain.py, and its run has its own folder."""
    cfg = parse(importlib.import_module(path.stem).Config, [str(path)])
    assert Path(cfg.out).name == path.stem
