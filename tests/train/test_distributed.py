"""Two processes under torchrun, gloo on the CPU: the same run as one process over the same global batches, and the same evaluation."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from vlm.data.shards import ShardWriter
from vlm.data.synthetic import draw_scene
from vlm.errors import UserError
from vlm.evaluation import evaluate
from vlm.run import train
from vlm.settings import config_from_dict
from vlm.train import distributed
from vlm.train.distributed import Ranks
from vlm.train.report import read_json_lines

BIN = Path(sys.executable).parent
# In the contrastive loss every row meets the texts of all ranks, so it is the one that a mistake between ranks shows in first.
SETTINGS: dict[str, Any] = {
    "task": "pretraining",
    "objectives.matching": 0.0,  # draws negatives at random
    "objectives.captioning": 1.0,
    "model.text.dropout": 0.0,
    "model.text.attention_dropout": 0.0,
    "model.image.batch_norm": "frozen",
    "train.epochs": 0.7,
    "train.evaluate_images": 1000,
    "train.averaging": 0.5,
    "data.streams": 4,
}
# Both commands in the same processes: starting them takes longer than what they do.
SCRIPT = """
import sys
from vlm.cli import main
train, evaluation, checkpoint, out = sys.argv[1:]
sys.exit(main(["train", train]) or main(["evaluate", evaluation, "--checkpoint", checkpoint, "--split", "val", "--out", out]))
"""


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of eleven scenes of which three cannot be used."""
    folder = tmp_path_factory.mktemp("faulty") / "set"
    with ShardWriter(folder, "faulty") as writer:
        for i in range(11):
            scene, data = draw_scene(i, 32), BytesIO()
            scene.image.save(data, "PNG")
            image = b"no image" if i in (2, 3, 9) else data.getvalue()
            writer.write(f"scene{i}", image, "png", scene.captions, image_id=i)
    return folder


def test_two_ranks_learn_and_say_what_one_process_does(
    nested: Callable[..., dict[str, Any]],
    checkpoint: Callable[..., Path],
    scenes: Path,
    faulty: Path,
    tmp_path: Path,
) -> None:
    splits = {"data.splits.val": [f"{scenes}/val", str(faulty)]}
    alone, both = (nested({**SETTINGS, **splits, "out": str(tmp_path / name)}) for name in ("alone", "both"))
    bad = tmp_path / "bad"  # the same under another name, as no image of val may be trained on
    shutil.copytree(faulty, bad)
    (bad / "index.json").write_text((faulty / "index.json").read_text().replace("faulty", "bad"))
    for values in (alone, both):
        values["data"]["splits"]["train"].append(str(bad))
    train(config_from_dict(alone, "test"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(both))
    captions = nested({**splits, "data.allow_overlap": True, "data.batch_size": 6})
    (tmp_path / "captions.yaml").write_text(yaml.safe_dump(captions))
    (tmp_path / "commands.py").write_text(SCRIPT)
    captioner = checkpoint()
    command = [
        *(BIN / "torchrun", "--nproc-per-node", "2", "--standalone", tmp_path / "commands.py"),
        *(tmp_path / "config.yaml", tmp_path / "captions.yaml", captioner, tmp_path / "of_two"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2 x cpu") == 1  # one rank speaks
    one, two = (read_json_lines(tmp_path / name / "log.jsonl") for name in ("alone", "both"))
    assert [(line["kind"], line["step"]) for line in one] == [(line["kind"], line["step"]) for line in two]
    for a, b in zip(one[:-1], two[:-1], strict=True):
        assert set(a) == set(b)
        tolerance = 1e-4 if a["step"] == 1 else 2e-3  # rounding, which Adam makes larger
        names = [name for name in a if name.endswith("loss")]
        assert len(names) == 4
        assert {n: b[n] for n in names} == pytest.approx({n: a[n] for n in names}, abs=tolerance)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-3)
        assert {n: v for n, v in b.items() if n.startswith(("lr", "filled"))} == {
            n: v for n, v in a.items() if n.startswith(("lr", "filled"))
        }
    assert sum(line["filled"] for line in two[:-1]) > 0
    for name, count in (("scenes", 13), ("faulty", 8)):  # each record once
        assert one[-1]["scores"][name]["images"] == two[-1]["scores"][name]["images"] == count
    assert one[-1]["scores"]["faulty"]["left_out"] == two[-1]["scores"]["faulty"]["left_out"] == 3
    state = torch.load(tmp_path / "both" / "latest" / "training" / "state.pt", weights_only=True)
    assert state["step"] == 5
    assert len(state["random"]) == 2
    assert not torch.equal(state["random"][0]["cpu"], state["random"][1]["cpu"])
    metadata = json.loads((tmp_path / "both" / "latest" / "config.json").read_text())
    assert metadata["model"]["text"]["dim"] == 32
    evaluate(config_from_dict(captions, "test"), captioner, "val", tmp_path / "of_one")
    for name, count in (("predictions.json", 13 + 8), ("results.json", None)):  # neither batches nor records are even
        of_one, of_two = (json.loads((tmp_path / folder / name).read_text()) for folder in ("of_one", "of_two"))
        assert of_one == of_two
        assert count is None or len(of_one) == count
    assert of_one["scores"]["scenes"]["images"] == 13
    assert of_one["intervals"]["faulty"]


def test_ranks_meet_in_a_store_that_dead_ones_have_left_their_traces_in() -> None:
    """Three meetings in one store, as after two restarts, the ranks coming in any order; each has a name of its own."""
    store, names = dist.HashStore(), []
    store.set("hello/1", "dead")
    store.set("welcome/dead", "a meeting long ago")
    for first in (0, 1, 0):
        with ThreadPoolExecutor(2) as pool:
            coming = [pool.submit(distributed.meet, store, rank, 2) for rank in (first, 1 - first)]
            found = [one.result(timeout=20) for one in coming]
        assert found[0] == found[1]
        names.append(found[0])
    assert len(set(names)) == 3


def test_a_rank_that_never_comes_is_named() -> None:
    with pytest.raises(UserError, match=r"ranks \[1, 2\] of 3 did not start"):
        distributed.meet(dist.HashStore(), 0, 3, timedelta(seconds=0.05))


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    ranks = distributed.start("cpu")
    assert ranks == Ranks(0, 1, torch.device("cpu"))
    assert ranks.main
    value = torch.tensor([1.0, 2.0])
    assert ranks.sum(value) is value
    assert ranks.gather(["a"]) == ["a"]
    assert (ranks.any(True), ranks.any(False)) == (True, False)
    ranks.barrier()
    distributed.stop()
