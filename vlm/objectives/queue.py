"""The queue of momentum features (He et al. 2020, MoCo; Li et al. 2021, ALBEF). Letters: K slots, N pairs, E width of the embeddings."""

import torch
from torch import Tensor, nn

from vlm.objectives.pairs import Pairs


class FeatureQueue(nn.Module):
    """The last K pairs that took part, with the identities of their images.

    It starts empty: a slot that nothing was written to is not valid, so that no random feature is ever a negative. Any number of pairs may come at
    a time. Nothing waits for the device.
    """

    image: Tensor
    text: Tensor
    ids: Tensor
    pushed: Tensor

    def __init__(self, size: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.size = size
        # The slot behind the last one takes what is not to be kept: leaving it out would need its number on the processor.
        self.register_buffer("image", torch.zeros(size + 1, dim, dtype=dtype))
        self.register_buffer("text", torch.zeros(size + 1, dim, dtype=dtype))
        self.register_buffer("ids", torch.zeros(size + 1, dtype=torch.long))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.long))  # pairs ever kept

    def pairs(self) -> Pairs:
        """All K slots."""
        valid = torch.arange(self.size, device=self.pushed.device) < self.pushed
        return Pairs(self.image[:-1], self.text[:-1], self.ids[:-1], valid)

    @torch.no_grad()
    def push(self, new: Pairs) -> None:
        """Writes the valid ones of N pairs, in order, over the oldest; of more than K the last K."""
        count = new.valid.cumsum(0)
        kept = new.valid & (count > count[-1] - self.size)
        slots = torch.where(kept, (self.pushed + count - 1) % self.size, self.size)
        self.image.index_copy_(0, slots, new.image.to(self.image.dtype))
        self.text.index_copy_(0, slots, new.text.to(self.text.dtype))
        self.ids.index_copy_(0, slots, new.ids)
        self.pushed += count[-1]
