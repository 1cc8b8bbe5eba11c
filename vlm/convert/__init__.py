"""Folders of transformers' BLIP as checkpoint folders and back: `vlm convert blip` and `vlm convert to-blip`.

What a folder is made of goes with it: settings, weights, tokenizer, image preprocessing, generation settings. Numbers of the weights are never
changed, so there and back is bit-identical.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.checkpoint import ANSWERS, checkpoint_metadata
from vlm.config import Config, DataConfig, GenerationConfig, Head, ModelConfig, VqaConfig
from vlm.data.spellings import spellings
from vlm.data.text import Tokenizer, known_cleaning
from vlm.errors import CheckpointError, UserError
from vlm.model.convert.blip import (
    BLIP_MODEL,
    CAPTIONING,
    FORMS,
    QUESTION_ANSWERING,
    RETRIEVAL,
    Form,
    from_blip_state_dict,
    read_blip_weights,
    to_blip_state_dict,
    vit_shape,
)
from vlm.model.convert.blip_config import form_of, from_blip_config, to_blip_config
from vlm.model.convert.blip_processing import from_blip_generation, from_blip_images, to_blip_generation, to_blip_images
from vlm.model.pretrained import CONFIG, load_metadata, load_state, model_config, read_weights, replacing_folder
from vlm.model.pretrained import save_pretrained as write_folder
from vlm.model.vision_language import VisionLanguageModel

CLEANING = "question_cleaning"
"""In config.json of a folder that `convert_to_blip` writes, for the way back; transformers, which cleans nothing, passes over it."""


@dataclass(frozen=True)
class Converted:
    """name: what the other side's model is called. left_out: what had no place on the other side, in words."""

    name: str
    left_out: tuple[str, ...]


def convert_blip(source: Path, target: Path, prompt: str = "", named: str = "") -> Converted:
    """Writes the checkpoint folder `target` from a folder as transformers saves BLIP.

    The new checkpoint can do what its source can: BlipForConditionalGeneration captions, BlipForQuestionAnswering answers (by open generation),
    BlipForImageTextRetrieval embeds and matches, BlipModel embeds; for the rest the predictor says what is missing. Generation settings are those of
    generation_config.json, else of text_config (older folders), else transformers' defaults, which are greedy decoding and 20 new tokens.
    transformers 5 itself passes over a BLIP folder's generation_config.json; here it counts.

    Questions stay as they are typed, as in transformers.

    prompt: the words that every caption continues ("a picture of "). transformers' folders do not say it, but their lengths count its tokens.
    named: what the card calls `source`, where that is a download.

    Raises:
        CheckpointError: `source` is incomplete, or is not what it says. UserError: `target` exists or cannot be written.
    """
    refuse_existing(target)
    foreign, name = _read_json(source / CONFIG), str(source / CONFIG)
    form = form_of(foreign, name)
    try:
        config = from_blip_config(foreign, name)
        model = VisionLanguageModel(config, load=False)
    except UserError:
        raise
    except Exception as error:  # a damaged value can show itself anywhere
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CheckpointError(f"{name}: cannot be used ({reason}); download the folder again.") from None
    if prompt and form is not CAPTIONING:
        raise UserError(f"a prompt is for captions; {source} holds {form.name}, leave --prompt out.")
    tokenizer = Tokenizer.load(source)
    _check_tokenizer(tokenizer, foreign, config, source)
    mean, std = from_blip_images(source, config.image.image_size)
    weights, file = read_blip_weights(source)
    state = from_blip_state_dict(weights, form, config, file)
    state |= {"image_encoder.mean": mean, "image_encoder.std": std}
    state.setdefault("temperature", torch.tensor(config.temperature))
    load_state(model, state, file)
    start = tokenizer.encode(prompt)[:-1] if prompt else [tokenizer.cls_id]
    generation, left_out = from_blip_generation(source, foreign, len(start), config.text.max_positions)
    if form is QUESTION_ANSWERING:
        generation = replace(generation, min_length=1)  # an answer has a word
    settings = Config(
        task={CAPTIONING.name: "captioning", QUESTION_ANSWERING.name: "vqa"}.get(form.name, "pretraining"),  # type: ignore[arg-type]
        model=config,
        data=DataConfig(
            prompt=prompt,
            question_cleaning=known_cleaning(foreign.get(CLEANING, "none"), name),
            max_tokens=config.text.max_positions,
            max_answer_tokens=generation.max_length,
        ),
        vqa=VqaConfig(form="encoder_decoder" if form is QUESTION_ANSWERING else "prompted", inference="generate"),
        generation=generation,
    )
    with replacing_folder(target) as new:
        card = converted_card(settings.task, config.heads, f"transformers' {form.name} in `{named or source}`", target)
        write_folder(state, new, checkpoint_metadata(settings), tokenizer.to_json(), card)
    return Converted(form.name, tuple(left_out))


