"""The allocator keeps what was freed: tried in processes of their own, as it cannot be undone."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from vlm.memory import keep_freed_memory
print(keep_freed_memory())
def step():
    return torch.ones(16, 1024, 1024).mul(2).sum()
for _ in range(4):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


RESIDENT = """
import torch
from vlm.memory import keep_freed_memory, release_freed_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
keep_freed_memory()
first = resident()
small = []
for _ in range(8):
    large = torch.ones(16, 1024, 1024)
    small.append(torch.ones(1000))  # between the large ones, so that the heap cannot shrink at its end
    large = large.mul(2)
    del large
big = [torch.ones(16, 1024, 1024) for _ in range(8)]
small.append(torch.ones(1000))
del big
print(resident() - first)
release_freed_memory()
print(resident() - first)
"""


def run(program: str, **variables: str) -> str:
    """What the program prints."""
    environment = {**{k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}, **variables}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout


def faults(**variables: str) -> tuple[bool, int]:
    """Whether it was told, and the page faults of three later steps of 128 MiB each."""
    told, count = run(FAULTS, **variables).split()
    return told == "True", int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_later_steps_take_few_new_pages() -> None:
    (told, count), (untold, usual) = faults(), faults(MALLOC_TOP_PAD_="0")  # the user's own settings stay
    assert (told, untold) == (True, False)
    assert usual > 3 * 32768
    assert count < usual / 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_what_was_freed_can_be_given_back() -> None:
    held, left = map(int, run(RESIDENT).split())
    assert held > 500 * 2**20
    assert left < held - 450 * 2**20
