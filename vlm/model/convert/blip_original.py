"""BLIP's weights as its authors publish them (model_base.pth, model_large_caption.pth, model_base_vqa_capfilt_large.pth, ...) under our names.

Names as in their models/blip_pretrain.py, blip.py, blip_vqa.py and blip_retrieval.py. In pretraining the decoder shares everything but its
self-attention with the encoder, and files hold both copies.

What these files have and transformers' folders have not: the temperature, and [ENC] in front of texts that are fused with an image.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

from vlm.config import ModelConfig
from vlm.model.convert import blip
from vlm.model.convert.authors import Kind, sizes, text_config

DECODER, FUSION = "text_decoder.bert.", ("text.", "fusion_memory.")
LANGUAGE = {"text_decoder.": "language_head."}
PRETRAINING = Kind(
    "BLIP of pretraining",
    "pretraining",
    ("contrastive", "matching", "language"),
    {"text_encoder.": FUSION},
    LANGUAGE,
    tied=DECODER,
)
RETRIEVAL = Kind("BLIP of retrieval", "pretraining", ("contrastive", "matching"), blip.RETRIEVAL.stacks, {})
CAPTIONING = Kind("BLIP of captioning", "captioning", ("language",), blip.CAPTIONING.stacks, LANGUAGE)
QUESTION_ANSWERING = Kind("BLIP of question answering", "vqa", ("language",), blip.QUESTION_ANSWERING.stacks, LANGUAGE)
ADDED_TOKENS = 2
"""[DEC] and [ENC], behind BERT's vocabulary."""


def kind_of(names: Iterable[str]) -> Kind:
    """Which kind of file has these names; for another model the likeliest, whose conversion will tell what is missing."""
    parts = {name.split(".")[0] for name in names}
    if "text_decoder" not in parts:
        return RETRIEVAL if "text_encoder" in parts else PRETRAINING
    if "text_encoder" not in parts:
        return CAPTIONING
    return PRETRAINING if "text_proj" in parts else QUESTION_ANSWERING


def model_config(state: Mapping[str, Tensor], kind: Kind, source: str) -> ModelConfig:
    """Our settings of the model in a file, whose sizes its tensors say.

    Raises CheckpointError for sizes that no such model has.
    """
    image, text, embed_dim = sizes(state, kind, source)
    reads_question = kind is QUESTION_ANSWERING
    first = text["vocab_size"] - ADDED_TOKENS
    return ModelConfig(
        image=image,
        text=text_config(
            text,
            token_types=False,
            cross_attention=tuple(range(text["layers"])),
            separate_causal_attention=bool(kind.tied),
        ),
        embed_dim=embed_dim,
        heads=kind.heads,
        decoder="separate" if reads_question else "shared",
        decoder_layers=text["layers"],
        decoder_reads="question" if reads_question else "image",
        first_token={"decoder": first} if kind is CAPTIONING else {"fused": first + 1, "decoder": first},
        label=kind.name,
    )
