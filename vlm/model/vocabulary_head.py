"""From states to the vocabulary: what masked-language and captioning objectives, and decoding, read.

Letters: D width of the states, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.config import TextConfig
from vlm.errors import ConfigError
from vlm.model.attention import initialise
from vlm.model.linear import Linear, linear


def _gelu_tanh(states: Tensor) -> Tensor:
    return F.gelu(states, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "gelu_tanh": _gelu_tanh, "relu": F.relu}


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The function of that name; a ConfigError names the known ones."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation={name!r} is not known; choose one of {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


class VocabularyHead(nn.Module):
    """BERT's `cls.predictions`: a transform, then the word embedding as the output matrix, and a bias. The embedding is the transformer's own and is
    given at each call, so the tie is in the structure and nothing is stored twice."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.transform = Linear(config.dim, config.dim)
        self.activation = activation_function(config.activation)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        initialise(self)

    def forward(self, states: Tensor, embedding_weight: Tensor) -> Tensor:
        """States (..., D) and the word embedding (V, D) -> logits (..., V)."""
        return linear(self.norm(self.activation(self.transform(states))), embedding_weight, self.bias)
