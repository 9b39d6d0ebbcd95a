"""Files that survive a kill: folders that are complete or absent, and JSON lines that are resumed.

    with NewFolder("data/books") as folder:     # an empty folder, renamed to data/books at the end
        (folder / "a.txt").write_text("a")

    done = resume_rows("answers.jsonl", header, n=1000, batch=64)  # [] at the first start
    append_rows("answers.jsonl", rows)
"""

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path

from common.config import UserError

HELD = {}  # path -> open file of answers, locked until this process ends


@contextlib.contextmanager
def writing(path, setting=""):
    """A context whose OSErrors, as of a full disk, become a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {setting}{path}: {error.strerror or error}; make room, or "
                        "choose another name") from None


def check_output(path, setting="", folder=False):
    """Make the folder of an output file, or that folder itself; UserError if `path` cannot be
    written, before the work for it begins."""
    path = Path(path)
    with writing(path, setting):
        (path if folder else path.parent).mkdir(parents=True, exist_ok=True)
        if not folder and path.exists() and not path.is_file():
            raise OSError(0, "it is a folder or a device")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(0, "there is no permission")


def flush(folder, deep=True):
    """Force `folder`, and if deep everything below it, to the disk."""
    for path in [*(Path(folder).rglob("*") if deep else ()), Path(folder)]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def publish(temporary, path):
    """Rename the finished folder `temporary` to `path` on the same disk, replacing what is there.

    A reader finds the old folder, none for an instant, or the complete new one.
    """
    flush(temporary)
    replaced = path.with_name(f".removing-{path.name}")
    shutil.rmtree(replaced, ignore_errors=True)  # of an earlier start that was killed
    if path.exists():
        path.rename(replaced)
    temporary.rename(path)
    flush(path.parent, deep=False)
    shutil.rmtree(replaced, ignore_errors=True)


def take_lock(file, doing, how=fcntl.LOCK_EX | fcntl.LOCK_NB, call=fcntl.flock):
    """Lock an open file; UserError if another process has it, whose work `doing` names. Nothing on
    a disk without locks."""
    try:
        call(file, how)
    except BlockingIOError:
        raise UserError(f"another process is {doing}; wait, or choose another name") from None
    except OSError:
        pass


class NewFolder:
    """A context manager: an empty folder that is renamed to `path` when the block ends, replacing
    an older one, and removed when the block fails. Only one process can make `path` at a time.

    Files in self.work survive an error or a kill for the next start, and are removed at the end.
    UserError if it cannot be written.
    check(path): raises UserError if what is at `path` may not be replaced, now or when it is.
    """

    def __init__(self, path, check=lambda path: None):
        self.path, self.check = Path(os.path.realpath(path)), check
        if self.path in (Path.cwd(), *Path.cwd().parents):
            raise UserError(f"{path} is or contains the working folder; choose another folder")
        check(self.path)
        self.work = self.path.with_name(f".writing-{self.path.name}")
        self.new = self.work / "new"

    def __enter__(self):
        with writing(self.path):
            self.work.mkdir(parents=True, exist_ok=True)
            self.lock = os.open(self.work, os.O_RDONLY)
            take_lock(self.lock, f"writing {self.path}")  # freed when the process ends
            shutil.rmtree(self.new, ignore_errors=True)
            self.new.mkdir()
        return self.new

    def __exit__(self, kind, error, _):
        try:
            if kind is None:
                self.check(self.path)
                publish(self.new, self.path)
            files = [p for p in self.work.rglob("*") if p.is_file() and p.stat().st_size]
            if kind and any(self.new not in file.parents for file in files):
                print(f"completed work is kept in {self.work}; the same command resumes there",
                      flush=True)
            else:
                shutil.rmtree(self.work, ignore_errors=True)
        except OSError as failure:
            error = failure
        finally:
            os.close(self.lock)
        if isinstance(error, OSError):  # a full or broken disk
            raise UserError(f"cannot write {self.path}: {error}") from None


def resume_rows(path, header, n, batch):
    """The rows in a .jsonl file after its first line, `header` (a dict): all n, or those of
    complete batches, since the last digits depend on the batch. The file is cut to them, or made.
    Row i has "row": i.

    header identifies what the rows depend on; UserError if the file begins with anything else, or
    has more rows, as after two processes wrote it.
    """
    path, first = Path(path), json.dumps(header).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = HELD[path.absolute()] = HELD.get(path.absolute()) or open(path, "ab")  # noqa: SIM115
    take_lock(file, f"writing {path}")
    content = path.read_bytes() if path.exists() else b""
    lines = content.split(b"\n")[1:-1]  # a kill may have cut the last one
    if len(lines) > n or not (content.startswith(first) or first.startswith(content)):
        raise UserError(f"{path} has answers of another checkpoint, with other settings, or to "
                        "other questions; choose another name, or remove it")
    lines = lines if len(lines) == n else lines[: len(lines) // batch * batch]
    try:
        rows = [json.loads(line) for line in lines]
        numbers = [row["row"] for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it") from None
    if numbers != list(range(len(rows))):
        raise UserError(f"two processes wrote {path}; remove it")
    kept = len(first) + sum(len(line) + 1 for line in lines)
    if len(content) != kept:
        with open(path, "ab") as file:
            file.truncate(kept if lines else 0)
            file.write(b"" if lines else first)
    return rows


def append_rows(path, rows):
    """Append rows to a .jsonl file, whose last line must be complete; makes the file if needed."""
    # Half a surrogate pair, which JSON may contain and UTF-8 may not, is escaped as JSON does it.
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
