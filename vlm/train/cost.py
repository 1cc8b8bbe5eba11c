"""What training costs: operations of a sample, counted while the first step is made, the device's peak, and the memory that was needed."""

import resource
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vlm.train.distributed import Ranks

PEAKS = {
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100 PCIE": 112e12,
    "V100": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Operations a second of dense matrix products in bf16 or fp16 with sums in fp32, by what NVIDIA's name of the device contains, the first that fits.

From NVIDIA's data sheets (H200, H100, A100, L40S, L4, V100: "Tensor Core", without sparsity, of the SXM forms unless named) and its white papers on
the GA102 and Ada architectures, appendix A (RTX 3090, RTX 4090: FP16 with FP32 accumulate).
"""
OTHERS = {"Ti", "D", "SUPER", "Laptop", "MIG"}
"""Words in the names of devices that are slower or faster than the one they are named after, and of parts of one."""


def peak(name: str, precision: str) -> float | None:
    """Operations a second that the device of this name (`torch.cuda.get_device_name`) reaches at most in half precision; None where unknown.

    A V100 has no bf16; fp32 runs on other units of each device, partly as TF32.
    """
    if precision == "fp32" or (precision == "bf16" and "V100" in name):
        return None
    words = name.replace("-", " ").split()
    if OTHERS & set(words):
        return None
    return next((value for part, value in PEAKS.items() if f" {part} " in f" {' '.join(words)} "), None)


class Operations(TorchDispatchMode):
    """Counts floating-point operations of what runs inside, 2 a multiply-add; results and random numbers are as without it.

    The formulas are torch's; attention counts by its definition, and what activation checkpointing computes again in a backward pass does not count.
    torch's own counter also follows modules by hooks and splits operations up, which a run that goes on must not have.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._backward = False

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Around a backward pass."""
        self._backward = True
        try:
            yield
        finally:
            self._backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(getattr(func, "_overloadpacket", None))
        # Gradients are computed without gradients of their own: where they are on in a backward pass, something is computed again.
        if formula is not None and not (self._backward and torch.is_grad_enabled()):
            count = formula(*args, **(kwargs or {}), out_val=result)
            name = func._overloadpacket.__name__
            if name == "convolution_backward" and not args[7]:  # not a transposed one
                count = convolution_gradients(args[0].shape, args[2].shape, args[10])
            if name.startswith("_scaled_dot_product") and name.endswith("_backward"):
                count = count * 4 // 5  # of its five matrix products the first one computes the scores again
            self.count += count
        return result


def convolution_gradients(gradient: torch.Size, weight: torch.Size, wanted: Sequence[bool]) -> int:
    """Operations for the gradients that are wanted (of the input, the weight, the bias), each as many as forward.

    torch's own count takes a grouped convolution for a full one. gradient: (B, C, ...) of the output. weight: (C, inputs of a group, ...).
    """
    return sum(wanted[:2]) * 2 * gradient.numel() // gradient[1] * weight.numel()


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors have held on a GPU, the largest resident size of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size  # macOS counts bytes, Linux kibibytes


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes that these tensors hold on this device: of one that is divided among ranks, this rank's part."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in local if isinstance(tensor, Tensor))


class Cost:
    """Counts the operations of the first micro-batch that a run computes, and says from then on how well the device is used.

    measures: also what the forward pass keeps for the backward pass, for a dry run.
    """

    def __init__(self, ranks: Ranks, precision: str) -> None:
        self.ranks = ranks
        self.name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU"
        self.peak = peak(self.name, precision)
        self.per_sample: float | None = None
        self.samples = 0  # of the micro-batch that was counted
        self.measures = False
        self.activations: dict[int, int] = {}  # bytes, by the address of the storage
        self._operations: Operations | None = None

    @contextmanager
    def counting(self, samples: int) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch of so many samples; only the first one is counted."""
        if self.per_sample is not None:
            yield
            return
        self._operations = Operations()
        with self._operations:
            yield
        self.per_sample, self.samples, self._operations = self._operations.count / samples, samples, None

    def forward(self) -> AbstractContextManager[Any]:
        """Around the forward pass inside `counting`."""
        if self._operations is None or not self.measures:
            return nullcontext()
        return saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def backward(self) -> AbstractContextManager[Any]:
        """Around the backward pass inside `counting`."""
        return nullcontext() if self._operations is None else self._operations.backward()

    def _keep(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            self.activations[storage.data_ptr()] = storage.nbytes()
        return tensor

    def figures(self, samples_per_second: float) -> dict[str, float]:
        """Operations a second of one device (tflops), as a share of its peak where that is known (mfu), and the memory that was needed (memory_gib).

        samples_per_second: of all ranks.
        """
        found = {"memory_gib": peak_memory(self.ranks.device) / 2**30}
        if self.per_sample is not None:
            rate = self.per_sample * samples_per_second / self.ranks.world
            found["tflops"] = rate / 1e12
            if self.peak is not None:
                found["mfu"] = rate / self.peak
        return found
