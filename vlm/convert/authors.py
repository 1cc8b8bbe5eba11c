"""The .pth files of ALBEF's and BLIP's authors as checkpoint folders: `vlm convert albef` and `vlm convert blip-original`.

A file has weights only. The rest is as published: images are normalised as CLIP's, captions and answers decoded with the settings in the authors'
configs, questions cleaned as in their training; the vocabulary, bert-base-uncased's, must be given.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlm.checkpoint import checkpoint_metadata
from vlm.config import Config, DataConfig, GenerationConfig, ModelConfig, VqaConfig
from vlm.config.data import QuestionCleaning
from vlm.convert import Converted, converted_card, refuse_existing
from vlm.data.text import Tokenizer
from vlm.errors import CheckpointError, ConfigError, UserError
from vlm.model.convert import albef, blip_original
from vlm.model.convert.authors import QUEUE, Kind, Momentum, from_state_dict, momentum_of
from vlm.model.convert.blip_processing import CLIP_MEAN, CLIP_STD
from vlm.model.convert.pickled import read_pickled
from vlm.model.pretrained import load_state, replacing_folder, save_pretrained, save_tensors
from vlm.model.vision_language import VisionLanguageModel
from vlm.start import MOMENTUM, momentum_tensors

VOCABULARY = "https://huggingface.co/google-bert/bert-base-uncased/resolve/main/vocab.txt"
PROMPT = "a picture of "
# The authors' max_length and min_length, which count the prompt and the first token (BLIP: configs/caption_coco.yaml, models/blip_vqa.py, where an
# answer may have no word; here it has one).
CAPTION_LENGTHS, ANSWER_LENGTHS, BEAMS = (20, 5), (10, 2), 3


@dataclass(frozen=True)
class Family:
    """Whose files: how a file's kind and its settings are told. added_tokens: those of the model behind the vocabulary's. question_cleaning: that of
    their training."""

    kind_of: Callable[[Iterable[str]], Kind]
    model_config: Callable[[Mapping[str, Tensor], Kind, str], ModelConfig]
    added_tokens: int
    question_cleaning: QuestionCleaning


ALBEF = Family(albef.kind_of, albef.model_config, 0, "albef")
BLIP = Family(blip_original.kind_of, blip_original.model_config, blip_original.ADDED_TOKENS, "blip")


def convert_original(
    family: Family,
    source: Path,
    target: Path,
    tokenizer: Path | None,
    prompt: str = PROMPT,
    keep_momentum: bool = False,
) -> Converted:
    """Writes the checkpoint folder `target` from a .pth file of the authors, which is read with weights_only: nothing in it is run.

    Kind and sizes follow from the names and shapes of the tensors. tokenizer: a vocab.txt, a tokenizer.json or a folder with one. prompt: the words
    that every caption of a captioning model continues. keep_momentum: the momentum copies and the queue of features are kept in
    momentum.safetensors, with which a pretraining that starts from `target` starts its teacher; otherwise they are dropped.

    Raises:
        CheckpointError: the file is damaged, or not what it says. UserError: `target` exists or cannot be written, there is no usable vocabulary, or
        no momentum to keep.
    """
    refuse_existing(target)
    state = read_pickled(source, "model")
    kind = family.kind_of(state)
    config = family.model_config(state, kind, str(source))
    ours = from_state_dict(state, kind, config, str(source))
    momentum = _momentum(state, kind, config, str(source)) if keep_momentum else None
    words = _tokenizer(tokenizer, config, family)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    ours |= {"image_encoder.mean": mean, "image_encoder.std": std}
    ours.setdefault("temperature", torch.tensor(config.temperature))
    model = VisionLanguageModel(config, load=False)
    load_state(model, ours, str(source), "the sizes of its other tensors")
    if momentum is not None:
        load_state(model, ours | momentum.model, f"{source}, momentum copies", "those of its model")
    settings = _settings(family, kind, config, words, prompt)
    with replacing_folder(target) as new:
        card = converted_card(kind.task, config.heads, f"{kind.name} in `{source}`", target)
        save_pretrained(ours, new, checkpoint_metadata(settings), words.to_json(), card)
        if momentum is not None:
            save_tensors(momentum_tensors(momentum), new / MOMENTUM)
    return Converted(kind.name, () if keep_momentum else _dropped(state))


def _momentum(state: Mapping[str, Tensor], kind: Kind, config: ModelConfig, source: str) -> Momentum:
    if kind.task != "pretraining":
        raise UserError(f"{source} is {kind.name}, which has no teacher here; leave --keep-momentum out.")
    momentum = momentum_of(state, kind, config, source)
    if momentum is None:
        raise UserError(f"{source} holds no momentum copies; leave --keep-momentum out.")
    return momentum


def _dropped(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    copies = any(name.split(".")[0].endswith("_m") for name in state)
    return tuple(
        what for what, there in (("momentum copies", copies), ("queue", any(name in state for name in QUEUE))) if there
    )


def _tokenizer(given: Path | None, config: ModelConfig, family: Family) -> Tokenizer:
    if given is None:
        raise ConfigError(
            "the file holds no vocabulary; give --tokenizer with bert-base-uncased's vocab.txt "
            f"({VOCABULARY}), or a folder with it or with a tokenizer.json."
        )
    words = Tokenizer.load(given)
    # transformers' tokenizers of BLIP may have the added tokens, at the places where the model has them.
    if config.text.vocab_size - words.vocab_size not in (0, family.added_tokens):
        raise CheckpointError(
            f"{given} has {words.vocab_size} tokens, but the model has {config.text.vocab_size - family.added_tokens}; "
            "give the vocabulary that it was trained with, bert-base-uncased's."
        )
    return words


def _settings(family: Family, kind: Kind, config: ModelConfig, words: Tokenizer, prompt: str) -> Config:
    """A run's settings as published for such a model, for what a checkpoint tells of them."""
    prompt = prompt if kind.task == "captioning" else ""
    start, limit = len(words.encode(prompt)) - 1, config.text.max_positions
    if start >= limit:
        raise UserError(f"the prompt has {start} tokens, which leaves none of {limit} for the caption; shorten it.")
    longest, shortest = ANSWER_LENGTHS if kind.task == "vqa" else CAPTION_LENGTHS
    longest = max(min(longest, limit) - start, 1)
    generation = GenerationConfig(
        beams=BEAMS, max_length=longest, min_length=min(max(shortest - start, 0), longest - 1)
    )
    return Config(
        task=kind.task,
        model=config,
        data=DataConfig(
            prompt=prompt,
            question_cleaning=family.question_cleaning,
            max_tokens=config.text.max_positions,
            max_answer_tokens=generation.max_length,
        ),
        vqa=VqaConfig(form="encoder_decoder" if kind.task == "vqa" else "prompted", inference="generate"),
        generation=generation,
    )
