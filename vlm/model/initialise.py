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


def load_text_weights(model: VisionLanguageModel, weights: TextWeights) -> tuple[Loaded, list[str]]:
    """Starts the text Transformer from a BERT's: its first layers if it has more, its first positions if it has more; and the heads of words.

    What became of the Transformer's tensors, and the model's names of all that were taken.
    """
    state = dict(weights.transformer)
    positions = model.text.embeddings.position.weight
    name = "embeddings.position.weight"
    if name in state and len(state[name]) > len(positions):
        state[name] = state[name][: len(positions)]
    report = load_by_name(model.text, state)
    names = [f"text.{name}" for name in report.loaded]
    for part in ("masked_language_head", "language_head"):
        head = getattr(model, part)
        if head is not None and weights.head:
            names += [f"{part}.{name}" for name in load_by_name(head, weights.head).loaded]
    return report, names


@dataclass(frozen=True)
class Started:
    """What was started from another part of the model: in words, and the tensors' names."""

    text: str
    names: list[str]


@torch.no_grad()
def decoder_from_fusion(model: VisionLanguageModel) -> Started | None:
    """Starts a separate decoder from the last layers of the text Transformer (ALBEF's VQA decoder), and its memory where the widths agree.

    Layers map to layers, their cross-attention included. Where those have causal self-attention of their own (BLIP), the decoder takes that.
    None without such a decoder.
    """
    if model.decoder is None or model.decoder_memory is None:
        return None
    text, decoder = model.text, model.decoder
    decoder.embeddings.load_state_dict(text.embeddings.state_dict())
    names = [f"decoder.embeddings.{name}" for name in decoder.embeddings.state_dict()]
    skip = len(text.layers) - len(decoder.layers)
    first = max(skip, 0)
    for index, layer in enumerate(decoder.layers):
        if index + skip >= 0:
            report = load_by_name(layer, _causal(text.layers[index + skip].state_dict()))
            names += [f"decoder.layers.{index}.{name}" for name in report.loaded]
    skip = len(model.fusion_memory.keys) - len(model.decoder_memory.keys)
    taken: list[str] = []
    for index in range(max(-skip, 0), len(model.decoder_memory.keys)):
        for what, own, fusion in (
            ("keys", model.decoder_memory.keys, model.fusion_memory.keys),
            ("values", model.decoder_memory.values, model.fusion_memory.values),
        ):
            report = load_by_name(own[index], fusion[index + skip].state_dict())
            taken += [f"decoder_memory.{what}.{index}.{name}" for name in report.loaded]
    memory = "" if taken else ", its memory new, of another width"
    said = f"decoder: started from the text's layers {first} to {len(text.layers) - 1}{memory}"
    return Started(said, names + taken)


def _causal(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer's state with the self-attention that it decodes with under the name that a separate decoder has for it."""
    return layer | {
        name.removeprefix("causal_"): tensor for name, tensor in layer.items() if name.startswith("causal_")
    }


def language_from_masked(model: VisionLanguageModel) -> Started | None:
    """Starts the language head from that of masked language modelling, as ALBEF's decoders start; None without those heads."""
    if model.language_head is None or model.masked_language_head is None:
        return None
    model.language_head.load_state_dict(model.masked_language_head.state_dict())
    names = [f"language_head.{name}" for name in model.language_head.state_dict()]
    return Started("language_head: started from the masked_language head", names)
