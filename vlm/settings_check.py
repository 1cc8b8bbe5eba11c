"""What the types of single settings cannot say: ranges, and settings that must fit each other."""

import math
from typing import Any

from vlm import finetune_check
from vlm.config import Config, DataConfig
from vlm.errors import ConfigError
from vlm.model.limits import Limits, check_drawing, check_search

ABOVE_0 = (
    *("data.batch_size", "data.shuffle_block", "data.max_answer_tokens", "tokenizer.vocab_size"),
    *("tokenizer.min_count", "data.cache.gigabytes", "data.cache.timeout"),
    *("model.embed_dim", "model.temperature", "model.decoder_layers"),
    *(
        "model.text.dim",
        "model.text.heads",
        "model.text.layers",
        "model.text.feed_forward_dim",
        "model.text.max_positions",
    ),
    *("objectives.hidden_unit", "objectives.hidden_share", "objectives.sample_temperature"),
    *("optimizer.lr", "optimizer.step_factor"),
    *("train.epochs", "train.accumulate", "train.log_every", "train.evaluate_images", "train.save_every"),
    "train.max_skipped",
    *("generation.beams", "generation.max_length", "generation.repetition_penalty"),
)
FROM_0 = (
    "data.cache.retries",
    *("data.workers", "optimizer.weight_decay", "optimizer.warmup_steps", "optimizer.min_lr_factor", "optimizer.clip"),
    *("train.evaluate_every", "train.samples", "train.keep", "generation.min_length", "generation.no_repeat_ngram"),
    *(
        "objectives.contrastive",
        "objectives.matching",
        "objectives.masked_language",
        "objectives.masked_image",
        "objectives.word_patch",
        "objectives.captioning",
        "objectives.answering",
        "objectives.self_critical",
    ),
    *("objectives.queue", "objectives.alpha_ramp", "objectives.easy_negatives", "retrieval.rerank"),
)
SHARES = (
    *("model.text.dropout", "model.text.attention_dropout", "model.image.drop_path", "objectives.label_smoothing"),
    "model.image.patch_drop",
    "objectives.hidden_share",
    *("train.averaging", "optimizer.betas.0", "optimizer.betas.1", "objectives.momentum"),
)


def check(config: Config) -> None:
    """Refuses what could only fail later.

    Raises:
        ConfigError: names the keys, what they are, and how to mend them.
    """
    _check_ranges(config)
    data, train, text = config.data, config.train, config.model.text
    if data.batch_size % train.accumulate:
        nearest = data.batch_size // train.accumulate * train.accumulate or train.accumulate
        raise ConfigError(
            f"data.batch_size={data.batch_size} is not a multiple of train.accumulate={train.accumulate}; use {nearest}."
        )
    if text.dim % text.heads:
        raise ConfigError(
            f"model.text.dim={text.dim} is not a multiple of model.text.heads={text.heads}; "
            f"use {text.dim // text.heads * text.heads or text.heads}."
        )
    bad = [i for i in text.cross_attention if not 0 <= i < text.layers]
    if bad:
        raise ConfigError(
            f"model.text.cross_attention names layers {bad}, but model.text.layers={text.layers}; use some of 0 to {text.layers - 1}."
        )
    if config.model.fusion == "late" and not text.cross_attention:
        raise ConfigError(
            "model.fusion=late needs layers with cross-attention; name the last ones in model.text.cross_attention."
        )
    if config.objectives.momentum > 0 and config.task != "pretraining":
        raise ConfigError(
            f"objectives.momentum={config.objectives.momentum:g}: only task=pretraining has a teacher; set it to 0."
        )
    if data.questions != (config.objectives.answering > 0) or (data.questions and config.vqa.form != "prompted"):
        raise ConfigError(
            f"data.questions={data.questions} and objectives.answering={config.objectives.answering:g}, which learns from them, belong together, "
            f"and need vqa.form=prompted (it is {config.vqa.form})."
        )
    if config.objectives.masked_image and data.blank_images:
        raise ConfigError(
            f"objectives.masked_image={config.objectives.masked_image:g} with data.blank_images=True: there is nothing to learn in grey; "
            "turn one of them off."
        )
    _check_teacher(config)
    finetune_check.check_finetune(config)
    _check_mixture(config.data)
    _check_order(config.data)
    _check_features(config)
    # Before a training, not at its first evaluation; the words that are banned need a tokenizer.
    said = config.generation
    Limits.of(said, end_id=0, spell=lambda _: [])
    check_search(said.beams, said.length_penalty)
    check_drawing(said.temperature, said.top_k, said.top_p)
    if (config.task == "vqa" or data.questions) and "{question}" not in data.question_prompt:
        raise ConfigError(f"data.question_prompt={data.question_prompt!r} must contain {{question}}.")
    if config.init_from is None:  # else the model is the checkpoint's, and the caller checks once more
        check_lengths(config)


def _check_mixture(data: DataConfig) -> None:
    folders, weights = data.splits.train, data.mixture
    if weights and len(weights) != len(folders):
        raise ConfigError(
            f"data.mixture={list(weights)} has {len(weights)} weights, data.splits.train {len(folders)} folders; give one weight for each folder, "
            "or data.mixture=[] to read each once an epoch."
        )
    if not all(0 < weight < math.inf for weight in weights):
        raise ConfigError(
            f"data.mixture={list(weights)}; expected passes an epoch above 0, e.g. 2 or 0.5; leave out of data.splits.train what is not to be read."
        )


