"""datasets/folder: tables and folders that hold what nobody expects, and runs over the output of an earlier one."""

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm.data.index import load_index
from vlm.data.info import info
from vlm.data.prepare import keyed_hash
from vlm.data.shards import ShardWriter

NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.fixture
def prepare(recipe, tmp_path) -> Callable[..., int]:
    """Runs the recipe on a source into tmp_path/o."""
    return lambda source, *more: recipe("folder").main(["--source", str(source), "--out", str(tmp_path / "o"), *more])


@pytest.fixture
def images(tmp_path, photograph) -> Path:
    for name in "abcd":
        photograph(tmp_path / "mine" / f"{name}.jpg")
    return tmp_path / "mine"


@pytest.mark.parametrize(
    ("name", "rows", "row"),
    [
        ("t.csv", 'a.jpg,a cat\nb.jpg,"a man\nc.jpg,a plane\nd.jpg,a dog\n', 3),  # open to the end of the file
        ("t.csv", 'a.jpg,"a man\nb.jpg,a plane\nc.jpg,"a dog"\nd.jpg,a cat\n', 2),  # open to the next quote
        ("t.csv", 'a.jpg,a cat\n\nb.jpg,"a man" and a dog\n', 3),
        ("t.csv", 'a.jpg,a cat\nb.jpg,"' + "a long row\n" * 20_000, 3),
        ("t.tsv", 'a.jpg\t"Hello said the man\nb.jpg\ta plane\n', 2),
        ("t.tsv", 'a.jpg\ta cat\nb.jpg\t"Hello" said the man\n', 3),
    ],
)
def test_an_unclosed_quote_is_an_error(prepare, images, tmp_path, capsys, name, rows, row):
    (images / name).write_text(f"image{',' if name == 't.csv' else chr(9)}caption\n{rows}")
    assert prepare(images / name) == 1
    error = capsys.readouterr().err
    assert f"{name} row {row}: not a readable table" in error
    assert "ends with one" in error
    assert "written twice" in error
    assert not (tmp_path / "o").exists()


def test_an_unclosed_quote_in_the_header_is_an_error(prepare, images, capsys):
    (images / "t.csv").write_text('image,"caption\na.jpg,a man\n')
    assert prepare(images / "t.csv") == 1
    assert "t.csv row 1: not a readable table" in capsys.readouterr().err


def test_quotes_that_belong_there_are_read(prepare, images, tmp_path, read_shards):
    (images / "t.csv").write_text(
        "\n"
        'image,"caption",captions,notes,notes,,\n'
        'a.jpg,a 3" nail,,,,,\r\n'
        'b.jpg,"he said ""no"", and\nleft",,,,,\n'
        '"c.jpg","","[""one"", ""two""]",x,y\n'
        'd.jpg, "hm"\n'
    )
    assert prepare(images / "t.csv", "--val-fraction", "0") == 0
    assert {k: r["captions"] for k, r in read_shards(tmp_path / "o" / "train").items()} == {
        "a": ['a 3" nail'],
        "b": ['he said "no", and\nleft'],
        "c": ["one", "two"],
        "d": ['"hm"'],
    }


@pytest.mark.parametrize("column", ["caption", "answers", "image"])
def test_a_column_that_stands_twice_is_an_error(prepare, images, capsys, column):
    (images / "t.csv").write_text(f"image,caption,question,answers, {column}\na.jpg,one,what?,x,a.jpg\n")
    assert prepare(images / "t.csv") == 1
    error = capsys.readouterr().err
    assert f"row 1: the column '{column}' stands 2 times, expected once" in error
    assert "JSON list in 'captions'" in error


def test_another_source_name_leaves_no_photograph_in_val(prepare, images, tmp_path, read_shards):
    (images / "t.csv").write_text("image,caption\n" + "".join(f"{n}.jpg,words\n" for n in "abcd"))
    assert prepare(images / "t.csv", "--val-fraction", "0.7", "--source-name", "first") == 0
    assert (tmp_path / "o" / "val").exists()
    assert prepare(images / "t.csv", "--val-fraction", "0", "--source-name", "second") == 0
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["train"]
    assert set(read_shards(tmp_path / "o" / "train")) == set("abcd")


def test_what_others_wrote_and_splits_of_other_recipes_stay(prepare, images, tmp_path, snapshot):
    (images / "t.csv").write_text("image,caption\na.jpg,words\n")
    for split in ("val", "test"):
        with ShardWriter(tmp_path / "o" / split, "another") as writer:
            writer.write("x", b"\xff\xd8", captions=["words"])
    index = tmp_path / "o" / "val" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"made_by": "somebody"}))
    before = snapshot(tmp_path / "o")
    assert prepare(images / "t.csv", "--val-fraction", "0") == 0
    after = snapshot(tmp_path / "o")
    assert {name: after.get(name) for name in before} == before


