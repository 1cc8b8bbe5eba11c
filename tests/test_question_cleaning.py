"""How questions are cleaned belongs to the checkpoint: its predictor, its evaluation and what is trained from it obey, copies of it keep it."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm.build import build_parts, load_sets
from vlm.checkpoint import write_checkpoint
from vlm.cli import main
from vlm.config import Config, DataConfig, ModelConfig, TokenizerConfig, VqaConfig
from vlm.data.encoders import sample_encoder
from vlm.data.records import Record
from vlm.data.scan import scan
from vlm.data.synthetic import write_scenes
from vlm.data.text import Tokenizer, clean_question
from vlm.errors import CheckpointError
from vlm.export import export
from vlm.model.pretrained import load_metadata
from vlm.predictor import Predictor

Make = Callable[[str | None], Path]
CONFIG = str(Path(__file__).parents[1] / "configs/finetune/vqa/tiny.yaml")
DEMO = Path(__file__).parents[1] / "demos/model"
TYPED = ' Is the man\'s "red/blue" T-shirt, (10:30) - new?! \n'


@pytest.fixture
def make(checkpoint: Callable[..., Path], tmp_path: Path) -> Make:
    """make("blip"): a random model whose decoder reads the question, with this cleaning in its config.json; None: without, as older checkpoints."""
    source = checkpoint("vqa", decoder="separate", decoder_layers=2, decoder_reads="question")

    def made(cleaning: str | None) -> Path:
        folder = tmp_path / str(cleaning)
        shutil.copytree(source, folder)
        metadata = load_metadata(folder)
        del metadata["text"]["question_cleaning"]
        if cleaning is not None:
            metadata["text"]["question_cleaning"] = cleaning
        (folder / "config.json").write_text(json.dumps(metadata))
        return folder

    return made


@pytest.mark.parametrize(
    ("cleaning", "expected"),
    [
        ("vlm", "is the man's red/blue t-shirt, 10 30 - new"),
        ("blip", " is the man's red/blue t-shirt, 1030 - new? \n"),
        ("albef", " is the mans red blue t shirt 1030   new \n"),
        ("none", TYPED),
    ],
)
def test_each_way(cleaning: Any, expected: str) -> None:
    assert clean_question(TYPED, cleaning=cleaning) == expected
    assert clean_question("One two three?  ", 2, cleaning) == ("One two three?  " if cleaning == "none" else "one two")
    kept = {"blip": "one two three?", "none": "One two three?  "}
    assert clean_question("One two three?  ", cleaning=cleaning) == kept.get(cleaning, "one two three")


def test_checkpoints_of_before_answer_as_before(make: Make) -> None:
    before, named, other = (Predictor.load(make(name), "cpu") for name in (None, "vlm", "none"))
    assert before.tokenizer.question_cleaning == "vlm"
    for picture in (DEMO.with_name("images") / name for name in ("cat.jpg", "coffee.jpg")):
        assert before.answer(picture, "How many dogs?") == named.answer(picture, "How many dogs?")
        assert before.answer(picture, "How many dogs?") == other.answer(picture, "how many dogs")
        assert before.answer(picture, "How many dogs?") != other.answer(picture, "How many dogs?")


def test_the_demo_s_questions_are_cleaned_as_they_were() -> None:
    assert "question_cleaning" not in load_metadata(DEMO)["text"]
    assert Tokenizer.load(DEMO).question_cleaning == "vlm"


def test_evaluation_asks_as_the_predictor_does(make: Make, tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", 1, 6)
    records = list(scan(load_sets([f"{tmp_path}/scenes/val"], "val")))
    said = []
    for cleaning in (None, "none"):
        folder, out = make(cleaning), tmp_path / f"out-{cleaning}"
        given = ["--checkpoint", str(folder), "--split", "val", "--out", str(out)]
        data = ["--data.splits.val", f"{tmp_path}/scenes/val", "--data.workers", "0", "--train.precision", "fp32"]
        form = ["--vqa.form", "encoder_decoder", "--vqa.inference", "generate", "--generation.beams", "2"]
        assert main(["evaluate", CONFIG, *given, *data, *form, "--data.max-answer-tokens", "8"]) == 0
        predictor = Predictor.load(folder, "cpu")
        expected = {
            q["question_id"]: predictor.answer(record.image, q["question"], beams=2).text
            for record in records
            for q in record.questions
        }
        found = json.loads((out / "predictions.json").read_text())
        assert {answer["question_id"]: answer["answer"] for answer in found} == expected
        said.append(expected)
    assert said[0] != said[1], "the question mark must matter"


def test_what_is_trained_from_a_checkpoint_keeps_its_way(make: Make, tmp_path: Path) -> None:
    vqa = VqaConfig(form="encoder_decoder", inference="generate")
    config = Config(task="vqa", init_from=str(make("albef")), vqa=vqa, data=DataConfig(question_cleaning="blip"))
    parts = build_parts(config, [])
    record = Record("toy", "a", b"", [], [{"question": "Is the man's hat red?", "answers": ["no"]}], 0)
    for training in (True, False):
        encoder = sample_encoder(config, parts.tokenizer, 32, training)
        (text,) = encoder.texts(record, 0)
        assert text.ids == parts.tokenizer.encode("is the mans hat red")
    write_checkpoint(tmp_path / "tuned", parts.config, parts.model, parts.tokenizer.to_json(), {})
    export([tmp_path / "tuned"], tmp_path / "out")
    for folder in (tmp_path / "tuned", tmp_path / "out"):
        assert load_metadata(folder)["text"]["question_cleaning"] == "albef"
        assert Tokenizer.load(folder).question_cleaning == "albef"


@pytest.mark.parametrize("source", [False, True])
def test_a_new_model_takes_the_setting(
    source: bool, make: Make, tiny_config: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    """Also where the tokenizer is that of a checkpoint with another way."""
    write_scenes(tmp_path / "scenes", 6, 1)
    words = TokenizerConfig(source=str(make("none")) if source else None)
    config = Config(task="vqa", model=tiny_config(), data=DataConfig(question_cleaning="blip"), tokenizer=words)
    parts = build_parts(config, load_sets([f"{tmp_path}/scenes/train"], "train"))
    assert parts.tokenizer.question_cleaning == parts.config.data.question_cleaning == "blip"
    encoder: Any = sample_encoder(parts.config, parts.tokenizer, 32, training=False)
    prompt = parts.tokenizer.encode("question: is it red? answer:")[:-1]
    assert encoder.prompt_ids("Is it red?") == prompt
    assert pickle.loads(pickle.dumps(encoder)).prompt_ids("Is it red?") == prompt  # as loader workers get it


def test_an_unknown_way_is_told(make: Make) -> None:
    with pytest.raises(CheckpointError) as caught:
        Predictor.load(make("clip"), "cpu")
    assert str(caught.value).endswith(
        "config.json: question_cleaning is 'clip', expected one of vlm, blip, albef, none; copy it again, or update the library."
    )
