"""From settings to the objects of a run: tokenizer, model, data, task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vlm.config import CacheConfig, Config, ModelConfig, TextConfig
from vlm.data.encoders import answers_questions as answers_questions
from vlm.data.encoders import sample_encoder as sample_encoder
from vlm.data.hiding import PatchHiding, patch_hiding
from vlm.data.index import ShardSet, load_index
from vlm.data.loader import Loader
from vlm.data.scan import image_ids, texts
from vlm.data.text import Tokenizer, clean_caption, train_wordpiece, trim
from vlm.errors import ConfigError, UserError
from vlm.hub import local_folder
from vlm.model.convert.bert import TextWeights, trim_vocabulary
from vlm.model.convert.text_folder import is_text_folder, load_text_folder
from vlm.model.generation import Rules
from vlm.model.image_encoder import ImageEncoder
from vlm.model.initialise import decoder_from_fusion, language_from_masked, load_by_name, load_text_weights
from vlm.model.pretrained import load_metadata, model_config, read_weights
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.self_critical import SelfCritical
from vlm.start import start_teacher
from vlm.tasks.captioning import CaptioningTask, caption_reward
from vlm.tasks.pretraining import Pretraining
from vlm.tasks.task import Task
from vlm.tasks.vqa import build_vqa
from vlm.train.distributed import Ranks
from vlm.train.report import say

CHECKED_IMAGES = 2_000_000
"""Above this many training images their identities are not kept and the check of honest splits is left to the user."""


@dataclass(frozen=True)
class Parts:
    """What a run is made of. `config` is the given one with the model's settings as they came out."""

    config: Config
    tokenizer: Tokenizer
    model: VisionLanguageModel


def load_sets(folders: Sequence[str], key: str, cache: CacheConfig | None = None) -> list[ShardSet]:
    """The shards of a split; cache: for the remote ones.

    Raises:
        ConfigError: none is given. UserError: one cannot be used.
    """
    if not folders:
        raise ConfigError(f"{key} is empty; give at least one folder of shards (made by datasets/NAME/prepare.py).")
    return [load_index(folder, cache) for folder in folders]


def build_parts(config: Config, sets: Sequence[ShardSet]) -> Parts:
    """Tokenizer and model, from a checkpoint (`init_from`), BERT-shaped weights (`text_weights`) or anew; `sets`: the training shards."""
    torch.manual_seed(config.seed)
    if config.init_from is not None:
        folder = str(local_folder(config.init_from))
        if not is_text_folder(folder):
            return _from_checkpoint(config, folder)
        config = replace(config, init_from=None, text_weights=folder)
    tokenizer, weights, text = _tokenizer_and_text(config, sets)
    config = replace(
        config,
        model=replace(config.model, text=replace(text, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id)),
    )
    model = VisionLanguageModel(config.model)
    if weights is not None:
        say(load_text_weights(model, weights).summary(f"text from {config.text_weights}"))
    _say(decoder_from_fusion(model))
    return Parts(_with_image_size(config, model), tokenizer, model)


def _from_checkpoint(config: Config, folder: str) -> Parts:
    metadata = load_metadata(folder)
    saved = model_config(metadata, folder)
    ours = config.model
    image = replace(
        saved.image,
        frozen=ours.image.frozen,
        trainable_blocks=ours.image.trainable_blocks,
        batch_norm=ours.image.batch_norm
        or ("frozen" if saved.image.weights or saved.image.pretrained else saved.image.batch_norm),
        checkpointing=ours.image.checkpointing,
        drop_path=ours.image.drop_path,
        patch_drop=ours.image.patch_drop,
    )
    # The checkpoint's decoder stays unless another one is asked for: `shared` is also what a config says that does not speak of it.
    decoder = ours if ours.decoder == "separate" else saved
    # Heads that a converted checkpoint lacks start anew, where the task has a use for them.
    wanted = ours.heads if config.task == "pretraining" else ("language",)
    heads = tuple(head for head in ModelConfig().heads if head in (*saved.heads, *wanted))
    merged = replace(
        saved,
        image=image,
        text=replace(
            saved.text,
            dropout=ours.text.dropout,
            attention_dropout=ours.text.attention_dropout,
            checkpointing=ours.text.checkpointing,
        ),
        heads=heads,
        decoder=decoder.decoder,
        decoder_layers=decoder.decoder_layers,
        decoder_reads=decoder.decoder_reads,
    )
    model = VisionLanguageModel(merged, load=False)
    report = load_by_name(model, read_weights(Path(folder)))
    say(report.summary(folder))
    if not any(name.startswith("decoder.") for name in report.loaded):
        _say(decoder_from_fusion(model))
    if "language" not in saved.heads and "masked_language" in saved.heads:
        _say(language_from_masked(model))
    if ours.image.image_size is not None:
        model.image_encoder.resize(ours.image.image_size)
    return Parts(_with_image_size(replace(config, model=merged), model), Tokenizer.load(folder), model)


