"""torch.compile for training: of the parts that take the time, in place, so that weights keep their names and evaluation runs as it is."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch._dynamo
from torch import nn

from vlm.tasks.task import Task

LIMIT = 64
"""Forms of one part that are compiled at most: a text stack runs with and without the image, causal, for the teacher, in a few lengths each."""


def compile_parts(task: Task, backend: str = "inductor") -> list[nn.Module]:
    """Compiles the parts that `task` names; they are compiled when they first run, and again for a new form of their input.

    What lies between them (choosing negatives, the queue, grouping texts by length on a CPU) would break the graph of a whole task in dozens of
    places, and takes no time. Sizes that change become symbols after their second value. Gradients' hooks (DDP's) stay where they are.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, LIMIT)  # type: ignore[attr-defined]
    parts = task.heavy_parts()
    for part in parts:
        part.compile(backend=backend)
    return parts


@contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled modules run as they are written: an evaluation has other shapes, and few of each."""
    with torch.compiler.set_stance("force_eager"):
        yield


@dataclass(frozen=True)
class Compiled:
    """What was compiled since `watch_compiling` began. graphs: in all. again: of these for another form of what was compiled already. breaks: places
    that cannot be compiled, with how often they were met."""

    graphs: int
    again: int
    breaks: Counter[str]

    def __str__(self) -> str:
        places = f" ({'; '.join(f'{n} x {why}' for why, n in self.breaks.most_common(3))})" if self.breaks else ""
        again = f"{self.again} recompilations for another form of input"
        return f"torch.compile: {self.graphs} graphs, {again}, {self.breaks.total()} graph breaks{places}"


@contextmanager
def watch_compiling(found: list[Compiled]) -> Iterator[None]:
    """Adds to `found` what is compiled inside."""
    utils = torch._dynamo.utils
    utils.counters.clear()
    utils.set_compilation_metrics_limit(100_000)
    utils.clear_compilation_metrics()
    yield
    breaks = Counter({reason.strip().split("\n")[0]: count for reason, count in utils.counters["graph_break"].items()})
    again = sum(1 for frame in utils.get_compilation_metrics() if frame.cache_size)  # None: of a backward pass
    found.append(Compiled(utils.counters["stats"]["unique_graphs"], again, breaks))