def test_only_tars_that_the_index_lists_are_removed(prepare, images, tmp_path):
    (images / "t.csv").write_text("image,caption\na.jpg,words\n")
    val = tmp_path / "o" / "val"
    with ShardWriter(val, "another") as writer:
        writer.write("x", b"\xff\xd8", captions=["words"])
    index = json.loads((val / "index.json").read_text())
    index["shards"].append({"name": "../precious.tar", "samples": 1, "bytes": 1})
    (val / "index.json").write_text(json.dumps(index))
    for name in ("precious.tar", "val/others.tar"):
        (tmp_path / "o" / name).write_bytes(b"x")
    assert prepare(images / "t.csv", "--val-fraction", "0") == 0
    assert [p.name for p in val.iterdir()] == ["others.tar"]
    assert (tmp_path / "o" / "precious.tar").exists()


@pytest.mark.parametrize("fraction", ["0", "0.99"])
def test_a_file_name_that_is_not_utf8(prepare, tmp_path, photograph, read_shards, monkeypatch, fraction):
    data = photograph(tmp_path / "plain.jpg")
    source = tmp_path / NOT_UTF8
    source.mkdir()
    for name in (NOT_UTF8, f"{NOT_UTF8} alone"):
        (source / f"{name}.jpg").write_bytes(data)
    (source / f"{NOT_UTF8}.txt").write_text("a café")
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="utf-8", errors="strict"))
    assert prepare(source, "--val-fraction", fraction) == 0
    sys.stdout.flush()
    assert b"image without a .txt file beside it, e.g. caf\\udce9 alone.jpg" in out.getvalue()
    split = "train" if fraction == "0" else "val"
    record = read_shards(tmp_path / "o" / split)[NOT_UTF8]
    assert record["image_id"] == f"{NOT_UTF8}.jpg"
    assert record["captions"] == ["a café"]
    assert info(load_index(tmp_path / "o" / split)).as_json()["records"] == 1


def test_a_name_that_no_file_can_have_is_not_in_the_folder(prepare, images, tmp_path, read_shards, capsys):
    names = ["a.jpg", "b\0.jpg", "c\ud800.jpg"]
    (images / "t.jsonl").write_text("".join(json.dumps({"image": n, "caption": "words"}) + "\n" for n in names))
    assert prepare(images / "t.jsonl", "--val-fraction", "0") == 0
    assert set(read_shards(tmp_path / "o" / "train")) == {"a"}
    assert "2  listed photograph that is not in the folder" in capsys.readouterr().out


def test_hashes_of_names_stay():
    assert keyed_hash("café/a.jpg", "folder holdout") == 0x83F4350EC702BE6C
    assert len({keyed_hash(name, "é") for name in (NOT_UTF8, "café", "caf")}) == 3


def test_what_cannot_be_read_is_left_out_and_counted(prepare, images, tmp_path, read_shards, capsys, monkeypatch):
    (images / "folder.jpg").mkdir()
    (images / "t.csv").write_text("image,caption\na.jpg,x\nb.jpg,x\nfolder.jpg,x\n.,x\n")
    read = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.name == "b.jpg":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert prepare(images / "t.csv", "--val-fraction", "0") == 0
    monkeypatch.undo()
    assert set(read_shards(tmp_path / "o" / "train")) == {"a"}
    assert "3  photograph that cannot be read, e.g. " in capsys.readouterr().out


def test_a_folder_says_which_files_it_passed_over(prepare, images, tmp_path, photograph, read_shards, capsys):
    photograph(images / "e.jfif", "JPEG")
    for name in ("e", "f", "g", "h", "folder"):
        (images / f"{name}.txt").write_text("words")
    for name in ("f.HEIC", "g.cr2", "h.CR2", "LICENCE", "captions.csv"):
        (images / name).write_bytes(b"x")
    (images / "folder.jpg").mkdir()
    assert prepare(images, "--val-fraction", "0") == 0
    assert set(read_shards(tmp_path / "o" / "train")) == {"e"}
    account = capsys.readouterr().out
    assert "2  .cr2 file, not taken for an image, e.g. g.cr2" in account
    assert "1  nameless file, not taken for an image, e.g. LICENCE" in account
    assert "1  .csv file, a table is a --source of its own, e.g. captions.csv" in account
    assert "1  not a readable image file, e.g. f.HEIC" in account
    assert "1  photograph that cannot be read, e.g. folder.jpg" in account
    assert "4  image without a .txt file beside it, e.g. a.jpg" in account
