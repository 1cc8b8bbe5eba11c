"""From settings to the objects of a run: tokenizer, model, data, task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vlm.checkpoint import read_answers
from vlm.config import CacheConfig, Config, Head, ModelConfig
from vlm.data.encoders import answers_questions as answers_questions
from vlm.data.encoders import sample_encoder as sample_encoder
from vlm.data.encoders import training_transform
from vlm.data.hiding import PatchHiding, patch_hiding
from vlm.data.index import ShardSet, list_shards, load_index
from vlm.data.loader import Loader
from vlm.data.text import Tokenizer
from vlm.errors import ConfigError
from vlm.features import stored_features
from vlm.finetune import prepare_finetuning
from vlm.hub import local_folder
from vlm.low_rank import add_adapters
from vlm.model.convert.text_folder import is_text_folder
from vlm.model.generation import Rules
from vlm.model.image_encoder import ImageEncoder
from vlm.model.initialise import Started, decoder_from_fusion, language_from_masked, load_by_name, load_text_weights
from vlm.model.pretrained import load_metadata, model_config, read_weights
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.self_critical import SelfCritical
from vlm.order_settings import streams_of
from vlm.start import check_set_weights, known_classifier, start_teacher, trained_heads, with_classifier
from vlm.tasks.captioning import CaptioningTask, caption_reward, first_ids
from vlm.tasks.pretraining import Pretraining
from vlm.tasks.task import Task
from vlm.tasks.vqa import build_vqa
from vlm.train.distributed import Ranks
from vlm.train.report import say
from vlm.vocabulary import tokenizer_and_text


@dataclass(frozen=True)
class Parts:
    """What a run is made of. `config`: the given one with the model's settings as they came out. `new`: the model's parameters that nothing was
    loaded into.
    """

    config: Config
    tokenizer: Tokenizer
    model: VisionLanguageModel
    new: frozenset[str] = frozenset()


def load_sets(
    folders: Sequence[str], key: str, cache: CacheConfig | None = None, order: str = "exact"
) -> list[ShardSet]:
    """The shards of a split; cache: for the remote ones. order: `data.order`, if it is for training: resampled, remote ones need no index.

    Raises:
        ConfigError: none is given. UserError: one cannot be used.
    """
    if not folders:
        raise ConfigError(f"{key} is empty; give at least one folder of shards (made by datasets/NAME/prepare.py).")
    load = list_shards if order == "resampled" else load_index
    return [load(folder, cache) for folder in folders]


def build_parts(
    config: Config, sets: Sequence[ShardSet], answers: Sequence[str] = (), heads: Sequence[Head] = ()
) -> Parts:
    """Tokenizer and model, from a checkpoint (`init_from`), BERT-shaped weights (`text_weights`) or anew; `sets`: the training shards; answers: what
    a classifier is to choose from; heads: those that a run which goes on has."""
    torch.manual_seed(config.seed)
    config = with_classifier(config, answers)
    if config.init_from is not None:
        folder = str(local_folder(config.init_from))
        if not is_text_folder(folder):
            return _from_checkpoint(config, folder, answers, heads)
        config = replace(config, init_from=None, text_weights=folder)
    tokenizer, weights, text = tokenizer_and_text(config, sets)
    tokenizer.question_cleaning = config.data.question_cleaning
    text = replace(text, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id)
    config = replace(config, model=replace(config.model, text=text, heads=tuple(heads or trained_heads(config))))
    model = VisionLanguageModel(config.model)
    known: list[str] = []
    if config.model.image.weights or config.model.image.pretrained:
        known = [f"image_encoder.backbone.{name}" for name in model.image_encoder.backbone.state_dict()]
    if weights is not None:
        report, names = load_text_weights(model, weights)
        say(report.summary(f"text from {config.text_weights}"))
        known += names
    started = _told(decoder_from_fusion(model))
    if weights is not None:  # otherwise it is as new as what it was started from
        known += started
    return _parts(config, tokenizer, model, known)


def _parts(config: Config, tokenizer: Tokenizer, model: VisionLanguageModel, known: Sequence[str]) -> Parts:
    """known: the names of what was loaded."""
    new = frozenset(name for name, _ in model.named_parameters()) - set(known)
    config = _with_image_size(config, model)
    return Parts(config, tokenizer, model, add_adapters(model, config.finetune.low_rank, new))


def _from_checkpoint(config: Config, folder: str, answers: Sequence[str], known_heads: Sequence[Head]) -> Parts:
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
    # A classifier is of the run's own answers, or is not kept.
    classifier: tuple[Head, ...] = ("classifier",) if "classifier" in ours.heads else ()
    wanted = known_heads or (*saved.heads, *trained_heads(config))
    heads = tuple(head for head in ModelConfig().heads if head in wanted) + classifier
    merged = replace(
        saved,
        image=image,
        text=replace(
            saved.text,
            dropout=ours.text.dropout,
            attention_dropout=ours.text.attention_dropout,
            checkpointing=ours.text.checkpointing,
            frozen=ours.text.frozen,
            trainable_layers=ours.text.trainable_layers,
        ),
        heads=heads,
        answers=ours.answers,
        decoder=decoder.decoder,
        decoder_layers=decoder.decoder_layers,
        decoder_reads=decoder.decoder_reads,
    )
    model = VisionLanguageModel(merged, load=False)
    state = known_classifier(read_weights(Path(folder)), read_answers(Path(folder)), answers, model)
    report = load_by_name(model, state)
    say(report.summary(folder))
    known = [*report.loaded]
    if not any(name.startswith("decoder.") for name in report.loaded):
        known += _told(decoder_from_fusion(model))
    if "language" not in saved.heads and "masked_language" in saved.heads:
        known += _told(language_from_masked(model))
    if ours.image.image_size is not None:
        model.image_encoder.resize(ours.image.image_size)
    tokenizer = Tokenizer.load(folder)
    data = replace(config.data, question_cleaning=tokenizer.question_cleaning)
    return _parts(replace(config, model=merged, data=data), tokenizer, model, known)


def _told(started: Started | None) -> list[str]:
    """The names of what was started from another part, once that is said."""
    if started is None:
        return []
    say(started.text)
    return started.names


def _with_image_size(config: Config, model: VisionLanguageModel) -> Config:
    """The settings with the image size that the encoder has, so that a checkpoint says it."""
    settings: ModelConfig = replace(
        config.model, image=replace(config.model.image, image_size=model.image_encoder.image_size)
    )
    model.config = settings
    return replace(config, model=settings)


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
    check_set_weights(config, sets)
    data, encoder = config.data, parts.model.image_encoder
    accumulate, world = config.train.accumulate, ranks.world
    if accumulate > 1 and data.batch_size // accumulate % world:
        raise ConfigError(
            f"data.batch_size={data.batch_size} in train.accumulate={accumulate} parts cannot be divided over {world} ranks; "
            f"use a multiple of {accumulate * world}."
        )
    features = stored_features(config, encoder, training_transform(data, encoder.image_size), sets, ranks)
    return Loader(
        sets,
        sample_encoder(config, parts.tokenizer, encoder.image_size, True, image_hiding(config, encoder), features),
        data.batch_size // accumulate,
        seed=config.seed,
        streams=streams_of(data, sets),
        shuffle_block=data.shuffle_block,
        workers=data.workers,
        rank=ranks.rank,
        world=ranks.world,
        max_bad_fraction=data.max_bad_fraction,
        mixture=data.mixture,
        declared=data.epoch_samples,
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
    tokenizer, first = parts.tokenizer, first_ids(parts.tokenizer, config.data.prompt)
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
    objectives, pretraining = config.objectives, config.task == "pretraining"
    captions = config.task == "captioning" or (pretraining and max(objectives.captioning, objectives.self_critical) > 0)
    speaks = captions or (pretraining and objectives.answering > 0)
    if speaks and parts.model.decoder is not None and parts.model.config.decoder_reads == "question":
        raise ConfigError(
            "captions need a decoder that reads the image; set model.decoder=separate and model.decoder_reads=image."
        )
    if captions:
        _check_caption_room(config, parts)
    if pretraining:
        _check_second_look(config, parts)
    task = TASKS[config.task](config, parts, answers, sets)
    task.blank_images = config.data.blank_images
    prepare_finetuning(task, config, parts.tokenizer, parts.new, training=bool(sets))
    if isinstance(task, Pretraining) and task.teacher is not None and config.init_from is not None and sets:
        told = start_teacher(task.teacher, local_folder(config.init_from))
        if told is not None:
            say(told)
    return task


def _check_second_look(config: Config, parts: Parts) -> None:
    """Refuses to look again with a head that the model lacks, which the first evaluation would notice after hours."""
    by, heads = config.retrieval.by, parts.model.config.heads
    head = "language" if by == "captioning" else by
    if config.retrieval.rerank and head not in heads:
        raise ConfigError(
            f"retrieval.rerank={config.retrieval.rerank} with retrieval.by={by} needs a {head} head, and this model has {', '.join(heads)}: "
            f"give objectives.{by} a weight, set retrieval.rerank=0, or choose the other retrieval.by."
        )


def _check_caption_room(config: Config, parts: Parts) -> None:
    """Refuses captions, which are generated in evaluation and for rewards, that are longer than the model has positions for."""
    longest, positions = config.generation.max_length, parts.model.config.text.max_positions
    before = len(first_ids(parts.tokenizer, config.data.prompt))
    if before + longest > positions:
        raise ConfigError(
            f"generation.max_length={longest} and the {before} tokens before it ([CLS] and data.prompt) need more positions than "
            f"model.text.max_positions={positions}; use at most generation.max_length={max(positions - before, 1)}."
        )
