"""What each pretraining objective teaches: python benchmarks/objectives.py [--seeds 3] [--photographs DIR] [--out DIR]

Pretrains with contrastive alone, then + matching, then + masked language; for every encoder and seed from the same start, with the same batches
and as many steps. Each is scored on held-out images by R@1 (mean of image to text and text to image; among drawn scenes an equal caption is right)
and, after one and the same fine-tuning, by CIDEr. Means with 95 % bootstrap intervals over images and seeds, paired differences, a verdict on each.
Drawn scenes are learnt from nothing; photographs, a folder of shards `train` and `val` beside `val_references.json`, from photos_small's start.
What is finished is not run again, so the same command goes on after a stop, and more seeds can be asked for later.
"""

import argparse
import itertools
import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from commands import Stopped, exit_status
from numpy.typing import NDArray
from objectives_summary import MEASURES, NO_HEAD, SETS, Cells, lines, summarize

ROOT = Path(__file__).resolve().parent.parent
OBJECTIVES = ("contrastive", "matching", "masked_language")
STAGES = {"test_resnet": "3"}  # for 4 x 4 image tokens of 64 px; other encoders are whole
PRETRAINED = "tf_efficientnet_lite2"  # photos_small's encoder
REFERENCES = "val_references.json"
CANDIDATES = 16  # of each image and of each text are looked at again


@dataclass(frozen=True)
class Images:
    """What is learnt from and scored on. config: NAME of configs/pretrain/NAME.yaml and configs/finetune/captioning/NAME.yaml; pretrain, finetune:
    settings of the two beside those."""

    folder: Path
    config: str
    pretrain: tuple[str, ...]
    finetune: tuple[str, ...]

    def file(self, stage: str) -> str:
        return str(ROOT / f"configs/{stage}/{self.config}.yaml")


def drawn(scenes: Path, encoder: str, more: Sequence[str]) -> Images:
    """Scenes, from nothing. By the mean of the text's states, and at a lower rate than the config's, a ViT learns from contrast within 150 steps."""
    model = ("--model.image.name", encoder, "--model.image.stages", STAGES.get(encoder, "None"))
    pretrain = (*model, "--model.text-pool", "mean", "--optimizer.lr", "6e-4", *more)
    return Images(scenes, "tiny", pretrain, ("--optimizer.lr", "1e-3", *more))


def main() -> int:
    parser = argparse.ArgumentParser(description="What each pretraining objective teaches.")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 (default: %(default)s)")
    parser.add_argument(
        "--encoders",
        nargs="+",
        default=["test_resnet", "test_vit"],
        metavar="NAME",
        help="timm models that take 64 px, for drawn scenes (default: %(default)s)",
    )
    parser.add_argument("--train", type=int, default=4000, metavar="N", help="training scenes (default: %(default)s)")
    parser.add_argument("--val", type=int, default=400, metavar="N", help="held-out scenes (default: %(default)s)")
    parser.add_argument("--photographs", type=Path, metavar="DIR", help="shards to use instead of drawn scenes")
    parser.add_argument(
        "--epochs",
        type=float,
        default=8,
        metavar="E",
        help="of pretraining; fine-tuning takes a quarter as many (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"), metavar="DIR", help="(%(default)s)")
    parser.add_argument(
        "--set", nargs=argparse.REMAINDER, default=[], metavar="", help="last: settings of all runs, of both stages"
    )
    arguments = parser.parse_args()
    for name in ("seeds", "train", "val", "epochs"):
        if getattr(arguments, name) <= 0:
            parser.error(f"--{name} {getattr(arguments, name)}: give more than 0")

    photographs, more = arguments.photographs, arguments.set
    settings = {name: getattr(arguments, name) for name in ("epochs", "set")}
    if photographs:
        settings |= {"photographs": str(photographs)}
        images = {PRETRAINED: Images(photographs, "photos_small", tuple(more), tuple(more))}
    else:
        settings |= {"train": arguments.train, "val": arguments.val}
        images = {name: drawn(arguments.out / "scenes", name, more) for name in arguments.encoders}

    def work() -> None:
        prepare(arguments.out, settings)
        cells = measure_all(arguments.out, images, arguments.seeds, arguments.epochs)
        write_report(arguments.out, settings, list(images), arguments.seeds, cells)

    return exit_status("objectives", work)