def convert_to_blip(source: Path, target: Path) -> Converted:
    """Writes `target`, a folder that transformers reads, from the checkpoint folder `source`.

    Which of its classes follows from what the checkpoint is for: captioning, questions that the decoder reads, or, without a task of the two,
    embeddings and matching. What that class has no place for is left out and named.

    Raises:
        CheckpointError: `source` is incomplete, or its model has another structure than BLIP's. UserError: `target` exists or cannot be written.
    """
    refuse_existing(target)
    metadata = load_metadata(source)
    config, state = model_config(metadata, str(source / CONFIG)), read_weights(source)
    load_state(VisionLanguageModel(config, load=False), state, str(source))
    tokenizer = Tokenizer.load(source)
    form = _form_for(metadata, config)
    patch = vit_shape(config).patch
    side = round((state["image_encoder.backbone.pos_embed"].shape[1] - 1) ** 0.5) * patch
    foreign = to_blip_config(config, form, side, tokenizer.cls_id, tokenizer.sep_id)
    foreign[CLEANING] = tokenizer.question_cleaning
    weights = to_blip_state_dict(state, form, config)
    generation, text = metadata.get("generation") or {}, metadata.get("text") or {}
    settings = GenerationConfig(**{k: v for k, v in generation.items() if k in asdict(GenerationConfig())})
    answer = text.get("max_answer_tokens", 8) if form is QUESTION_ANSWERING else None
    files = {
        "preprocessor_config.json": to_blip_images(state["image_encoder.mean"], state["image_encoder.std"], side),
        "tokenizer_config.json": _tokenizer_config(tokenizer, config),
    }
    if form.decodes:
        banned = [ids for words in settings.banned_words for ids in spellings(tokenizer, words)]
        files["generation_config.json"] = to_blip_generation(settings, foreign["text_config"], answer, banned)
    with replacing_folder(target) as new:
        write_folder(weights, new, foreign, tokenizer.to_json(), _foreign_card(form, source))
        for name, content in files.items():
            (new / name).write_text(json.dumps(content, indent=2) + "\n")
    left_out = _left_out(config, form, state, metadata, source)
    if form is QUESTION_ANSWERING and tokenizer.question_cleaning != "none":
        left_out += (f"the cleaning of questions ({tokenizer.question_cleaning}), which is done by hand there",)
    return Converted(form.name, left_out)


def _form_for(metadata: dict[str, Any], config: ModelConfig) -> Form:
    reads_question = config.decoder == "separate" and config.decoder_reads == "question"
    if metadata.get("task") == "vqa" and not reads_question:
        raise CheckpointError(
            "this checkpoint answers in the form `prompted`, which BLIP does not have; it cannot be converted to it."
        )
    if reads_question:
        return QUESTION_ANSWERING
    if metadata.get("task") == "captioning":
        return CAPTIONING
    return BLIP_MODEL if config.text_pool == "pooler" else RETRIEVAL


def _left_out(
    config: ModelConfig, form: Form, state: dict[str, Tensor], metadata: dict[str, Any], source: Path
) -> tuple[str, ...]:
    found = [f"the {head} head" for head in config.heads if head not in form.heads]
    if config.decoder == "separate" and form is not QUESTION_ANSWERING:
        found.append("the separate decoder")
    if form is RETRIEVAL:
        found.append(f"the temperature {float(state['temperature']):.4g}")
    if prompt := (metadata.get("text") or {}).get("prompt"):
        found.append(f"the prompt {prompt!r}, which is given as text there")
    if form is CAPTIONING and (metadata.get("generation") or {}).get("no_doubled_words"):
        found.append("no_doubled_words")
    if (source / ANSWERS).exists():
        found.append("the answer list")
    return tuple(found)


def _check_tokenizer(tokenizer: Tokenizer, foreign: dict[str, Any], config: ModelConfig, source: Path) -> None:
    text = foreign.get("text_config") or {}
    for key, default, own in (("sep_token_id", 102, tokenizer.sep_id), ("pad_token_id", 0, tokenizer.pad_id)):
        if text.get(key, default) != own:
            raise CheckpointError(
                f"{source}: {key} is {text.get(key, default)}, the tokenizer's is {own}; the files do not belong together."
            )
    if max(tokenizer.vocab_size, config.first_token["decoder"] + 1) > config.text.vocab_size:
        raise CheckpointError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens and bos_token_id is {config.first_token['decoder']}, "
            f"but the model has {config.text.vocab_size} tokens; the files do not belong together."
        )


def _tokenizer_config(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    roles = ("pad", "unk", "cls", "sep", "mask")
    names = tokenizer.tokens(getattr(tokenizer, f"{role}_id") for role in roles)
    return {
        "tokenizer_class": "BertTokenizer",
        "model_max_length": config.text.max_positions,
        "do_lower_case": True,
        **{f"{role}_token": name for role, name in zip(roles, names, strict=True)},
    }


def refuse_existing(target: Path) -> None:
    """Raises UserError where `target` is there already."""
    if target.exists():
        raise UserError(f"{target} exists; give another folder, or remove it.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist; give a folder with config.json, weights and tokenizer of one of {', '.join(FORMS)}."
        ) from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not readable as JSON ({error}); download the folder again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no settings; download the folder again.")
    return content


def converted_card(task: str, heads: Sequence[Head], source: str, target: Path) -> str:
    """README.md of a converted checkpoint. source: what it was, and where."""
    pipeline, use = "zero-shot-image-classification", 'print(predictor.embed_images(["img.jpg"]))'
    if task == "captioning":
        pipeline, use = "image-to-text", 'print(predictor.caption(["img.jpg"])[0].text)'
    elif task == "vqa":
        question = '"how many dogs are there?"'
        pipeline, use = "visual-question-answering", f'print(predictor.answer("img.jpg", {question}).text)'
    elif "matching" in heads:
        use = 'print(predictor.match("img.jpg", ["a dog", "a cat"]))'
    return "\n".join(
        (
            *("---", "library_name: vlm", f"pipeline_tag: {pipeline}", "---", f"# {target.name}", ""),
            f"Converted from {source}; its licence and data are those of its source.",
            *("", "```python", "from vlm.predictor import Predictor", ""),
            *(f'predictor = Predictor.load("{target}")', use),
            *("```", ""),
        )
    )


def _foreign_card(form: Form, source: Path) -> str:
    return f"---\nlibrary_name: transformers\n---\n# {form.name}\n\nConverted with `vlm convert to-blip` from `{source}`.\n"
