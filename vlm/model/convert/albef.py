"""ALBEF's weights as its authors publish them (ALBEF.pth, ALBEF_4M.pth, mscoco.pth, flickr30k.pth, refcoco.pth, vqa.pth) under our names.

Names as in their models/model_pretrain.py, model_retrieval.py (also visual grounding) and model_vqa.py: the lower layers of `text_encoder` read the
text, the upper ones, with cross-attention, fuse it with the image; in questions a `text_decoder` reads the fused states.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

from vlm.config import ModelConfig
from vlm.model.convert.authors import Kind, first_cross_layer, sizes, text_config
from vlm.model.convert.bert import cross_attention_layers

FUSION = ("text.", "fusion_memory.")
PRETRAINING = Kind(
    "ALBEF of pretraining",
    "pretraining",
    ("contrastive", "matching", "masked_language"),
    {"text_encoder.bert.": FUSION},
    {"text_encoder.": "masked_language_head."},
)
RETRIEVAL = Kind("ALBEF of retrieval", "pretraining", ("contrastive", "matching"), {"text_encoder.": FUSION}, {})
QUESTION_ANSWERING = Kind(
    "ALBEF of question answering",
    "vqa",
    ("language",),
    {"text_encoder.": FUSION, "text_decoder.bert.": ("decoder.", "decoder_memory.")},
    {"text_decoder.": "language_head."},
)


def kind_of(names: Iterable[str]) -> Kind:
    """Which kind of file has these names; for another model the likeliest, whose conversion will tell what is missing."""
    names = list(names)
    if any(name.startswith("text_decoder.") for name in names):
        return QUESTION_ANSWERING
    if any(
        name.startswith("text_encoder.") and not name.startswith(("text_encoder.bert.", "text_encoder.cls."))
        for name in names
    ):
        return RETRIEVAL
    return PRETRAINING


def model_config(state: Mapping[str, Tensor], kind: Kind, source: str) -> ModelConfig:
    """Our settings of the model in a file, whose sizes its tensors say.

    Raises CheckpointError for sizes that no such model has.
    """
    image, text, embed_dim = sizes(state, kind, source)
    cross = tuple(range(first_cross_layer(state, kind, text["layers"]), text["layers"]))
    reads_question = kind is QUESTION_ANSWERING
    decoder_layers = cross_attention_layers(name for name in state if name.startswith("text_decoder."))
    return ModelConfig(
        image=image,
        text=text_config(text, cross_attention=cross),
        embed_dim=embed_dim,
        heads=kind.heads,
        fusion="late",
        decoder="separate" if reads_question else "shared",
        decoder_layers=max(decoder_layers, default=5) + 1,
        decoder_reads="question" if reads_question else "image",
        label=kind.name,
    )
