"""Every config of the repository is one that can be used, and those of published models say the published numbers."""

from pathlib import Path
from typing import Any

import pytest

from vlm.settings import config_from_dict, config_to_yaml, load_config

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def test_there_are_configs() -> None:
    assert len(CONFIGS) > 0
    assert {path.parent.name for path in CONFIGS} >= {"pretrain", "captioning", "vqa", "retrieval"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_it_loads_and_says_what_it_trains(path: Path) -> None:
    import yaml

    config = load_config(path)
    folder = path.relative_to(ROOT / "configs").parts
    # Retrieval is fine-tuned by pretraining's objectives.
    assert config.task == ("pretraining" if folder[0] == "pretrain" or folder[1] == "retrieval" else folder[1])
    assert config.data.splits.train
    assert config.data.splits.val
    assert config.out.startswith("runs/")
    assert path.read_text().startswith("#"), "a config begins with what it is for"
    assert config_from_dict(yaml.safe_load(config_to_yaml(config)), "again") == config


def test_no_two_configs_write_into_one_folder() -> None:
    outs = [load_config(path).out for path in CONFIGS]
    assert len(outs) == len(set(outs))


# salesforce/ALBEF: configs/Pretrain.yaml (lr 1e-4, min_lr 1e-5, warmup_lr 1e-5, warmup_epochs 20 of 100 steps, weight_decay 0.02, epochs 30,
# image_res 256, embed_dim 256, batch_size 64 on 8 GPUs, temp 0.07, mlm_probability 0.15, queue_size 65536, momentum 0.995, alpha 0.4),
# Pretrain.py (25 tokens, alpha over the first epoch), dataset/__init__.py (crops from 0.2, RandAugment 2 and 7).
ALBEF: dict[str, Any] = {
    "model.image.name": "deit_base_patch16_224",
    "model.image.image_size": 256,
    "model.text.dim": 768,
    "model.text.layers": 12,
    "model.text.cross_attention": (6, 7, 8, 9, 10, 11),
    "model.fusion": "late",
    "model.embed_dim": 256,
    "model.temperature": 0.07,
    "data.batch_size": 64 * 8,
    "data.max_tokens": 25,
    "data.crop_scale": (0.2, 1.0),
    "data.randaugment": (2, 7),
    "objectives.contrastive": 1.0,
    "objectives.matching": 1.0,
    "objectives.masked_language": 1.0,
    "objectives.captioning": 0.0,
    "objectives.masking_probability": 0.15,
    "objectives.momentum": 0.995,
    "objectives.queue": 65536,
    "objectives.alpha": 0.4,
    "objectives.alpha_ramp": 1.0,
    "optimizer.lr": 1e-4,
    "optimizer.weight_decay": 0.02,
    "optimizer.betas": (0.9, 0.999),
    "optimizer.schedule": "cosine",
    "optimizer.warmup_steps": 20 * 100,
    "optimizer.warmup_from": 1e-5,
    "optimizer.min_lr_factor": 1e-5 / 1e-4,
    "optimizer.clip": 0.0,
    "train.epochs": 30,
}
# salesforce/BLIP: configs/pretrain.yaml (init_lr 3e-4, min_lr 1e-6, warmup_lr 1e-6, warmup_steps 3000, lr_decay_rate 0.9, weight_decay 0.05,
# max_epoch 20, image_size 224, batch_size 75 on 32 GPUs, queue_size 57600, alpha 0.4), models/blip_pretrain.py (30 tokens, momentum 0.995),
# models/med.py (label smoothing 0.1), pretrain.py (alpha over two epochs), data/__init__.py (crops from 0.2, RandAugment 2 and 5).
BLIP = ALBEF | {
    "model.image.image_size": 224,
    "model.text.cross_attention": tuple(range(12)),
    "model.text.separate_causal_attention": True,
    "model.fusion": "full",
    "data.batch_size": 75 * 32,
    "data.max_tokens": 30,
    "data.randaugment": (2, 5),
    "objectives.masked_language": 0.0,
    "objectives.captioning": 1.0,
    "objectives.label_smoothing": 0.1,
    "objectives.queue": 57600,
    "objectives.alpha_ramp": 2.0,
    "optimizer.lr": 3e-4,
    "optimizer.weight_decay": 0.05,
    "optimizer.schedule": "step",
    "optimizer.step_factor": 0.9,
    "optimizer.warmup_steps": 3000,
    "optimizer.warmup_from": 1e-6,
    "optimizer.min_lr_factor": 1e-6 / 3e-4,
    "train.epochs": 20,
}
# Fine-tuning of BLIP: init_lr, min_lr 0 and weight_decay 0.05 of configs/caption_coco.yaml, vqa.yaml and retrieval_coco.yaml, no warm-up; crops from
# 0.5. An epoch here takes one text of an image where theirs takes all: five captions, 5.3 questions.
TUNED: dict[str, Any] = {
    "data.batch_size": 256,
    "data.crop_scale": (0.5, 1.0),
    "data.randaugment": (2, 5),
    "optimizer.weight_decay": 0.05,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_steps": 0,
    "optimizer.min_lr_factor": 0.0,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "pretrain/albef_base": ALBEF,
    "pretrain/albef_base_14m": ALBEF,
    "pretrain/blip_base": BLIP,
    # Li et al. 2022, section 4.1: 2e-4 and batches of 2400 for ViT-L; models/blip.py: drop path 0.1.
    "pretrain/blip_large": BLIP
    | {
        "model.image.name": "vit_large_patch16_224.augreg_in21k",
        "model.image.drop_path": 0.1,
        "optimizer.lr": 2e-4,
        "optimizer.min_lr_factor": 1e-6 / 2e-4,
    },
    # zdou0830/METER: task_mlm_itm_clip_bert in meter/config.py, clip_transform in meter/transforms/transform.py; rates of 1e-5 and 5 times as much
    # for the cross-modal layers and heads.
    "pretrain/mlm_itm": {
        "model.text.cross_attention": (6, 7, 8, 9, 10, 11),
        "data.batch_size": 4096,
        "data.max_tokens": 50,
        "data.crop_scale": (1.0, 1.0),
        "data.flip": False,
        "data.randaugment": None,
        "objectives.contrastive": 0.0,
        "objectives.matching": 1.0,
        "objectives.masked_language": 1.0,
        "objectives.masking_probability": 0.15,
        "objectives.whole_words": True,
        "optimizer.lr": 5 * 1e-5,
        "optimizer.lr_factors.image_encoder": 1 / 5,
        "optimizer.weight_decay": 0.01,
        "optimizer.betas": (0.9, 0.98),
        "optimizer.schedule": "linear",
        "optimizer.warmup_steps": 10_000,
        "optimizer.warmup_from": 0.0,
        "optimizer.min_lr_factor": 0.0,
        "optimizer.clip": 0.0,
    },
    # configs/VQA.yaml (image_res 384, batch 32 x 8, lr 2e-5, min_lr 1e-6, warmup_lr 1e-5, warmup_epochs 4 of 100 steps, epochs 8); VQA.py: 25.
    "finetune/vqa/albef_base": {
        "model.image.image_size": 384,
        "model.decoder": "separate",
        "model.decoder_layers": 6,
        "model.decoder_reads": "question",
        "data.batch_size": 32 * 8,
        "data.max_tokens": 25,
        "data.crop_scale": (0.5, 1.0),
        "data.randaugment": (2, 7),
        "optimizer.lr": 2e-5,
        "optimizer.weight_decay": 0.02,
        "optimizer.schedule": "cosine",
        "optimizer.warmup_steps": 4 * 100,
        "optimizer.warmup_from": 1e-5,
        "optimizer.min_lr_factor": 1e-6 / 2e-5,
        "train.epochs": 43,
    },
    # configs/Retrieval_flickr.yaml (image_res 384, batch 32 x 8, lr 1e-5 from the first step, min_lr 1e-6, epochs 10, k_test 128).
    "finetune/retrieval/albef_base_flickr30k": {
        "model.image.image_size": 384,
        "data.batch_size": 32 * 8,
        "data.crop_scale": (0.5, 1.0),
        "data.randaugment": (2, 7),
        "objectives.queue": 65536,
        "objectives.masked_language": 0.0,
        "retrieval.rerank": 128,
        "optimizer.lr": 1e-5,
        "optimizer.weight_decay": 0.02,
        "optimizer.warmup_steps": 0,
        "optimizer.min_lr_factor": 1e-6 / 1e-5,
        "train.epochs": 10 * 5,
    },
    "finetune/retrieval/blip_base_coco": TUNED
    | {
        "model.image.image_size": 384,
        "data.max_tokens": 35,
        "objectives.captioning": 0.0,
        "objectives.negatives": "joined",
        "objectives.queue": 57600,
        "retrieval.rerank": 256,
        "optimizer.lr": 1e-5,
        "train.epochs": 6 * 5,
    },
    "finetune/captioning/blip_base_coco": TUNED
    | {
        "model.image.image_size": 384,
        "data.prompt": "a picture of ",
        "data.max_tokens": 40,
        "objectives.label_smoothing": 0.1,
        "optimizer.lr": 1e-5,
        "generation.beams": 3,
        "generation.max_length": 20 - 4,
        "generation.min_length": 5 - 4,
        "train.epochs": 5 * 5,
    },
    "finetune/vqa/blip_base": TUNED
    | {
        "model.image.image_size": 480,
        "model.image.drop_path": 0.1,
        "model.decoder_layers": 12,
        "data.max_tokens": 35,
        "objectives.label_smoothing": 0.1,
        "optimizer.lr": 2e-5,
        "train.epochs": 53,
    },
    # task_finetune_vqa_clip_bert with clip_randaug: 5e-6, 50 times as much for the head, 5 times for the cross-modal layers.
    "finetune/vqa/meter_base": {
        "model.image.image_size": 576,
        "vqa.form": "classify",
        "vqa.min_answer_count": 9,
        "data.batch_size": 512,
        "data.max_tokens": 50,
        "data.flip": False,
        "data.randaugment": (2, 9),
        "optimizer.lr": 5e-6,
        "optimizer.lr_factors.answer_head": 50,
        "optimizer.lr_factors.fusion_memory": 5,
        "optimizer.weight_decay": 0.01,
        "optimizer.betas": (0.9, 0.98),
        "optimizer.schedule": "linear",
        "optimizer.warmup_from": 0.0,
        "optimizer.min_lr_factor": 0.0,
        "train.epochs": 53,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str) -> None:
    config = load_config(ROOT / f"configs/{name}.yaml")
    wrong = {}
    for key, expected in PUBLISHED[name].items():
        value: Any = config
        for part in key.split("."):
            value = value[part] if isinstance(value, dict) else getattr(value, part)
        if value != (pytest.approx(expected, rel=2e-3) if isinstance(expected, float) else expected):
            wrong[key] = f"{value}, published: {expected}"
    assert not wrong


def test_every_recipe_of_a_published_model_is_compared() -> None:
    names = [str(path.relative_to(ROOT / "configs").with_suffix("")) for path in CONFIGS]
    assert {n for n in names if n.split("/")[-1].startswith(("albef", "blip", "meter", "mlm_itm"))} == set(PUBLISHED)
