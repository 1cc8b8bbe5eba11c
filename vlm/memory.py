"""The C allocator's manners on a CPU: freed memory is kept for the next step instead of being given back to the system."""

import ctypes
import os
import sys

# <malloc.h> of glibc
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """From here on large tensors come from the heap, which does not shrink; whether the C library could be told so.

    By default glibc maps each large block anew and unmaps it when freed, so that a training step on a CPU spends about a tenth of its time
    on page faults (benchmarks/cpu_training.py). The heap stays as large as it has been at its largest. What the user has set by
    glibc's own environment variables stays.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1), mallopt(M_TOP_PAD, 64 * 2**20)])


def release_freed_memory() -> None:
    """Gives freed memory back once, before processes are forked: they would keep their copies of its pages when this one writes to them again."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
