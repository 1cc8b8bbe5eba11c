"""int8 weights for inference: the linear maps in a quarter of fp32's memory, by torchao.

Each row of a weight is rounded to 8 bits with a scale of its own, and multiplied as floating point; activations stay as they are. Embeddings, norms,
convolutions and heads are left alone.
"""

import logging

from torch import nn

from vlm.errors import ConfigError, UserError
from vlm.model.vision_language import VisionLanguageModel


def quantize(model: VisionLanguageModel, kind: str) -> VisionLanguageModel:
    """The model itself, with int8 weights in every `Linear` of the image encoder, the text Transformer, the decoder and their memories.

    kind: "int8", the only one. Move the model to its device before; it can no longer be trained or saved.

    Raises:
        ConfigError: another kind. UserError: torchao is not installed.
    """
    if kind != "int8":
        raise ConfigError(f"quantize={kind!r} is not known; give int8, or leave it out.")
    logger = logging.getLogger("torch.utils._pytree")
    level = logger.level
    logger.setLevel(logging.ERROR)  # torchao's import says what is deprecated in torchao itself
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise UserError("int8 weights need torchao: pip install 'vlm-fusion[int8]'.") from None
    finally:
        logger.setLevel(level)
    parts = (model.image_encoder, model.text, model.fusion_memory, model.decoder, model.decoder_memory)
    for part in parts:
        if part is not None:
            quantize_(part, Int8WeightOnlyConfig(), filter_fn=lambda module, _: isinstance(module, nn.Linear))
    return model
