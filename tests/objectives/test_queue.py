"""The queue of momentum features: what it holds after any number of pushes, and that it starts empty."""

import pytest
import torch
from torch.profiler import profile

from vlm.objectives.pairs import Pairs
from vlm.objectives.queue import FeatureQueue


def numbered(first: int, count: int, valid: list[bool] | None = None) -> Pairs:
    """Pairs whose features say which ones they are."""
    number = torch.arange(first, first + count)
    return Pairs(
        number[:, None].expand(-1, 3).float(),
        -number[:, None].expand(-1, 3).float(),
        number * 10,
        torch.ones(count, dtype=torch.bool) if valid is None else torch.tensor(valid),
    )


def held(queue: FeatureQueue) -> list[int]:
    """The pairs in it from the oldest to the newest, each part checked against the others."""
    content = queue.pairs()
    assert len(content.valid) == queue.size
    order = (torch.arange(queue.size) + queue.pushed) % queue.size
    order = order[content.valid[order]]
    number = content.image[order, 0].long()
    assert torch.equal(content.image[order], number[:, None].expand(-1, 3).float())
    assert torch.equal(content.text[order], -content.image[order])
    assert torch.equal(content.ids[order], number * 10)
    return number.tolist()


@pytest.mark.parametrize("counts", [[3] * 12, [7, 7, 7], [2, 5, 1, 9, 4, 12, 3], [30], [5, 40, 1]])
def test_it_holds_the_last_ones_in_order_after_several_rounds(counts: list[int]) -> None:
    queue, pushed = FeatureQueue(7, 3), 0
    assert held(queue) == []
    for count in counts:
        queue.push(numbered(pushed, count))
        pushed += count
        assert held(queue) == list(range(max(0, pushed - 7), pushed))


def test_no_slot_is_written_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU would write in any order."""
    original, seen = torch.Tensor.index_copy_, 0

    def index_copy(self: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += 1
        real = index[index < 7]
        assert len(real.unique()) == len(real)
        return original(self, dim, index, source)

    monkeypatch.setattr(torch.Tensor, "index_copy_", index_copy)
    queue = FeatureQueue(7, 3)
    for count in (5, 20):
        queue.push(numbered(0, count))
    assert seen == 6


def test_what_takes_no_part_takes_no_slot() -> None:
    queue = FeatureQueue(4, 3)
    queue.push(numbered(0, 3, [True, False, True]))
    assert held(queue) == [0, 2]
    queue.push(numbered(3, 2, [False, False]))
    assert held(queue) == [0, 2]
    queue.push(numbered(5, 9, [True, False] * 4 + [True]))
    assert held(queue) == [7, 9, 11, 13]


def test_nothing_waits_for_the_device() -> None:
    queue = FeatureQueue(5, 3)
    with profile() as profiled:
        queue.push(numbered(0, 3, [True, False, True]))
        queue.pairs()
    used = {event.name for event in profiled.events()}
    assert "aten::index_copy_" in used
    assert not used & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}