def _say(text: str | None) -> None:
    if text is not None:
        say(text)


def _with_image_size(config: Config, model: VisionLanguageModel) -> Config:
    """The settings with the image size that the encoder has, so that a checkpoint says it."""
    settings: ModelConfig = replace(
        config.model, image=replace(config.model.image, image_size=model.image_encoder.image_size)
    )
    model.config = settings
    return replace(config, model=settings)


def _tokenizer_and_text(config: Config, sets: Sequence[ShardSet]) -> tuple[Tokenizer, TextWeights | None, TextConfig]:
    """The tokenizer, the text weights trimmed to it if any, and the text settings that fit them."""
    text, settings = config.model.text, config.tokenizer
    weights: TextWeights | None = None
    if config.text_weights is not None:
        fields, weights = load_text_folder(config.text_weights)
        if text.layers > fields["layers"]:
            raise ConfigError(
                f"model.text.layers={text.layers}, but {config.text_weights} has {fields['layers']}; use at most that many."
            )
        kept_here = {"layers", "cross_attention", "dropout", "attention_dropout", "checkpointing"}
        text = replace(text, **{k: v for k, v in fields.items() if k not in kept_here and k != "max_positions"})
        text = replace(text, max_positions=min(text.max_positions, fields["max_positions"]))
    source = settings.source or config.text_weights
    if source is None:
        say(f"training a WordPiece vocabulary of at most {settings.vocab_size} tokens on the shards' text")
        return train_wordpiece([*_all_text(config, sets), *_prompts(config)], settings.vocab_size), None, text
    tokenizer = Tokenizer.load(source)
    if settings.trim:
        tokenizer, kept = trim(tokenizer, _all_text(config, sets), settings.min_count, _prompts(config))
        say(f"vocabulary trimmed to {tokenizer.vocab_size} tokens that occur")
        if weights is not None:
            weights = trim_vocabulary(weights, torch.tensor(kept))
    if weights is not None and len(weights.transformer["embeddings.word.weight"]) != tokenizer.vocab_size:
        raise ConfigError(
            f"tokenizer.source={source} has {tokenizer.vocab_size} tokens, the text weights another number; take the tokenizer they came with."
        )
    return tokenizer, weights, text


def _all_text(config: Config, sets: Sequence[ShardSet]) -> list[str]:
    """The training shards' distinct texts and those of later tasks, cleaned as the model will see them."""
    more = [load_index(folder, config.data.cache) for folder in config.tokenizer.trim_to]
    return sorted({clean_caption(text) for text in texts([*sets, *more])})


def _prompts(config: Config) -> list[str]:
    return [config.data.prompt, config.data.question_prompt.replace("{question}", " ")]


def image_hiding(config: Config, encoder: ImageEncoder) -> PatchHiding | None:
    """Which patches the run hides in training, if any.

    Raises:
        ConfigError: the encoder has none that could be hidden, or the settings do not fit them.
    """
    objectives = config.objectives
    if config.task != "pretraining" or objectives.masked_image == 0:
        return None
    return patch_hiding(encoder.grid(), encoder.patch, objectives.hidden_unit, objectives.hidden_share)


def training_loader(config: Config, parts: Parts, sets: Sequence[ShardSet], ranks: Ranks) -> Loader:
    """Micro-batches of the training split for this rank."""
    data, encoder = config.data, parts.model.image_encoder
    return Loader(
        sets,
        sample_encoder(config, parts.tokenizer, encoder.image_size, True, image_hiding(config, encoder)),
        data.batch_size // config.train.accumulate,
        seed=config.seed,
        streams=data.streams,
        shuffle_block=data.shuffle_block,
        workers=data.workers,
        rank=ranks.rank,
        world=ranks.world,
        max_bad_fraction=data.max_bad_fraction,
        mixture=data.mixture,
    )


