"""Everything that can be trained is trained, scored and shown in bf16, which devices with instructions for it take; what it loses and scores is
fp32's but for rounding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm.config import Config
from vlm.run import train
from vlm.train.report import read_json_lines

VIT = {"name": "test_vit", "image_size": 64, "stages": 0}
PRETRAINING = {"task": "pretraining", "retrieval.rerank": 3}
ALONE = {"objectives.matching": 0.0, "objectives.masked_language": 0.0}
TEACHER = {"objectives.momentum": 0.9, "objectives.queue": 20, "objectives.alpha_ramp": 0}
VQA = {"task": "vqa", "data.max_answer_tokens": 4}
DRAWN = {"objectives.self_critical": 1.0}  # what is drawn, and so its reward, may be other words
CASES: dict[str, dict[str, Any]] = {
    "ALBEF": PRETRAINING | TEACHER,
    "BLIP": PRETRAINING | TEACHER | {"objectives.masked_language": 0.0, "objectives.captioning": 1.0},
    "retrieval by captions": {**PRETRAINING, **ALONE, "objectives.captioning": 1.0, "retrieval.by": "captioning"},
    "sigmoid": {"task": "pretraining", **ALONE, "objectives.contrastive_loss": "sigmoid"},
    "masked image": {**PRETRAINING, "model.image": VIT, "objectives.masked_image": 1.0, "objectives.word_patch": 0.1},
    "patches dropped": {**PRETRAINING, "model.image": {**VIT, "patch_drop": 0.5}},
    "accumulated": {**PRETRAINING, "train.accumulate": 2},
    "checkpointing": {**PRETRAINING, "model.image": {**VIT, "checkpointing": True}, "model.text.checkpointing": True},
    "all texts and questions": {
        **PRETRAINING,
        "objectives.captioning": 1.0,
        "objectives.answering": 0.5,
        "data.questions": True,
        "data.texts_per_image": "all",
    },
    "captioning": {"train.averaging": 0.9},
    "captioning, contrast kept on": {"finetune.contrastive": 0.3},
    "R-Drop and FreeLB": {"finetune.consistency": 1.0, "finetune.adversarial.steps": 2},
    "self-critical": DRAWN,
    "answers ranked": {**VQA, "vqa.inference": "rank"},
    "answers all ranked": {**VQA, "vqa.inference": "rank_all"},
    "answers generated, from the question's states": {
        **VQA,
        "vqa.inference": "generate",
        "vqa.form": "encoder_decoder",
        "model.decoder": "separate",
        "model.decoder_reads": "question",
    },
    "answers classified": {**VQA, "vqa.form": "classify", "model.heads": ["classifier"]},
}


@pytest.mark.parametrize("case", CASES)
def test_bf16_is_fp32_but_for_rounding(make_config: Callable[..., Config], tmp_path: Path, case: str) -> None:
    first, scored = [], []
    for precision in ("fp32", "bf16"):
        settings = {**CASES[case], "train.epochs": 0.34, "train.precision": precision, "train.samples": 2}
        config = make_config({**settings, "out": str(tmp_path / precision)})
        scored.append(train(config))
        lines = [line for line in read_json_lines(tmp_path / precision / "log.jsonl") if line["kind"] == "train"]
        assert [line["step"] for line in lines] == [1, 2]
        first.append({name: value for name, value in lines[0].items() if name.endswith("/loss")})
        (page,) = (tmp_path / precision / "samples").iterdir()
        assert page.read_text().count("<img ") == 2
    assert scored[0].keys() == scored[1].keys()
    assert first[0].keys() == first[1].keys()
    assert len(first[0]) > 0
    if CASES[case] is not DRAWN:
        assert first[1] == pytest.approx(first[0], rel=0.02)
