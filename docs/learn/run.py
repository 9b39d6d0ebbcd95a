"""Runs the chapters, and checks solutions to their exercises.

    python docs/learn/run.py                      # every chapter; draws their pictures
    python docs/learn/run.py 3                    # chapter 3
    python docs/learn/run.py 3 my_solutions.py    # checks your functions against chapter 3's tests

The Python blocks of a chapter run one after another in one namespace, in which your file runs too:
it can use what the chapter has defined. For an exercise NAME the chapter defines
check_NAME(solution), which raises an AssertionError with a hint for a wrong solution.
"""

import functools
import re
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent.parent))
IMAGES = FOLDER / "images"  # where the chapters draw their pictures
CHAPTERS = sorted(FOLDER.glob("[0-9][0-9]_*.md"))


def run(chapter):
    """The namespace that the blocks of a chapter (a path) leave."""
    text, names = chapter.read_text(encoding="utf-8"), {"IMAGES": IMAGES}
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S):
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(chapter), "exec"), names)  # noqa: S102
    return names


@functools.cache
def chapter_names(number):
    """The namespace of a chapter that has run, for solutions that build on it."""
    return run(next(path for path in CHAPTERS if int(path.name[:2]) == number))


def checks(names):
    """{exercise: its test} of a namespace."""
    return {name.removeprefix("check_"): test for name, test in names.items()
            if name.startswith("check_")}


def verdict(test, solution):
    if solution is None:
        return "there is no function of this name in the file"
    try:
        test(solution)
    except AssertionError as hint:
        return f"not yet: {hint}"
    except Exception as error:  # of the learner's code
        return f"not yet: it raises {type(error).__name__}: {error}"
    return "right"


def main():
    number, *solutions = [*sys.argv[1:], ""][:2] if len(sys.argv) > 1 else [""]
    chosen = [path for path in CHAPTERS if not number or int(path.name[:2]) == int(number)]
    for chapter in chosen:
        names = chapter_names(int(chapter.name[:2]))
        print(f"{chapter.name}: ok")
        if solutions and solutions[0]:
            mine = runpy.run_path(solutions[0], init_globals=names)
            for exercise, test in checks(names).items():
                print(f"  {exercise}: {verdict(test, mine.get(exercise))}")


if __name__ == "__main__":
    main()
