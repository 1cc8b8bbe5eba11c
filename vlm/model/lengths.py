"""Texts run beside others of like length: on a CPU, where padding costs as much as words.

Letters: T texts, L tokens of the longest, D width.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_MULTIPLE = 8
_WORTH = 256


def reads_lengths(mask: Tensor) -> bool:
    """Whether lengths can be read without waiting for a device; an exported graph must not depend on those of its example."""
    return mask.device.type == "cpu" and not torch.compiler.is_exporting()


def by_length(mask: Tensor, run: Callable[[Tensor, int], Tensor], worth: int = _WORTH) -> Tensor:
    """What `run` gives for all texts, (T, L, D): run(rows (R,), length) -> (R, length, D) is called for the texts of each length, rounded up to a
    multiple of 8; behind them stand zeros. Captions and questions with answers differ in length, so half of a joint batch is padding.

    On another device than the CPU `run` is called once, for all texts: reading lengths would wait for the device. mask: (T, L) bool. worth: padding
    of fewer tokens is computed rather than saved by a call of its own, which reads all weights again and adds up their gradients.
    """
    texts, longest = mask.shape
    if not reads_lengths(mask) or texts == 0:
        return run(torch.arange(texts, device=mask.device), longest)
    position = torch.arange(1, longest + 1)
    lengths = (mask * position).amax(1).clamp(min=1)
    rounded = (-(-lengths // _MULTIPLE) * _MULTIPLE).clamp(max=longest)
    groups = list(_groups(rounded, worth))
    if len(groups) == 1 and groups[0][1] == longest:
        return run(groups[0][0], longest)
    parts = [F.pad(run(rows, length), (0, 0, 0, longest - length)) for rows, length in groups]
    return torch.cat(parts).index_select(0, torch.cat([rows for rows, _ in groups]).argsort())


def _groups(lengths: Tensor, worth: int) -> Iterator[tuple[Tensor, int]]:
    """Rows and the length they run at, from the shortest; those whose padding to the next length is below `worth` tokens go along with it."""
    waiting: list[int] = []
    padding, present = 0, lengths.unique().tolist()
    for length, longer in zip(present, [*present[1:], None], strict=True):
        waiting.append(length)
        rows = torch.isin(lengths, torch.tensor(waiting)).nonzero().squeeze(1)
        if longer is not None:
            padding += len(rows) * (longer - length)
            if padding < worth:
                continue
        yield rows, length
        waiting, padding = [], 0
