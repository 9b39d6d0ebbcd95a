"""The claims of common/atomic.py: folders complete or absent, JSON lines resumed."""

import contextlib
import os
import resource
import subprocess
import sys

import pytest
from conftest import ROOT

from common.atomic import NewFolder, append_rows, check_output, resume_rows, writing
from common.config import UserError


def test_a_folder_appears_complete_and_is_kept_by_a_later_error(tmp_path):
    out = tmp_path / "in/out"
    for text in "old", "new":
        with NewFolder(out) as folder:
            (folder / "a").write_text(text)
            assert out.exists() == (text == "new")
        assert (out / "a").read_text() == text
    for error, raised in ((KeyboardInterrupt(), KeyboardInterrupt),
                          (OSError("No space left on device"), UserError)):
        with pytest.raises(raised), NewFolder(out) as folder:
            (folder / "b").write_text("newer")
            raise error
        assert os.listdir(out.parent) == ["out"] and os.listdir(out) == ["a"]


def test_an_output_is_checked_before_the_work_and_a_full_disk_is_a_sentence(tmp_path):
    check_output(tmp_path / "new/folder/a.gguf")
    check_output(tmp_path / "new/other", folder=True)
    assert sorted(os.listdir(tmp_path / "new")) == ["folder", "other"]
    for path in tmp_path, "/dev/full":
        with pytest.raises(UserError, match=r"--gguf=.* a folder or a device"):
            check_output(path, "--gguf=")
    full = pytest.raises(UserError, match="cannot write --out=/dev/full: No space left on device")
    with full, writing("/dev/full", "--out="):
        append_rows("/dev/full", [{}])


def test_work_survives_an_error_for_the_next_start(tmp_path):
    folder = NewFolder(tmp_path / "out")
    with pytest.raises(ValueError), folder as new:
        (new / "a").write_text("a")
        (folder.work / "rows").write_text("1")
        raise ValueError
    with NewFolder(tmp_path / "out") as new:
        assert not os.listdir(new)
        assert (new.parent / "rows").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]


def test_two_processes_cannot_write_one_folder(tmp_path):
    with NewFolder(tmp_path / "out"):
        with pytest.raises(UserError, match="another process"), NewFolder(tmp_path / "out"):
            pass
        assert (tmp_path / ".writing-out/new").is_dir()


def test_two_processes_cannot_append_to_one_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    code = f"from common.atomic import *; resume_rows({str(path)!r}, {{}}, 2, 1); print(1); input()"
    with subprocess.Popen([sys.executable, "-uc", code], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(UserError, match="another process is writing"):
            resume_rows(path, {}, 2, 1)
        other.communicate(b"\n")
    assert resume_rows(path, {}, 2, 1) == []


def test_rows_are_resumed_after_the_last_complete_batch(tmp_path):
    path, header = tmp_path / "in/rows.jsonl", {"checkpoint": "a"}
    rows = [{"row": n, "text": "größe \ud800 \n"} for n in range(5)]
    assert resume_rows(path, header, 5, 2) == []
    append_rows(path, rows)
    complete = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(complete) if byte == ord("\n")]
    for length in range(len(complete) + 1):
        path.write_bytes(complete[:length])  # as a kill or a full disk leaves it
        n_rows = sum(end <= length for end in ends[1:])
        n_kept = n_rows if n_rows == 5 else n_rows // 2 * 2
        assert resume_rows(path, header, 5, 2) == rows[:n_kept]
        assert path.read_bytes() == complete[: ends[n_kept]]
        append_rows(path, rows[n_kept:])
        assert path.read_bytes() == complete
    with pytest.raises(UserError, match="other questions"):
        resume_rows(path, header, 4, 2)
    path.write_bytes(complete[: ends[2]] + complete[ends[0] : ends[2]])  # rows 0, 1, 0, 1
    with pytest.raises(UserError, match="two processes"):
        resume_rows(path, header, 5, 2)


@pytest.mark.parametrize("room", range(0, 90, 7))
def test_a_full_disk_loses_no_complete_batch(room, tmp_path):
    """room: bytes that still fit, as a limit on the size of the file."""
    path, rows = tmp_path / "rows.jsonl", [{"row": n, "text": "x" * 9} for n in range(6)]
    resume_rows(path, {}, 6, 2)
    append_rows(path, rows[:2])
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, limits[1]))
    try:
        with contextlib.suppress(OSError):
            append_rows(path, rows[2:4])
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        with contextlib.suppress(OSError):
            resume_rows(path, {}, 6, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes().startswith(before)
    assert resume_rows(path, {}, 6, 2) == rows[: 4 if room >= len(before) - 3 else 2]


@pytest.mark.parametrize("content", ["Notes", "Notes\n", '{"checkpoint": "b"}\n',
                                     '{"checkpoint": "a"}\nno JSON\n'])
def test_rows_behind_another_header_are_refused_and_unchanged(content, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"another checkpoint|damaged"):
        resume_rows(path, {"checkpoint": "a"}, 1, 1)
    assert path.read_text() == content
