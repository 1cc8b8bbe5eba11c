"""Drawn captions: no more than asked, filtered where asked, everything else as it was, the same after a stop; and pairs judged by a model."""

import io
import json
import os
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil

from vlm.capfilt import caption, filter_by_model, fingerprint
from vlm.cli import main
from vlm.config import GenerationConfig
from vlm.data.filter import Rules, filter_shards
from vlm.data.images import decode_image
from vlm.data.index import ShardSet, load_index
from vlm.data.join import join
from vlm.data.scan import scan
from vlm.data.shards import ShardWriter
from vlm.data.synthetic import write_scenes
from vlm.data.text import train_wordpiece
from vlm.errors import CheckpointError, ConfigError, UserError
from vlm.predictor import Predictor, Said
from vlm.work_log import Stopped

FITS = {"good": 1.0, "fair": 0.5}


class Speaker(Predictor):
    """Says what the test puts down; texts that begin with "good" fit every image, others less. Asks to stop in the call `stop`."""

    def __init__(self, said: list[str], stop: int | None = None) -> None:
        self.said, self.stop, self.images = said, stop, 0
        self.model, self.prompt, self.generation = torch.nn.Linear(1, 1), "", GenerationConfig()  # type: ignore[assignment]
        torch.nn.init.zeros_(self.model.weight)  # type: ignore[arg-type]
        torch.nn.init.zeros_(self.model.bias)  # type: ignore[arg-type]

    def caption(self, images, beams=None, sampled=False, seed=0, batch_size=16, **settings):  # type: ignore[no-untyped-def]
        self.images += len(images)
        if images and self.stop is not None:
            self.stop -= 1
            if self.stop == 0:
                os.kill(os.getpid(), signal.SIGTERM)
        return [Said(self.said[seed % len(self.said)], 0.5) for _ in images]

    def embed_images(self, images, batch_size=16):  # type: ignore[no-untyped-def]
        return torch.tensor([[1.0, 0.0]]).repeat(len(images), 1)

    def embed_texts(self, texts, batch_size=64):  # type: ignore[no-untyped-def]
        return torch.tensor([[FITS.get(text.split()[0], 0.1), 0.0] for text in texts]).reshape(len(texts), 2)


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    """Four scenes with 0, 1, 2 and 3 captions of the middling kind, in two shards."""
    write_scenes(tmp_path / "scenes", 4, 1, size=32)
    with ShardWriter(tmp_path / "few", "toy", 2) as writer:
        for number, record in enumerate(scan([load_index(tmp_path / "scenes/train")])):
            captions = [f"fair caption {i}" for i in range(number)]
            writer.write(record.key, record.image, "png", captions, record.questions, number)
    return load_index(tmp_path / "few")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_image_gets_one_more(shards: ShardSet, tmp_path: Path) -> None:
    done = caption(Speaker(["a caption"]), shards, tmp_path / "more")
    assert (done.images, done.added, done.drawn, done.threshold) == (4, 4, 4, None)
    for old, new in zip(scan([shards]), scan([load_index(tmp_path / "more")]), strict=True):
        assert new.captions == [*old.captions, "a caption"]
        assert (new.key, new.image, new.questions, new.image_id) == (old.key, old.image, old.questions, old.image_id)


