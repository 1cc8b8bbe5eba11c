"""Dropout that does not wait for its random numbers on a CPU."""

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """As `torch.nn.Dropout`; on a CPU the mask is drawn by bytes, of which a 64-bit random number holds eight.

    There PyTorch draws a number of 64 bits and more for each element, one after another, which took a tenth of a training step of a small model.
    Compiled, it is torch's own, whose numbers are drawn inside the loop that uses them.

    A byte makes the probability a multiple of 1/256; what is kept is scaled by that probability, so the expectation is exact.
    """

    def forward(self, states: Tensor) -> Tensor:
        """Any shape, which is kept."""
        if not self.training:
            return states  # torch's own asks the dispatcher first, 36 times a token of a caption
        if self.p == 0 or states.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(states)
        threshold = min(max(round(self.p * 256), 1), 255)
        words = torch.empty(-(-states.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        kept = words.view(torch.uint8)[: states.numel()].view(states.shape) >= threshold
        return states * (kept.to(states.dtype) * (256 / (256 - threshold)))
