"""Drawn captions: no more than asked, none that fits worse than people's, everything else as it was."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vlm.bootstrap import bootstrap
from vlm.cli import main
from vlm.data.index import ShardSet, load_index
from vlm.data.scan import scan
from vlm.data.shards import ShardWriter
from vlm.data.synthetic import write_scenes
from vlm.errors import ConfigError, UserError
from vlm.predictor import Predictor, Said


class Speaker(Predictor):
    """Says what the test puts down; texts that begin with "good" fit every image, others less."""

    def __init__(self, said: list[str]) -> None:
        self.said, self.calls = said, 0

    def caption(self, images, beams=None, sampled=False, seed=0, batch_size=16, **settings):  # type: ignore[no-untyped-def]
        self.calls += 1
        return [Said(self.said[seed % len(self.said)], 0.5) for _ in images]

    def embed_images(self, images, batch_size=16):  # type: ignore[no-untyped-def]
        return torch.tensor([[1.0, 0.0]]).repeat(len(images), 1)

    def embed_texts(self, texts, batch_size=64):  # type: ignore[no-untyped-def]
        fits = [1.0 if text.startswith("good") else 0.5 if text.startswith("fair") else 0.1 for text in texts]
        return torch.tensor([[fit, 0.0] for fit in fits])


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    """Four scenes with 0, 1, 2 and 3 captions of the middling kind."""
    write_scenes(tmp_path / "scenes", 4, 1, size=32)
    with ShardWriter(tmp_path / "few", "toy") as writer:
        for number, record in enumerate(scan([load_index(tmp_path / "scenes/train")])):
            captions = [f"fair caption {i}" for i in range(number)]
            writer.write(record.key, record.image, "png", captions, record.questions, number)
    return load_index(tmp_path / "few")


def test_what_fits_is_added_up_to_the_number_asked_for(shards: ShardSet, tmp_path: Path) -> None:
    speaker = Speaker(["good one", "good two", "bad", "good one", "fair caption 0"])
    done = bootstrap(speaker, shards, tmp_path / "more", captions=3)
    assert (done.images, done.threshold) == (4, 0.5)
    before, after = list(scan([shards])), list(scan([load_index(tmp_path / "more")]))
    assert [len(r.captions) for r in after] == [2, 3, 3, 3]
    for old, new in zip(before, after, strict=True):
        assert (new.key, new.image, new.questions, new.image_id) == (old.key, old.image, old.questions, old.image_id)
        assert new.captions[: len(old.captions)] == old.captions
        assert set(new.captions[len(old.captions) :]) <= {"good one", "good two"}
        assert len(set(new.captions)) == len(new.captions)
    assert done.added == sum(len(r.captions) for r in after) - 6
    assert done.drawn > done.added


def test_a_real_model_gives_the_same_twice(shards: ShardSet, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    predictor = Predictor.load(checkpoint("pretraining"), "cpu")
    first = bootstrap(predictor, shards, tmp_path / "a", captions=3, quantile=0.0)
    again = bootstrap(predictor, shards, tmp_path / "b", captions=3, quantile=0.0)
    assert first == again
    assert first.images == 4
    for one, other in zip(scan([load_index(tmp_path / "a")]), scan([load_index(tmp_path / "b")]), strict=True):
        assert one.captions == other.captions


def test_the_command(
    shards: ShardSet, checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["shards", "bootstrap", shards.root, "--checkpoint", str(checkpoint("pretraining")), "--out", str(out)]
    assert main([*command, "--captions", "2", "--quantile", "0"]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 4 images, ")
    assert load_index(out).samples == 4


def test_unusable_settings_and_data(shards: ShardSet, tmp_path: Path) -> None:
    for settings in ({"captions": 0}, {"quantile": 1.0}):
        with pytest.raises(ConfigError, match="give captions >= 1 and 0 <= quantile < 1"):
            bootstrap(Speaker(["good"]), shards, tmp_path / "out", **settings)  # type: ignore[arg-type]
    (record,) = list(scan([shards]))[:1]
    with ShardWriter(tmp_path / "none", "toy") as writer:
        writer.write(record.key, record.image, "png", (), record.questions)
    with pytest.raises(UserError, match="no image has a caption"):
        bootstrap(Speaker(["good"]), load_index(tmp_path / "none"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