def evaluation_loader(config: Config, parts: Parts, shards: ShardSet, ranks: Ranks) -> Loader:
    """Batches of one evaluation set for this rank."""
    return Loader(
        [shards],
        sample_encoder(config, parts.tokenizer, parts.model.image_encoder.image_size, training=False),
        config.data.batch_size,
        workers=config.data.workers,
        rank=ranks.rank,
        world=ranks.world,
        training=False,
        max_bad_fraction=config.data.max_bad_fraction,
    )


def _self_critical(config: Config, parts: Parts, sets: Sequence[ShardSet]) -> SelfCritical | None:
    if config.objectives.self_critical == 0 or not sets:
        return None
    tokenizer, prompt = parts.tokenizer, config.data.prompt
    first = tokenizer.encode(prompt)[:-1] if prompt else [tokenizer.cls_id]
    rules = Rules(end_id=tokenizer.sep_id, max_length=config.generation.max_length)
    return SelfCritical(first, rules, caption_reward(tokenizer, sets), temperature=config.objectives.sample_temperature)


def _captioning(config: Config, parts: Parts, sets: Sequence[ShardSet]) -> CaptioningTask:
    objectives, self_critical = config.objectives, _self_critical(config, parts, sets)
    weight = 1.0 if self_critical is None else objectives.captioning / objectives.self_critical
    return CaptioningTask(
        parts.model,
        parts.tokenizer,
        objectives.label_smoothing,
        config.data.prompt,
        config.generation,
        self_critical,
        weight,
    )


TASKS: dict[str, Callable[[Config, Parts, Sequence[str], Sequence[ShardSet]], Task]] = {
    "pretraining": lambda config, parts, _, sets: Pretraining(
        parts.model, config.objectives, _self_critical(config, parts, sets), config.retrieval
    ),
    "captioning": lambda config, parts, _, sets: _captioning(config, parts, sets),
    "vqa": lambda config, parts, answers, _: build_vqa(parts.model, parts.tokenizer, config, answers),
}


def build_task(config: Config, parts: Parts, answers: Sequence[str] = (), sets: Sequence[ShardSet] = ()) -> Task:
    """The task around the model. answers: the answer list of VQA. sets: the training shards, where it is to be trained.

    Raises:
        ConfigError: its parts do not fit together.
    """
    objectives = config.objectives
    pretrained = max(objectives.captioning, objectives.answering, objectives.self_critical) > 0
    captions = config.task == "captioning" or (config.task == "pretraining" and pretrained)
    if captions and parts.model.decoder is not None and parts.model.config.decoder_reads == "question":
        raise ConfigError(
            "captions need a decoder that reads the image; set model.decoder=separate and model.decoder_reads=image."
        )
    task = TASKS[config.task](config, parts, answers, sets)
    task.blank_images = config.data.blank_images
    if isinstance(task, Pretraining) and task.teacher is not None and config.init_from is not None and sets:
        _say(start_teacher(task.teacher, local_folder(config.init_from)))
    return task


def training_images(sets: Sequence[ShardSet], init_from: str | None) -> Tensor | None:
    """Sorted identities (N,) int64 of all images that the model will have been trained on, with those of the checkpoint it starts from."""
    from vlm.checkpoint import read_trained_on

    if sum(s.samples for s in sets) > CHECKED_IMAGES:
        return None
    before = read_trained_on(local_folder(init_from)) if init_from is not None else None
    ids = image_ids(sets) | (set(before.tolist()) if before is not None else set())
    return torch.tensor(sorted(ids), dtype=torch.long)


def check_held_out(trained_on: Tensor | None, shards: ShardSet, allow: bool) -> None:
    """Refuses to evaluate on images that were trained on, in this task or an earlier one.

    Raises:
        UserError: names how many.
    """
    if trained_on is None or allow:
        return
    ids = torch.tensor(sorted(image_ids([shards])), dtype=torch.long)
    known = int(torch.isin(ids, trained_on).sum())
    if known:
        raise UserError(
            f"{shards.root}: {known} of its {len(ids)} images were trained on (in this or an earlier task), so its scores would lie. "
            "Split by image (see the prepare.py scripts), or set --data.allow-overlap True if that is what you want to measure."
        )
