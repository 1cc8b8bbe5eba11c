"""From the settings of fine-tuning to what a task learns with: objectives kept on, what lies around its words, rates by layer and by what is new."""

from collections.abc import Collection

from torch import nn

from vlm.config import Config, FinetuneConfig, OptimizerConfig
from vlm.data.text import Tokenizer
from vlm.errors import ConfigError
from vlm.hub import local_folder
from vlm.model.depth import depths
from vlm.model.pretrained import load_pretrained
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.adversarial import Adversarial
from vlm.objectives.around import Words
from vlm.objectives.consistency import Consistency
from vlm.objectives.contrastive import Contrastive
from vlm.objectives.distillation import Distillation
from vlm.objectives.sigmoid import SigmoidContrastive
from vlm.tasks.task import Task
from vlm.train.report import say


def prepare_finetuning(
    task: Task, config: Config, tokenizer: Tokenizer, new: Collection[str], training: bool = True
) -> None:
    """Changes a task as the settings ask. new: the model's parameters that nothing was loaded into. training: otherwise it is to be evaluated only.

    Raises:
        ConfigError: the settings do not suit the model, or the teacher.
    """
    settings, objectives = config.finetune, config.objectives
    if settings.contrastive:
        kind = SigmoidContrastive if objectives.contrastive_loss == "sigmoid" else Contrastive
        task.learn("contrastive", kind(), settings.contrastive)
    if training and "captioning" in task.objectives and config.task != "pretraining":
        words: Words = task.objectives["captioning"]  # type: ignore[assignment]
        task.learn("captioning", _around(words, task.model, settings, tokenizer), task.weights["captioning"])
    task.rate_factors = rate_factors(task.model, task.learned, config.optimizer, new)


def _around(words: Words, model: VisionLanguageModel, settings: FinetuneConfig, tokenizer: Tokenizer) -> Words:
    """What is asked for around the words' objective, the ascent outermost: it climbs on all of the loss."""
    if settings.teacher is not None:
        teacher = read_teacher(settings.teacher, tokenizer)
        words = Distillation(
            words,
            teacher,
            model.config.text.dim,
            settings.teacher_logits,
            settings.teacher_features,
            settings.teacher_temperature,
        )
    if settings.consistency:
        words = Consistency(words, settings.consistency)
    adversarial = settings.adversarial
    if adversarial.steps:
        words = Adversarial(words, adversarial.steps, adversarial.step_size, adversarial.bound)
    return words


def read_teacher(source: str, tokenizer: Tokenizer) -> VisionLanguageModel:
    """The checkpoint that is learned from.

    Raises:
        ConfigError: it has other tokens, or no words to teach.
    """
    folder = local_folder(source)
    teacher, _ = load_pretrained(folder)
    if Tokenizer.load(folder).to_json() != tokenizer.to_json():
        raise ConfigError(
            f"finetune.teacher={source} has another tokenizer than the model, so its words are not comparable; start the model from a checkpoint "
            "with the teacher's tokenizer, or give tokenizer.source the teacher's folder."
        )
    if teacher.language_head is None or (teacher.decoder is not None and teacher.config.decoder_reads != "image"):
        raise ConfigError(
            f"finetune.teacher={source} does not tell words of images (no language head, or a decoder that reads the question); take a captioner."
        )
    say(f"teacher: {source}, {sum(p.numel() for p in teacher.parameters()) / 1e6:.1f} M parameters, frozen")
    return teacher


def rate_factors(
    model: VisionLanguageModel, learned: nn.Module, config: OptimizerConfig, new: Collection[str]
) -> dict[str, float]:
    """By parameter the factor of its rate, where it is not 1. learned: the objectives' own parameters, which are always new.

    Raises:
        ConfigError: new parts are to have a rate of their own, but nothing is old.
    """
    factors: dict[str, float] = {}
    if config.layer_decay != 1:
        factors = {name: config.layer_decay**depth for name, depth in depths(model).items()}
    if config.new_lr_factor != 1:
        names = dict(model.named_parameters()).keys()
        if names <= set(new):
            raise ConfigError(
                f"optimizer.new_lr_factor={config.new_lr_factor:g}, but the whole model is new; set init_from, text_weights or image.weights, or "
                "take optimizer.lr."
            )
        for name in [*(names & set(new)), *(name for name, _ in learned.named_parameters())]:
            factors[name] = factors.get(name, 1.0) * config.new_lr_factor
    return factors
