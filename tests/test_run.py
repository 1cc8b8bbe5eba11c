"""vlm/run.py: what the checkpoints of a run carry on from the one that it started from."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vlm.checkpoint import read_answers
from vlm.cli import main
from vlm.data.synthetic import write_scenes

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
