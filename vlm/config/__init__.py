"""Every setting of the library, typed: one frozen dataclass for each room, `Config` for a whole run.

This module and its parts (`config_*.py`) import the standard library only, so that every room may import its own settings. Reading YAML,
checking types and command-line overrides live in `vlm/settings.py`.
"""

from dataclasses import dataclass, field
from typing import Literal

from vlm.config.data import CacheConfig as CacheConfig
from vlm.config.data import DataConfig as DataConfig
from vlm.config.data import SplitsConfig as SplitsConfig
from vlm.config.finetune import AdversarialConfig as AdversarialConfig
from vlm.config.finetune import FinetuneConfig as FinetuneConfig
from vlm.config.finetune import LowRankConfig as LowRankConfig
from vlm.config.objectives import ObjectivesConfig as ObjectivesConfig
from vlm.config.vqa import VqaConfig as VqaConfig

Head = Literal["contrastive", "matching", "masked_language", "language", "classifier"]


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """The image encoder: any timm backbone."""

    name: str = "vit_base_patch16_224"
    """timm model name."""
    image_size: int | None = None
    """Side of the square input in pixels; null takes timm's for this model."""
    weights: str | None = None
    """A local weights file (.safetensors, or a state dict that loads with weights_only)."""
    stages: int | None = None
    """Keep the backbone only up to this feature index (timm's), for a finer grid on small images; null keeps all."""
    width: int | None = None
    """Width that a feature map (of a convolutional network, a Swin) is brought to, by a linear map and a layer norm, before cross-attention reads it:
    fewer weights than cross-attention of the map's own width in every layer; null keeps the map as it is."""
    pretrained: bool = False
    """Let timm download its pretrained weights."""
    frozen: bool = False
    """Do not train the image encoder."""
    trainable_blocks: int | None = None
    """Train only the last N blocks (stages of a convolutional network); null trains all."""
    batch_norm: Literal["frozen", "sync", "local"] | None = None
    """Batch-norm statistics; null: frozen when weights are given, local otherwise."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    drop_path: float = 0.0
    """Stochastic depth rate."""
    patch_drop: float = 0.0
    """Share of an image's patches left out at random in training (FLIP: 0.5), for speed; evaluation, a teacher and masked_image see all. ViT only."""
    norm_eps: float | None = None
    """Epsilon of the layer norms; null takes timm's (BLIP as transformers has it: 1e-5, timm's ViT: 1e-6)."""
    antialias: bool = True
    """How a ViT's positions are interpolated when image_size changes: timm's way, with antialiasing, or plainly, as ALBEF, BLIP and transformers."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text Transformer: BERT's layers."""

    vocab_size: int = 30522
    """Number of tokens; set from the tokenizer when training starts."""
    dim: int = 384
    """Width of the states."""
    heads: int = 12
    """Attention heads."""
    layers: int = 6
    """Number of layers."""
    feed_forward_dim: int = 1536
    """Width inside the feed-forward part."""
    max_positions: int = 512
    """Longest text in tokens."""
    norm_eps: float = 1e-12
    """Epsilon of the layer norms."""
    token_types: bool = True
    """Add BERT's token-type embedding (always type 0)."""
    dropout: float = 0.1
    """Dropout of the states in training."""
    attention_dropout: float = 0.1
    """Dropout of the attention weights in training; on a CPU it costs a fifth of a step."""
    cross_attention: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    """Indices of the layers with cross-attention: the last ones (ALBEF) or all (BLIP)."""
    separate_causal_attention: bool = False
    """The causal mode has self-attention weights of its own (BLIP)."""
    pad_id: int = 0
    """The padding token."""
    activation: str = "gelu"
    """Activation of the feed-forward part (exact GELU)."""
    checkpointing: bool = False
    """Recompute activations in the backward pass, of a separate decoder too: less memory, more time."""
    frozen: bool = False
    """Do not train the embeddings and layers, except their cross-attention; heads and a separate decoder are trained."""
    trainable_layers: int | None = None
    """Train only the last N layers, and the cross-attention of all; null trains all."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The vision-language model: which parts there are and how they are joined."""

    image: ImageConfig = field(default_factory=ImageConfig)
    """Image encoder."""
    text: TextConfig = field(default_factory=TextConfig)
    """Text Transformer: text encoder, fusion encoder and, if shared, decoder."""
    embed_dim: int = 256
    """Width E of the image and text embeddings that the contrastive objective compares."""
    heads: tuple[Head, ...] = ("contrastive", "matching", "masked_language", "language")
    """The heads that there may be: a run has those that it trains, and those of the checkpoint that it starts from. A checkpoint cannot do what heads
    are for that it lacks. `classifier` comes with vqa.form=classify."""
    answers: int = 0
    """Answers that the classifier chooses from; set from the answer list when training starts."""
    text_pool: Literal["first", "mean", "pooler"] = "first"
    """The text's embedding comes from its first token (ALBEF, BLIP), the mean over its tokens (MiniLM's sentence embedding), or BERT's
    pooler: its first token through a linear map and tanh (BlipModel)."""
    image_pool_norm: bool = False
    """Normalise the pooled image tokens once more, with the image encoder's last norm (BlipModel)."""
    projection_bias: bool = True
    """The projections to the embeddings have biases (BlipModel: none)."""
    fusion: Literal["late", "full"] = "full"
    """late: fusion continues from the text states below the first cross-attention layer (ALBEF); full: it starts from the tokens (BLIP)."""
    decoder: Literal["shared", "separate"] = "shared"
    """shared: causal decoding runs through the same layers; separate: a second stack, started from the fusion layers, those of init_from where
    its checkpoint has no such decoder (ALBEF's VQA decoder)."""
    decoder_layers: int = 6
    """Layers of a separate decoder, all with cross-attention."""
    decoder_reads: Literal["image", "question"] = "image"
    """What a separate decoder attends to: the image tokens, or the states of the question fused with the image."""
    first_token: dict[str, int] = field(default_factory=dict)
    """Token ids that replace [CLS] in the modes text, fused, decoder (BLIP's [ENC] and [DEC]); empty: [CLS] stays."""
    temperature: float = 0.07
    """Initial temperature of the contrastive objective; it is learned."""
    label: str = ""
    """Name for the model card."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Where the tokens come from."""

    source: str | None = None
    """tokenizer.json, vocab.txt or a folder with one; null takes init_from's, else trains a WordPiece on the training shards' text."""
    vocab_size: int = 8000
    """Size of a trained WordPiece vocabulary."""
    trim: bool = False
    """Keep only the tokens that occur in the training text (and the letters, so that any word can be spelt)."""
    min_count: int = 1
    """With trim: in how many places a token must occur; rarer words are spelt in pieces."""
    trim_to: tuple[str, ...] = ()
    """More shard folders whose text counts when trimming or training the vocabulary (later tasks of the same model)."""


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """How pretraining's retrieval is evaluated."""

    rerank: int = 0
    """So many of the nearest texts of each image, and images of each text, are scored again by cross-attention; 0: embeddings alone or, without
    objectives.contrastive and where what `by` names is trained, all pairs by cross-attention alone."""
    by: Literal["matching", "captioning"] = "matching"
    """What scores them: the matching head, or the likelihood of the text as a caption of the image."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 1e-4
    """Peak rate."""
    lr_factors: dict[str, float] = field(default_factory=dict)
    """Rate factors by part of the model, e.g. {image_encoder: 0.1, text.layers.0: 0.5}; the longest matching name counts."""
    layer_decay: float = 1.0
    """Rate factor for each layer below the heads: text layers, blocks of a ViT, stages of a convolutional network; embeddings and stem are lowest
    (BEiT, ELECTRA: 0.65 to 0.9). It multiplies lr_factors."""
    new_lr_factor: float = 1.0
    """Rate factor of what init_from, text_weights and image.weights did not bring; it multiplies the others."""
    weight_decay: float = 0.05
    """Decay; biases, norms, embeddings of position and temperature never decay."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's betas."""
    schedule: Literal["cosine", "step", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_steps: int = 100
    """Steps of linear warm-up, the last of which has the peak rate."""
    warmup_from: float = 0.0
    """Rate that the warm-up starts from, of which its first step is one step above (ALBEF 1e-5, BLIP 1e-6); lr_factors multiply it too."""
    min_lr_factor: float = 0.01
    """Lowest rate as a share of the peak."""
    step_factor: float = 0.9
    """Factor an epoch, for schedule: step."""
    clip: float = 1.0
    """Largest gradient norm; 0 does not clip."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    epochs: float = 10
    """Passes over the training data; fractions allowed."""
    accumulate: int = 1
    """Micro-batches an optimizer step: as many times less memory. The contrastive loss still compares the whole batch, with its exact gradients, for
    which images and texts are encoded twice; hard negatives come from the micro-batch."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """fp32, or bf16 or fp16 autocast, on the CPU and on a GPU. auto: bf16 where the device has instructions for it, else fp16 (with a scaled
    loss) on a GPU, fp32 on a CPU; a run that is resumed keeps what it began with."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun. ddp: every rank holds the whole model. fsdp: in pieces (FSDP2), for models that do not fit; see docs/distributed.md."""
    compile: bool = False
    """torch.compile of image encoder and text stacks (needs a C++ compiler, on a GPU Triton): a slow start, faster steps; --dry-run says of how many
    graphs. Evaluation is not compiled."""
    averaging: float = 0.0
    """Decay of the averaged weights (exponential), which are evaluated and saved; 0 turns it off."""
    log_every: int = 20
    """Steps between log lines."""
    evaluate_every: int = 0
    """Steps between evaluations; 0: at the end of every epoch."""
    evaluate_images: int = 1000
    """Images used in evaluations while training."""
    samples: int = 8
    """Pictures of each validation set that evaluations show with what the model says of them, in OUT/samples and in the trackers; 0: none."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where the run can be watched beside log.jsonl; a new start goes on with the same run there."""
    save_every: int = 500
    """Steps between saves of the full state; it is also saved at each evaluation and on request."""
    keep: int = 0
    """So many of the last states that were saved stay beside `latest`, as step-N; `cp -r` one to `latest` to go on from there."""
    max_skipped: int = 10
    """Stop after so many steps in a row whose loss or gradient was not finite; such steps are skipped, and their images named in log.jsonl."""
    deterministic: bool = False
    """Deterministic algorithms only."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How captions and answers are produced; stored with the checkpoint."""

    beams: int = 3
    """Beams; 1 is greedy."""
    max_length: int = 30
    """Most tokens generated."""
    min_length: int = 5
    """Fewest tokens generated before a caption may end."""
    length_penalty: float = 1.0
    """Exponent of the length that a beam's score is divided by."""
    repetition_penalty: float = 1.0
    """Divides the probability of tokens already used (1: none)."""
    no_repeat_ngram: int = 0
    """Forbid repeating n-grams of this size; 0 allows."""
    no_doubled_words: bool = False
    """Forbid a token, mostly a word, right after itself, as in "a green green bus", which models trained for a reward say now and then."""
    banned_words: tuple[str, ...] = ()
    """Words and phrases that no caption contains, in any spelling that the tokenizer has for them."""
    temperature: float = 1.0
    """Of captions that are drawn instead of searched: below 1 the likely words become likelier, above 1 the others."""
    top_k: int = 0
    """Drawn captions: only the so many likeliest tokens; 0 takes all."""
    top_p: float = 0.9
    """Drawn captions: only the likeliest tokens that together reach this probability (nucleus sampling); 1 takes all."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    task: Literal["pretraining", "captioning", "vqa"] = "pretraining"
    """What is trained."""
    out: str = "runs/default"
    """The run's folder: log.jsonl, checkpoints (latest, best), config.yaml."""
    seed: int = 0
    """Seed of initialisation, order and augmentation."""
    init_from: str | None = None
    """A checkpoint folder, or a model's name on the hub, to start from: weights by name, tokenizer, model settings, and what is loaded, new and
    left over is said. What `vlm convert bert` makes is taken as text_weights."""
    text_weights: str | None = None
    """A folder with BERT-shaped weights and their tokenizer to start the text Transformer from."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model; with init_from its shape is the checkpoint's, and only image_size, frozen, trainable_blocks, trainable_layers, batch_norm,
    checkpointing, drop_path, patch_drop, dropout and attention_dropout are taken from here, and a separate decoder where one is asked for."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Tokens."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data."""
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    """Pretraining objectives."""
    vqa: VqaConfig = field(default_factory=VqaConfig)
    """Visual question answering."""
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    """Evaluation of retrieval."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Loop."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Fine-tuning."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """Decoding."""
