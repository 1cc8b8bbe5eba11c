"""The command `vlm` as a user meets it: what it writes, what it says, and with which status it leaves."""

import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from vlm.cli import main
from vlm.data.synthetic import write_scenes
from vlm.train.report import read_json_lines

ROOT = Path(__file__).parent.parent
Run = Callable[..., tuple[int, str, str]]

TINY: dict[str, Any] = {
    "model": {
        "image": {"name": "resnet10t", "image_size": 32, "stages": 2},
        "text": {
            "dim": 32,
            "heads": 2,
            "layers": 2,
            "feed_forward_dim": 64,
            "max_positions": 48,
            "cross_attention": [0, 1],
        },
        "embed_dim": 16,
    },
    "tokenizer": {"vocab_size": 120},
    "data": {"batch_size": 8, "streams": 4, "workers": 0, "max_tokens": 32, "randaugment": None},
    "optimizer": {"lr": 2.0e-3, "warmup_steps": 2},
    "train": {"epochs": 0.5, "precision": "fp32", "log_every": 1},
    "generation": {"beams": 2, "max_length": 6, "min_length": 1},
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 32, 8, size=32, samples_per_shard=16)
    return folder


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


def write_config(path: Path, task: str, scenes: Path, out: Path) -> Path:
    values = {**TINY, "task": task, "out": str(out)}
    values["data"] = {**TINY["data"], "splits": {"train": [f"{scenes}/train"], "val": [f"{scenes}/val"]}}
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def config(scenes: Path, tmp_path: Path) -> str:
    return str(write_config(tmp_path / "config.yaml", "captioning", scenes, tmp_path / "run"))


