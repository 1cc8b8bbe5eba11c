"""Shards are written whole or not at all, and every documented form is read."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset

from vlm.data.records import BadRecord, Record, ShardReader, image_hash, parse_record, scan_shard
from vlm.data.shards import ShardSet, ShardWriter, load_index
from vlm.errors import UserError


def read_all(shards: ShardSet) -> list[Record]:
    reader = ShardReader()
    root = Path(shards.root)
    return [reader.read(root / s.name, shards.source, i) for s in shards.shards for i in range(s.samples)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    question = {"question_id": 7, "question": "Was ist das?", "answers": ["Straße", "道"]}
    with ShardWriter(tmp_path / "s", "toy", samples_per_shard=2) as writer:
        writer.write("a", b"A", captions=["ein Hund", "zwei"], image_id=12)
        writer.write("b", b"B", extension=".PNG", questions=[question])
        writer.write("long" * 60, b"C", extension="webp", captions=["c"], questions=[question], image_id="x9")
    found = load_index(tmp_path / "s")
    assert [(s.name, s.samples) for s in found.shards] == [("shard-000000.tar", 2), ("shard-000001.tar", 1)]
    assert [s.bytes for s in found.shards] == [(tmp_path / "s" / s.name).stat().st_size for s in found.shards]
    assert read_all(found) == [
        Record("toy", "a", b"A", ["ein Hund", "zwei"], [], image_hash("toy", 12), 12),
        Record("toy", "b", b"B", [], [question], image_hash("toy", "b"), "b"),
        Record("toy", "long" * 60, b"C", ["c"], [question], image_hash("toy", "x9"), "x9"),
    ]
    index = json.loads((tmp_path / "s" / "index.json").read_text())
    assert (index["source"], index["samples"]) == ("toy", 3)


def test_image_hash_is_a_signed_64_bit_number_of_source_and_id() -> None:
    # golden: int.from_bytes(blake2b(b"coco/42", digest_size=8).digest(), "little", signed=True)
    assert image_hash("coco", 42) == image_hash("coco", "42") == 3366741594973752827
    assert len({image_hash("coco", 42), image_hash("coco", 43), image_hash("coc", 42)}) == 3
    assert all(-(2**63) <= image_hash("coco", i) < 2**63 for i in range(100))


def test_webdataset_reads_our_shards(write_set: Callable[..., ShardSet]) -> None:
    shards = write_set(samples=5, samples_per_shard=3)
    urls = [f"{shards.root}/{s.name}" for s in shards.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=lambda source: source))
    assert [s["__key__"] for s in samples] == [f"k{i:03d}" for i in range(5)]
    assert [s["jpg"] for s in samples] == [r.image for r in read_all(shards)]


def test_equal_content_gives_equal_bytes(write_set: Callable[..., ShardSet], tmp_path: Path) -> None:
    first = (Path(write_set("toy").root) / "shard-000000.tar").read_bytes()
    shutil.rmtree(tmp_path / "toy")
    assert (Path(write_set("toy").root) / "shard-000000.tar").read_bytes() == first


def test_an_exception_leaves_the_earlier_shards(write_set: Callable[..., ShardSet], tmp_path: Path) -> None:
    before = write_set(samples=5)
    names = sorted(os.listdir(tmp_path))

    def interrupted() -> None:
        with ShardWriter(before.root, "toy", 1) as writer:
            writer.write("new", b"img", captions=["c"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert load_index(before.root) == before
    assert [r.key for r in read_all(before)] == [f"k{i:03d}" for i in range(5)]
    assert sorted(os.listdir(tmp_path)) == names


def test_a_full_disk_is_one_clear_line(write_set: Callable[..., ShardSet], monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_set(samples=5)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlm.data.shards.webdataset.TarWriter.write", full)
    with (
        pytest.raises(UserError, match="No space left on device; free some space"),
        ShardWriter(before.root, "toy") as writer,
    ):
        writer.write("new", b"img", captions=["c"])
    assert load_index(before.root) == before


def test_writing_again_replaces_all_shards(write_set: Callable[..., ShardSet]) -> None:
    write_set(samples=20, samples_per_shard=3)
    after = write_set(samples=4, samples_per_shard=3)
    assert sorted(os.listdir(after.root)) == ["index.json", "shard-000000.tar", "shard-000001.tar"]
    assert len(read_all(after)) == 4


def test_an_interrupted_replacement_is_refused_and_can_be_repeated(
    write_set: Callable[..., ShardSet], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_set(samples=20, samples_per_shard=3)
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target).name == "shard-000001.tar":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_set(samples=5, samples_per_shard=3)
    monkeypatch.undo()
    with pytest.raises(UserError, match="interrupted; run the command that writes these shards again"):
        load_index(tmp_path / "toy")
    assert write_set(samples=5, samples_per_shard=3).samples == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "a"}, "was written before"),
        ({"key": "a.b"}, "without '.' and '/'"),
        ({"key": "a/b"}, "without '.' and '/'"),
        ({"key": ""}, "without '.' and '/'"),
        ({"extension": "gif"}, "expected one of jpg, jpeg, png, webp"),
        ({"captions": [" "]}, "needs a non-empty image and a caption or a question"),
        ({"image": b""}, "needs a non-empty image and a caption or a question"),
    ],
)
def test_unusable_records_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    first: dict[str, Any] = {"key": "a", "image": b"img", "captions": ["c"]}

    def write() -> None:
        with ShardWriter(tmp_path / "s", "toy") as writer:
            for record in (first, first | {"key": "b"} | change):
                writer.write(**record)

    with pytest.raises(UserError, match=message):
        write()
    assert not (tmp_path / "s").exists()


def img2dataset_folder(folder: Path, write_tar: Callable[..., None]) -> None:
    for shard in range(2):
        members: dict[str, bytes] = {}
        for i in range(3):
            key = f"{shard:05d}{i:04d}"
            own = {
                "caption": "not this one",
                "url": "http://x",
                "key": key,
                "status": "success",
                "error_message": None,
                "width": 9,
            }
            members |= {
                f"{key}.jpg": b"img%d" % i,
                f"{key}.json": json.dumps(own).encode(),
                f"{key}.txt": f"caption {key}".encode(),
            }
        write_tar(folder / f"{shard:05d}.tar", members)
        (folder / f"{shard:05d}_stats.json").write_text(
            json.dumps({"count": 5, "successes": 3, "failed_to_download": 2})
        )


@pytest.mark.parametrize("stats", [True, False])
def test_img2dataset_folders_are_read_as_they_are(tmp_path: Path, write_tar: Callable[..., None], stats: bool) -> None:
    folder = tmp_path / "cc3m"
    img2dataset_folder(folder, write_tar)
    if not stats:
        for file in folder.glob("*_stats.json"):
            file.unlink()
    found = load_index(folder)
    assert (found.source, found.samples) == ("cc3m", 6)
    records = read_all(found)
    assert [r.captions for r in records] == [[f"caption {r.key}"] for r in records]
    assert records[4].image_id == image_hash("cc3m", "000010001")
    assert json.loads((folder / "index.json").read_text())["samples"] == 6
    assert load_index(folder) == found
    part = load_index(folder / "{00001..00001}.tar")
    assert [s.name for s in part.shards] == ["00001.tar"]


def test_foreign_shards_are_never_replaced(tmp_path: Path, write_tar: Callable[..., None]) -> None:
    img2dataset_folder(tmp_path / "cc3m", write_tar)
    for _ in range(2):  # without an index, and with the one made at first use
        with pytest.raises(UserError, match="ShardWriter did not write"), ShardWriter(tmp_path / "cc3m", "cc3m"):
            pass
        assert load_index(tmp_path / "cc3m").samples == 6


def test_plain_text_and_foreign_names(tmp_path: Path, write_tar: Callable[..., None]) -> None:
    members = {
        "./d/a.jpeg": b"img",
        "./d/a.TXT": b" a dog \n",
        "__meta__": b"",
        "README": b"",
        "d/b.seg.png": b"?",
        "d/b.png": b"img",
        "d/b.txt": b"b",
    }
    write_tar(tmp_path / "x" / "0.tar", members)
    records = read_all(load_index(tmp_path / "x"))
    assert parse_record("x", "e", {"jpg": b"i", "json": rb'{"captions": ["\ud83d\ude00"]}'}).captions == ["\U0001f600"]
    assert [(r.key, r.image, r.captions) for r in records] == [("d/a", b"img", ["a dog"]), ("d/b", b"img", ["b"])]


@pytest.mark.parametrize(
    ("members", "cause"),
    [
        ({"txt": b"a"}, "no image"),
        ({"jpg": b"", "txt": b"a"}, "no image"),
        ({"jpg": b"i"}, "no text"),
        ({"jpg": b"i", "txt": b" "}, "no text"),
        ({"jpg": b"i", "json": b'{"captions": []}'}, "no text"),
        ({"jpg": b"i", "json": b"{"}, "broken json"),
        ({"jpg": b"i", "json": b"[1]"}, "broken json"),
        ({"jpg": b"i", "json": b'{"image_id": ' + b"9" * 5000 + b"}"}, "broken json"),
        ({"jpg": b"i", "json": b"[" * 100_000}, "broken json"),
        ({"jpg": b"i", "json": rb'{"captions": ["\ud83d"]}'}, "not UTF-8"),
        ({"jpg": b"i", "json": b'{"captions": "a"}'}, "broken json"),
        ({"jpg": b"i", "json": b'{"questions": [{"answers": []}]}'}, "broken json"),
        ({"jpg": b"i", "txt": b"\xff\xfe"}, "not UTF-8"),
        ({"jpg": b"i", "json": b'{"captions": ["\xff"]}'}, "not UTF-8"),
    ],
)
def test_bad_records_say_why(members: dict[str, bytes], cause: str) -> None:
    with pytest.raises(BadRecord, match="toy/k") as caught:
        parse_record("toy", "k", members)
    assert caught.value.cause == cause


@pytest.mark.parametrize("cut", ["inside a file", "inside a header", "empty", "damaged header"])
def test_a_damaged_tar_gives_the_records_before_the_damage(write_set: Callable[..., ShardSet], cut: str) -> None:
    shards = write_set(samples=6)
    path = Path(shards.root) / shards.shards[0].name
    offsets, damage = scan_shard(path)
    assert (len(offsets), damage) == (7, None)
    data = bytearray(path.read_bytes())
    if cut == "damaged header":
        data[offsets[4] : offsets[4] + 512] = b"\x07" * 512
    else:
        del data[{"inside a file": offsets[4] + 514, "inside a header": offsets[4] + 100, "empty": 0}[cut] :]
    path.write_bytes(data)
    after, damage = scan_shard(path)
    whole = {"inside a file": 4, "inside a header": 3, "empty": 0, "damaged header": 3}[
        cut
    ]  # the record before may lack files
    assert len(after) == whole + 1
    assert after[:-1] == offsets[:whole]
    assert damage
    reader = ShardReader()
    assert [reader.read(path, "toy", i).key for i in range(whole)] == [f"k{i:03d}" for i in range(whole)]
    with pytest.raises(BadRecord, match=f"holds {whole} whole records") as caught:
        reader.read(path, "toy", whole)
    assert caught.value.cause == "missing"
    assert load_index(shards.root).samples == 6  # the index keeps its promise: order and steps do not depend on damage


def test_unusable_places_name_the_mend(
    tmp_path: Path, write_set: Callable[..., ShardSet], write_tar: Callable[..., None]
) -> None:
    shards = write_set()
    root = Path(shards.root)
    wrong: list[tuple[str | Path, str]] = [
        (tmp_path / "nothing", "is not a folder; expected shards"),
        (tmp_path, "holds no shards"),
        (root / "shard-{000000..000009}.tar", "does not list shard-000004.tar"),
        ("file://" + str(tmp_path / "remote"), "remote shards need one: .*`vlm shards index FOLDER`"),
    ]
    for path, message in wrong:
        with pytest.raises(UserError, match=message):
            load_index(path)
    write_tar(root / "more.tar", {"a.jpg": b"i"})
    with pytest.raises(UserError, match=r"does not list more.tar .*`vlm shards index"):
        load_index(root)
    (root / "more.tar").unlink()
    (root / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match=r"lacks shard-000001.tar"):
        load_index(root)
    (root / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index.json cannot be used .*make it anew"):
        load_index(root)


def test_remote_index_is_read(write_set: Callable[..., ShardSet]) -> None:
    shards = write_set()
    found = load_index(f"file://{shards.root}/shard-{{000001..000002}}.tar")
    assert found.shards == shards.shards[1:3]
