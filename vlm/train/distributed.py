"""Ranks under torchrun: one process a device, gloo on CPUs, NCCL on GPUs; a single process without it."""

import os
import secrets
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from vlm.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process's place. device: where it computes."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and lines."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; every rank must ask. The processors tell each other, so that nobody waits for a GPU to end its step."""
        if self.world == 1:
            return flag
        value = torch.tensor(float(flag))
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def gather(self, items: list[Any]) -> list[Any]:
        """All ranks' items in rank order, on every rank."""
        if self.world == 1:
            return items
        parts: list[list[Any]] = [[] for _ in range(self.world)]
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.world > 1:
            dist.barrier()


def start(device: str | None = None) -> Ranks:
    """Joins the process group that torchrun's variables describe, if any. device: cpu or cuda; by default a GPU where there is one."""
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    place = torch.device("cuda", local) if kind == "cuda" else torch.device(kind)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world > 1 and not dist.is_initialized():
        # With GPUs gloo as well: what the processors tell each other (lengths, names) does not wait for a device.
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        store, _, _ = next(rendezvous("env://"))
        store = PrefixStore(meet(store, rank, world), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return Ranks(rank, world, place)


def meet(store: Store, rank: int, world: int, patience: timedelta = timedelta(minutes=30)) -> str:
    """A name, the same on all ranks, that only the present processes know.

    torchrun keeps one store over restarts (seen in PyTorch 2.15): under the same names stand the addresses of processes that are dead, and a new one
    that reads them before they are overwritten cannot connect. The number of restarts is no such name, as machines count their own. patience: how
    long the first rank waits for the others.

    Raises:
        UserError: a rank did not come.
    """
    own = secrets.token_hex(8)
    if rank > 0:
        store.set(f"hello/{rank}", own)
        name: str = store.get(f"welcome/{own}").decode()
        store.set(f"joined/{name}/{rank}", "")
        return name
    waiting, end = set(range(1, world)), time.monotonic() + patience.total_seconds()
    while waiting:
        # A greeting may be that of a dead process, so the first rank goes on answering until all have joined this very meeting.
        for other in sorted(waiting):
            if store.check([f"joined/{own}/{other}"]):
                waiting.remove(other)
            elif store.check([f"hello/{other}"]):
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", own)
        if time.monotonic() > end:
            raise UserError(f"ranks {sorted(waiting)} of {world} did not start; see what torchrun says of them.")
        time.sleep(0.01)
    return own


def stop() -> None:
    """Leaves the process group."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
