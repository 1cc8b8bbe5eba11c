"""How well an epoch is shuffled, and what planning and resuming one costs at scale: python benchmarks/shuffle.py [--streams 64 1024] [--block 1000]

Quality: the order of 1,000 shards x 1,000 records beside a full permutation of them and beside the files' own order, the worst there is. The source
order stands for whatever a set is sorted by (class, site, day).
Cost: 100,000 shards x 10,000 records for 512 ranks: the index read, an epoch planned, and the batch in its middle found, by one rank alone and by all
ranks together; every step in a process of its own, with processor seconds and the memory by which it grew (Linux).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

RANKS = 512


def main() -> int:
    parser = argparse.ArgumentParser(description="How well an epoch is shuffled, and what planning one costs.")
    parser.add_argument(
        "--streams", type=int, nargs="+", default=[64, 1024], metavar="S", help="of the orders measured (%(default)s)"
    )
    parser.add_argument("--block", type=int, default=1000, metavar="N", help="records permuted together (%(default)s)")
    parser.add_argument("--batch", type=int, default=256, metavar="B", help="records of a batch (%(default)s)")
    parser.add_argument("--shards", type=int, default=1000, metavar="N", help="of 1,000 records each (%(default)s)")
    parser.add_argument(
        "--simulated", type=int, default=100_000, metavar="N", help="shards of the simulation (%(default)s)"
    )
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    for name in ("streams", "block", "batch", "shards", "simulated"):
        if np.min(getattr(given, name)) < 1:
            parser.error(f"--{name} {getattr(given, name)}: give at least 1")
    if given.step:
        print(json.dumps(measured(given.step, given.folder)))
        return 0
    show_quality(given)
    show_cost(given.simulated)
    return 0


def show_quality(given: argparse.Namespace) -> None:
    """The measures of our orders, the best and the worst one of the same records."""
    count = given.shards * 1000
    orders = {f"S={s}, block {given.block}": our_order(given.shards, 1000, s, given.block) for s in given.streams}
    orders |= {
        "full permutation": np.random.default_rng(0).permutation(count),
        "order of the files": np.arange(count),
    }
    print(f"{given.shards:,} shards x 1,000 records, batches of {given.batch}")
    for name, order in orders.items():
        found = quality(order, 1000, given.batch)
        print(f"{name:<22} " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()))


def our_order(shards: int, samples: int, streams: int, block: int) -> NDArray[np.int64]:
    """The source numbers of an epoch's records in the order in which they are read."""
    from vlm.data.index import ShardInfo, ShardSet
    from vlm.data.order import EpochOrder

    infos = tuple(ShardInfo(str(i), samples, 1) for i in range(shards))
    order = EpochOrder([ShardSet("/", "s", infos)], 0, 0, streams, block)
    places = (order.place(p % streams, p // streams) for p in range(order.samples))
    return np.fromiter((int(p.shard.name) * samples + p.number for p in places), np.int64, order.samples)


def quality(order: NDArray[np.int64], samples: int, batch: int) -> dict[str, float]:
    """What a training could notice of an order of the records 0 .. N - 1; `samples` of a shard.

    distance: mean distance of neighbours in the source order, over N / 3, which a full permutation has. same shard: share of the pairs within a batch
    that come from one shard. spread: deviation of a batch's mean source place, over that of random batches. correlation: of the mean source places
    of a batch and the next.
    """
    count = len(order)
    whole = order[: count // batch * batch].reshape(-1, batch)
    means = whole.mean(1)
    shards = np.sort(whole // samples, axis=1)
    pairs = 0
    for row in shards:
        sizes = np.unique(row, return_counts=True)[1]
        pairs += int((sizes * (sizes - 1) // 2).sum())
    return {
        "distance": float(np.abs(np.diff(order)).mean() / (count / 3)),
        "same shard": pairs / (len(whole) * batch * (batch - 1) / 2),
        "spread": float(means.std() / (count / np.sqrt(12 * batch))),
        "correlation": float(np.corrcoef(means[:-1], means[1:])[0, 1]),
    }


def read_index(folder: str) -> tuple[object, float]:
    """The index, and processor seconds; so the next ones too."""
    from vlm.data.index import load_index

    start = time.process_time()
    return load_index(folder), time.process_time() - start


def plan(folder: str) -> tuple[object, float]:
    """An epoch's order as a training makes it, streams enough for four workers a rank."""
    from vlm.data.index import load_index
    from vlm.data.order import EpochOrder

    shards = load_index(folder)
    start = time.process_time()
    return EpochOrder([shards], 0, 3, 4 * RANKS), time.process_time() - start


def resume(folder: str, ranks: int) -> tuple[object, float]:
    """The middle batch of the epoch (64 records a rank), as the first `ranks` ranks find theirs after a restart, the index being read."""
    from vlm.data.index import load_index
    from vlm.data.order import EpochOrder, batch_places

    shards = load_index(folder)
    start = time.process_time()
    order = EpochOrder([shards], 0, 3, 4 * RANKS)
    step = order.samples // (64 * RANKS) // 2
    for rank in range(ranks):
        for p in batch_places(step, 64 * RANKS, order.samples, rank, RANKS):
            order.place(p % order.streams, p // order.streams)
    return order, time.process_time() - start


STEPS = {
    "the index read": read_index,
    "an epoch planned": plan,
    "planned and resumed in its middle by one rank": lambda folder: resume(folder, 1),
    "planned once, resumed by 512 ranks in turn": lambda folder: resume(folder, RANKS),
}


def measured(step: str, folder: str) -> dict[str, float]:
    """Seconds of a step alone; MiB by which the process grew from the imports on, with what the step needs."""
    import vlm.data.loader  # noqa: F401 (what a training has anyway)

    before = largest_memory()
    kept, seconds = STEPS[step](folder)
    grown = largest_memory() - before
    del kept
    return {"seconds": seconds, "mib": grown}


def largest_memory() -> float:
    """MiB; getrusage would tell that of the process which started this one, where it is larger."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024


def show_cost(shards: int) -> None:
    """Every step of the simulation in a process of its own, on empty files with a true index."""
    from vlm.data.index import ShardInfo, index_content
    from vlm.files import write_json

    print(f"{shards:,} shards x 10,000 records, {RANKS} ranks")
    with tempfile.TemporaryDirectory() as folder:
        infos = [ShardInfo(f"shard-{i:06d}.tar", 10_000, 10_000 * 50_000) for i in range(shards)]
        for info in infos:
            (Path(folder) / info.name).touch()
        write_json(Path(folder) / "index.json", index_content("simulated", infos))
        for step in STEPS:
            command = [sys.executable, __file__, "--step", step, "--folder", folder]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout)
            print(f"{step:<46} {found['seconds']:.2f} s, {found['mib']:.0f} MiB")


if __name__ == "__main__":
    sys.exit(main())
