"""datasets/folder: one's own tables and folders, and errors that name the row and the column."""

import json

import pytest


@pytest.fixture
def images(tmp_path, photograph):
    folder = tmp_path / "mine"
    for name in ("a.jpg", "sub/b.png", "c d.jpg", "a.png"):
        photograph(folder / name, "PNG" if name.endswith("png") else "JPEG")
    return folder


def _all(read_shards, out):
    return {k: r for s in ("train", "val") if (out / s).exists() for k, r in read_shards(out / s).items()}


def test_csv_with_captions_and_questions(recipe, images, tmp_path, read_shards):
    (images / "t.csv").write_text(
        "image,caption,question,answer\n"
        'a.jpg,"a dog, running",,\n'
        "./a.jpg,another,what is it?,dog\n"
        "sub/b.png,,how many?,2\n"
        "a.png,same stem,,\n"
        "gone.jpg,nothing,,\n"
    )
    out = tmp_path / "o"
    assert recipe("folder").main(["--source", str(images / "t.csv"), "--out", str(out), "--source-name", "mine"]) == 0
    records = _all(read_shards, out)
    assert records["a"]["captions"] == ["a dog, running", "another"]
    assert records["a"]["questions"][0] | {"question_id": 0} == {
        "question_id": 0,
        "question": "what is it?",
        "answers": ["dog"],
        "answer_type": "other",
        "question_type": "what is",
    }
    assert records["sub_b"]["questions"][0]["answer_type"] == "number"
    assert {r["image_id"] for r in records.values()} == {"a.jpg", "a.png", "sub/b.png"}
    index = json.loads(next(out.glob("*/index.json")).read_text())
    assert index["source"] == "mine"


def test_jsonl_with_lists_and_another_image_root(recipe, images, tmp_path, read_shards):
    rows = [
        {"image": "c d.jpg", "captions": ["one", "two"]},
        {"image": "a.jpg", "question": "who?", "answers": ["me", "you"]},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    command = ["--source", str(tmp_path / "t.jsonl"), "--images", str(images), "--out", str(tmp_path / "o")]
    assert recipe("folder").main(command) == 0
    records = _all(read_shards, tmp_path / "o")
    assert records["c_d"]["captions"] == ["one", "two"]
    assert records["a"]["questions"][0]["answers"] == ["me", "you"]


def test_folder_with_text_files_beside(recipe, images, tmp_path, read_shards, capsys):
    (images / "sub" / "b.txt").write_text("first\n\nsecond\n")
    assert recipe("folder").main(["--source", str(images), "--out", str(tmp_path / "o")]) == 0
    assert {k: r["captions"] for k, r in _all(read_shards, tmp_path / "o").items()} == {"sub_b": ["first", "second"]}
    assert "3  image without a .txt file beside it, e.g. a.jpg" in capsys.readouterr().out


def test_an_image_keeps_its_split_when_others_come_and_go(recipe, tmp_path, photograph, read_shards):
    names = [f"{i}.jpg" for i in range(60)]
    for name in names:
        photograph(tmp_path / "i" / name)
    held_out = []
    for rows in (names, names[:29:-1]):
        (tmp_path / "i" / "t.csv").write_text("image,caption\n" + "".join(f"{n},words\n" for n in rows))
        command = ["--source", str(tmp_path / "i" / "t.csv"), "--out", str(tmp_path / "o"), "--val-fraction", "0.3"]
        assert recipe("folder").main(command) == 0
        held_out.append(set(read_shards(tmp_path / "o" / "val")))
    assert 8 <= len(held_out[0]) <= 30
    assert held_out[1] == {k for k in held_out[0] if int(k) >= 30}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", "file,caption\na.jpg,x\n", ["row 1", "file, caption", "'image'"]),
        ("t.csv", "image,text\na.jpg,x\n", ["row 1", "image, text", "caption"]),
        ("t.csv", "image,caption\na.jpg,x\n,y\n", ["row 3", "'image'"]),
        ("t.csv", "image,caption\na.jpg,a dog, running\n", ["row 2", "3 cells", "quotes"]),
        ("t.csv", "image,question,answer\na.jpg,what?,\n", ["row 2", "'answer'", "what?"]),
        ("t.csv", 'image,captions\na.jpg,"[""x"""\n', ["row 2", "'captions'"]),
        ("t.jsonl", '{"image": "a.jpg", "caption": "x"}\n{"image": \n', ["row 2", "JSON"]),
        ("t.jsonl", '{"image": "a.jpg", "caption": ["x"]}\n', ["row 1", "'caption'"]),
        ("t.jsonl", '{"image": "a.jpg", "answer": "x"}\n', ["row 1", "'question'"]),
        ("t.xlsx", "", [".xlsx", ".csv"]),
        ("t.csv", "image,caption\nnone.jpg,x\n", ["no usable photograph", "none.jpg"]),
    ],
)
def test_errors_name_row_and_column(recipe, images, tmp_path, capsys, name, content, words):
    (images / name).write_text(content)
    assert recipe("folder").main(["--source", str(images / name), "--out", str(tmp_path / "o")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert all(word in error for word in words), error
    assert not list((tmp_path / "o").glob("**/*.tar"))
