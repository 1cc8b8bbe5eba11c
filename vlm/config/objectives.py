"""The settings of the objectives: a part of `vlm.config`, from which they are imported."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ObjectivesConfig:
    """Weights of the objectives (0 leaves one out) and their settings."""

    contrastive: float = 1.0
    """Image-text contrastive."""
    matching: float = 1.0
    """Image-text matching with hard negatives."""
    masked_language: float = 1.0
    """Masked language modelling given the image."""
    masked_image: float = 0.0
    """Masked image modelling: the pixels of hidden patches (SimMIM). For a ViT; a convolutional network has no patches that could be hidden."""
    word_patch: float = 0.0
    """Word-patch alignment by optimal transport (ViLT: 0.1)."""
    captioning: float = 0.0
    """Causal captioning: the mean over the captions' tokens."""
    answering: float = 0.0
    """With data.questions: causal answers after their questions, the mean over questions, beside `captioning` and apart from it: a question has
    some two tokens of answer, an image some fifty of captions."""
    self_critical: float = 0.0
    """Captions drawn from the model, rewarded by CIDEr-D against their image's references; for the end of training. In the task captioning
    it takes the place of the cross-entropy, to which `captioning` then gives a weight."""
    sample_temperature: float = 1.0
    """For self_critical: temperature of the captions that are drawn; below 1 they are nearer to what beam search finds."""
    contrastive_loss: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: each image picks its text among all, and the reverse (CLIP, ALBEF, BLIP); sigmoid: every pair on its own (SigLIP, which starts
    from model.temperature 0.1); it takes no teacher."""
    momentum: float = 0.0
    """Decay of the momentum teacher (ALBEF, BLIP: 0.995), whose features are the keys of contrastive and whose predictions are soft targets of
    contrastive and masked_language; 0: no teacher."""
    queue: int = 0
    """With a teacher: features of earlier steps that are keys too (ALBEF 65536, BLIP 57600); 0: none."""
    keys: Literal["joined", "local"] = "joined"
    """With a teacher: keys are its features of all ranks' batches and the queue, or of this rank's batch and the queue (as published)."""
    alpha: float = 0.4
    """With a teacher: weight of its soft targets; 0: hard targets only."""
    alpha_ramp: float = 1.0
    """Epochs over which alpha grows from 0 (ALBEF 1, BLIP 2); fractions allowed."""
    negatives: Literal["local", "joined"] = "local"
    """Where matching looks for hard negatives and word_patch for other images: in this rank's micro-batch, or in those of all ranks (as BLIP may:
    image tokens are sent around)."""
    easy_negatives: float = 0.0
    """Epochs at the start in which matching draws its negatives evenly; over as many more they become hard. 0: hard at once (ALBEF, BLIP). A model
    that starts without trained fusion layers learns matching much sooner with it; fractions allowed."""
    masking_probability: float = 0.15
    """Share of the tokens hidden for masked_language."""
    whole_words: bool = False
    """For masked_language: hide all pieces of a word or none."""
    masked_image_text: bool = True
    """For masked_image: two layers with cross-attention read the image's text (MaskVLM); False: from the image alone (SimMIM)."""
    hidden_share: float = 0.6
    """Share of the image hidden for masked_image."""
    hidden_unit: int = 32
    """Side in pixels of the squares hidden for masked_image: one or several patches."""
    label_smoothing: float = 0.1
    """Label smoothing of captioning and answers (PyTorch's definition)."""
