"""The settings of visual question answering: a part of `vlm.config`, from which they are imported."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class VqaConfig:
    """Visual question answering."""

    form: Literal["encoder_decoder", "prompted", "classify"] = "prompted"
    """encoder_decoder: the question is fused with the image and the decoder attends to its states (ALBEF, BLIP);
    prompted: the decoder reads the image and the question is its prompt (one model for captions and answers);
    classify: one output for each answer of the list on the question fused with the image (METER, ViLT, BEiT-3)."""
    min_answer_count: int = 1
    """Answers of so many training questions or more form the answer list, counted after the official normalisation; with form=classify those
    that are a question's commonest, as METER counts (9 there)."""
    inference: Literal["rank", "rank_all", "generate"] = "rank"
    """rank: the best of the answer list, exactly, by its probability; rank_all: the same answer, with all of the list scored, and its share of
    the list's probability as the confidence; generate: open generation. form=classify scores its whole list in any case."""
    set_weights: dict[str, float] = field(default_factory=dict)
    """Weights in the loss of the questions of a source, e.g. {visual_genome: 0.5} (ALBEF; BLIP 0.2); sources that are not named have 1. The loss is
    divided by the number of questions, as published, not by the sum of their weights."""
