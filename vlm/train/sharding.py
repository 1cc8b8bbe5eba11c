"""How a task is spread over ranks: whole on each (DDP), or in pieces (FSDP2: each rank keeps its share of every weight, gradient and moment).

In pieces, a unit's weights are gathered when its forward pass starts and let go behind it; a unit is a block of the image encoder, a layer of a text
Transformer, or, together, the rest of the task. Ranks must gather in the same order: what runs a different number of times on each (texts by length
on a CPU) is no unit of its own, and evaluation, whose captions end at different lengths, runs on a model in one piece.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from vlm.errors import ConfigError
from vlm.tasks.task import Task
from vlm.train.distributed import Ranks


class Sharding:
    """Wraps `task`, whose optimizer and averages are made afterwards.

    Attributes: `module`, what is called in place of the task.
    """

    def __init__(self, task: Task, ranks: Ranks, kind: Literal["ddp", "fsdp"]) -> None:
        """Raises ConfigError where the ranks would make different passes, which FSDP2 cannot follow."""
        self.ranks = ranks
        self.module: nn.Module = task
        self._copy: nn.Module | None = None
        self._alone: list[nn.Parameter] = []
        if ranks.world == 1:
            return
        if kind == "ddp":
            devices = [ranks.device.index] if ranks.device.type == "cuda" else None
            # PyTorch's newer name for it, whose older one warns at every start.
            known = inspect.signature(DistributedDataParallel).parameters
            name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            buffers: dict[str, Any] = {name: False}
            self.module = DistributedDataParallel(task, device_ids=devices, find_unused_parameters=True, **buffers)
            return
        _check(task)
        self._copy = copy.deepcopy(task.model).requires_grad_(False).cpu()
        self._mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        sharded = _sharded_parameters(task)
        kept = {parameter for parameter in task.parameters() if parameter not in sharded}
        # FSDP2 leaves out what has no dimension to divide, such as the temperature: their gradients are averaged here.
        self._alone = [parameter for parameter in task.parameters() if parameter in kept and parameter.requires_grad]
        for parameter in sharded:  # convolutions come with their channels last, which FSDP2 does not divide
            parameter.data = parameter.data.contiguous()
        for unit in list(_units(task, sharded, ranks.device)):
            fully_shard(unit, mesh=self._mesh)
        fully_shard(task, mesh=self._mesh, ignored_params=kept)
        register_fsdp_forward_method(task, "embed")

    def no_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Around a micro-batch: DDP adds gradients up on each rank before the last one; in pieces there is no room for that."""
        if last or not isinstance(self.module, DistributedDataParallel):
            return nullcontext()
        return self.module.no_sync()

    def reduce(self) -> None:
        """After the last backward pass of a step: the gradients that the wrapper leaves to us."""
        for parameter in self._alone:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.ranks.world

    def share(self, model: nn.Module, like: nn.Module) -> None:
        """Leaves of a whole copy of the model this rank's pieces, divided as those of `like` are."""
        for name, parameter in like.named_parameters():
            if isinstance(parameter, DTensor):
                owner, _, own = name.rpartition(".")
                piece = nn.Parameter(part_of(model.get_parameter(name).detach(), parameter), requires_grad=False)
                model.get_submodule(owner).register_parameter(own, piece)

    @torch.no_grad()
    def whole(self, model: nn.Module) -> nn.Module:
        """The model in one piece, on every rank: itself, or a copy on the processor that the next call overwrites. Every rank must ask."""
        if self._copy is None:
            return model
        own = self._copy.state_dict()
        for name, tensor in model.state_dict().items():
            own[name].copy_(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
        return self._copy


def part_of(value: Tensor, like: Tensor | None) -> Tensor:
    """This rank's piece of a whole tensor where `like`, of the same shape, is in pieces; otherwise the tensor, laid out in memory as `like` is:
    fused optimizers walk through weights and moments side by side.
    """
    if like is None or isinstance(value, DTensor) or value.shape != like.shape:
        return value
    if isinstance(like, DTensor):  # every rank holds the same, nothing is sent
        whole = value.to(like.device).contiguous()
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return value if value.stride() == like.stride() else torch.empty_like(like, dtype=value.dtype).copy_(value)


def local(tensor: Tensor) -> Tensor:
    """This rank's piece, or the tensor itself: what elementwise arithmetic between tensors divided alike needs."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def total_norm(norm: Tensor) -> Tensor:
    """A norm over pieces as the number that it is on every rank."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _check(task: Task) -> None:
    """The answers of a mixed batch, and captions drawn in training, take other passes on each rank."""
    for name in {"answering", "self_critical"} & set(task.objectives):
        raise ConfigError(
            f"train.sharding=fsdp: the ranks make different passes through the text layers for {name}, which FSDP2 cannot follow; use ddp."
        )


def _sharded_parameters(task: Task) -> set[nn.Parameter]:
    """What is trained, and the teacher's copies of it. Frozen weights stay whole: they have neither gradients nor moments."""
    trained = {name for name, parameter in task.model.named_parameters() if parameter.requires_grad}
    models = [module for module in task.modules() if type(module) is type(task.model)]
    found = {p for model in models for name, p in model.named_parameters() if name in trained}
    found |= {p for p in task.learned.parameters() if p.requires_grad}
    return {parameter for parameter in found if parameter.ndim > 0}


def _units(task: Task, sharded: set[nn.Parameter], device: torch.device) -> Iterator[nn.Module]:
    """The outermost of several modules of a kind that follow each other, sharded as a whole: layers, blocks, stages."""
    taken: list[str] = []
    for name, module in task.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or any(name.startswith(f"{t}.") for t in taken):
            continue
        if not _same_on_every_rank(name, device):
            continue
        children = dict(module.named_children())
        if len({type(child) for child in children.values()}) != 1 or len(children) < 2:
            continue
        for key, child in children.items():
            parameters = set(child.parameters())
            if parameters and parameters <= sharded and any(True for _ in child.children()):
                taken.append(f"{name}.{key}")
                yield child


def _same_on_every_rank(name: str, device: torch.device) -> bool:
    """Whether a part runs equally often on every rank. `vlm.model.lengths` runs texts by length on a CPU."""
    return device.type != "cpu" or ".image_encoder." in f".{name}."
