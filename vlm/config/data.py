"""The settings of the data: a part of `vlm.config`, from which they are imported."""

from dataclasses import dataclass, field
from typing import Literal

QuestionCleaning = Literal["vlm", "blip", "albef", "none"]


@dataclass(frozen=True, kw_only=True)
class SplitsConfig:
    """Shard folders of each split; several folders are joined."""

    train: tuple[str, ...] = ()
    """Folders, or brace patterns of tars, with training shards; http(s)://, s3://, gs://, hf:// and pipe:COMMAND too (docs/data.md)."""
    val: tuple[str, ...] = ()
    """Folders for evaluation while training; selects the best checkpoint."""
    test: tuple[str, ...] = ()
    """Folders for the final evaluation only."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """How remote shards are fetched, and where their copies are kept."""

    folder: str | None = None
    """Where the copies are kept, by all processes of a machine together; null takes vlm/shards below $XDG_CACHE_HOME or ~/.cache."""
    gigabytes: float = 100.0
    """Room for the copies, in 10^9 bytes; those used longest ago are removed. It should hold the shards that all streams read at one time."""
    timeout: float = 60.0
    """Seconds without data, or with less than a kibibyte each, after which a connection is given up and made anew."""
    retries: int = 5
    """Further attempts at a shard, after each that brought nothing new; after the last its records are bad samples, `unreadable shard`."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read and how it is prepared."""

    splits: SplitsConfig = field(default_factory=SplitsConfig)
    """Shard folders by split."""
    mixture: tuple[float, ...] = ()
    """Passes over each folder of splits.train in an epoch: 2 reads it twice, 0.5 another half each time; empty: each once."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Copies of remote shards."""
    batch_size: int = 64
    """Images in one optimizer step, over all ranks and accumulated micro-batches."""
    order: Literal["exact", "resampled"] = "exact"
    """exact: each record once an epoch, from shards that are counted; resampled: drawn with replacement, counted or not (docs/data.md)."""
    epoch_samples: int | None = None
    """Records of an epoch of order=resampled, which has no length of its own."""
    streams: int | None = None
    """Number of streams that the epoch's order is cut into; divisible by the number of ranks. null: batch_size, or its first multiple from 64 on; 64
    with remote shards."""
    shuffle_block: int = 1000
    """Records permuted together inside a stream."""
    workers: int = 2
    """Loader processes a rank; 0 loads in the training process."""
    max_bad_fraction: float = 0.1
    """Stop when more than this share of samples is unusable."""
    max_tokens: int = 32
    """Longest caption or question in tokens, [CLS] and [SEP] included."""
    max_answer_tokens: int = 8
    """Longest answer in tokens."""
    prompt: str = ""
    """Leading words of each caption, not predicted (BLIP: 'a picture of ')."""
    question_prompt: str = "question: {question} answer:"
    """How a question becomes a prompt in the VQA form `prompted`."""
    question_cleaning: QuestionCleaning = "vlm"
    """What becomes of a question before it is tokenized; with init_from the checkpoint's way counts. vlm: lower case, without .!"()*#:;~ and the
    question mark; blip, albef: as their authors, who keep the question mark (BLIP), or take ' and , away too and part words at - and / (ALBEF);
    none: it stays as it is, as in transformers."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Area range of RandomResizedCrop."""
    flip: bool = True
    """Flip left-right at random, except where a text of the record says left or right."""
    randaugment: tuple[int, int] | None = (2, 5)
    """RandAugment: operations and magnitude, without colour reversal; null turns it off."""
    views: int | None = None
    """How many augmentations of an image are drawn before they repeat, one an epoch; null: a new one each time."""
    features: str | None = None
    """A folder for what a frozen image encoder makes of the training images in `views` augmentations: made at the start, what is there already is
    used, and no step decodes or encodes an image again. 2 bytes x views x tokens x width an image; `--dry-run` makes none."""
    texts_per_image: Literal["one", "all"] = "one"
    """Captions or questions of an image that a training step takes: one drawn at random, or all, which share the image's encoding."""
    questions: bool = False
    """Pretraining also on the records' questions, in the VQA form `prompted`: one model then makes captions and answers."""
    allow_overlap: bool = False
    """Allow evaluation images that are also training images."""
    blank_images: bool = False
    """Replace every image by grey: the question-only (or caption-without-image) baseline."""
