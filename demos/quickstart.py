"""The main job in one go, offline, on drawn scenes: python demos/quickstart.py [--out DIR] [--train N] [--val N]

Draws scenes with exact captions and questions into shards, pretrains a tiny model, fine-tunes it for captioning and for VQA, evaluates both on
held-out scenes beside their baselines, captions held-out scenes, and draws a picture of all that; then captions photographs with the checkpoint in
demos/model. Each step is a command that you can run yourself.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PICTURES = 8
PHOTOGRAPHS = str(ROOT / "demos/images")
MARK = ".quickstart"  # a folder with this file in it was made here and may be made anew


def main() -> int:
    parser = argparse.ArgumentParser(description="Pretrain, fine-tune, evaluate and caption on drawn scenes.")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/quickstart"),
        metavar="DIR",
        help="run folder, made anew (default: %(default)s)",
    )
    parser.add_argument("--train", type=int, default=4000, metavar="N", help="training scenes (default: %(default)s)")
    parser.add_argument("--val", type=int, default=300, metavar="N", help="held-out scenes (default: %(default)s)")
    parser.add_argument("--epochs", type=float, metavar="E", help="epochs of each stage, in place of the configs'")
    arguments = parser.parse_args()
    for name in ("train", "val"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)}: give at least 1")

    from vlm.errors import UserError

    try:
        quickstart(arguments.out, arguments.train, arguments.val, arguments.epochs)
    except Stopped as stopped:
        print(f"quickstart: {stopped}", file=sys.stderr)
        return stopped.status
    except UserError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return error.exit_code
    return 0


class Stopped(Exception):
    """A command ended with a status other than 0, and has said why."""

    def __init__(self, command: str, status: int) -> None:
        super().__init__(f"`{command}` ended with status {status}; see above.")
        self.status = status


def quickstart(out: Path, train: int, val: int, epochs: float | None) -> None:
    """All stages, one after another.

    Raises:
        UserError: the folder holds something else, or matplotlib is not installed. Stopped: a command ended early.
    """
    from vlm.errors import UserError

    start = time.perf_counter()
    if find_spec("matplotlib") is None:
        raise UserError("drawing the picture needs matplotlib: pip install 'vlm-fusion[demo]'.")
    make_anew(out)
    scenes = out / "scenes"

    stage(1, f"Draw {train + val} scenes with captions, questions and answers into WebDataset shards")
    command("vlm.data.synthetic", "--out", str(scenes), "--train", str(train), "--val", str(val))
    splits = ["--data.splits.train", f"{scenes}/train", "--data.splits.val", f"{scenes}/val"]
    common = [*splits, *([] if epochs is None else ["--train.epochs", str(epochs)])]

    stage(2, "Pretrain: contrastive, masked language and captioning objectives")
    vlm("train", "configs/pretrain/tiny.yaml", "--out", f"{out}/pretrain", *common)

    stage(3, "Fine-tune for captioning")
    pretrained = ["--init-from", f"{out}/pretrain/latest"]
    vlm("train", "configs/finetune/captioning/tiny.yaml", "--out", f"{out}/captioning", *common, *pretrained)
    common += ["--init-from", f"{out}/captioning/latest"]  # it sees better by now

    stage(4, "Fine-tune for visual question answering")
    vlm("train", "configs/finetune/vqa/tiny.yaml", "--out", f"{out}/vqa", *common)

    stage(5, "The same with grey images: what the questions alone give away")
    blank = ["--data.blank-images", "True"]
    vlm("train", "configs/finetune/vqa/tiny.yaml", "--out", f"{out}/vqa_question_only", *common, *blank)

    stage(6, "Evaluate on the held-out scenes")
    for name in ("captioning", "vqa"):
        run = ["--checkpoint", f"{out}/{name}/latest", "--split", "val", "--out", f"{out}/{name}/evaluation"]
        vlm("evaluate", f"configs/finetune/{name}/tiny.yaml", *run, *splits)
    report(out, scenes)

    stage(7, "Caption held-out scenes with demos/caption.py")
    images = extract(scenes / "val", out / "images")
    captions = demo("caption", f"{out}/images", "--model", f"{out}/captioning/latest")
    picture = draw(out, images, captions)

    stage(8, "Caption photographs, and ask about them, with the checkpoint that comes with vlm")
    demo("caption", PHOTOGRAPHS)
    demo("contact_sheet", PHOTOGRAPHS, "--out", f"{out}/photographs.png")
    seconds = time.perf_counter() - start
    print(
        f"\nDone in {seconds:.0f} s. The run is in {out}; curves, captions and answers are in {picture} and {out}/photographs.png"
    )


def make_anew(out: Path) -> None:
    """Empties the run folder, if it is one.

    Raises:
        UserError: it holds something else, or cannot be written.
    """
    from vlm.errors import UserError

    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (out / MARK).exists():
            raise UserError(
                f"{out} holds something that is not a run of the quickstart; choose another --out, or remove it."
            )
        if out.exists():
            shutil.rmtree(out)
        out.mkdir(parents=True)
        (out / MARK).touch()
    except OSError as error:
        raise UserError(f"{out} cannot be made anew ({error.strerror or error}); choose another --out.") from None


def stage(number: int, title: str) -> None:
    print(f"\n=== {number}. {title}", flush=True)


def vlm(*arguments: str) -> None:
    """Runs a `vlm` command in this process, which spares its imports."""
    from vlm.cli import main

    print(f"$ vlm {shlex.join(arguments)}", flush=True)
    name, config, *rest = arguments
    if status := main([name, str(ROOT / config), *rest]):
        raise Stopped(f"vlm {name}", status)


def command(module: str, *arguments: str) -> None:
    """Runs a module's command in a process of its own."""
    print(f"$ python -m {module} {shlex.join(arguments)}", flush=True)
    if status := subprocess.run([sys.executable, "-m", module, *arguments]).returncode:
        raise Stopped(f"python -m {module}", status)


