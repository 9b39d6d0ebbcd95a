"""The claims of common/config.py: a typo never passes, a file is read and never run, flags win."""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from common.config import TrainSettings, UserError, parse, read_json, run_main

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(ROOT.glob("configs/*/*.py"))


@dataclass
class Config(TrainSettings):
    data: str = "data/text"
    n_layer: int = 20
    size: Literal["small", "large"] = "small"


@pytest.fixture
def written(tmp_path):
    """Write a config file and say its name."""
    def write(text):
        path = tmp_path / "settings.py"
        path.write_text(text, encoding="utf-8")
        return str(path)
    return write


def test_without_anything_the_defaults_hold():
    assert parse(Config, []) == Config()


def test_flags_override_the_file_and_the_file_the_defaults(written):
    path = written('"""Words."""\n\nmax_steps = 7  # few\nlr = 1e-4\ndata = "here"\nout = ""\n')
    assert parse(Config, [path]) == Config(max_steps=7, lr=1e-4, data="here", out="")
    cfg = parse(Config, [path, "--max_steps=9", "--data=there"])
    assert cfg == Config(max_steps=9, lr=1e-4, data="there", out="")


@pytest.mark.parametrize(("text", "value"), [
    ("weight_decay = -0.5", -0.5), ("seed = 1_000", 1000), ("compile = True", True),
    ("resume = False", False), ("size = 'large'", "large"),
    ("data = '--odd name=1'", "--odd name=1"), ("data = 'größe 日本'", "größe 日本"),
    ("lr = 1", 1.0), ("data = '7'", "7"),
])
def test_a_file_holds_numbers_strings_and_booleans(written, text, value):
    found = getattr(parse(Config, [written(text)]), text.split()[0])
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(("argv", "resume", "compiled"), [
    (["--resume=False"], False, False), (["--resume=True", "--compile=True"], True, True),
    (["--resume", "False"], False, False),
])
def test_booleans_are_written_out(argv, resume, compiled):
    cfg = parse(Config, argv)
    assert (cfg.resume, cfg.compile) == (resume, compiled)


# -------------------------------------------------------------------------------------------- typos


@pytest.mark.parametrize(("flag", "nearest"), [
    ("--max_step=5", "max_steps"), ("--n_layers=2", "n_layer"), ("--warm_up", "warmup"),
    ("--max-step=5", "max_steps"), ("--no-resume", "resume"),
])
def test_a_typo_on_the_command_line_names_the_nearest_setting(flag, nearest):
    with pytest.raises(UserError, match=rf"on the command line.*did you mean {nearest}\?"):
        parse(Config, ["--lr=1", flag])


def test_a_typo_in_a_file_names_the_line_and_the_nearest_setting(written):
    path = written("max_steps = 5\n\nmuon_ir = 0.1\n")
    with pytest.raises(UserError, match=r"'muon_ir' \(in .*settings\.py, line 3\).*mean muon_lr\?"):
        parse(Config, [path])


def test_a_name_like_no_other_points_to_help():
    with pytest.raises(UserError, match=r"no setting 'zzz' .*--help lists the settings"):
        parse(Config, ["--zzz=1"])


@pytest.mark.parametrize("argv", [
    ["--max_steps=many"], ["--max_steps=5.5"], ["--max_steps="], ["--lr=fast"], ["--size=medium"],
    ["--resume=maybe"], ["--resume"], ["--max_steps"], ["stray.py", "stray2.py"],
], ids=str)
def test_a_value_of_the_wrong_type_ends_with_status_2(written, argv, capsys):
    if not argv[0].startswith("-"):
        argv = [written("max_steps = 5"), *argv]
    with pytest.raises(SystemExit) as end:
        parse(Config, argv)
    assert end.value.code == 2
    capsys.readouterr()


@pytest.mark.parametrize("text", ["max_steps = 'many'", "max_steps = None", "size = 'medium'",
                                  "resume = 1.5"])
def test_a_value_of_the_wrong_type_in_a_file_ends_so_too(written, text, capsys):
    with pytest.raises(SystemExit) as end:
        parse(Config, [written(text)])
    assert end.value.code == 2
    assert text.split()[0] in capsys.readouterr().err


def test_help_lists_every_setting_with_its_comment(capsys):
    with pytest.raises(SystemExit) as end:
        parse(Config, ["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and "--n_layer" in shown and "price of one device" in shown


# ------------------------------------------------------------------------- a file is never executed


@pytest.mark.parametrize("line", [
    "max_steps = 1 + len(open({bait!r}, 'w').name)",
    "data = __import__('pathlib').Path({bait!r}).touch()",
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
])
def test_what_is_not_a_plain_value_is_refused_and_not_run(written, tmp_path, line):
    bait = tmp_path / "it_ran"
    path = written("seed = 3\n" + line.format(bait=str(bait)) + "\n")
    with pytest.raises(UserError, match=r"settings\.py, line 2: .*(only lines like|plain number)"):
        parse(Config, [path])
    assert not bait.exists()


@pytest.mark.parametrize("content", [b"max_steps = ", b"max_steps 5", b"\xff\xfe", b"out = '\x00'"],
                         ids=repr)
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path / "broken.py").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read the config file .*broken\.py"):
        parse(Config, [str(tmp_path / "broken.py")])


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no config file .*nowhere\.py"):
        parse(Config, [str(tmp_path / "nowhere.py")])
    with pytest.raises(UserError, match="cannot read the config file"):
        parse(Config, [str(tmp_path)])


# ---------------------------------------------------------------------------------- the whole house


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_config_file_suits_its_stage(path):
    """configs/demo/pretrain.py suits pretrain.py, and its run has a folder of its own."""
    stage = importlib.import_module(path.stem)
    cfg = parse(stage.Config, [str(path)])
    assert Path(cfg.out).name == path.stem


def test_the_demo_has_a_config_file_for_each_stage():
    demo = {path.stem for path in CONFIGS if path.parent.name == "demo"}
    assert demo == {"clip_pretrain", "pretrain", "sft", "vision_pretrain", "vision_sft"}


def test_a_user_error_is_one_line_and_status_1(capsys):
    def main():
        raise UserError("there is no such thing; try another")
    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: there is no such thing; try another\n"


def test_broken_json_is_named(tmp_path):
    (tmp_path / "whole.json").write_text(json.dumps({"größe": 1}), encoding="utf-8")
    assert read_json(tmp_path / "whole.json") == {"größe": 1}
    (tmp_path / "half.json").write_text("{", encoding="utf-8")
    for name in ("half.json", "nowhere.json"):
        with pytest.raises(UserError, match=f"cannot read .*{name}"):
            read_json(tmp_path / name)
