"""Bad samples of several processes: their share over all ranks decides, as in one process, and all ranks say the same."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import yaml

from vlm.cli import main
from vlm.data.loader import Loader
from vlm.data.order import EpochOrder
from vlm.data.shards import ShardSet, ShardWriter, load_index
from vlm.data.synthetic import draw_scene
from vlm.errors import UserError
from vlm.train.report import read_json_lines

MakeLoader = Callable[..., Loader]
WriteSet = Callable[..., ShardSet]
BATCH, STREAMS, SCENES = 16, 4, 208
SETTINGS: dict[str, Any] = {
    "task": "captioning",
    "model": {
        "image": {"name": "resnet10t", "image_size": 32, "stages": 2},
        "text": {
            "dim": 32,
            "heads": 2,
            "layers": 1,
            "feed_forward_dim": 32,
            "max_positions": 48,
            "cross_attention": [0],
        },
        "embed_dim": 16,
    },
    "tokenizer": {"vocab_size": 120},
    "data": {"batch_size": BATCH, "streams": STREAMS, "workers": 0, "max_tokens": 32, "randaugment": None},
    "optimizer": {"lr": 1e-3, "warmup_steps": 2},
    "train": {"epochs": 1, "precision": "fp32", "log_every": 5},
    "generation": {"beams": 1, "max_length": 6, "min_length": 1},
}
# Each rank keeps what every command said and left with.
SCRIPT = """
import contextlib, io, json, os, sys
from pathlib import Path
from vlm.cli import main
found = {}
for name, arguments in json.loads(Path(sys.argv[1]).read_text()).items():
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(arguments)
    found[name] = code, said.getvalue()
Path(f"{sys.argv[1]}.{os.environ['RANK']}").write_text(json.dumps(found))
"""


def on_all(loaders: list[Loader]) -> list[str]:
    """What each rank says once it has read an epoch, all at the same time."""
    given: list[list[Any]] = [[] for _ in loaders]
    met = Barrier(len(loaders), timeout=20)

    def one(rank: int) -> str:
        def gather(items: list[Any]) -> list[Any]:
            given[rank] = items
            met.wait()
            return [item for part in given for item in part]

        for _ in loaders[rank].iterate(0):
            pass
        try:
            loaders[rank].check(gather)
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(loaders)) as pool:
        return list(pool.map(one, range(len(loaders))))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("world", [2, 4])
def test_the_share_of_all_ranks_decides(
    write_set: WriteSet, make_loader: MakeLoader, world: int, training: bool
) -> None:
    """One rank's share is beyond the limit in the first set; in the second that of all is, though most ranks' shares are not."""
    # in the order of the files, and of one stream a rank, record i is rank i % world's
    few = write_set("few", 480, 100, broken=range(0, 24 * world, world))
    many = write_set("many", 480, 100, broken=range(0, 60 * world, world))
    for shards, bad in ((few, 24), (many, 60)):
        each = [make_loader(shards, rank=r, world=world, training=training, batch_size=8) for r in range(world)]
        if training:
            limit = bad / 480 + (0.001 if shards is few else -0.001)
            each = [
                make_loader(shards, rank=r, world=world, batch_size=8, max_bad_fraction=limit) for r in range(world)
            ]
        told = on_all(each)
        assert len(set(told)) == 1
        if shards is few:
            assert told[0] == ""
            continue
        assert told[0].startswith(f"{bad} of 480 samples cannot be used ({bad} x undecodable image), more than max_bad")
        assert "For example: record " in told[0]


def test_an_evaluation_of_which_one_rank_can_use_nothing_goes_on(write_set: WriteSet, make_loader: MakeLoader) -> None:
    half = [make_loader(write_set("half", 2, broken=[1]), rank=r, world=2, training=False) for r in range(2)]
    assert on_all(half) == ["", ""]
    none = [make_loader(write_set("none", 2, broken=[0, 1]), rank=r, world=2, training=False) for r in range(2)]
    told = on_all(none)
    assert told[0] == told[1]
    assert told[0].startswith("2 of 2 samples cannot be used (2 x undecodable image)")


def test_ranks_whose_data_are_all_bad_end(write_set: WriteSet, make_loader: MakeLoader) -> None:
    shards = write_set("all", 40, broken=range(40))
    for rank in range(2):
        with pytest.raises(UserError, match=r"40 samples were tried and none can be used"):
            next(make_loader(shards, rank=rank, world=2).iterate(0))


def write_scenes(folder: Path, bad: set[int], count: int) -> ShardSet:
    with ShardWriter(folder, folder.name, 50) as writer:
        for i in range(count):
            scene, data = draw_scene(i, 32), BytesIO()
            scene.image.save(data, "PNG")
            writer.write(f"s{i:03d}", b"none" if i in bad else data.getvalue(), "png", scene.captions, image_id=i)
    return load_index(folder)


def of_rank(shards: ShardSet, rank: int, count: int) -> set[int]:
    """So many of the scenes that one of two ranks reads in the first epoch."""
    order = EpochOrder([shards], 0, 0, STREAMS, 1000)
    places = [p for p in range(SCENES) if p % 2 == rank]
    found = [order.place(p % STREAMS, p // STREAMS) for p in places]
    return {int(place.shard.name[6:12]) * 50 + place.number for place in found[:count]}


def test_two_processes_decide_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training and an evaluation in which only one rank meets bad samples, many of its own and few of all; and both with too many."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    bad = of_rank(write_scenes(tmp_path / "train", set(), SCENES), 1, 15)
    write_scenes(tmp_path / "train", bad, SCENES)
    for name, broken in (("half", {1}), ("none", {0, 1})):
        write_scenes(tmp_path / name, broken, 2)
    train, commands = [str(tmp_path / "train")], {}

    def settings(name: str, **data: Any) -> str:
        values = {**SETTINGS, "out": str(tmp_path / name / "run"), "data": {**SETTINGS["data"], **data}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
        return str(tmp_path / f"{name}.yaml")

    for name, limit in (("few", 0.1), ("many", 0.05)):
        commands[f"train {name}"] = ["train", settings(name, splits={"train": train}, max_bad_fraction=limit)]
    for name in ("half", "none"):
        file = settings(name, splits={"train": train, "val": [str(tmp_path / name)]}, allow_overlap=True)
        given = ["--checkpoint", str(tmp_path / "few/run/latest"), "--split", "val"]
        commands[f"evaluate {name}"] = ["evaluate", file, *given, "--out", str(tmp_path / f"{name}.of2")]
    (tmp_path / "commands").write_text(json.dumps(commands))
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = [Path(sys.executable).parent / "torchrun", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*torchrun, tmp_path / "script.py", tmp_path / "commands"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = [json.loads((tmp_path / f"commands.{rank}").read_text()) for rank in range(2)]
    for rank in range(2):
        assert {name: code for name, (code, _) in said[rank].items()} == {
            "train few": 0,
            "train many": 1,
            "evaluate half": 0,
            "evaluate none": 1,
        }, said[rank]
    for name, sums in (("train many", "15 of 160 "), ("evaluate none", "2 of 2 ")):
        first, second = (said[rank][name][1].splitlines()[-1] for rank in range(2))
        assert first == second
        assert f"{sums}samples cannot be used" in first, first
    lines = read_json_lines(tmp_path / "few/run/log.jsonl")
    assert sum(line["filled"] for line in lines) == 15
    alone = [*commands["evaluate half"][:-1], str(tmp_path / "half.of1")]
    assert main(alone) == 0
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("half.of1", "half.of2"))
    assert one["scores"] == two["scores"]
    assert one["scores"]["half"]["left_out"] == 1