def test_made_captions_are_marked_and_stay_so(shards: ShardSet, tmp_path: Path) -> None:
    caption(Speaker(["a caption"]), shards, tmp_path / "one")
    caption(Speaker(["another one"]), load_index(tmp_path / "one"), tmp_path / "two")
    first = list(scan([load_index(tmp_path / "two")]))
    for old, new in zip(scan([shards]), first, strict=True):
        assert old.synthetic == []
        assert new.captions == [*old.captions, "a caption", "another one"]
        assert new.synthetic == ["a caption", "another one"]
    filter_shards(load_index(tmp_path / "two"), tmp_path / "kept", Rules(max_words=2))
    assert {text for record in scan([load_index(tmp_path / "kept")]) for text in record.captions} == {
        "a caption",
        "another one",
    }
    assert all(record.synthetic == record.captions for record in scan([load_index(tmp_path / "kept")]))
    join([shards, load_index(tmp_path / "two")], tmp_path / "joined")
    assert [r.synthetic for r in scan([load_index(tmp_path / "joined")])] == [r.synthetic for r in first]
    with ShardWriter(tmp_path / "people", "toy") as writer:  # what somebody said is no model's, even if one says it too
        for record in first:
            writer.write(record.key, record.image, "png", ["another one"], (), record.name)
    join([load_index(tmp_path / "two"), load_index(tmp_path / "people")], tmp_path / "both")
    assert all(record.synthetic == ["a caption"] for record in scan([load_index(tmp_path / "both")]))


