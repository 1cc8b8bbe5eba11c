"""YAML and overrides become a checked Config, or one line that says what was got, what was expected and how to mend it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlm.config import Config, DataConfig, ImageConfig, ModelConfig, OptimizerConfig, SplitsConfig, TextConfig
from vlm.errors import ConfigError
from vlm.settings import config_from_dict, config_to_yaml, load_config

WriteYaml = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> WriteYaml:
    """write("key: value", name="config.yaml") -> the file's path."""

    def make(text: str, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return make


def refused(path: Path | str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_values_reach_their_place_and_the_rest_keeps_its_default(write: WriteYaml) -> None:
    config = load_config(
        write("task: vqa\nmodel: {text: {dim: 96, cross_attention: [4, 5]}}\ndata: {splits: {train: [a, b]}}")
    )
    assert config == Config(
        task="vqa",
        model=ModelConfig(text=TextConfig(dim=96, cross_attention=(4, 5))),
        data=DataConfig(splits=SplitsConfig(train=("a", "b"))),
    )


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("optimizer: {learning_rate: 1}", "unknown setting optimizer.learning_rate; known here: lr, lr_factors,"),
        ("optimizer: {shedule: cosine}", "unknown setting optimizer.shedule; did you mean optimizer.schedule?"),
        ("model: {text: {dims: 3}}", "unknown setting model.text.dims; did you mean model.text.dim?"),
        ("optimiser: {lr: 1}", "unknown setting optimiser; did you mean optimizer?"),
        ("data: {splits: {vall: [x]}}", "unknown setting data.splits.vall; did you mean data.splits.val?"),
        ("lr: 0.1", "unknown setting lr; did you mean optimizer.lr?"),
        ("weight_decay: 0.1", "unknown setting weight_decay; did you mean optimizer.weight_decay?"),
        (
            "model: {frozen: true}",
            "unknown setting model.frozen; did you mean model.image.frozen or model.text.frozen?",
        ),
        ("xyzzy: 1", "unknown setting xyzzy; known here: task, out, seed,"),
        ("1: 2", "unknown setting 1; known here:"),
    ],
)
def test_an_unknown_key_names_the_nearest(write: WriteYaml, text: str, hint: str) -> None:
    path = write(text)
    assert refused(path).startswith(f"{path}: {hint}")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optimizer: {lr: fast}", ("optimizer.lr = 'fast'", "number")),
        ("data: {batch_size: 2.5}", ("data.batch_size = 2.5", "integer")),
        ("task: painting", ("task = 'painting'", "'pretraining', 'captioning' or 'vqa'")),
        ("model: 5", ("model = 5",)),
        ("data:", ("data = None",)),
        ("data: {splits: {train: folder}}", ("data.splits.train = 'folder'", "expected a list, e.g. [folder].")),
        ("data: {crop_scale: [0.5]}", ("data.crop_scale",)),
        ("optimizer: {lr_factors: {image_encoder: slow}}", ("optimizer.lr_factors.image_encoder = 'slow'",)),
        ("out: [runs]", ("out = ['runs']", "string")),
    ],
)
def test_a_wrong_type_names_key_value_and_what_was_expected(
    write: WriteYaml, text: str, parts: tuple[str, ...]
) -> None:
    path = write(text)
    message = refused(path)
    assert message.startswith(f"{path}: ")
    assert all(part in message for part in parts), message


def test_numbers_that_yaml_takes_for_text(write: WriteYaml) -> None:
    """PyYAML reads 1e-4, without a dot, as a string."""
    text = "optimizer: {lr: 1e-4, lr_factors: {image_encoder: 1e-1}}\ntrain: {epochs: 1e1}"
    assert yaml.safe_load(text)["optimizer"]["lr"] == "1e-4"
    config = load_config(write(text))
    assert (config.optimizer.lr, config.optimizer.lr_factors, config.train.epochs) == (
        1e-4,
        {"image_encoder": 0.1},
        10.0,
    )


