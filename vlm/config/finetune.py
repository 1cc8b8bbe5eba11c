"""The settings of fine-tuning beyond frozen parts and rates: a part of `vlm.config`, from which they are imported."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class LowRankConfig:
    """LoRA (Hu et al. 2022; extra: lora): linear maps stay as they are, and learn a sum of `rank` outer products beside them."""

    rank: int = 0
    """Rank of what is learned; 0: everything is trained that is not frozen. Otherwise the adapters alone, and what the start did not bring."""
    alpha: float = 16.0
    """The adapters' output is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("query", "key", "value", "output", "keys", "values", "qkv", "proj")
    """Last words of the names of the linear maps that get adapters: those of self- and cross-attention in the text Transformer, of its memory
    (keys, values), and of a ViT's attention (qkv, proj). `inner`, `outer`, `fc1` and `fc2` are the feed-forward parts'."""


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """Embeddings moved to where the loss is higher (FreeLB, Zhu et al. 2020; VILLA, Gan et al. 2020), and learned from there."""

    steps: int = 0
    """Places that are learned from, each a step of ascent from the one before, beginning at a random one; the decoder runs as often. 0: none.
    (FreeLB and VILLA: 3.)"""
    step_size: float = 0.05
    """Length of a step, as a share of the length of what it moves: a text's word embeddings, an image's tokens."""
    bound: float = 0.1
    """How far from their true place they may come, as such a share."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How the tasks captioning and vqa learn, beside `optimizer` (layer_decay, new_lr_factor) and the parts that are frozen."""

    contrastive: float = 0.0
    """For captioning: weight of the contrastive objective (objectives.contrastive_loss) that is kept on beside it, so that captions do not cost
    retrieval. Evaluations then give the recalls too."""
    consistency: float = 0.0
    """R-Drop (Liang et al. 2021): weight alpha of the symmetric Kullback-Leibler divergence between two passes of the decoder that differ by
    dropout. Needs model.text.dropout or attention_dropout. (The authors: 0.1 to 5.)"""
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    """Adversarial perturbation."""
    teacher: str | None = None
    """A larger checkpoint, with the same tokenizer, that is learned from beside the data: a folder, or a name on the hub. It is frozen and is not
    saved."""
    teacher_logits: float = 1.0
    """With a teacher: weight of the divergence from its distribution of each word (Hinton et al. 2015)."""
    teacher_features: float = 0.0
    """With a teacher: weight of the squared distance from its decoder's last states, through a linear map, which is learned, where widths differ."""
    teacher_temperature: float = 2.0
    """With a teacher: both distributions are flattened by it; the divergence is multiplied by its square."""
    low_rank: LowRankConfig = field(default_factory=LowRankConfig)
    """LoRA."""
