"""Small folders in the layouts of the official downloads, and a way to run the recipes on them."""

import importlib.util
import json
import sys
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe() -> Callable[[str], ModuleType]:
    """The module datasets/NAME/prepare.py, loaded by path as a user runs it."""

    def load(name: str) -> ModuleType:
        module_name = f"prepare_{name}"
        spec = importlib.util.spec_from_file_location(module_name, ROOT / "datasets" / name / "prepare.py")
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def photograph() -> Callable[..., bytes]:
    """Write a small image whose bytes depend on its path; returns the bytes."""

    def write(path: Path, kind: str = "JPEG") -> bytes:
        path.parent.mkdir(parents=True, exist_ok=True)
        shade = sum(path.name.encode()) % 256
        Image.new("RGB", (8, 6), (shade, 255 - shade, 90)).save(path, kind)
        return path.read_bytes()

    return write


@pytest.fixture
def read_shards() -> Callable[[Path], dict[str, dict[str, Any]]]:
    """Records of a split by key: the JSON's fields, with the image's bytes and ending added. Checks index.json on the way."""

    def read(folder: Path) -> dict[str, dict[str, Any]]:
        index = json.loads((folder / "index.json").read_text())
        assert sorted(p.name for p in folder.glob("*.tar")) == [s["name"] for s in index["shards"]]
        records: dict[str, dict[str, Any]] = {}
        for shard in index["shards"]:
            data = (folder / shard["name"]).read_bytes()
            assert len(data) == shard["bytes"]
            with tarfile.open(fileobj=BytesIO(data)) as tar:
                keys = set()
                for member in tar:
                    key, _, extension = member.name.partition(".")
                    content = tar.extractfile(member)
                    assert content is not None
                    record = records.setdefault(key, {})
                    if extension == "json":
                        record.update(json.loads(content.read()))
                    else:
                        record.update(image=content.read(), extension=extension)
                    keys.add(key)
            assert len(keys) == shard["samples"]
        assert len(records) == index["samples"]
        return records

    return read


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder with its bytes."""
    return lambda folder: {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def coco_source(tmp_path: Path, photograph: Callable[..., bytes]) -> Path:
    """COCO photographs with Karpathy's file and VQA v2's: ids 1..6 in train2014, 11..16 in val2014 (13 val, 14 test, 15 restval, 16 damaged)."""
    source = tmp_path / "coco"
    entries, questions = [], {"train2014": [], "val2014": []}
    split_of = {13: "val", 14: "test", 15: "restval"}
    for image_id in [*range(1, 7), *range(11, 17)]:
        subset = "train2014" if image_id < 10 else "val2014"
        name = f"COCO_{subset}_{image_id:012d}.jpg"
        photograph(source / subset / name)
        entries.append(
            {
                "filepath": subset,
                "filename": name,
                "cocoid": image_id,
                "split": split_of.get(image_id, "train"),
                "sentences": [{"raw": f" caption {k} of {image_id} "} for k in range(2)] if image_id != 2 else [],
            }
        )
        for k in range(2):
            questions[subset].append(
                {"image_id": image_id, "question": f"what {k}?", "question_id": image_id * 1000 + k}
            )
    (source / "val2014" / "COCO_val2014_000000000016.jpg").write_bytes(b"not an image")
    (source / "train2014" / "COCO_train2014_000000000001.jpg").unlink()
    (source / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": entries}))
    for subset, rows in questions.items():
        (source / f"v2_OpenEnded_mscoco_{subset}_questions.json").write_text(json.dumps({"questions": rows}))
        annotations = [
            {
                "image_id": q["image_id"],
                "question_id": q["question_id"],
                "question_type": "what",
                "answer_type": "other",
                "multiple_choice_answer": "red",
                "answers": [{"answer": "red" if i < 7 else "blue", "answer_id": i + 1} for i in range(10)],
            }
            for q in rows
            if q["question_id"] != 3001
        ]
        (source / f"v2_mscoco_{subset}_annotations.json").write_text(json.dumps({"annotations": annotations}))
    return source
