"""Settings of fine-tuning that must fit each other and the task: a part of `vlm/settings_check.py`."""

from vlm.config import Config
from vlm.errors import ConfigError

ABOVE_0 = (
    *("optimizer.layer_decay", "optimizer.new_lr_factor", "finetune.teacher_temperature"),
    *("finetune.low_rank.alpha", "finetune.adversarial.step_size", "finetune.adversarial.bound"),
)
FROM_0 = (
    *("finetune.contrastive", "finetune.consistency", "finetune.adversarial.steps", "finetune.low_rank.rank"),
    *("finetune.teacher_logits", "finetune.teacher_features"),
)


def check_finetune(config: Config) -> None:
    """Refuses what could only fail later.

    Raises:
        ConfigError: names the keys and how to mend them.
    """
    settings, text = config.finetune, config.model.text
    if config.optimizer.layer_decay > 1:
        raise ConfigError(
            f"optimizer.layer_decay={config.optimizer.layer_decay:g}; expected a factor up to 1, which trains all layers alike."
        )
    if settings.contrastive and config.task != "captioning":
        raise ConfigError(
            f"finetune.contrastive={settings.contrastive:g} keeps it on beside captioning, but task={config.task}; set it to 0 "
            "(task=pretraining has objectives.contrastive; questions describe nothing that could be compared)."
        )
    if settings.consistency and max(text.dropout, text.attention_dropout) == 0:
        raise ConfigError(
            f"finetune.consistency={settings.consistency:g} compares passes that differ by dropout, and there is none; "
            "set model.text.dropout to 0.1, or finetune.consistency to 0."
        )
    if settings.teacher is not None and settings.teacher_logits == settings.teacher_features == 0:
        raise ConfigError(
            "finetune.teacher is given, but finetune.teacher_logits and finetune.teacher_features are 0; give one a weight, or leave the teacher out."
        )
    if settings.teacher is not None and config.data.blank_images:
        raise ConfigError("finetune.teacher sees images that data.blank_images=True hides; turn one of them off.")
    _check_words(config)
    _check_low_rank(config)
    if config.train.sharding == "fsdp" and (settings.adversarial.steps or settings.low_rank.rank):
        what = "finetune.adversarial" if settings.adversarial.steps else "finetune.low_rank"
        raise ConfigError(f"{what} does not work with a model in pieces; set train.sharding to ddp (it is fsdp).")


def _check_words(config: Config) -> None:
    """What lies around the words' loss needs a task whose loss that is."""
    settings, objectives = config.finetune, config.objectives
    wanted = {
        "finetune.consistency": settings.consistency > 0,
        "finetune.adversarial.steps": settings.adversarial.steps > 0,
        "finetune.teacher": settings.teacher is not None,
    }
    named = [key for key, given in wanted.items() if given]
    if not named:
        return
    if config.task == "pretraining" or (config.task == "vqa" and config.vqa.form != "prompted"):
        form = f" with vqa.form={config.vqa.form}" if config.task == "vqa" else ""
        raise ConfigError(
            f"{' and '.join(named)} are of captioning, and of vqa with vqa.form=prompted, but task={config.task}{form}; leave them out."
        )
    if config.task == "captioning" and objectives.self_critical and not objectives.captioning:
        raise ConfigError(
            f"{' and '.join(named)} change the cross-entropy, which objectives.self_critical={objectives.self_critical:g} takes the place of; "
            "give objectives.captioning a weight, or leave them out."
        )


def _check_low_rank(config: Config) -> None:
    rank = config.finetune.low_rank.rank
    if rank == 0:
        return
    if config.optimizer.layer_decay != 1:
        raise ConfigError(
            f"finetune.low_rank.rank={rank} trains adapters only, all at one rate; set optimizer.layer_decay to 1 "
            f"(it is {config.optimizer.layer_decay:g})."
        )
    if config.objectives.momentum:
        raise ConfigError(
            f"finetune.low_rank.rank={rank} with a momentum teacher (objectives.momentum={config.objectives.momentum:g}), whose weights have no "
            "adapters; set one of them to 0."
        )