def test_images_without_a_text_get_one(shards: ShardSet, tmp_path: Path) -> None:
    """As they come out of a camera; where nothing fits them, or they cannot be decoded, they are left out and told."""
    images = [record.image for record in scan([shards])]
    (tmp_path / "bare").mkdir()
    with tarfile.open(tmp_path / "bare/00000.tar", "w") as tar:
        for number, data in enumerate([*images, b"no image"]):
            info = tarfile.TarInfo(f"i{number}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    bare = load_index(tmp_path / "bare")
    assert list(scan([bare])) == [], "training has no use for them"
    done = caption(Speaker(["a caption"]), bare, tmp_path / "out")
    assert (done.images, done.bad, done.undecodable, done.bare) == (4, {}, 1, 1)
    assert str(done).endswith("; 1 images left out, which have no text")
    found = list(scan([load_index(tmp_path / "out")]))
    assert [(r.image, r.captions, r.synthetic) for r in found] == [(i, ["a caption"], ["a caption"]) for i in images]
    with pytest.raises(UserError, match="no image has a text"):
        caption(Speaker([""]), bare, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_fits_is_added_up_to_the_number_asked_for(shards: ShardSet, tmp_path: Path) -> None:
    speaker = Speaker(["good one", "good two", "bad", "good one", "fair caption 0"])
    done = caption(speaker, shards, tmp_path / "more", below=3, quantile=0.5)
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


def test_below_without_filter(shards: ShardSet, tmp_path: Path) -> None:
    speaker = Speaker(["bad one", "fair caption 0", "bad two"])
    caption(speaker, shards, tmp_path / "more", below=3)
    after = [r.captions for r in scan([load_index(tmp_path / "more")])]
    assert after[0] == ["bad one", "fair caption 0", "bad two"]
    assert after[1] == ["fair caption 0", "bad one"], "what repeats a caption is left out"
    assert after[2] == ["fair caption 0", "fair caption 1", "bad one"]
    assert speaker.images == 3 + 2 + 1


def test_a_real_model_gives_the_same_twice(shards: ShardSet, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    predictor = Predictor.load(checkpoint("pretraining"), "cpu")
    first = caption(predictor, shards, tmp_path / "a", below=3, quantile=0.0)
    assert first == caption(predictor, shards, tmp_path / "b", below=3, quantile=0.0)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_stop_is_gone_on_with(shards: ShardSet, tmp_path: Path) -> None:
    said = ["good one", "good two", "bad"]
    settings = {"below": 3, "quantile": 0.5, "batch_size": 1}
    caption(Speaker(said), shards, tmp_path / "whole", **settings)  # type: ignore[arg-type]
    with pytest.raises(Stopped, match=r"1 of 4 images are done.*same command") as stopped:
        caption(Speaker(said, stop=2), shards, tmp_path / "out", **settings)  # type: ignore[arg-type]
    assert stopped.value.exit_code == 3
    assert not (tmp_path / "out").exists()
    log = tmp_path / ".out.begun.jsonl"
    log.write_bytes(log.read_bytes() + b'[{"drawn": [[1.0, "cut')  # as a power cut leaves it
    with pytest.raises(UserError, match=r"begun with other settings \(below 3\)"):
        caption(Speaker(said), shards, tmp_path / "out", quantile=0.5, batch_size=1)
    speaker = Speaker(said)
    done = caption(speaker, shards, tmp_path / "out", **settings)  # type: ignore[arg-type]
    assert speaker.images == 3 + 2, "the first image is not done again"
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert done.images == 4
    assert not log.exists()


def test_another_model_does_not_go_on(shards: ShardSet, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        caption(Speaker(["a"], stop=1), shards, tmp_path / "out", batch_size=1)
    predictor = Predictor.load(checkpoint("captioning"), "cpu")
    with pytest.raises(UserError, match=r"other settings \(model\)"):
        caption(predictor, shards, tmp_path / "out", batch_size=1)
    before = fingerprint(predictor)
    assert before == fingerprint(Predictor.load(checkpoint("captioning"), "cpu"))
    with torch.no_grad():
        next(predictor.model.parameters()).view(-1)[0] += 1
    assert fingerprint(predictor) != before


def test_bad_images_and_records(shards: ShardSet, tmp_path: Path) -> None:
    tar = Path(shards.root) / "shard-000001.tar"
    data = bytearray(tar.read_bytes())
    place = data.index(b"\x89PNG")
    data[place + 40 : place + 400] = bytes(360)
    tar.write_bytes(data)
    head = Path(shards.root) / "shard-000000.tar"
    head.write_bytes(head.read_bytes().replace(b'{"questions"', b'["questions"', 1))
    done = caption(Speaker(["good one"]), load_index(shards.root), tmp_path / "out", below=9)
    assert (done.images, done.bad, done.undecodable, done.added) == (3, {"broken json": 1}, 1, 2)
    assert str(done).endswith("; 1 images cannot be decoded and got none; unusable records left out: 1 broken json")
    assert [len(r.captions) for r in scan([load_index(tmp_path / "out")])] == [2, 2, 4]


def test_unusable_settings_and_data(shards: ShardSet, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    for settings in ({"below": 0}, {"quantile": 1.0}):
        with pytest.raises(ConfigError, match="give below >= 1 and 0 <= quantile < 1"):
            caption(Speaker(["good"]), shards, tmp_path / "out", **settings)  # type: ignore[arg-type]
    (record,) = list(scan([shards]))[:1]
    with ShardWriter(tmp_path / "none", "toy") as writer:
        writer.write(record.key, record.image, "png", (), record.questions)
    with pytest.raises(UserError, match="no image that can be decoded has a caption"):
        caption(Speaker(["good"]), load_index(tmp_path / "none"), tmp_path / "out", quantile=0.5)
    with pytest.raises(ConfigError, match="never changed in place"):
        caption(Speaker(["good"]), shards, Path(shards.root))
    silent = Predictor.load(checkpoint("pretraining", heads=("contrastive",)), "cpu")
    with pytest.raises(CheckpointError, match="make captions"):
        caption(silent, shards, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few", "none", "scenes"]


def test_a_converted_blip_says_what_it_says_of_the_pictures(
    shards: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    tokenizer = train_wordpiece(["a red circle left of a blue square", "two dogs on the grass"] * 2, 100)
    text = {
        "vocab_size": tokenizer.vocab_size + 2,
        "bos_token_id": tokenizer.vocab_size,
        "sep_token_id": tokenizer.sep_id,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 40,
    }
    vision = {  # timm's test_vit
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "image_size": 32,
    }
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.3)
    model.save_pretrained(tmp_path / "blip")
    tokenizer.save(tmp_path / "blip/tokenizer.json")
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "blip")
    assert main(["convert", "blip", str(tmp_path / "blip"), str(tmp_path / "ours")]) == 0

    out = tmp_path / "out"
    command = ["shards", "caption", shards.root, "--model", str(tmp_path / "ours"), "--out", str(out)]
    assert main([*command, "--filter"]) == 1
    assert "has no contrastive head" in capsys.readouterr().err
    assert main(command) == 0
    assert capsys.readouterr().out == f"{out}: 4 images, 4 captions added of 4 drawn\n"
    predictor = Predictor.load(tmp_path / "ours")
    said = [one.text for one in predictor.caption([decode_image(record.image) for record in scan([shards])])]
    assert [record.captions[-1] for record in scan([load_index(out)])] == said
    assert len(set(said)) > 1, "the images must matter, else this shows nothing"


def test_pairs_are_judged_by_a_model(shards: ShardSet, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    predictor = Predictor.load(checkpoint("pretraining"), "cpu")
    before = list(scan([shards]))
    pairs = [(record, text) for record in before for text in record.captions]
    embedded = predictor.embed_images([record.image for record, _ in pairs])
    expected = {
        "similarity": (embedded * predictor.embed_texts([text for _, text in pairs])).sum(1).tolist(),
        "matching": [predictor.match(record.image, [text])[0] for record, text in pairs],
    }
    for by, scores in expected.items():
        least = sorted(scores)[3] - 1e-6
        filter_by_model(predictor, shards, tmp_path / by, Rules(min_score=least), by)  # type: ignore[arg-type]
        kept = [(record.key, text) for record in scan([load_index(tmp_path / by)]) for text in record.captions]
        assert kept == [(r.key, text) for (r, text), score in zip(pairs, scores, strict=True) if score >= least]
        report = filter_by_model(predictor, shards, tmp_path / "half", Rules(), by, worst=0.5, batch_size=1)  # type: ignore[arg-type]
        assert report.captions_dropped == {"score too low": 3}
        told = json.loads((tmp_path / "half/report.json").read_text())["settings"]
        assert told["by"] == by
        assert told["scores"]["50%"] == told["min_score"] == pytest.approx(sum(sorted(scores)[2:4]) / 2, abs=1e-5)
    assert not list(tmp_path.glob(".*"))


def test_scoring_goes_on_and_is_refused_in_words(
    shards: ShardSet, checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictor = Predictor.load(checkpoint("pretraining"), "cpu")
    filter_by_model(predictor, shards, tmp_path / "whole", Rules(), worst=0.3, batch_size=1)
    embed, calls = predictor.embed_images, []

    def stopping(images: list, batch_size: int = 16) -> torch.Tensor:
        calls.append(len(images))
        if calls == [0, 1, 1]:
            signal.raise_signal(signal.SIGINT)
        return embed(images, batch_size)

    predictor.embed_images = stopping  # type: ignore[method-assign]
    with pytest.raises(Stopped, match="2 of 4"):
        filter_by_model(predictor, shards, tmp_path / "out", Rules(), worst=0.3, batch_size=1)
    filter_by_model(predictor, shards, tmp_path / "out", Rules(), worst=0.3, batch_size=1)
    assert calls == [0, 1, 1, 0, 1, 1]
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    for rules, worst in ((Rules(), None), (Rules(min_score=0.1), 0.1), (Rules(), 1.0)):
        with pytest.raises(ConfigError):
            filter_by_model(predictor, shards, tmp_path / "no", rules, worst=worst)
    command = ["shards", "filter", shards.root, "--model", str(checkpoint("captioning", heads=("language",)))]
    assert main([*command, "--out", str(tmp_path / "no"), "--worst", "0.1", "--by", "matching"]) == 1
    assert "has no matching head" in capsys.readouterr().err


def test_the_command(
    shards: ShardSet, checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["shards", "caption", shards.root, "--model", str(checkpoint("pretraining")), "--out", str(out)]
    assert main([*command, "--below", "2", "--filter", "0"]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 4 images, ")
    assert load_index(out).samples == 4
