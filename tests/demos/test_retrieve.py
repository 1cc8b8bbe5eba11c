"""demos/retrieve.py: the images that fit best, the best first."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vlm.data.images import decode_image
from vlm.predictor import Predictor

Demo = Callable[..., Any]
DEMOS = Path(__file__).parents[2] / "demos"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where indexes are kept."""
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of the image encoder took."""
    calls: list[int] = []
    embed_images = Predictor.embed_images

    def counted(self: Predictor, images: Any, batch_size: int = 16) -> Any:
        calls.append(len(images))
        return embed_images(self, images, batch_size)

    monkeypatch.setattr(Predictor, "embed_images", counted)
    return calls


@pytest.fixture
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("pretraining")


def test_the_order_is_that_of_the_similarities(demo: Demo, model: Path, pictures: list[Path]) -> None:
    predictor = Predictor.load(model, "cpu")
    similarity = (predictor.embed_images(pictures) @ predictor.embed_texts(["two dogs"])[0]).tolist()
    expected = sorted(zip(similarity, map(str, pictures), strict=True), reverse=True)
    done = demo("retrieve", pictures[0].parent, "two dogs", "--model", model)
    assert (done.status, done.err) == (0, [])
    assert done.out == [f"{value:.3f}\t{path}" for value, path in expected]
    done = demo("retrieve", *pictures, "two dogs", "--model", model, "--top", "2", "--json", "--device", "cpu")
    found = [json.loads(line) for line in done.out]
    assert [line["image"] for line in found] == [path for _, path in expected[:2]]
    assert [line["similarity"] for line in found] == pytest.approx([value for value, _ in expected[:2]], abs=1e-4)


def test_bad_images_are_named_and_the_others_listed(
    demo: Demo, model: Path, pictures: list[Path], bad_pictures: dict[str, Path]
) -> None:
    done = demo("retrieve", *bad_pictures.values(), pictures[0], "two dogs", "--model", model)
    assert (done.status, len(done.out), len(done.err)) == (1, 1, len(bad_pictures))
    for line, (says, path) in zip(done.err, bad_pictures.items(), strict=True):
        assert line.startswith("retrieve: ")
        assert str(path) in line
        assert says in line


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a.png"],
        ["a.png", " "],
        ["a.png", "dogs", "--top", "0"],
        ["a.png", "dogs", "--rerank", "-1"],
        ["two dogs", str(Path(__file__).parent)],
    ],
)
def test_bad_arguments_exit_2(demo: Demo, arguments: list[str]) -> None:
    done = demo("retrieve", *arguments)
    assert (done.status, done.out) == (2, [])


def test_a_model_that_is_not_there(demo: Demo, pictures: list[Path], tmp_path: Path) -> None:
    done = demo("retrieve", pictures[0], "dogs", "--model", tmp_path / "none")
    assert (done.status, done.out, len(done.err)) == (1, [], 1)
    assert "no such checkpoint folder" in done.err[0]


def test_a_second_search_encodes_nothing(demo: Demo, model: Path, pictures: list[Path], encoded: list[int]) -> None:
    folder = pictures[0].parent
    first = demo("retrieve", folder, "two dogs", "--model", model)
    assert sum(encoded) == 4
    again = demo("retrieve", folder, "two dogs", "--model", model)
    assert (sum(encoded), again.out) == (4, first.out)
    one = demo("retrieve", pictures[2], "a hat", "--model", model)  # of a folder that is known
    assert (sum(encoded), len(one.out)) == (4, 1)
    demo("retrieve", folder, "two dogs", "--model", model, "--no-cache")
    assert sum(encoded) == 8


def test_what_is_new_or_changed_is_encoded_and_what_is_gone_forgotten(
    demo: Demo, model: Path, pictures: list[Path], encoded: list[int], cache: Path
) -> None:
    folder = pictures[0].parent
    demo("retrieve", folder, "two dogs", "--model", model)
    pictures[0].write_bytes(pictures[1].read_bytes())  # another image
    os.utime(pictures[1], ns=(1, 1))  # perhaps another
    pictures[3].rename(folder / "e.png")
    done = demo("retrieve", folder, "two dogs", "--model", model)
    assert sum(encoded) == 4 + 3
    expected = demo("retrieve", folder, "two dogs", "--model", model, "--no-cache")
    assert (done.status, done.out) == (0, expected.out)
    assert len(done.out) == 4
    (file,) = cache.rglob("*.safetensors")
    assert b"e.png" in (written := file.read_bytes())
    assert b"d.png" not in written


def test_another_model_has_another_index(
    demo: Demo, model: Path, checkpoint: Callable[..., Path], pictures: list[Path], encoded: list[int], cache: Path
) -> None:
    other = checkpoint("pretraining", embed_dim=24)
    for source in (model, other, model):
        assert demo("retrieve", *pictures, "two dogs", "--model", source).status == 0
    assert sum(encoded) == 8
    assert len(list(cache.rglob("*.safetensors"))) == 2


@pytest.mark.parametrize("damage", [b"", b"not an index", None])
def test_a_damaged_index_is_made_anew(
    demo: Demo, model: Path, pictures: list[Path], encoded: list[int], cache: Path, damage: bytes | None
) -> None:
    folder = pictures[0].parent
    first = demo("retrieve", folder, "two dogs", "--model", model)
    (file,) = cache.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8] if damage is None else damage)
    done = demo("retrieve", folder, "two dogs", "--model", model)
    assert (done.status, done.out, sum(encoded)) == (0, first.out, 8)
    assert done.err == [f"retrieve: {file} is damaged; the index of {folder} is made anew."]
    assert demo("retrieve", folder, "two dogs", "--model", model).err == []


def test_an_index_that_cannot_be_written_hinders_nobody(
    demo: Demo, model: Path, pictures: list[Path], cache: Path
) -> None:
    cache.write_text("a file where the folder should be")
    done = demo("retrieve", *pictures, "two dogs", "--model", model)
    assert (done.status, len(done.out), len(done.err)) == (0, 4, 1)
    assert "cannot be written" in done.err[0]


def test_an_interrupted_search_keeps_what_it_has(
    demo: Demo, model: Path, pictures: list[Path], encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm.image_index import ImageIndex, index_file

    predictor = Predictor.load(model, "cpu")
    file = index_file(predictor, pictures[0].parent)
    index = ImageIndex(pictures[0].parent, file, pytest.fail)
    working = index.update(predictor, [path.name for path in pictures], batch_size=2)
    assert [next(working), next(working), next(working)] == ["a.png", "b.png", "c.png"]
    working.close()  # Ctrl-C leaves the loop that reads it
    assert set(ImageIndex(pictures[0].parent, file, pytest.fail).entries) == {"a.png", "b.png", "c.png", "d.png"}
    demo("retrieve", *pictures, "two dogs", "--model", model)
    assert sum(encoded) == 4


def test_the_second_look(demo: Demo, model: Path, pictures: list[Path]) -> None:
    predictor = Predictor.load(model, "cpu")
    similarity = (predictor.embed_images(pictures) @ predictor.embed_texts(["two dogs"])[0]).tolist()
    chance = [predictor.match(path, ["two dogs"])[0] for path in pictures]
    order = sorted(range(4), key=lambda i: -similarity[i])
    temperature = float(predictor.model.temperature.detach())
    odds = [similarity[i] / temperature + math.log(chance[i] / (1 - chance[i])) for i in range(4)]
    for count in (0, 2, 4):
        expected = sorted(order[:count], key=lambda i: -odds[i]) + order[count:]
        done = demo("retrieve", *pictures, "two dogs", "--model", model, "--rerank", count, "--json")
        assert [json.loads(line)["image"] for line in done.out] == [str(pictures[i]) for i in expected]


def test_without_a_matching_head_the_likelihood_of_the_caption_looks_again(
    demo: Demo, checkpoint: Callable[..., Path], pictures: list[Path]
) -> None:
    model = checkpoint("pretraining", heads=("contrastive", "language"))
    predictor = Predictor.load(model, "cpu")
    net, ids = predictor.model, torch.tensor([predictor.tokenizer.encode("two dogs")])
    wanted = predictor.embed_texts(["two dogs"])[0]
    scores = []
    with torch.no_grad():
        for path in pictures:
            features = net.encode_image(predictor.transform(decode_image(path))[None])
            logits = net.language_logits(net.decode_states(ids, net.memory(features.tokens, None, "decoder")))
            chosen = logits[0, :-1].log_softmax(1).gather(1, ids[0, 1:, None]).sum()
            scores.append(float(features.embedding[0] @ wanted / net.temperature + chosen))
    expected = sorted(range(4), key=lambda i: -scores[i])
    done = demo("retrieve", *pictures, "two dogs", "--model", model, "--rerank", 4, "--json")
    assert [json.loads(line)["image"] for line in done.out] == [str(pictures[i]) for i in expected]
    assert expected != sorted(range(4), key=lambda i: -float(predictor.embed_images([pictures[i]])[0] @ wanted))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems' names are texts")
def test_a_path_that_is_no_text_goes_out_as_it_came_in(model: Path, pictures: list[Path], tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Path(os.fsdecode(odd)).write_bytes(pictures[0].read_bytes())
    done = subprocess.run(
        [sys.executable, str(DEMOS / "retrieve.py"), odd, "two dogs", "--model", str(model), "--no-cache"],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )
    assert done.stdout.split(b"\t")[1] == odd + b"\n"


def test_the_best_are_drawn(demo: Demo, model: Path, pictures: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sheet = tmp_path / "sheet.png"
    done = demo("retrieve", *pictures, "two dogs", "--model", model, "--top", 2, "--out", sheet)
    assert (done.status, len(done.out)) == (0, 2)
    assert done.err == [f"retrieve: wrote {sheet}"]
    with Image.open(sheet) as drawn:
        assert drawn.format == "PNG"