def prepare(out: Path, settings: dict[str, Any]) -> None:
    """Draws the scenes, once.

    Raises:
        UserError: the folder holds a comparison with other settings, or there are no photographs.
    """
    from vlm.data.synthetic import write_scenes
    from vlm.errors import UserError
    from vlm.files import write_json

    made = out / "settings.json"
    if made.exists():
        if (before := json.loads(made.read_text())) != settings:
            raise UserError(f"{out} was made with {before}, now {settings} is asked for; choose another --out.")
        return
    if photographs := settings.get("photographs"):
        if absent := [name for name in ("train", "val", REFERENCES) if not (Path(photographs) / name).exists()]:
            raise UserError(f"{photographs} has no {absent[0]}; datasets/flickr8k/prepare.py makes such a folder.")
        out.mkdir(parents=True, exist_ok=True)
    else:
        shutil.rmtree(out / "scenes", ignore_errors=True)  # half drawn
        write_scenes(out / "scenes", settings["train"], settings["val"])
    write_json(made, settings)


def measure_all(out: Path, images: dict[str, Images], seeds: int, epochs: float) -> Cells:
    """Every (encoder, seed, set), a seed after the other; those that are finished are read."""
    from vlm.files import write_json
    from vlm.train.report import duration

    cells: Cells = {}
    left = list(itertools.product(images, range(seeds), SETS))
    left.sort(key=lambda cell: cell[1])
    for name in [*left]:
        if (result := folder(out, *name) / "result.json").exists():
            cells[name] = json.loads(result.read_text())
            left.remove(name)
    while left:
        name = left.pop(0)
        start = time.perf_counter()
        found = measure(folder(out, *name), images[name[0]], *name[1:], epochs)
        found["seconds"] = time.perf_counter() - start
        write_json(folder(out, *name) / "result.json", found)
        cells[name] = found
        scores = ", ".join(f"{title} {mean(found[m]):.1f}" for m, title in MEASURES.items() if found[m] is not None)
        eta = sum(expected(cells, cell[2]) for cell in left)
        print(f"=== {' / '.join(map(str, name))}: {scores}", file=sys.stderr)
        print(f"=== {len(left)} of {len(left) + len(cells)} left, ETA {duration(eta)}", file=sys.stderr, flush=True)
    return cells


def folder(out: Path, encoder: str, seed: int, objectives: str) -> Path:
    """Where a run of three keeps its files."""
    return out / encoder / f"seed{seed}" / OBJECTIVES[SETS[objectives] - 1]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def expected(cells: Cells, objectives: str) -> float:
    """Seconds that a run of this set will take: as the others of it did, or as all."""
    same = [cell["seconds"] for (_, _, name), cell in cells.items() if name == objectives]
    return mean(same or [cell["seconds"] for cell in cells.values()])


def measure(here: Path, images: Images, seed: int, objectives: str, epochs: float) -> dict[str, Any]:
    """Pretraining, its R@1, fine-tuning, its CIDEr: of each held-out image, in percent, in the order of the shards."""
    pretrain, finetune = images.file("pretrain"), images.file("finetune/captioning")
    common = ["--seed", str(seed), "--data.workers", "0", "--data.splits.train", f"{images.folder}/train"]
    weights = {name: float(i < SETS[objectives]) for i, name in enumerate(OBJECTIVES)} | {"captioning": 0.0}
    # Without a language head: fine-tuning makes one of masked language's, which is random where that was not trained.
    model = ["--model.heads", *OBJECTIVES, *images.pretrain]
    model += [word for name, weight in weights.items() for word in (f"--objectives.{name}", str(weight))]
    length = ["--train.epochs", str(epochs), "--data.splits.val"]  # no evaluation: it is done once, below
    vlm("train", pretrain, "--out", f"{here}/pretrain", *common, *model, *length, "--resume", "auto")
    rerank = weights["matching"] > 0
    found = retrieve(pretrain, f"{here}/pretrain/latest", images.folder, images.pretrain, rerank)

    start = ["--init-from", f"{here}/pretrain/latest", *images.finetune]
    length[1] = str(epochs / 4)
    vlm("train", finetune, "--out", f"{here}/captioning", *common, *start, *length, "--resume", "auto")
    run = ["--checkpoint", f"{here}/captioning/latest", "--split", "val", "--out", f"{here}/captioning/evaluation"]
    vlm("evaluate", finetune, *run, "--data.workers", "0", "--data.splits.val", f"{images.folder}/val")
    return {**found, "cider": ciders(images.folder / REFERENCES, here / "captioning/evaluation/predictions.json")}


def vlm(*arguments: str) -> None:
    """Runs a `vlm` command in this process, which spares its imports."""
    from vlm.cli import main

    print(f"$ vlm {shlex.join(arguments)}", file=sys.stderr, flush=True)
    if status := main(arguments):
        raise Stopped(f"vlm {arguments[0]}", status)


