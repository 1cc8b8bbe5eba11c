"""ONNX graphs say what the model says: for other sizes than those of the export, word by word and without PyTorch."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.cli import main
from vlm.errors import CheckpointError, ConfigError, UserError
from vlm.model.beam_search import beam_search
from vlm.model.generation import Rules
from vlm.model.limits import Limits
from vlm.model.vision_language import VisionLanguageModel
from vlm.onnx.export import _Decoder, _Image, export_onnx
from vlm.onnx.search import search
from vlm.predictor import Predictor

MakeModel = Callable[..., VisionLanguageModel]
END = 3
RULES: tuple[dict[str, Any], ...] = (
    {"min_length": 4},
    {"no_repeat_ngram": 2},
    {"no_doubled": True},
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
    length_penalty = rules.get("length_penalty", 1.0)
    limits = Rules(end_id=END, max_length=9, **{k: v for k, v in rules.items() if k != "length_penalty"})
    tokens, memory = _Image(model, False, True)(torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8))
    start, step = [2, 7], _Decoder(model)

    def stepped(ids: np.ndarray, cache: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, grown = step(torch.from_numpy(ids), torch.from_numpy(cache), memory)
        return logits.numpy(), grown.numpy()

    stack = model.text if model.decoder is None else model.decoder
    empty = np.zeros((5, 1, len(stack.layers), 2, 2, 0, 16))
    found = search(stepped, start, empty, limits, beams, length_penalty)
    seen, prompts = model.memory(tokens, None, "decoder"), torch.tensor([start] * 5)
    expected = beam_search(model, seen, prompts, None, limits, beams, length_penalty)
    assert found == [text.ids for text in expected]
    assert len({tuple(ids) for ids in found}) > 1


@pytest.mark.parametrize("rule", [{"no_doubled": True}, {"banned": ((1, 1),)}, {"no_repeat_ngram": 1}])
@pytest.mark.parametrize("beams", [1, 2])
def test_a_row_with_no_token_left_ends(rule: dict[str, Any], beams: int) -> None:
    """Of the end and one word the word may follow the end only, and the end is not allowed yet."""
    limits = Limits(end_id=0, max_length=6, min_length=4, **rule)
    assert (
        search(lambda ids, cache: (np.zeros((*ids.shape[:2], 2)), cache), [0], np.zeros((3, 1)), limits, beams)
        == [[1]] * 3
    )


def test_as_many_beams_go_on_where_others_end() -> None:
    """The best text is B C. Behind its first word the candidates are, in this order, A and its end, A C, B and its end, B C: of the first three one
    goes on."""
    end, a, b, c = range(4)
    chances = {
        (a,): {end: 0.5, c: 0.48},
        (b,): {end: 0.5, c: 0.45},
        (a, c): {end: 0.25, a: 0.25, b: 0.25, c: 0.25},
        (b, c): {end: 0.96},
    }

    def step(ids: np.ndarray, cache: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The cache is the text so far."""
        cache = np.concatenate([cache, ids], axis=2)
        logits = np.full((*ids.shape[:2], 4), -9.0)
        for row, beam in np.ndindex(*ids.shape[:2]):
            for token, chance in chances.get(tuple(cache[row, beam, 1:].tolist()), {a: 0.5, b: 0.45}).items():
                logits[row, beam, token] = math.log(chance)
        return logits, cache

    empty = np.zeros((1, 1, 0), dtype=np.int64)
    assert search(step, [end], empty, Limits(end_id=end, max_length=4), 2, 2.0) == [[b, c]]


def _export(source: Path, out: Path) -> tuple[Path, Path]:
    pytest.importorskip("onnxscript")
    assert main(["export", str(source), "--out", str(out), "--onnx"]) == 0
    return source, out


@pytest.fixture(scope="module")
def exported(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its graphs."""
    source = checkpoint("pretraining", prompt="a man", text={"layers": 1, "cross_attention": (0,)})
    return _export(source, tmp_path_factory.mktemp("onnx") / "graphs")


@pytest.fixture(scope="module")
def exported_captioner(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """As a conversion of BLIP is: the decoder has its own first token, and the prompt is the captions' only."""
    settings = {"text": {"layers": 1, "cross_attention": (0,)}, "first_token": {"decoder": 60}}
    source = checkpoint("captioning", prompt="a red", **settings)
    return _export(source, tmp_path_factory.mktemp("onnx") / "graphs")


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)
    return [Image.fromarray(pixels).resize((40, 30)) for pixels in noise]


