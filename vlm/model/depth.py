"""How far below the heads each parameter stands, for layer-wise decay of the learning rate (ELECTRA, Clark et al. 2020; BEiT, Bao et al. 2022)."""

from vlm.model.backbone import blocks_of
from vlm.model.text_transformer import TextTransformer
from vlm.model.vision_language import VisionLanguageModel


def depths(model: VisionLanguageModel) -> dict[str, int]:
    """By parameter 1 for the last layer of its stack, one more for each layer below, most for embeddings and stem; heads are not named: 0.

    Keys and values that a layer's cross-attention reads stand where the layer does. A feature map's positions and its linear map are a head.
    """
    encoder = model.image_encoder
    groups = blocks_of(encoder.backbone)
    found = {f"image_encoder.backbone.{name}": len(groups) - i for i, group in enumerate(groups) for name in group}
    of_layer = _stack("text", model.text, "fusion_memory")
    if model.decoder is not None:
        of_layer |= _stack("decoder", model.decoder, "decoder_memory")
    for part, depth in of_layer.items():
        found |= {f"{part}.{name}": depth for name, _ in model.get_submodule(part).named_parameters()}
    return found


def _stack(name: str, stack: TextTransformer, memory: str) -> dict[str, int]:
    """Depths of the parts of a stack, by their names' beginnings."""
    count = len(stack.layers)
    found = {f"{name}.embeddings": count + 1} | {f"{name}.layers.{i}": count - i for i in range(count)}
    for layer, slot in stack.slots.items():
        found |= {f"{memory}.{what}.{slot}": count - layer for what in ("keys", "values")}
    return found
