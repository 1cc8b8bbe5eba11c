"""From settings to what the loader makes of a record."""

from vlm.config import Config, DataConfig
from vlm.data.collate import SampleEncoder
from vlm.data.features import StoredFeatures
from vlm.data.hiding import PatchHiding
from vlm.data.images import EvaluationTransform, TrainingTransform
from vlm.data.samples import CaptionEncoder, JointEncoder, QuestionEncoder, Transform
from vlm.data.text import Tokenizer
from vlm.errors import ConfigError


def training_transform(data: DataConfig, image_size: int) -> TrainingTransform:
    """The augmentation that the settings ask for."""
    return TrainingTransform(image_size, scale=data.crop_scale, flip=data.flip, randaugment=data.randaugment)


def sample_encoder(
    config: Config,
    tokenizer: Tokenizer,
    image_size: int,
    training: bool,
    hiding: PatchHiding | None = None,
    features: StoredFeatures | None = None,
) -> SampleEncoder:
    """What the loader makes of a record for this task. In training, hiding: which patches are hidden; features: taken in place of the images."""
    data = config.data
    transform: Transform = EvaluationTransform(image_size)
    if training:
        transform = training_transform(data, image_size) if features is None else features
    question = QuestionEncoder(
        tokenizer,
        transform,
        training,
        form=config.vqa.form,
        question_prompt=data.question_prompt,
        max_question_tokens=data.max_tokens,
        max_answer_tokens=data.max_answer_tokens,
        texts_per_image=data.texts_per_image if training else "all",
        set_weights=config.vqa.set_weights,
        seed=config.seed,
        views=data.views,
    )
    if config.task == "vqa":
        return question
    masks = training and config.task == "pretraining" and config.objectives.masked_language > 0
    if masks and config.objectives.whole_words and not tokenizer.continuing_ids:
        raise ConfigError(
            "objectives.whole_words needs a WordPiece tokenizer, whose pieces say that they go on with a word; use False."
        )
    caption = CaptionEncoder(
        tokenizer,
        transform,
        training,
        max_tokens=data.max_tokens,
        prompt=data.prompt,
        texts_per_image=data.texts_per_image if training else "all",
        masking_probability=config.objectives.masking_probability if masks else None,
        whole_words=config.objectives.whole_words,
        hiding=hiding if training else None,
        seed=config.seed,
        views=data.views,
    )
    if training and answers_questions(config):
        return JointEncoder(caption, question)
    return caption


def answers_questions(config: Config) -> bool:
    """Whether the run's model learns to answer."""
    return config.task == "vqa" or (config.task == "pretraining" and config.data.questions)