@pytest.fixture(scope="module")
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """captioning.yaml and vqa.yaml, and the runs that they led to."""
    folder = tmp_path_factory.mktemp("trained")
    for task in ("captioning", "vqa"):
        assert main(["train", str(write_config(folder / f"{task}.yaml", task, scenes, folder / task))]) == 0
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """run("train", ...) -> exit status, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else 1
        output = capsys.readouterr()
        return status, output.out, output.err

    return call


def test_help(run: Run, config: str) -> None:
    status, out, _ = run("--help")
    assert status == 0
    assert all(command in out for command in ("train", "evaluate", "score", "plot", "shards"))
    status, out, _ = run("train", "--help")
    assert (status, "usage: vlm train CONFIG" in out) == (0, True)
    assert run("train")[0] == 2
    status, out, _ = run("train", config, "--help")
    assert status == 0
    assert "--optimizer.lr" in out
    assert "Peak rate" in out
    assert "0.002" in out
    scores = [("score", kind) for kind in ("vqa", "captions", "pope", "retrieval")]
    for arguments in (("evaluate",), *scores, ("plot",), ("shards", "index")):
        assert run(*arguments, "--help")[0] == 0


def test_the_installed_command_answers_without_loading_torch() -> None:
    vlm = Path(sys.executable).parent / "vlm"
    assert "COMMAND" in subprocess.run([vlm, "--help"], capture_output=True, text=True, check=True).stdout
    program = (
        "import sys, vlm.cli, vlm.settings; print([m for m in ('torch', 'timm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_unusable_arguments_leave_with_2(run: Run, config: str, tmp_path: Path) -> None:
    for arguments, said in [
        ((), "required: COMMAND"),
        (("trian",), "invalid choice: 'trian'"),
        (("train", ROOT / "configs/pretrain/tinny.yaml"), "Did you mean"),
        (("train", config, "--resume", "yes"), "invalid choice: 'yes'"),
        (("train", config, "--optimizer.lr", "fast"), "--optimizer.lr"),
        (("train", config, "--optimizer.weight-decai", "1"), "--optimizer.weight-decay FLOAT"),
        (
            ("train", config, "--train.accumulate", "3"),
            "data.batch_size=8 is not a multiple of train.accumulate=3; use 6",
        ),
        (("train", config, "--data.splits.train"), "data.splits.train is empty"),
        (("train", config, "--model.image.name", "resnet10"), "the nearest are"),
        (("train", config, "--task", "painting"), "--task"),
        (("train", config, "--optimizer.lr-factors", "vision", "0.1"), "no part is called 'vision'"),
        (("evaluate", config, "--checkpoint", "x", "--out", "y", "--split", "vall"), "invalid choice: 'vall'"),
        (("evaluate", config, "--checkpoint", "x", "--out", "y", "--split", "test"), "data.splits.test is empty"),
        (("evaluate", config, "--split", "val"), "required: --checkpoint, --out"),
        (("score", "vqa", "--predictions", "p.json"), "required: --questions, --annotations"),
        (("score", "captions", "--references", "r", "--predictions", "p", "--jsn"), "unrecognized arguments: --jsn"),
        (
            ("score", "captions", "--references", "r", "--predictions", "p", "--images", "i"),
            "--image-text-score MODEL and --images FOLDER go together",
        ),
    ]:
        status, _, err = run(*arguments)
        assert (status, said in err, "Traceback" in err) == (2, True, False), (arguments, err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml"]


def test_what_stops_the_work_leaves_with_1_and_one_line(run: Run, config: str, scenes: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    for name, index, tar in [
        ("index", "{", None),
        ("lost", '{"source": "a", "samples": 1, "shards": []}', b""),
        ("none", None, None),
    ]:
        (bad / name).mkdir(parents=True)
        if index is not None:
            (bad / name / "index.json").write_text(index)
        if tar is not None:
            (bad / name / "shard-000000.tar").write_bytes(tar)
    (bad / "garbage").mkdir()
    (bad / "garbage" / "shard-000000.tar").write_bytes(b"no tar at all" * 1000)
    (bad / "file").write_text("")
    shards = "--data.splits.train"
    for arguments, said in [
        (
            ("train", config, shards, bad / "missing"),
            "missing is not a folder; expected shards (*.tar). Make them with datasets/",
        ),
        (("train", config, "--data.splits.val", bad / "missing"), "missing is not a folder"),
        (("train", config, shards, bad / "index"), "index.json cannot be used"),
        (("train", config, shards, bad / "lost"), "does not list shard-000000.tar"),
        (("train", config, shards, bad / "none"), "holds no shards"),
        (("train", config, shards, bad / "garbage"), "0 samples"),
        (("train", config, "--data.batch-size", "64"), "use a smaller batch"),
        (("train", config, "--init-from", bad / "missing"), "no such checkpoint folder"),
        (("train", config, "--init-from", bad), "config.json is missing"),
        (("train", config, "--text-weights", bad), str(bad)),
        (("train", config, "--tokenizer.source", bad / "file"), "not a tokenizer"),
        (("train", config, "--out", bad / "file"), "bad/file/config.yaml: cannot be written"),
        (("train", config, "--data.splits.val", scenes / "train"), "32 of its 32 images were trained on"),
        (
            ("evaluate", config, "--checkpoint", bad / "x", "--split", "val", "--out", tmp_path / "e"),
            "no such checkpoint folder",
        ),
        (
            ("score", "captions", "--references", bad / "x", "--predictions", bad / "x"),
            "no such file; expected a JSON file",
        ),
        (("score", "pope", "--annotations", bad / "x", "--predictions", bad / "x"), "no such file; expected a JSON"),
        (("score", "retrieval", "--similarity", bad / "file"), "file: cannot be read"),
        (("shards", "index", bad / "none"), "holds no shards"),
        (("plot", bad / "missing"), "missing"),
    ]:
        status, _, err = run(*arguments)
        last = err.rstrip("\n").split("\n")[-1]
        assert (status, last.startswith("vlm: "), said in last, "Traceback" in err) == (1, True, True, False), (
            arguments,
            err,
        )
    assert not (tmp_path / "run" / "latest").exists()
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("said", "known"), [("DataLoader worker (pid 7) is killed by signal: Killed. ", True), ("x", False)]
)
def test_a_killed_reader_is_told_without_a_traceback(
    run: Run, config: str, monkeypatch: pytest.MonkeyPatch, said: str, known: bool
) -> None:
    def train(*_: Any, **__: Any) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr("vlm.run.train", train)
    if known:
        status, _, err = run("train", config)
        assert status == 1
        assert "pid 7" in err
        assert "lower data.workers" in err
    else:
        with pytest.raises(RuntimeError, match="x"):
            run("train", config)


def test_dry_run_shows_and_writes_nothing(run: Run, config: str, scenes: Path, tmp_path: Path) -> None:
    before = sorted(str(p) for folder in (tmp_path, scenes) for p in folder.rglob("*"))
    status, _, err = run("train", config, "--dry-run", "--data.prompt", "a picture of")
    assert status == 0
    assert yaml.safe_load(err[err.index("task:") : err.index("captioning into")])["data"]["prompt"] == "a picture of"
    for part in (
        "parameters in millions",
        "images (8, 3, 32, 32) uint8",
        "'a picture of a ",
        "one step: captioning/loss",
        "it took",
    ):
        assert part in err, part
    assert sorted(str(p) for folder in (tmp_path, scenes) for p in folder.rglob("*")) == before
    status, _, err = run("train", config, "--dry-run", "--data.splits.val", str(scenes / "train"))
    assert (status, "were trained on" in err) == (1, True)


def test_a_second_start_is_refused_and_resume_says_that_it_is_done(run: Run, trained: Path) -> None:
    status, _, err = run("train", trained / "captioning.yaml")
    assert (status, "holds a run already; add --resume auto" in err) == (2, True)
    status, _, err = run("train", trained / "captioning.yaml", "--resume", "auto")
    assert (status, "is finished: 2 of 2 steps are done" in err) == (0, True)
    status, _, err = run("train", trained / "captioning.yaml", "--resume", "auto", "--train.epochs", "9")
    assert (status, "these settings and data give 36" in err) == (1, True)


def evaluated(run: Run, trained: Path, task: str, out: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """predictions.json and results.json of `vlm evaluate`."""
    checkpoint = trained / task / "latest"
    status, _, err = run(
        "evaluate", trained / f"{task}.yaml", "--checkpoint", checkpoint, "--split", "val", "--out", out
    )
    assert status == 0, err
    pages = ["answers.html"] if task == "vqa" else []
    assert sorted(p.name for p in out.iterdir()) == [*pages, "predictions.json", "results.json"]
    return json.loads((out / "predictions.json").read_text()), json.loads((out / "results.json").read_text())


def test_evaluate_captions_and_score_them_officially(run: Run, trained: Path, scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "evaluation"
    predictions, results = evaluated(run, trained, "captioning", out)
    references = json.loads((scenes / "val_references.json").read_text())
    assert sorted(p["image_id"] for p in predictions) == sorted(image["id"] for image in references["images"])
    assert all(set(p) == {"image_id", "caption"} for p in predictions)
    assert results["split"] == "val"
    assert results["checkpoint"] == str(trained / "captioning" / "latest")
    assert results["config"]["data"]["splits"]["val"] == [f"{scenes}/val"]
    assert {"python", "torch", "timm"} <= set(results["versions"])
    assert results["commit"] is None or len(results["commit"]) == 40
    arguments = (
        "score",
        "captions",
        "--references",
        scenes / "val_references.json",
        "--predictions",
        out / "predictions.json",
    )
    status, printed, _ = run(*arguments, "--json")
    official = json.loads(printed)
    assert status == 0
    assert set(official) == {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"}
    for name, value in official.items():
        assert results["scores"]["scenes"][name] == pytest.approx(100 * value, abs=1e-9)
    assert "CIDEr" in run(*arguments)[1]


def test_evaluate_answers_and_score_them_officially(run: Run, trained: Path, scenes: Path, tmp_path: Path) -> None:
    predictions, results = evaluated(run, trained, "vqa", tmp_path / "out")
    asked = json.loads((scenes / "val_questions.json").read_text())["questions"]
    assert sorted(p["question_id"] for p in predictions) == sorted(q["question_id"] for q in asked)
    status, printed, _ = run(
        *(
            "score",
            "vqa",
            "--questions",
            scenes / "val_questions.json",
            "--annotations",
            scenes / "val_annotations.json",
        ),
        *("--predictions", tmp_path / "out" / "predictions.json", "--json"),
    )
    official = json.loads(printed)
    assert status == 0
    assert set(official) == {"overall", "perAnswerType", "perQuestionType"}
    assert results["scores"]["scenes"]["accuracy"] == pytest.approx(
        official["overall"], abs=0.006
    )  # rounded to two digits


def test_score_what_needs_no_model(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "similarity.npy", np.eye(3))
    status, printed, _ = run("score", "retrieval", "--similarity", tmp_path / "similarity.npy", "--json")
    assert (status, json.loads(printed)["mean_R@1"], json.loads(printed)["texts"]) == (0, 100, 3)
    (tmp_path / "a.json").write_text('{"question_id": 1, "text": "Is there a dog?", "label": "no"}\n')
    (tmp_path / "p.json").write_text('[{"question_id": 1, "answer": "No."}]')
    files = ("--annotations", tmp_path / "a.json", "--predictions", tmp_path / "p.json")
    status, printed, _ = run("score", "pope", *files, "--json")
    assert (status, json.loads(printed)["overall"]["accuracy"]) == (0, 100)
    assert run("score", "pope", *files)[1].startswith("overall\n  accuracy")


def test_score_captions_by_more_than_words(
    run: Run, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, color in ((1, "red"), (2, "blue")):
        Image.new("RGB", (40, 30), color).save(tmp_path / f"{name}.png")
    captions = [{"image_id": 1, "caption": "a red circle"}, {"image_id": 2, "caption": "a blue square"}]
    (tmp_path / "r.json").write_text(json.dumps({"images": [], "annotations": captions}))
    (tmp_path / "p.json").write_text(json.dumps(captions))
    files = ("--references", tmp_path / "r.json", "--predictions", tmp_path / "p.json")
    options = ("--document-frequencies", tmp_path / "r.json", "--json")
    model = checkpoint(task="pretraining", heads=("contrastive",))
    status, printed, err = run("score", "captions", *files, *options, "--image-text-score", model, "--images", tmp_path)
    assert status == 0, err
    assert list(json.loads(printed))[-2:] == ["CIDEr", "image_text_score"]
    assert 0 <= json.loads(printed)["image_text_score"] <= 2.5
    monkeypatch.setattr("vlm.metrics.java.java", lambda: None)
    status, printed, err = run("score", "captions", *files, "--meteor")
    assert (status, printed, len(err.splitlines())) == (1, "", 1)
    assert "METEOR is a Java program; to have it: " in err


def test_an_evaluation_without_the_training_shards(run: Run, trained: Path, tmp_path: Path) -> None:
    checkpoint = trained / "vqa" / "latest"
    arguments = (
        "evaluate",
        trained / "vqa.yaml",
        "--checkpoint",
        checkpoint,
        "--split",
        "val",
        "--out",
        tmp_path / "out",
    )
    status, _, err = run(*arguments, "--data.splits.train", tmp_path / "elsewhere")
    assert (status, "no baselines by counting training answers" in err) == (0, True)
    assert (tmp_path / "out" / "results.json").exists()


def test_evaluating_on_what_was_trained_on_is_refused(run: Run, trained: Path, scenes: Path, tmp_path: Path) -> None:
    checkpoint = trained / "captioning" / "latest"
    arguments = (
        "evaluate",
        trained / "captioning.yaml",
        "--checkpoint",
        checkpoint,
        "--split",
        "val",
        "--out",
        tmp_path / "out",
    )
    status, _, err = run(*arguments, "--data.splits.val", scenes / "train")
    assert (status, "32 of its 32 images were trained on" in err) == (1, True)
    assert not (tmp_path / "out").exists()
    assert run(*arguments, "--data.splits.val", scenes / "train", "--data.allow-overlap", "True")[0] == 0


def test_a_damaged_checkpoint_is_refused(run: Run, trained: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "cut"
    checkpoint.mkdir()
    for file in (trained / "captioning" / "latest").iterdir():
        if file.is_file():
            (checkpoint / file.name).write_bytes(file.read_bytes()[:-40])
    arguments = (
        "evaluate",
        trained / "captioning.yaml",
        "--split",
        "val",
        "--out",
        tmp_path / "out",
        "--checkpoint",
        checkpoint,
    )
    for name, said in [
        ("config.json", "config.json: not readable as JSON"),
        ("model.safetensors", "model.safetensors: not a whole safetensors file"),
        ("tokenizer.json", "tokenizer.json: not a tokenizer"),
        ("trained_on.safetensors", "trained_on.safetensors: damaged"),
    ]:
        status, _, err = run(*arguments)
        assert (status, said in err, "Traceback" in err) == (1, True, False), err
        (checkpoint / name).write_bytes((trained / "captioning" / "latest" / name).read_bytes())
    assert run(*arguments)[0] == 0


def picture(shade: int) -> bytes:
    data = BytesIO()
    Image.new("RGB", (32, 32), (shade, 100, 100)).save(data, "PNG")
    return data.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))


def test_training_goes_on_over_bad_records_and_a_shard_cut_short(run: Run, config: str, tmp_path: Path) -> None:
    """Forty records: one without an image, one without a text, one that is no image, and the last ones of a shard cut off."""
    folder = tmp_path / "faulty"
    folder.mkdir()
    members: dict[str, bytes] = {}
    for i in range(24):
        members[f"a{i:02d}.png"] = picture(i) if i != 7 else b"not an image"
        members[f"a{i:02d}.txt"] = b"a red circle number %d" % i
    del members["a03.png"], members["a05.txt"]
    write_tar(folder / "shard-000000.tar", members)
    whole = {
        f"b{i:02d}.{e}": d for i in range(16) for e, d in (("png", picture(i)), ("txt", b"a blue square number %d" % i))
    }
    write_tar(folder / "shard-000001.tar", whole)
    assert run("shards", "index", folder, "--source", "faulty")[0] == 0
    path = folder / "shard-000001.tar"
    size = path.stat().st_size
    with path.open("rb+") as file:
        file.truncate(
            13 * 4 * 512 + 700
        )  # two files of a block and its header each a record: in the middle of record 13
    assert path.stat().st_size < size
    arguments = (
        "--data.splits.train",
        folder,
        "--data.splits.val",
        "--train.epochs",
        "1",
        "--data.max-bad-fraction",
        "0.5",
    )
    status, _, err = run("train", config, *arguments)
    assert (status, "Traceback" in err) == (0, False), err
    lines = [line for line in read_json_lines(tmp_path / "run" / "log.jsonl") if line["kind"] == "train"]
    assert len(lines) == 40 // 8
    causes = {k: sum(line.get(k, 0) for line in lines) for k in ("filled/no image", "filled/no text", "filled/missing")}
    assert causes == {"filled/no image": 1, "filled/no text": 1, "filled/missing": 3}
    assert sum(line["filled"] for line in lines) == 6
    assert "bad samples" in err
    weights = torch.load(tmp_path / "run" / "latest" / "training" / "state.pt", weights_only=True)["model"]
    assert all(tensor.isfinite().all() for tensor in weights.values() if tensor.is_floating_point())
