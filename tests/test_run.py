"""vlm/run.py: what the checkpoints of a run carry on from the one that it started from."""

import shutil
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import pytest
import torch
from torch._inductor import config as inductor

from vlm.checkpoint import read_answers
from vlm.cli import main
from vlm.data.shards import ShardWriter
from vlm.data.synthetic import draw_scene, write_scenes
from vlm.model.pretrained import load_metadata, read_weights
from vlm.train.report import read_json_lines

TINY = str(Path(__file__).parents[1] / "configs/pretrain/tiny.yaml")
SMALL = ["--data.batch-size", "4", "--data.workers", "0", "--train.epochs", "0.5", "--data.splits.val"]


@pytest.mark.parametrize(
    ("settings", "kept"), [([], ["zebra"]), (["--data.questions", "True", "--objectives.answering", "1"], None)]
)
def test_a_stage_without_questions_keeps_the_answer_list(
    checkpoint: Callable[..., Path], tmp_path: Path, settings: list[str], kept: list[str] | None
) -> None:
    write_scenes(tmp_path / "scenes", 8, 4)
    model = checkpoint("pretraining", ("zebra",))
    given = [
        "--init-from",
        str(model),
        "--data.splits.train",
        str(tmp_path / "scenes/train"),
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(["train", TINY, *given, *settings, *SMALL]) == 0
    answers = read_answers(tmp_path / "run/latest")
    if kept is None:
        assert answers
        assert "zebra" not in answers  # its own questions' answers
    else:
        assert answers == kept


def test_a_stage_of_rewards_alone_can_be_evaluated(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", 4, 4)
    weights = {"contrastive": 0, "matching": 0, "masked-language": 0, "captioning": 0, "self-critical": 1}
    given = [part for name, weight in weights.items() for part in (f"--objectives.{name}", str(weight))]
    given += ["--checkpoint", str(checkpoint("pretraining")), "--split", "val", "--out", str(tmp_path / "out")]
    given += ["--data.splits.val", str(tmp_path / "scenes/val"), "--data.workers", "0"]
    assert main(["evaluate", TINY, *given]) == 0
    assert (tmp_path / "out/results.json").exists()


def test_a_classifier_is_trained_goes_on_exactly_and_starts_another(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    write_scenes(tmp_path / "scenes", 16, 4)
    start = checkpoint("captioning")
    folders = ["--data.splits.train", str(tmp_path / "scenes/train"), "--data.splits.val", str(tmp_path / "scenes/val")]
    given = ["--init-from", str(start), *folders, *SMALL[:4], "--train.epochs", "1", "--train.averaging", "0.9"]
    classify = str(Path(TINY).parents[1] / "finetune/vqa/tiny_classify.yaml")
    run = ["train", classify, *given, "--train.save-every", "2", "--train.keep", "9"]
    assert main([*run, "--out", str(tmp_path / "run")]) == 0
    saved = load_metadata(tmp_path / "run/best")
    answers = read_answers(tmp_path / "run/best")
    assert "classifier" in saved["model"]["heads"]
    assert saved["model"]["answers"] == len(answers) > 5
    weights = read_weights(tmp_path / "run/latest")
    assert len(weights["answer_head.output.weight"]) == len(answers)
    # From the state of step 2 on, the same weights come out.
    shutil.copytree(tmp_path / "run/step-00000002", tmp_path / "again/latest")
    assert main([*run, "--out", str(tmp_path / "again"), "--resume", "auto"]) == 0
    again = read_weights(tmp_path / "again/latest")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    # Another stage starts from it with other answers, and a captioner without its classifier.
    more = [*given, "--init-from", str(tmp_path / "run/best"), "--vqa.min-answer-count", "3", *SMALL[4:]]
    assert main(["train", classify, *more, "--out", str(tmp_path / "more")]) == 0
    fewer = read_answers(tmp_path / "more/latest")
    assert 0 < len(fewer) < len(answers)
    assert load_metadata(tmp_path / "more/latest")["model"]["answers"] == len(fewer)
    captions = str(Path(TINY).parents[1] / "finetune/captioning/tiny.yaml")
    onto = ["--init-from", str(tmp_path / "run/best"), *folders, *SMALL[:6], "--out", str(tmp_path / "captions")]
    assert main(["train", captions, *onto]) == 0
    after = load_metadata(tmp_path / "captions/latest")["model"]
    assert "classifier" not in after["heads"]
    assert after["answers"] == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--vqa.min-answer-count", "9999"], "lower vqa.min_answer_count"),
        (["--vqa.set-weights", "visual_genom", "0.5"], "are of scenes; name one of these"),
        (["--vqa.set-weights", "scenes", "0"], "vqa.set_weights.scenes=0.0; expected a number above 0"),
    ],
)
def test_unusable_settings_of_questions_are_refused(
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_scenes(tmp_path / "scenes", 8, 4)
    given = ["--init-from", str(checkpoint()), "--data.splits.train", str(tmp_path / "scenes/train"), *SMALL]
    classify = str(Path(TINY).parents[1] / "finetune/vqa/tiny_classify.yaml")
    assert main(["train", classify, *given, "--out", str(tmp_path / "run"), *more]) == 2
    assert message in capsys.readouterr().err


def test_compiling_without_a_compiler_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scenes(tmp_path / "scenes", 8, 4)
    given = ["--data.splits.train", str(tmp_path / "scenes/train"), *SMALL, "--out", str(tmp_path / "run")]
    for dry in ([], ["--dry-run"]):
        with inductor.patch({"cpp.cxx": (None, "/no/such/compiler")}):
            assert main(["train", TINY, *given, "--train.compile", "True", *dry]) == 2
        assert "torch.compile needs a C++ compiler, and none is found; install g++" in capsys.readouterr().err
    assert not (tmp_path / "run/latest").exists()


def write_questions(folder: Path, answered: Sequence[int] = (), bad: Sequence[int] = ()) -> str:
    """Four pictures with a question each. answered: which of them have an answer. bad: those whose image is none."""
    with ShardWriter(folder, folder.name) as writer:
        for i in range(4):
            scene, data = draw_scene(100 + i, 32), BytesIO()
            scene.image.save(data, "PNG")
            question = {"question_id": i, "question": "what color is it?"} | (
                {"answers": ["red"]} if i in answered else {}
            )
            image = b"no image" if i in bad else data.getvalue()
            writer.write(f"{folder.name}{i}", image, "png", questions=[question], image_id=i)
    return str(folder)


@pytest.fixture
def question_run(checkpoint: Callable[..., Path], tmp_path: Path) -> list[str]:
    """A run of four steps that is evaluated twice; the folders of data.splits.val follow."""
    write_scenes(tmp_path / "scenes", 8, 4)
    classify = str(Path(TINY).parents[1] / "finetune/vqa/tiny_classify.yaml")
    given = ["--init-from", str(checkpoint()), "--data.splits.train", str(tmp_path / "scenes/train")]
    given += ["--data.batch-size", "4", "--data.workers", "0", "--train.epochs", "2", "--train.evaluate-every", "2"]
    return ["train", classify, *given, "--out", str(tmp_path / "run"), "--data.splits.val"]


def test_questions_without_answers_cannot_choose_a_checkpoint(
    question_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*question_run, write_questions(tmp_path / "testdev")]) == 2
    said = capsys.readouterr().err
    assert "data.splits.val: none of the questions of testdev has an answer" in said
    assert "step 1" not in said
    assert not (tmp_path / "run/latest").exists()


def test_a_set_without_answers_does_not_count_beside_one_that_has_some(
    question_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [write_questions(tmp_path / "testdev"), write_questions(tmp_path / "dev", answered=range(4))]
    assert main([*question_run, *folders]) == 0
    assert capsys.readouterr().err.count("testdev: none of its questions has an answer, so it does not count") == 1
    lines = [line for line in read_json_lines(tmp_path / "run/log.jsonl") if line["kind"] == "evaluation"]
    assert len(lines) == 2
    assert all("accuracy" not in line["scores"]["testdev"] for line in lines)
    assert all(line["selects"] == line["scores"]["dev"]["accuracy"] for line in lines)


def test_answers_whose_images_cannot_be_read_choose_nothing(
    question_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the evaluation notices."""
    assert main([*question_run, write_questions(tmp_path / "dev", answered=[3], bad=[3])]) == 0
    lines = [line for line in read_json_lines(tmp_path / "run/log.jsonl") if line["kind"] == "evaluation"]
    assert [(line["selects"], line["best"]) for line in lines] == [(None, False)] * 2
    assert not (tmp_path / "run/best").exists()
    assert "/best" not in capsys.readouterr().err


def test_foreign_shards_of_one_name_are_not_trained_on_together(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = []
    for name in ("a", "b"):
        write_scenes(tmp_path / name / "web", 8, 4)
        folders.append(str(tmp_path / name / "web" / "train"))
        (tmp_path / name / "web" / "train" / "index.json").unlink()
    given = ["--init-from", str(checkpoint("pretraining")), "--data.splits.train", *folders, *SMALL]
    assert main(["train", TINY, *given, "--out", str(tmp_path / "run")]) == 2
    assert "--source" in capsys.readouterr().err


def test_a_run_of_more_heads_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As runs had that began when untrained heads were kept."""
    write_scenes(tmp_path / "scenes", 12, 4)
    given = ["--data.splits.train", str(tmp_path / "scenes/train"), "--out", str(tmp_path / "run"), *SMALL]
    run = ["train", TINY, *given, "--objectives.matching", "0", "--train.save-every", "1", "--train.keep", "9"]
    with monkeypatch.context() as before:
        before.setattr("vlm.build.trained_heads", lambda config: config.model.heads)
        assert main([*run, "--train.epochs", "1"]) == 0
    heads = load_metadata(tmp_path / "run/latest")["model"]["heads"]
    assert "matching" in heads
    shutil.rmtree(tmp_path / "run/latest")
    shutil.copytree(tmp_path / "run/step-00000001", tmp_path / "run/latest")
    assert main([*run, "--train.epochs", "1", "--resume", "auto"]) == 0
    assert load_metadata(tmp_path / "run/latest")["model"]["heads"] == heads