def retrieve(file: str, checkpoint: str, folder: Path, settings: Sequence[str], rerank: bool) -> dict[str, Any]:
    """R@1 of each held-out image by the embeddings, and after a second look by the matching head, or None without."""
    import torch

    from vlm.build import build_parts, build_task, evaluation_loader, load_sets
    from vlm.config import RetrievalConfig
    from vlm.settings import load_config
    from vlm.tasks.pretraining import Pretraining
    from vlm.tasks.reranking import join_texts
    from vlm.tasks.reranking import rerank as look_again
    from vlm.train import distributed

    wanted = ["--init-from", checkpoint, "--data.workers", "0", *settings]
    config = load_config(file, [*wanted, "--data.splits.val", f"{folder}/val"])
    sets = load_sets(config.data.splits.val, "data.splits.val")
    parts = build_parts(config, sets)
    ranks = distributed.start()
    try:
        task = build_task(parts.config, parts).to(ranks.device).eval()
        assert isinstance(task, Pretraining)
        task.retrieval = RetrievalConfig(
            rerank=CANDIDATES
        )  # its records then hold tokens and token ids, with a matching head or without
        batches = evaluation_loader(config, parts, sets[0], ranks).iterate(0)
        records = [record for batch in batches for record in task.predict(batch.to(ranks.device))]
        similarity = np.stack([r["image"] for r in records]) @ np.concatenate([r["texts"] for r in records]).T
        texts = join_texts([text for r in records for text in r["ids"]], parts.tokenizer.pad_id, ranks.device)
        images, owners = image_ids([[tuple(text) for text, _ in r["ids"]] for r in records])
        found = {"images": [r["key"] for r in records], "reranked": None}
        found["embeddings"] = right_first(similarity, images, owners)
        if rerank:
            tokens = torch.from_numpy(np.stack([r["tokens"] for r in records]))
            scores = look_again(task.model, tokens, texts, similarity, CANDIDATES, "matching")
            found["reranked"] = right_first(scores, images, owners)
        return found
    finally:
        distributed.stop()


def image_ids(captions: Sequence[Sequence[Any]]) -> tuple[list[int], list[int]]:
    """Of each image's captions, the images' ids and the texts': where an image has one, as of a drawn scene, it is as right for every image of which
    the same is said."""
    if all(len(texts) == 1 for texts in captions):
        known: dict[Any, int] = {}
        same = [known.setdefault(text, len(known)) for (text,) in captions]
        return same, same
    return list(range(len(captions))), [image for image, texts in enumerate(captions) for _ in texts]


def right_first(scores: NDArray, images: Sequence[int], owners: Sequence[int]) -> list[float]:
    """For scores (N, M) of images and texts with these ids: 100 where image and all its texts find a right one first; the image counts half, its
    texts the other half. Texts stand in the order of their images, as many of each."""
    from vlm.metrics.retrieval import retrieval_scores

    ranks = retrieval_scores(scores, images, owners)
    texts = (ranks.text_ranks < 1).reshape(len(images), -1).mean(1)
    found: list[float] = (50.0 * ((ranks.image_ranks < 1) + texts)).tolist()
    return found


def ciders(references: Path, predictions: Path) -> list[float]:
    """CIDEr of each image, in percent."""
    from vlm.metrics.captions import caption_scores

    known: dict[Any, list[str]] = {}
    for a in json.loads(references.read_text())["annotations"]:
        known.setdefault(a["image_id"], []).append(a["caption"])
    said = {p["image_id"]: p["caption"] for p in json.loads(predictions.read_text())}
    found = caption_scores(known, said).cider_per_image
    return [100 * found[image] for image in said]


def write_report(out: Path, settings: dict[str, Any], encoders: Sequence[str], seeds: int, cells: Cells) -> None:
    """Prints the tables and writes results.json."""
    from vlm.files import write_json

    summary = summarize(encoders, seeds, cells)
    seconds = {" / ".join(map(str, name)): cell["seconds"] for name, cell in cells.items()}
    write_json(out / "results.json", {"settings": settings, "seeds": seeds, **summary, "seconds": seconds})
    print("\n".join(lines(summary)))
    held_out = f"{len(next(iter(cells.values()))['images'])} held-out images"
    print(f"\n{held_out}, {seeds} seeds; for contrastive alone there is no second look: {NO_HEAD}")
    print(f"there, and + matching, re-ranked, is compared with its embeddings. Written to {out}/results.json")


if __name__ == "__main__":
    sys.exit(main())
