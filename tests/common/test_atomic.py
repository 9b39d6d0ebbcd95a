"""The claims of common/atomic.py: folders complete or absent, JSON lines resumed."""

import os

import pytest

from common.atomic import NewFolder, append_rows, resume_rows
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


@pytest.mark.parametrize("keep", [False, True])
def test_work_survives_an_error_for_the_next_start(keep, tmp_path):
    folder = NewFolder(tmp_path / "out", keep)
    with pytest.raises(ValueError), folder as new:
        (new / "a").write_text("a")
        (folder.work / "rows").write_text("1")
        raise ValueError
    with NewFolder(tmp_path / "out", keep) as new:
        assert os.listdir(new) == ["a"] * keep
        assert (new.parent / "rows").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]


def test_two_processes_cannot_write_one_folder(tmp_path):
    with NewFolder(tmp_path / "out"):
        with pytest.raises(UserError, match="another process"), NewFolder(tmp_path / "out"):
            pass
        assert (tmp_path / ".writing-out/new").is_dir()


def test_rows_are_resumed_after_the_last_complete_batch(tmp_path):
    path, header = tmp_path / "in/rows.jsonl", {"checkpoint": "a"}
    rows = [{"n": n, "text": "größe \ud800 \n"} for n in range(5)]
    assert resume_rows(path, header, 5, 2) == []
    append_rows(path, rows)
    complete = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(complete) if byte == ord("\n")]
    for length, n_kept in ((0, 0), (5, 0), (ends[0], 0), (ends[2] - 1, 0), (ends[2], 2),
                           (ends[3], 2), (ends[5] - 1, 4), (ends[5], 5)):
        path.write_bytes(complete[:length])  # as a kill leaves it
        assert resume_rows(path, header, 5, 2) == rows[:n_kept]
        append_rows(path, rows[n_kept:])
        assert path.read_bytes() == complete
    with pytest.raises(UserError, match="other questions"):
        resume_rows(path, header, 4, 2)


@pytest.mark.parametrize("content", ["Notes", "Notes\n", '{"checkpoint": "b"}\n',
                                     '{"checkpoint": "a"}\nno JSON\n'])
def test_rows_behind_another_header_are_refused_and_unchanged(content, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"another checkpoint|damaged"):
        resume_rows(path, {"checkpoint": "a"}, 1, 1)
    assert path.read_text() == content