def demo(name: str, *arguments: str) -> list[str]:
    """Runs demos/NAME.py in a process of its own; its lines."""
    print(f"$ python demos/{name}.py {shlex.join(arguments)}", flush=True)
    done = subprocess.run(
        [sys.executable, str(ROOT / f"demos/{name}.py"), *arguments], stdout=subprocess.PIPE, text=True
    )
    print(done.stdout, end="")
    if done.returncode:
        raise Stopped(f"python demos/{name}.py", done.returncode)
    return done.stdout.splitlines()


def report(out: Path, scenes: Path) -> None:
    """The held-out scores beside their baselines."""
    captions = {p["image_id"]: p["caption"] for p in read(out / "captioning/evaluation/predictions.json")}
    references: dict[Any, str] = {
        a["image_id"]: a["caption"] for a in read(scenes / "val_references.json")["annotations"]
    }
    exact = sum(captions[i] == references[i] for i in captions) / len(captions)
    cider = score(out / "captioning", "CIDEr")
    blind = [line for line in read_lines(out / "vqa_question_only/log.jsonl") if line["kind"] == "evaluation"][-1]
    rows = [
        ("captions: exact match, %", 100 * exact),
        ("captions: CIDEr", cider),
        ("VQA accuracy, %", score(out / "vqa", "accuracy")),
        ("  question only (the same training, grey images), %", next(iter(blind["scores"].values()))["accuracy"]),
        ("  commonest answer to the question's first words, %", score(out / "vqa", "baseline/by_first_words")),
        ("  commonest answer, %", score(out / "vqa", "baseline/commonest_answer")),
    ]
    print(f"\nOn {len(captions)} held-out scenes and {score(out / 'vqa', 'questions'):.0f} questions:")
    for name, value in rows:
        print(f"  {name:<56} {value:6.1f}")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def score(run: Path, name: str) -> float:
    return float(next(iter(read(run / "evaluation/results.json")["scores"].values()))[name])


def extract(shards: Path, folder: Path) -> list[Path]:
    """The first held-out scenes as files."""
    from vlm.data.index import load_index
    from vlm.data.scan import scan

    folder.mkdir()
    paths: list[Path] = []
    for record, _ in zip(scan([load_index(shards)]), range(PICTURES), strict=False):
        paths.append(folder / f"{record.key}.png")
        paths[-1].write_bytes(record.image)
    return sorted(paths)


def draw(out: Path, images: list[Path], captions: list[str]) -> Path:
    """Loss curves above, scenes with captions and answers below."""
    import textwrap

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    from vlm.data.index import load_index
    from vlm.data.scan import scan
    from vlm.files import write_figure
    from vlm.train.plot import loss_names, points, read_run

    questions = {record.key: record.questions for record in scan([load_index(out / "scenes/val")])}
    answers = {p["question_id"]: p["answer"] for p in read(out / "vqa/evaluation/predictions.json")}
    figure, axes = pyplot.subplots(3, 4, figsize=(16, 12), layout="constrained")
    for axis, name in zip(axes[0], ("pretrain", "captioning", "vqa", "vqa_question_only"), strict=True):
        train = read_run(out / name).train
        for loss in loss_names(train):
            axis.plot(*points(train, loss), marker=".", label=loss.removesuffix("/loss"))
        axis.set_title(f"{name}: loss by step")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    for axis in axes[1:].flat:
        axis.axis("off")
    for axis, path, caption in zip(axes[1:].flat, images, captions, strict=False):
        axis.imshow(Image.open(path))
        asked = questions[path.stem][:2]
        marks = ["right" if answers[q["question_id"]] in q["answers"] else f"wrong: {q['answers'][0]}" for q in asked]
        lines = [f"{q['question']} {answers[q['question_id']]} ({mark})" for q, mark in zip(asked, marks, strict=True)]
        axis.set_title(
            "\n".join(textwrap.wrap(caption, 44) + [text for line in lines for text in textwrap.wrap(line, 52)]),
            fontsize=9,
        )
    target = out / "quickstart.png"
    write_figure(figure, target, dpi=90)
    pyplot.close(figure)
    return target


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(1)
