"""Where a new model's weights come from: a checkpoint by name, BERT-shaped text weights, a decoder from the fusion layers."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlm.model.convert.bert import TextWeights
from vlm.model.vision_language import VisionLanguageModel


@dataclass(frozen=True)
class Loaded:
    """Names of tensors: taken over, new (they keep their random start), and left over in the source."""

    loaded: list[str]
    new: list[str]
    left: list[str]

    def summary(self, source: str) -> str:
        """One line for the log."""
        text = f"{source}: {len(self.loaded)} tensors loaded"
        for what, names in (("new", self.new), ("left over", self.left)):
            if names:
                parts = sorted({".".join(name.split(".")[:2]) for name in names})
                text += f", {len(names)} {what} ({', '.join(parts[:6])}{', ...' if len(parts) > 6 else ''})"
        return text


def load_by_name(module: nn.Module, state: dict[str, Tensor]) -> Loaded:
    """Takes every tensor whose name and shape are the module's."""
    own = module.state_dict()
    fits = {name: tensor for name, tensor in state.items() if name in own and own[name].shape == tensor.shape}
    module.load_state_dict(fits, strict=False)
    return Loaded(list(fits), [n for n in own if n not in fits], [n for n in state if n not in fits])


def load_text_weights(model: VisionLanguageModel, weights: TextWeights) -> Loaded:
    """Starts the text Transformer from a BERT's: its first layers if it has more, its first positions if it has more."""
    state = dict(weights.transformer)
    positions = model.text.embeddings.position.weight
    name = "embeddings.position.weight"
    if name in state and len(state[name]) > len(positions):
        state[name] = state[name][: len(positions)]
    loaded = load_by_name(model.text, state)
    if weights.head:
        for head in (model.masked_language_head, model.language_head):
            if head is not None:
                load_by_name(head, weights.head)
    return loaded


@torch.no_grad()
def decoder_from_fusion(model: VisionLanguageModel) -> None:
    """Starts a separate decoder from the last layers of the text Transformer (ALBEF's VQA decoder), and its memory where the widths agree."""
    if model.decoder is None or model.decoder_memory is None:
        return
    text, decoder = model.text, model.decoder
    decoder.embeddings.load_state_dict(text.embeddings.state_dict())
    skip = len(text.layers) - len(decoder.layers)
    for index, layer in enumerate(decoder.layers):
        if index + skip >= 0:
            load_by_name(layer, text.layers[index + skip].state_dict())
    skip = len(model.fusion_memory.keys) - len(model.decoder_memory.keys)
    for index in range(len(model.decoder_memory.keys)):
        if index + skip >= 0:
            load_by_name(model.decoder_memory.keys[index], model.fusion_memory.keys[index + skip].state_dict())
            load_by_name(model.decoder_memory.values[index], model.fusion_memory.values[index + skip].state_dict())
