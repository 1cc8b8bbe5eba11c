"""What stands beside BLIP's weights in transformers' folders, here and back: image preprocessing and generation settings."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.config import GenerationConfig
from vlm.errors import CheckpointError

PROCESSOR, OLD_PROCESSOR, GENERATION = "processor_config.json", "preprocessor_config.json", "generation_config.json"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3
# What evaluation does to an image; the folder must say the same. What it does not say is so by transformers' default.
STEPS = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": BICUBIC,
    "rescale_factor": 1 / 255,
    "do_center_crop": False,  # do_pad may be true: it changes nothing about squares of one size
}
# Generation settings that change what is said and have no counterpart here, with the values that mean "off".
NEUTRAL: dict[str, Any] = {
    "do_sample": False,
    "early_stopping": False,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "penalty_alpha": None,
    "bad_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "exponential_decay_length_penalty": None,
}
NUMBERS = (
    *("max_length", "min_length", "max_new_tokens", "min_new_tokens"),
    *("num_beams", "length_penalty", "repetition_penalty", "no_repeat_ngram_size"),
)
DEFAULT_NEW_TOKENS = 20


def from_blip_images(folder: Path, image_size: int | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1, 3, 1, 1) of a folder's image preprocessing: squashed to the square, bicubic, rescaled, normalised.

    Raises CheckpointError where it does anything else.
    """
    content = _read(folder / PROCESSOR).get("image_processor")
    name = PROCESSOR if isinstance(content, dict) else OLD_PROCESSOR
    settings = content if isinstance(content, dict) else _read(folder / OLD_PROCESSOR)
    if not settings:
        raise CheckpointError(f"{folder} has neither {PROCESSOR} with an image_processor nor {OLD_PROCESSOR}.")
    for key, expected in STEPS.items():
        got = settings.get(key)
        if got is not None and got != expected:
            raise CheckpointError(
                f"{folder / name}: {key} is {got}, expected {expected}: other steps are not made here."
            )
    size = settings.get("size") or 384
    sides = [size, size] if isinstance(size, int) else [size.get("height"), size.get("width")]
    if sides != [image_size, image_size]:
        raise CheckpointError(
            f"{folder / name}: size is {size}, but the model's images are of {image_size} px; the files do not belong together."
        )
    mean, std = settings.get("image_mean") or CLIP_MEAN, settings.get("image_std") or CLIP_STD
    try:
        return torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)
    except (TypeError, ValueError, RuntimeError):
        raise CheckpointError(
            f"{folder / name}: image_mean={mean}, image_std={std}: expected three numbers each."
        ) from None


def to_blip_images(mean: Tensor, std: Tensor, image_size: int) -> dict[str, Any]:
    """preprocessor_config.json, which every version of transformers reads."""
    return {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "BlipProcessor",
        **{key: value for key, value in STEPS.items() if value is not False},
        "do_convert_rgb": True,
        "size": {"height": image_size, "width": image_size},
        "image_mean": _digits(mean),
        "image_std": _digits(std),
    }


def _digits(values: Tensor) -> list[float]:
    """The shortest decimal numbers that are these in fp32."""
    return [float(str(value)) for value in values.flatten().numpy()]


def from_blip_generation(
    folder: Path, foreign: Mapping[str, Any], prompt_tokens: int, max_positions: int
) -> tuple[GenerationConfig, list[str]]:
    """A folder's generation settings as ours, and those that have no place here.

    foreign: its config.json. prompt_tokens: those that a caption continues, the first token included; transformers' max_length and min_length
    count them, ours do not.

    Raises CheckpointError where nothing can be generated.
    """
    stated = {**(foreign.get("text_config") or {}), **_read(folder / GENERATION)}
    stated = {key: value for key, value in stated.items() if value is not None}
    for key in NUMBERS:
        if not isinstance(stated.get(key, 0), int | float):
            raise CheckpointError(f"{folder}: the generation setting {key} is {stated[key]!r}, expected a number.")
    longest = stated.get("max_new_tokens")
    if longest is None:
        longest = stated["max_length"] - prompt_tokens if "max_length" in stated else DEFAULT_NEW_TOKENS
    longest = min(longest, max_positions - prompt_tokens)
    if longest < 1:
        raise CheckpointError(
            f"{folder}: max_length={stated.get('max_length')} leaves no token after the {prompt_tokens} of the prompt; shorten the prompt."
        )
    shortest = stated.get("min_new_tokens", max(stated.get("min_length", 0) - prompt_tokens, 0))
    settings = GenerationConfig(
        beams=stated.get("num_beams", 1),
        max_length=longest,
        min_length=shortest,
        length_penalty=stated.get("length_penalty", 1.0),
        repetition_penalty=stated.get("repetition_penalty", 1.0),
        no_repeat_ngram=stated.get("no_repeat_ngram_size", 0),
    )
    left_out = [f"{key}={stated[key]}" for key, off in NEUTRAL.items() if stated.get(key, off) != off]
    return settings, left_out


def to_blip_generation(
    settings: GenerationConfig,
    text_config: Mapping[str, Any],
    max_answer_tokens: int | None,
    banned: Sequence[Sequence[int]] = (),
) -> dict[str, Any]:
    """generation_config.json. max_answer_tokens: for a model that answers, whose answers have at least one token; None for captions. banned:
    sequences of tokens that no caption contains."""
    answers = max_answer_tokens is not None
    return {
        **({"bad_words_ids": [list(ids) for ids in banned]} if banned and not answers else {}),
        "max_new_tokens": max_answer_tokens if answers else settings.max_length,
        "min_new_tokens": 1 if answers else settings.min_length,
        "num_beams": settings.beams,
        "length_penalty": settings.length_penalty,
        "repetition_penalty": settings.repetition_penalty,
        "no_repeat_ngram_size": settings.no_repeat_ngram,
        **{f"{role}_token_id": text_config[f"{role}_token_id"] for role in ("bos", "eos", "pad")},
    }


def _read(path: Path) -> dict[str, Any]:
    """A JSON file's settings; none where it does not exist."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not readable as JSON ({error}); download the folder again.") from None
    return content if isinstance(content, dict) else {}
