"""ONNX graphs say what the model says: for other sizes than those of the export, word by word and without PyTorch."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.cli import main
from vlm.config import GenerationConfig
from vlm.errors import CheckpointError, UserError
from vlm.model.beam_search import beam_search
from vlm.model.generation import Rules
from vlm.model.vision_language import VisionLanguageModel
from vlm.onnx.export import _Decoder, _Image, export_onnx
from vlm.onnx.search import search
from vlm.predictor import Predictor

MakeModel = Callable[..., VisionLanguageModel]
PLAIN = GenerationConfig(beams=3, max_length=9, min_length=0)
END = 3
RULES: tuple[dict[str, Any], ...] = (
    {"min_length": 4},
    {"no_repeat_ngram": 2},
    {"no_doubled_words": True},
    {"banned": ((5,), (9, 5), (7, 7), (11,), (30, 12, 3))},
    {"repetition_penalty": 1.3, "length_penalty": 0.5, "min_length": 3},
)
FAMILY: dict[str, dict[str, Any]] = {
    "shared": {},
    "separate": {"decoder": "separate", "decoder_layers": 2, "fusion": "late", "text": {"cross_attention": (2, 3)}},
    "own causal attention": {"text": {"separate_causal_attention": True}},
}


@pytest.mark.parametrize(
    ("kind", "rules"),
    [*((kind, {}) for kind in FAMILY), *(("shared", rules) for rules in RULES)],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "plain",
)
@pytest.mark.parametrize("beams", [1, 2, 3])
@torch.no_grad()
def test_the_search_equals_that_of_the_library(
    tiny_model: MakeModel, kind: str, beams: int, rules: dict[str, Any]
) -> None:
    """With the decoder's step as it is exported, run by PyTorch in fp64."""
    model = tiny_model(**FAMILY[kind])
    assert model.language_head is not None
    model.language_head.bias[END] += 4.0  # texts should end, some early
    banned = rules.get("banned", ())
    settings = replace(PLAIN, beams=beams, **{name: value for name, value in rules.items() if name != "banned"})
    tokens, memory = _Image(model, False, True)(torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8))
    start, step = [2, 7], _Decoder(model)

    def stepped(ids: np.ndarray, cache: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, grown = step(torch.from_numpy(ids), torch.from_numpy(cache), memory)
        return logits.numpy(), grown.numpy()

    stack = model.text if model.decoder is None else model.decoder
    empty = np.zeros((5, 1, len(stack.layers), 2, 2, 0, 16))
    found = search(stepped, start, empty, settings, END, banned)
    expected = beam_search(
        model,
        model.memory(tokens, None, "decoder"),
        torch.tensor([start] * 5),
        None,
        Rules(
            end_id=END,
            max_length=9,
            min_length=settings.min_length,
            repetition_penalty=settings.repetition_penalty,
            no_repeat_ngram=settings.no_repeat_ngram,
            no_doubled=settings.no_doubled_words,
            banned=banned,
        ),
        beams,
        settings.length_penalty,
    )
    assert found == [text.ids for text in expected]
    assert len({tuple(ids) for ids in found}) > 1


@pytest.fixture(scope="module")
def exported(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its graphs."""
    pytest.importorskip("onnxscript")
    source, out = (
        checkpoint("pretraining", prompt="a man", text={"layers": 1, "cross_attention": (0,)}),
        tmp_path_factory.mktemp("onnx") / "graphs",
    )
    assert main(["export", str(source), "--out", str(out), "--onnx"]) == 0
    return source, out


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)
    return [Image.fromarray(pixels).resize((40, 30)) for pixels in noise]


def test_graphs_say_what_the_model_says(exported: tuple[Path, Path], pictures: list[Image.Image]) -> None:
    pytest.importorskip("onnxruntime")
    from vlm.onnx.runner import OnnxRunner

    source, out = exported
    predictor, runner = Predictor.load(source, "cpu"), OnnxRunner(out, threads=1)
    for beams in (1, 3):
        expected = [said.text for said in predictor.caption(pictures, beams=beams)]
        assert len(set(expected)) > 1
        assert runner.caption(pictures, beams=beams) == expected
        assert runner.caption(pictures[:1], beams=beams) == expected[:1]
    np.testing.assert_allclose(runner.embed_images(pictures), predictor.embed_images(pictures), atol=1e-5)
    texts = ["Two dogs!", "a man with a hat rides a brown horse on the green grass", "red"]
    for some in (texts, texts[:1]):
        np.testing.assert_allclose(runner.embed_texts(some), predictor.embed_texts(some), atol=1e-5)


def test_it_runs_without_pytorch(exported: tuple[Path, Path], tmp_path: Path, pictures: list[Image.Image]) -> None:
    pytest.importorskip("onnxruntime")
    pictures[0].save(tmp_path / "a.png")
    code = (
        "import sys; sys.modules['torch'] = None; from vlm.onnx.runner import OnnxRunner; "
        f"print(OnnxRunner({str(exported[1])!r}).caption([{str(tmp_path / 'a.png')!r}])[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == Predictor.load(exported[0], "cpu").caption(pictures[:1])[0].text


def test_the_folder_says_how_to_use_it(exported: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = exported
    told = json.loads((out / "config.json").read_text())
    assert told["onnx"] == {
        "image_size": 32,
        "cache": [1, 2, 2, 16],
        "max_positions": 48,
        "decoder_first_token": None,
    }
    assert told["generation"]["beams"] == 2
    with pytest.raises(UserError, match=r"graphs exists; give another --out"):
        export_onnx(source, out)


def test_what_cannot_be_exported_or_run(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from vlm.onnx.runner import OnnxRunner

    asks = checkpoint("vqa", decoder="separate", decoder_reads="question")
    with pytest.raises(CheckpointError, match="its decoder reads the question"):
        export_onnx(asks, tmp_path / "out")
    with pytest.raises(CheckpointError, match="no ONNX graphs here"):
        OnnxRunner(asks)
    assert main(["export", str(asks), str(asks), "--out", str(tmp_path / "out"), "--onnx"]) == 2
    assert "--onnx takes one checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    from vlm.onnx.runner import OnnxRunner

    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"pip install 'vlm-fusion\[onnx\]'"):
        export_onnx(tmp_path, tmp_path / "out") if package == "onnx" else OnnxRunner(tmp_path)