@pytest.mark.parametrize("kind", ["exported", "exported_captioner"])
def test_graphs_say_what_the_model_says(request: pytest.FixtureRequest, kind: str, pictures: list[Image.Image]) -> None:
    pytest.importorskip("onnxruntime")
    from vlm.onnx.runner import OnnxRunner

    source, out = request.getfixturevalue(kind)
    predictor, runner = Predictor.load(source, "cpu"), OnnxRunner(out, threads=1)
    for beams in (1, 3):
        expected = [said.text for said in predictor.caption(pictures, beams=beams)]
        assert len(set(expected)) > 1
        assert runner.caption(pictures, beams=beams) == expected
        assert runner.caption(pictures[:1], beams=beams) == expected[:1]
    np.testing.assert_allclose(runner.embed_images(pictures), predictor.embed_images(pictures), atol=1e-5)
    texts = ["Two dogs!", "a man with a hat rides a brown horse on the green grass", "red", "a red circle is left " * 8]
    for some in (texts, texts[:1]):
        np.testing.assert_allclose(runner.embed_texts(some), predictor.embed_texts(some), atol=1e-5)


@pytest.fixture
def say(exported: tuple[Path, Path], pictures: list[Image.Image]) -> Callable[..., list[str]]:
    """say(kind, prompt="", **settings of generation): captions by the "library", or by the "runner" from the same checkpoint's graphs."""
    pytest.importorskip("onnxruntime")
    from vlm.onnx.runner import OnnxRunner

    predictor, runner = Predictor.load(exported[0], "cpu"), OnnxRunner(exported[1], threads=1)
    stored = runner.settings["generation"]

    def run(kind: str, prompt: str = "", **settings: Any) -> list[str]:
        if kind == "library":
            return [said.text for said in predictor.caption(pictures, prompt=prompt, **settings)]
        runner.settings["generation"] = stored | settings
        runner.settings["text"]["prompt"] = prompt
        return runner.caption(pictures)

    return run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 48}, r"49 tokens do not fit max_positions=48; ask"),
        ({"prompt": "a man and " * 20}, r"tokens do not fit max_positions=48; ask"),
        ({"max_length": 0}, "^max_length=0: give at least 1"),
        ({"min_length": -3}, "min_length=-3 .* give 0 <= min_length < max_length"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be above 0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty=-1.0 must be above 0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty=nan must be above 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty=inf .* give 1e-06 to 1e"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram=-1 must not be negative"),
        ({"banned_words": "red"}, r"banned_words is a single text, expected several; write \['red'\]"),
        ({"banned_words": [" "]}, "has no letters"),
        ({"beams": 0}, "beams=0: give at least 1"),
        *(
            ({"length_penalty": value}, f"length_penalty={value}: give -10 to 10")
            for value in (400.0, -400.0, math.nan)
        ),
        ({"length_penalty": 400.0, "beams": 1}, "length_penalty=400.0: give -10 to 10"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["library", "runner"])
def test_unusable_settings_are_refused_by_both(
    say: Callable[..., list[str]], kind: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        say(kind, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 47},  # behind [CLS], which is the 48th
        {"max_length": 4, "min_length": 40},
        {"banned_words": ["man", "brown horse"], "no_doubled_words": True},
        *({"length_penalty": value, "beams": 4, "repetition_penalty": 1e6} for value in (-10.0, 10.0)),
    ],
    ids=str,
)
def test_usable_settings_say_the_same_in_both(say: Callable[..., list[str]], settings: dict[str, Any]) -> None:
    said = say("library", **settings)
    assert len(set(said)) > 1
    assert say("runner", **settings) == said


@pytest.mark.parametrize("kind", ["library", "runner"])
def test_no_items_and_a_single_one(exported: tuple[Path, Path], kind: str) -> None:
    pytest.importorskip("onnxruntime")
    from vlm.onnx.runner import OnnxRunner

    runs = Predictor.load(exported[0], "cpu") if kind == "library" else OnnxRunner(exported[1], threads=1)
    assert runs.caption([]) == []
    for embed in (runs.embed_images, runs.embed_texts):
        found = np.asarray(embed([]))
        assert (found.shape, found.dtype) == ((0, 16), np.float32)
    for call in (runs.caption, runs.embed_images, runs.embed_texts):
        with pytest.raises(TypeError, match=r"write \['ab'\]"):
            call("ab")


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
