"""docs/learn: every chapter runs, its tests accept the solutions and refuse typical mistakes."""

import pytest
from conftest import ROOT

from docs.learn import run, solutions
from docs.learn.wrong import WRONG


@pytest.mark.slow
@pytest.mark.parametrize("chapter", run.CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_runs_and_its_exercises_can_be_solved(chapter, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "IMAGES", tmp_path)
    tests = run.checks(run.chapter_names(int(chapter.name[:2])))
    assert len(tests) == 2 and any(tmp_path.iterdir())
    for picture in tmp_path.iterdir():
        assert (ROOT / "docs/learn/images" / picture.name).is_file()
        assert f"(images/{picture.name})" in chapter.read_text(encoding="utf-8")
    for exercise, test in tests.items():
        test(getattr(solutions, exercise))
        with pytest.raises((AssertionError, ValueError)):
            test(WRONG[exercise])