def _check_order(data: DataConfig) -> None:
    if data.streams is not None and data.streams < 1:
        raise ConfigError(f"data.streams={data.streams}; expected a number above 0, or null.")
    declared = data.epoch_samples
    if data.order == "resampled" and (declared is None or declared < 1):
        raise ConfigError(
            f"data.order=resampled with data.epoch_samples={declared}: such an epoch has no length of its own; give one, e.g. 1000000."
        )
    if data.order == "exact" and declared is not None:
        raise ConfigError(
            f"data.epoch_samples={declared}, but data.order=exact, whose epoch is all records; use data.order=resampled, or null."
        )


def _check_features(config: Config) -> None:
    data = config.data
    if data.views is not None and data.views < 1:
        raise ConfigError(f"data.views={data.views}; expected a number above 0, or null.")
    if data.features is None:
        return
    if data.views is None:
        raise ConfigError(
            f"data.features={data.features} needs to know of how many augmentations; set data.views, e.g. to 4."
        )
    pixels = {
        "objectives.masked_image": config.task == "pretraining" and config.objectives.masked_image > 0,
        "finetune.teacher": config.finetune.teacher is not None,
        "data.blank_images": data.blank_images,
    }
    if data.order != "exact":
        raise ConfigError(
            f"data.features={data.features} is made shard by shard, which data.order={data.order} does not count; use exact, or null."
        )
    if found := [key for key, wanted in pixels.items() if wanted]:
        raise ConfigError(
            f"data.features={data.features} takes the place of the images, which {found[0]} needs; turn one of them off."
        )


def _check_teacher(config: Config) -> None:
    objectives = config.objectives
    if objectives.queue and objectives.momentum == 0:
        raise ConfigError(
            f"objectives.queue={objectives.queue} holds a momentum teacher's features, but objectives.momentum=0; "
            "use objectives.momentum=0.995, or objectives.queue=0."
        )
    sigmoid = objectives.contrastive_loss == "sigmoid"
    if objectives.queue and (sigmoid or objectives.contrastive == 0):
        what = "objectives.contrastive_loss=sigmoid" if sigmoid else "objectives.contrastive=0"
        raise ConfigError(
            f"objectives.queue={objectives.queue} is of the softmax contrastive objective, but {what}; use objectives.queue=0."
        )
    if objectives.momentum and objectives.masked_language == 0 and (sigmoid or objectives.contrastive == 0):
        raise ConfigError(
            f"objectives.momentum={objectives.momentum:g}, but no objective reads the teacher; use objectives.momentum=0, "
            "or give contrastive (with contrastive_loss=softmax) or masked_language a weight."
        )


def check_lengths(config: Config) -> None:
    """Refuses texts that are longer than the model has positions for.

    Raises:
        ConfigError: names the keys and how to mend them.
    """
    data, positions = config.data, config.model.text.max_positions
    longest, keys = data.max_tokens, f"data.max_tokens={data.max_tokens}"
    if (config.task == "vqa" or data.questions) and config.vqa.form == "prompted":
        longest += data.max_answer_tokens - 1  # the question and its answer in one text, [CLS] once
        keys += f" and data.max_answer_tokens={data.max_answer_tokens}"
    longest = -(-longest // 8) * 8
    if longest > positions:
        raise ConfigError(
            f"{keys} make texts of up to {longest} tokens (a multiple of 8), more than model.text.max_positions={positions}; "
            f"{'lower them' if config.init_from else f'use model.text.max_positions={longest}'}."
        )


def _check_ranges(config: Config) -> None:
    for key in (*ABOVE_0, *finetune_check.ABOVE_0):
        if not 0 < (value := _value(config, key)) < math.inf:
            raise ConfigError(f"{key}={value}; expected a number above 0.")
    for key in (*FROM_0, *finetune_check.FROM_0):
        if not 0 <= (value := _value(config, key)) < math.inf:
            raise ConfigError(f"{key}={value}; expected 0 or more.")
    for key in SHARES:
        if not 0 <= (value := _value(config, key)) < 1:
            raise ConfigError(f"{key}={value}; expected 0 (off) to below 1.")
    for key in ("objectives.masking_probability", "objectives.alpha", "data.max_bad_fraction"):
        if not 0 <= (value := _value(config, key)) <= 1:
            raise ConfigError(f"{key}={value}; expected a share from 0 to 1.")
    data, size = config.data, config.model.image.image_size
    if data.max_tokens < 3:
        raise ConfigError(f"data.max_tokens={data.max_tokens}; expected at least 3: a word between [CLS] and [SEP].")
    if size is not None and size <= 0:
        raise ConfigError(f"model.image.image_size={size}; expected pixels, or null for timm's size.")
    if not 0 < data.crop_scale[0] <= data.crop_scale[1] <= 1:
        raise ConfigError(f"data.crop_scale={list(data.crop_scale)}; expected two shares of the area, e.g. [0.5, 1.0].")
    if data.randaugment is not None and not (data.randaugment[0] >= 0 and 0 <= data.randaugment[1] <= 10):
        raise ConfigError(
            f"data.randaugment={list(data.randaugment)}; expected a number of operations and a magnitude up to 10, e.g. [2, 5]."
        )


def _value(config: Config, key: str) -> Any:
    """The number at a dotted key; a digit is a place in a tuple."""
    value: Any = config
    for name in key.split("."):
        value = value[int(name)] if name.isdigit() else getattr(value, name)
    return value
