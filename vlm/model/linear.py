"""`Linear` as torch's, faster where a CPU decodes a caption: few rows, large weights.

Letters: D inputs, O outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = range(2, 6)  # rows; one alone is a matrix-vector product either way, and more are not safely faster turned round


class Linear(nn.Linear):
    """torch's `Linear`, by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) -> (..., O)."""
        return linear(input, self.weight, self.bias)


def linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`: states (..., D), weight (O, D), bias (O,) or None -> (..., O).

    A beam search of one image has a row a beam, and all weights are read for each token: what counts is how fast. In fp32 torch's CPU product of a
    few rows with the weight reads it at 6 GB/s where the product of the weight with them, as columns, reads it at 18 (AMD EPYC, two threads, 3 rows;
    benchmarks/few_rows.py).
    """
    if not _turns(states, weight) or states.numel() // states.shape[-1] not in FEW:
        return F.linear(states, weight, bias)
    columns = states.flatten(0, -2).t()
    turned = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
    return turned.t().contiguous().view(*states.shape[:-1], -1)


def _turns(states: Tensor, weight: Tensor) -> bool:
    """Whether it may be turned round: fp32 on a CPU, weights of no other kind (int8), no gradient to come, no export."""
    return (
        states.is_cpu
        and states.dtype == weight.dtype == torch.float32
        and type(weight) in (Tensor, nn.Parameter)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
    )