def test_overrides_win_and_are_typed(write: WriteYaml) -> None:
    path = write("optimizer: {lr: 1.0e-3, warmup_steps: 7}\ndata: {splits: {train: [a]}}")
    config = load_config(
        path,
        [
            *("--optimizer.lr", "1e-4", "--data.splits.train", "b", "c", "--model.text.cross-attention", "1", "2"),
            *(
                "--data.randaugment",
                "None",
                "--model.image.image_size",
                "96",
                "--data.flip",
                "False",
                "--task",
                "captioning",
            ),
        ],
    )
    assert (config.optimizer.lr, config.optimizer.warmup_steps) == (1e-4, 7)
    assert config.data.splits.train == ("b", "c")
    assert (config.model.text.cross_attention, config.model.image.image_size) == ((1, 2), 96)
    assert (config.data.randaugment, config.data.flip, config.task) == (None, False, "captioning")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--optimizer.weight-decai", "1"], "--optimizer.weight-decay FLOAT"),
        (["--optimizer.lr", "fast"], "--optimizer.lr"),
        (["--task", "painting"], "captioning"),
    ],
)
def test_bad_overrides_leave_with_2(
    write: WriteYaml, capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(write("task: vqa"), overrides)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert said in output.err
    assert "Traceback" not in output.err


def test_overrides_are_checked_too(write: WriteYaml) -> None:
    assert refused(write("task: vqa"), "--train.accumulate", "0") == "train.accumulate=0; expected a number above 0."


def test_help_shows_every_setting_with_its_meaning_and_present_value(
    write: WriteYaml, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write("optimizer: {lr: 0.00777}")
    with pytest.raises(SystemExit) as caught:
        load_config(path, ["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for name in keys(Config):
        assert f"--{name.replace('_', '-')}" in shown, name
    plain = " ".join(shown.replace("│", " ").split())
    assert "Peak rate. (default: 0.00777)" in plain
    assert "to start from" in plain
    assert f"vlm train {path}" in plain


def keys(kind: Any, prefix: str = "") -> list[str]:
    found = []
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            found += keys(field.type, f"{prefix}{field.name}.")
        else:
            found.append(prefix + field.name)
    return found


def test_a_base_is_merged_key_by_key(write: WriteYaml, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    write("out: runs/a\noptimizer: {lr: 0.5, warmup_steps: 3}\ndata: {splits: {train: [a], val: [b]}}", "base.yaml")
    path = write(
        "base: ../base.yaml\nout: runs/b\noptimizer: {lr: 0.25}\ndata: {splits: {train: [c, d]}}", "more/top.yaml"
    )
    config = load_config(path)
    assert (config.out, config.optimizer.lr, config.optimizer.warmup_steps) == ("runs/b", 0.25, 3)
    assert config.data.splits == SplitsConfig(train=("c", "d"), val=("b",))


def test_bases_that_cannot_be_used(write: WriteYaml, tmp_path: Path) -> None:
    path = write("base: nothere.yaml")
    assert refused(path).startswith(f"{tmp_path}/nothere.yaml: no such config file")
    write("base: config.yaml", "second.yaml")
    path = write("base: second.yaml\n")
    assert "second.yaml has a base of its own; one level is allowed" in refused(path)
    write("lr: 1", "wrong.yaml")
    assert "unknown setting lr" in refused(write("base: wrong.yaml"))


def test_files_that_are_no_config(write: WriteYaml, tmp_path: Path) -> None:
    assert "not valid YAML" in refused(write("a: [1"))
    assert "not valid YAML" in refused(write("a: b: c"))
    assert "expected settings as `key: value`, got list" in refused(write("- a"))
    assert "expected settings as `key: value`, got NoneType" in refused(write(""))
    assert f"{tmp_path}: cannot be read as text" in refused(tmp_path)
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    assert "cannot be read as text" in refused(tmp_path / "image.yaml")


def test_a_missing_file_names_its_like(write: WriteYaml, tmp_path: Path) -> None:
    write("", "photos_small.yaml")
    assert refused(tmp_path / "photo_small.yaml").endswith(
        f"no such config file. Did you mean {tmp_path}/photos_small.yaml?"
    )
    assert "Configs lie in configs/pretrain and configs/finetune" in refused(tmp_path / "none" / "x.yaml")


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(
            task="vqa",
            seed=3,
            init_from="runs/a: b/best",
            model=ModelConfig(image=ImageConfig(image_size=96), first_token={"decoder": 5}, label='It\'s "ours": ü'),
            data=DataConfig(splits=SplitsConfig(train=("a", "b")), randaugment=None, crop_scale=(0.25, 0.75)),
            optimizer=OptimizerConfig(lr=1e-5, lr_factors={"image_encoder": 1e-7}, betas=(0.9, 0.999)),
        ),
    ],
)
def test_yaml_round_trip(config: Config, write: WriteYaml) -> None:
    assert load_config(write(config_to_yaml(config))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "data: {batch_size: 10}\ntrain: {accumulate: 4}",
            "data.batch_size=10 is not a multiple of train.accumulate=4; use 8.",
        ),
        (
            "data: {batch_size: 2}\ntrain: {accumulate: 4}",
            "data.batch_size=2 is not a multiple of train.accumulate=4; use 4.",
        ),
        ("train: {accumulate: 0}", "train.accumulate=0; expected a number above 0."),
        ("generation: {temperature: 0}", "temperature=0.0, top_k=0, top_p=0.9: give 0 < temperature < inf, top_k >= 0"),
        ("generation: {top_k: -1}", "temperature=1.0, top_k=-1, top_p=0.9: give 0 < temperature < inf, top_k >= 0"),
        (
            "generation: {top_p: 1.5}",
            "temperature=1.0, top_k=0, top_p=1.5: give 0 < temperature < inf, top_k >= 0 and 0 < top_p <= 1.",
        ),
        ("generation: {temperature: 1e-7}", "temperature=1e-07: give 1e-06, which is as good as the likeliest token,"),
        ("generation: {length_penalty: 400}", "length_penalty=400.0: give -10 to 10; 0 ignores the length."),
        (
            "generation: {repetition_penalty: 1e7}",
            "repetition_penalty=10000000.0 must be above 0: give 1e-06 to 1e+06; 1 is none.",
        ),
        ("train: {save_every: 0}", "train.save_every=0; expected a number above 0."),
        ("train: {epochs: .inf}", "train.epochs=inf; expected a number above 0."),
        ("optimizer: {lr: .nan}", "optimizer.lr=nan; expected a number above 0."),
        ("optimizer: {lr: -1}", "optimizer.lr=-1.0; expected a number above 0."),
        ("optimizer: {betas: [0.9, 1.0]}", "optimizer.betas.1=1.0; expected 0 (off) to below 1."),
        ("data: {workers: -1}", "data.workers=-1; expected 0 or more."),
        ("data: {max_tokens: 2}", "data.max_tokens=2; expected at least 3: a word between [CLS] and [SEP]."),
        (
            "data: {crop_scale: [0.8, 0.5]}",
            "data.crop_scale=[0.8, 0.5]; expected two shares of the area, e.g. [0.5, 1.0].",
        ),
        (
            "data: {randaugment: [2, 50]}",
            "data.randaugment=[2, 50]; expected a number of operations and a magnitude up to 10",
        ),
        ("data: {max_bad_fraction: 2}", "data.max_bad_fraction=2.0; expected a share from 0 to 1."),
        ("model: {text: {dropout: 1.0}}", "model.text.dropout=1.0; expected 0 (off) to below 1."),
        ("model: {text: {heads: 0}}", "model.text.heads=0; expected a number above 0."),
        ("model: {text: {dim: 100}}", "model.text.dim=100 is not a multiple of model.text.heads=12; use 96."),
        (
            "model: {text: {layers: 4}}",
            "model.text.cross_attention names layers [4, 5], but model.text.layers=4; use some of 0 to 3.",
        ),
        ("model: {fusion: late, text: {cross_attention: []}}", "model.fusion=late needs layers with cross-attention"),
        ("model: {image: {image_size: 0}}", "model.image.image_size=0; expected pixels, or null for timm's size."),
        (
            "task: vqa\ndata: {question_prompt: 'question:'}",
            "data.question_prompt='question:' must contain {question}.",
        ),
        ("task: vqa\nobjectives: {momentum: 0.995}", "objectives.momentum=0.995: only task=pretraining has a teacher"),
        (
            "data: {questions: true}",
            "data.questions=True and objectives.answering=0, which learns from them, belong together",
        ),
        ("objectives: {answering: 1}", "data.questions=False and objectives.answering=1"),
        (
            "data: {questions: true}\nobjectives: {answering: 1}\nvqa: {form: encoder_decoder}",
            "data.questions=True and objectives.answering=1, which learns from them, belong together, and need vqa.form=prompted",
        ),
        ("objectives: {masked_image: 1, hidden_share: 1}", "objectives.hidden_share=1.0; expected 0 (off) to below 1."),
        ("objectives: {hidden_share: 0}", "objectives.hidden_share=0.0; expected a number above 0."),
        ("model: {image: {patch_drop: 1}}", "model.image.patch_drop=1.0; expected 0 (off) to below 1."),
        (
            "objectives: {masked_image: 1}\ndata: {blank_images: true}",
            "objectives.masked_image=1 with data.blank_images=True: there is nothing to learn in grey",
        ),
        ("train: {averaging: 1.0}", "train.averaging=1.0; expected 0 (off) to below 1."),
        (
            "data: {max_tokens: 33}\nmodel: {text: {max_positions: 36}}",
            "data.max_tokens=33 make texts of up to 40 tokens (a multiple of 8), more than model.text.max_positions=36; "
            "use model.text.max_positions=40.",
        ),
        (
            "task: vqa\nmodel: {text: {max_positions: 32}}",
            "data.max_tokens=32 and data.max_answer_tokens=8 make texts of up to 40 tokens",
        ),
        (
            "data: {questions: true}\nobjectives: {answering: 1}\nvqa: {form: prompted}\nmodel: {text: {max_positions: 32}}",
            "data.max_tokens=32 and data.max_answer_tokens=8 make texts of up to 40 tokens",
        ),
    ],
)
def test_what_single_types_cannot_say(write: WriteYaml, text: str, message: str) -> None:
    assert refused(write(text)).startswith(message)


def test_lengths_are_not_checked_against_a_model_that_a_checkpoint_brings(write: WriteYaml) -> None:
    text = "data: {max_tokens: 33}\nmodel: {text: {max_positions: 36}}\n"
    assert load_config(write(text + "init_from: runs/a/best")).data.max_tokens == 33


def test_errors_name_their_source() -> None:
    with pytest.raises(ConfigError, match=r"^config\.json of x: unknown setting sed; did you mean seed\?"):
        config_from_dict({"sed": 1}, "config.json of x")
