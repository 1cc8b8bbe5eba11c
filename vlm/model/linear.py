"""`Linear` as torch's, faster where a CPU decodes a caption: few rows, large weights.

Letters: D inputs, O outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = range(1, 6)  # rows; more are not safely faster turned round
LARGE = 1 << 17  # numbers in a weight; of a smaller one, one row is not faster in blocks


class Linear(nn.Linear):
    """torch's `Linear`, by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) -> (..., O)."""
        return linear(input, self.weight, self.bias)


def linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`: states (..., D), weight (O, D), bias (O,) or None -> (..., O).

    A beam search of one image has a row a beam, greedy decoding one row, and all weights are read for each token: what counts is how fast. In fp32
    torch's CPU product of three rows with the weight reads it at 5 GB/s, that of the weight with them, as columns, at 16. One row's product reads it
    at 13 GB/s, a batched one of the weight's blocks at 23 (AMD EPYC, two threads; benchmarks/few_rows.py).
    """
    if not _chooses(states, weight) or (rows := states.numel() // states.shape[-1]) not in FEW:
        return F.linear(states, weight, bias)
    columns = states.reshape(rows, -1).t()
    if rows > 1:
        turned = weight @ columns if bias is None else torch.addmm(bias.unsqueeze(1), weight, columns)
        return turned.t().contiguous().view(*states.shape[:-1], -1)
    # Compiled, blocks lose the layout of their column, and with it more than they gain.
    if weight.numel() < LARGE or torch.compiler.is_compiling() or (count := _blocks(len(weight))) is None:
        return F.linear(states, weight, bias)
    blocks, columns = weight.unflatten(0, (count, -1)), columns.expand(count, -1, -1)
    product = blocks @ columns if bias is None else torch.baddbmm(bias.view(count, -1, 1), blocks, columns)
    return product.view(*states.shape[:-1], -1)


def _blocks(outputs: int) -> int | None:
    """Into how many equal blocks: one for each thread, two at least; where they cannot be equal a few more, or as many as there can be; None where
    none of these divide the outputs."""
    least = max(torch.get_num_threads(), 2)
    return next((n for n in (*range(least, 4 * least + 1), *range(least - 1, 1, -1)) if outputs % n == 0), None)


def _chooses(states: Tensor, weight: Tensor) -> bool:
    """Whether the way is free: fp32 on a CPU, weights of no other kind (int8), no gradient to come, no export."""
    return (
        not torch.is_grad_enabled()
        and states.is_cpu
        and states.dtype == weight.dtype == torch.float32
        and type(weight) in (nn.Parameter, Tensor)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
    )
