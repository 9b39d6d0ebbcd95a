"""The claims of prep/resumable.py: an interrupted prepare.py resumes to the same bytes."""

import glob
import json
import os
import tarfile

import pyarrow
import pyarrow.parquet
import pytest
from conftest import run
from PIL import Image

from common.checkpoint import sums


def many_rows(path, n=400):
    """A file of documents that are chats too; two of them cannot be used."""
    rows = [{"text": f"Story {i}. " * (i % 7 + 1), "prompt": f"say {i}", "output": f"it is {i}"}
            for i in range(n)]
    rows[n // 20] = rows[n // 2] = {"text": " ", "prompt": "hi", "output": ""}
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def about(name, *texts, **more):
    """A row in LLaVA's form about the image `name`; texts are question, answer, question ..."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {**({"image": name} if name else {}), "conversations": turns, **more}


def many_images(folder, n=120):
    """A file of chats about the images in folder/images; one in 21 is missing."""
    (folder / "images").mkdir()
    for i in range(20):
        Image.new("RGB", (30, 20), (12 * i, 0, 0)).save(folder / f"images/{i}.png")
    rows = [about(f"{i % 21}.png", "<image>\nWhat?", f"It is {i}.") for i in range(n)]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def prepared(*argv):
    """The output of a successful command of prepare.py."""
    result = run("prepare.py", *argv)
    assert (result.status, result.err) == (0, "")
    return result.out


@pytest.mark.parametrize("command", ["text", "chat", "images", "dataset"])
def test_interrupted_and_resumed_it_makes_the_same_bytes(command, vocabulary, tmp_path,
                                                         interrupted):
    (tmp_path / "in").mkdir()
    if command == "images":
        source = [f"--files={many_images(tmp_path / 'in')}", "--image_size=32",
                  f"--image_root={tmp_path}/in/images.tar.gz", "--shard_bytes=9000"]
        with tarfile.open(tmp_path / "in/images.tar.gz", "w:gz") as archive:
            archive.add(tmp_path / "in/images", "images")
    elif command == "dataset":
        many_rows(tmp_path / "in/a.parquet")
        source = [f"--dataset={tmp_path}/in"]
    else:
        files = [many_rows(tmp_path / f"in/{name}", 50) for name in ("a.jsonl", "b.parquet")]
        source = [f"--files={files[0]},{files[1]},{many_rows(tmp_path / 'in/c.jsonl')}"]
    argv = ["text" if command == "dataset" else command, *source, f"--tokenizer={vocabulary}"]
    said = prepared(*argv, f"--out={tmp_path}/complete")
    stopped = interrupted(*argv, f"--out={tmp_path}/out")
    assert stopped.status == 130 and "the same command resumes" in stopped.out
    assert not (tmp_path / "out").exists()
    assert not any("sqlite" in os.path.realpath(file) for file in glob.glob("/proc/self/fd/*"))
    resumed = prepared(*argv, f"--out={tmp_path}/out")
    assert "resuming after 64 completed rows" in resumed
    assert sums(tmp_path / "out") == sums(tmp_path / "complete")
    manifests = [tmp_path / f"{name}/manifest.json" for name in ("out", "complete")]
    assert manifests[0].read_text() == manifests[1].read_text()
    left_out = [line for line in said.splitlines() if line.startswith("left out")]
    assert left_out and set(left_out) <= set(resumed.splitlines())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["complete", "in", "out"]


def test_what_changes_records_or_damages_them_starts_over(vocabulary, tmp_path, interrupted):
    path = many_rows(tmp_path / "a.jsonl")
    argv = ["text", f"--tokenizer={vocabulary}", f"--files={path}", f"--out={tmp_path}/out"]
    interrupted(*argv)
    said = prepared(*argv, "--field=output")
    assert "starting over" in said and "resuming" not in said
    interrupted(*argv)
    assert "resuming after 64" in prepared(*argv, "--val_share=0.5", "--seed=3")
    for size in 100, 20_000:
        interrupted(*argv)
        (records,) = (tmp_path / ".writing-out").glob("rows-*.sqlite")
        os.truncate(records, size)
        said = prepared(*argv)
        assert "damaged: starting over" in said and "394 documents" in said
    interrupted(*argv)
    many_rows(path, 100)  # another file of the same name
    said = prepared(*argv)
    assert "starting over" in said and "97 documents" in said


def test_an_error_keeps_completed_rows(vocabulary, tmp_path):
    many_rows(tmp_path / "a.jsonl", 2000)
    (tmp_path / "z.parquet").write_bytes(b"not parquet")
    argv = ["text", f"--tokenizer={vocabulary}", f"--files={tmp_path}/a.jsonl,{tmp_path}/z.parquet",
            f"--out={tmp_path}/out"]
    for said in "the same command resumes", "resuming after":
        result = run("prepare.py", *argv)
        assert "z.parquet" in result.refusal and said in result.out
    assert not (tmp_path / "out").exists()


def test_the_number_of_cores_changes_no_byte(vocabulary, tmp_path, monkeypatch):
    many_rows(tmp_path / "a.jsonl", 1000)
    for cores in 1, 7:
        monkeypatch.setattr("prep.resumable.cores", lambda cores=cores: cores)
        prepared("text", f"--files={tmp_path}/a.jsonl", f"--tokenizer={vocabulary}",
                 f"--out={tmp_path}/{cores}")
    assert sums(tmp_path / "1") == sums(tmp_path / "7")
