"""Randomness by key: what happens to a sample depends on what it is, never on which process reads it or when."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def keyed_seed(*parts: int | str) -> int:
    """An unsigned 64-bit seed for `parts`, by convention (seed, epoch, source, key, purpose): blake2b of them.

    The order and the kinds count: (1, "2"), (1, 2) and (12,) give different seeds.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def keyed_generator(*parts: int | str) -> torch.Generator:
    """A new CPU generator seeded by `parts`, see keyed_seed."""
    return torch.Generator().manual_seed(keyed_seed(*parts))


@contextmanager
def keyed_random(*parts: int | str) -> Iterator[None]:
    """Runs a block under the global CPU generator seeded by `parts` and puts its state back after: torchvision's transforms know no other generator.

    Only the CPU generator: `torch.manual_seed` would queue a call for CUDA each time where that is not started.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(keyed_seed(*parts))
    try:
        yield
    finally:
        torch.set_rng_state(state)
