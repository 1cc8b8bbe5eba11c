"""From a question fused with an image to the answers of a list. Letters: T questions, D width, A answers.

METER's, ViLT's and BEiT-3's: two linear maps with a norm between them. METER's reads the pooled text and image of its two fused streams; here one
stream is fused, of which the first token's state is read, as matching reads it.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.model.attention import initialise


class AnswerHead(nn.Module):
    """One logit an answer: twice the width, norm, GELU, the answers."""

    def __init__(self, dim: int, answers: int, norm_eps: float) -> None:
        super().__init__()
        if answers < 1:
            raise ConfigError(
                f"model.heads names classifier, but model.answers={answers}; train with task=vqa and vqa.form=classify, which sets both."
            )
        self.hidden = nn.Linear(dim, 2 * dim)
        self.norm = nn.LayerNorm(2 * dim, eps=norm_eps)
        self.output = nn.Linear(2 * dim, answers)
        initialise(self)

    def forward(self, states: Tensor) -> Tensor:
        """(T, D) states to (T, A) logits."""
        logits: Tensor = self.output(F.gelu(self.norm(self.hidden(states))))
        return logits
