"""What each pretraining objective teaches, on drawn scenes: python benchmarks/objectives.py [--seeds 3] [--encoders test_resnet test_vit] [--out DIR]

Pretrains from nothing with contrastive alone, then + matching, then + masked language; for every encoder and seed from the same start, with the same
batches and as many steps. Each is scored on held-out scenes by R@1 (mean of image to text and text to image; an equal caption is right) and, after
one and the same fine-tuning, by CIDEr. Means with 95 % bootstrap intervals over images and seeds, paired differences, a verdict on each.
What is finished is not run again, so the same command goes on after a stop, and more seeds can be asked for later.
"""

import argparse
import itertools
import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from commands import Stopped, exit_status
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
PRETRAIN, FINETUNE = (str(ROOT / f"configs/{name}/tiny.yaml") for name in ("pretrain", "finetune/captioning"))
OBJECTIVES = ("contrastive", "matching", "masked_language")
SETS = {"contrastive": 1, "+ matching": 2, "+ masked language": 3}  # how many of OBJECTIVES, each with weight 1
STAGES = {"test_resnet": "3"}  # for 4 x 4 image tokens of 64 px; other encoders are whole
MEASURES = {"embeddings": "R@1, embeddings", "reranked": "R@1, re-ranked", "cider": "CIDEr"}
CANDIDATES = 16  # of each image and of each text are looked at again
RESAMPLES = 2000
NO_HEAD = "no matching head was trained"
Cells = dict[tuple[str, int, str], dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description="What each pretraining objective teaches, on drawn scenes.")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 (default: %(default)s)")
    parser.add_argument(
        "--encoders",
        nargs="+",
        default=["test_resnet", "test_vit"],
        metavar="NAME",
        help="timm models that take 64 px (default: %(default)s)",
    )
    parser.add_argument("--train", type=int, default=4000, metavar="N", help="training scenes (default: %(default)s)")
    parser.add_argument("--val", type=int, default=400, metavar="N", help="held-out scenes (default: %(default)s)")
    parser.add_argument(
        "--epochs",
        type=float,
        default=8,
        metavar="E",
        help="of pretraining; fine-tuning takes a quarter as many (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"), metavar="DIR", help="(%(default)s)")
    arguments = parser.parse_args()
    for name in ("seeds", "train", "val", "epochs"):
        if getattr(arguments, name) <= 0:
            parser.error(f"--{name} {getattr(arguments, name)}: give more than 0")

    settings = {name: getattr(arguments, name) for name in ("train", "val", "epochs")}

    def work() -> None:
        prepare(arguments.out, settings)
        cells = measure_all(arguments.out, arguments.encoders, arguments.seeds, settings["epochs"])
        write_report(arguments.out, settings, arguments.encoders, arguments.seeds, cells)

    return exit_status("objectives", work)


def prepare(out: Path, settings: dict[str, Any]) -> None:
    """Draws the scenes, once.

    Raises:
        UserError: the folder holds a comparison with other settings.
    """
    from vlm.data.synthetic import write_scenes
    from vlm.errors import UserError
    from vlm.files import write_json

    made = out / "settings.json"
    if made.exists():
        if (before := json.loads(made.read_text())) != settings:
            raise UserError(f"{out} was made with {before}, now {settings} is asked for; choose another --out.")
        return
    shutil.rmtree(out / "scenes", ignore_errors=True)  # half drawn
    write_scenes(out / "scenes", settings["train"], settings["val"])
    write_json(made, settings)


def measure_all(out: Path, encoders: Sequence[str], seeds: int, epochs: float) -> Cells:
    """Every (encoder, seed, set), a seed after the other; those that are finished are read."""
    from vlm.files import write_json
    from vlm.train.report import duration

    cells: Cells = {}
    left = list(itertools.product(encoders, range(seeds), SETS))
    left.sort(key=lambda cell: cell[1])
    for name in [*left]:
        if (result := folder(out, *name) / "result.json").exists():
            cells[name] = json.loads(result.read_text())
            left.remove(name)
    while left:
        name = left.pop(0)
        start = time.perf_counter()
        found = measure(out, *name, epochs)
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


def measure(out: Path, encoder: str, seed: int, objectives: str, epochs: float) -> dict[str, Any]:
    """Pretraining, its R@1, fine-tuning, its CIDEr: of each held-out image, in percent, in the order of the shards."""
    here, scenes = folder(out, encoder, seed, objectives), out / "scenes"
    common = ["--seed", str(seed), "--data.workers", "0", "--data.splits.train", f"{scenes}/train"]
    weights = {name: float(i < SETS[objectives]) for i, name in enumerate(OBJECTIVES)} | {"captioning": 0.0}
    model = ["--model.image.name", encoder, "--model.image.stages", STAGES.get(encoder, "None")]
    # Without a language head: fine-tuning makes one of masked language's, which is random where that was not trained.
    # With the mean of the text's states, and a lower rate than the config's, a ViT learns from contrastive alone within 150 steps.
    model += ["--model.heads", *OBJECTIVES, "--model.text-pool", "mean", "--optimizer.lr", "6e-4"]
    model += [word for name, weight in weights.items() for word in (f"--objectives.{name}", str(weight))]
    length = ["--train.epochs", str(epochs), "--data.splits.val"]  # no evaluation: it is done once, below
    vlm("train", PRETRAIN, "--out", f"{here}/pretrain", *common, *model, *length, "--resume", "auto")
    found = retrieve(f"{here}/pretrain/latest", scenes, rerank=weights["matching"] > 0)

    start = ["--init-from", f"{here}/pretrain/latest", "--optimizer.lr", "1e-3"]
    length[1] = str(epochs / 4)
    vlm("train", FINETUNE, "--out", f"{here}/captioning", *common, *start, *length, "--resume", "auto")
    run = ["--checkpoint", f"{here}/captioning/latest", "--split", "val", "--out", f"{here}/captioning/evaluation"]
    vlm("evaluate", FINETUNE, *run, "--data.workers", "0", "--data.splits.val", f"{scenes}/val")
    return {**found, "cider": ciders(scenes / "val_references.json", here / "captioning/evaluation/predictions.json")}


def vlm(*arguments: str) -> None:
    """Runs a `vlm` command in this process, which spares its imports."""
    from vlm.cli import main

    print(f"$ vlm {shlex.join(arguments)}", file=sys.stderr, flush=True)
    if status := main(arguments):
        raise Stopped(f"vlm {arguments[0]}", status)


def retrieve(checkpoint: str, scenes: Path, rerank: bool) -> dict[str, Any]:
    """R@1 of each held-out image by the embeddings, and after a second look by the matching head, or None without."""
    import torch

    from vlm.build import build_parts, build_task, evaluation_loader, load_sets
    from vlm.settings import load_config
    from vlm.tasks.reranking import join_texts
    from vlm.tasks.reranking import rerank as look_again
    from vlm.train import distributed

    wanted = ["--init-from", checkpoint, "--data.workers", "0", "--retrieval.rerank", str(CANDIDATES)]
    config = load_config(PRETRAIN, [*wanted, "--data.splits.val", f"{scenes}/val"])
    sets = load_sets(config.data.splits.val, "data.splits.val")
    parts = build_parts(config, sets)
    ranks = distributed.start()
    try:
        task = build_task(parts.config, parts).to(ranks.device).eval()
        batches = evaluation_loader(config, parts, sets[0], ranks).iterate(0)
        records = [record for batch in batches for record in task.predict(batch.to(ranks.device))]
        similarity = np.stack([r["image"] for r in records]) @ np.concatenate([r["texts"] for r in records]).T
        texts = join_texts([text for r in records for text in r["ids"]], parts.tokenizer.pad_id, ranks.device)
        owners = caption_ids([text for r in records for text, _ in r["ids"]])
        found = {"images": [r["key"] for r in records], "embeddings": right_first(similarity, owners), "reranked": None}
        if rerank:
            tokens = torch.from_numpy(np.stack([r["tokens"] for r in records]))
            scores = look_again(task.model, tokens, texts, similarity, CANDIDATES, "matching")
            found["reranked"] = right_first(scores, owners)
        return found
    finally:
        distributed.stop()


def caption_ids(captions: Sequence[Any]) -> list[int]:
    """A number for each caption, the same for equal ones: a scene's caption is as right for every scene that it describes."""
    known: dict[Any, int] = {}
    return [known.setdefault(tuple(caption), len(known)) for caption in captions]


def right_first(scores: NDArray, owners: Sequence[int]) -> list[float]:
    """For N images with one text each and scores (N, N): 100, 50 or 0, as both, one or none of image and text find a right one first."""
    from vlm.metrics.retrieval import retrieval_scores

    ranks = retrieval_scores(scores, owners, owners)
    found: list[float] = (50.0 * ((ranks.image_ranks < 1).astype(float) + (ranks.text_ranks < 1))).tolist()
    return found


def ciders(references: Path, predictions: Path) -> list[float]:
    """CIDEr of each image, in percent."""
    from vlm.metrics.captions import caption_scores

    known = {a["image_id"]: [a["caption"]] for a in json.loads(references.read_text())["annotations"]}
    said = {p["image_id"]: p["caption"] for p in json.loads(predictions.read_text())}
    found = caption_scores(known, said).cider_per_image
    return [100 * found[image] for image in said]


def interval(values: NDArray) -> tuple[float, float]:
    """95 % of the means of resamples of values (S, N), of which both the S seeds and the N images are drawn anew; with one seed as
    vlm.metrics.interval.
    """
    seeds, images = values.shape
    generator = np.random.default_rng(0)
    times = generator.multinomial(images, np.full(images, 1 / images), RESAMPLES)
    seed_times = generator.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES)
    means = ((seed_times @ values) * times).sum(1) / values.size
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def verdict(low: float, high: float) -> str:
    """What the interval of a difference says."""
    return "rises" if low > 0 else "falls" if high < 0 else "not told apart"


def summarize(encoders: Sequence[str], seeds: int, cells: Cells) -> dict[str, Any]:
    """Means of each set and differences between one and the next, with their intervals and the seeds' own means.

    For contrastive alone there is no second look: + matching, re-ranked, is compared with its embeddings.
    """
    scores, differences = [], []
    for encoder, (measure, title) in itertools.product(encoders, MEASURES.items()):
        before: NDArray | None = None
        for name in SETS:
            runs = [cells[encoder, seed, name] for seed in range(seeds)]
            row = {"encoder": encoder, "set": name, "measure": title}
            shown = measure if runs[0][measure] is not None else "embeddings"
            values = np.array([run[shown] for run in runs])
            scores.append(row | (_told(values) if shown == measure else {"missing": NO_HEAD}))
            if before is not None:
                told = _told(values - before)
                differences.append(row | told | {"verdict": verdict(told["low"], told["high"])})
            before = values
    return {"scores": scores, "differences": differences}


def _told(values: NDArray) -> dict[str, Any]:
    low, high = interval(values)
    return {"mean": float(values.mean()), "low": low, "high": high, "by_seed": values.mean(1).tolist()}


def lines(summary: dict[str, Any]) -> Iterator[str]:
    """Two tables in Markdown."""
    yield "| encoder | objectives | " + " | ".join(MEASURES.values()) + " |"
    yield "| --- | --- |" + " --- |" * len(MEASURES)
    rows = {(r["encoder"], r["set"], r["measure"]): r for r in summary["scores"]}
    for encoder, name in dict.fromkeys((r["encoder"], r["set"]) for r in summary["scores"]):
        found = [rows[encoder, name, title] for title in MEASURES.values()]
        yield f"| {encoder} | {name} | " + " | ".join(_shown(row) for row in found) + " |"
    yield ""
    yield "| encoder | what is added | measure | difference | by seed | verdict |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for r in summary["differences"]:
        seeds = ", ".join(f"{value:+.1f}" for value in r["by_seed"])
        yield f"| {r['encoder']} | {r['set']} | {r['measure']} | {_shown(r, '+')} | {seeds} | {r['verdict']} |"


def _shown(row: dict[str, Any], sign: str = "") -> str:
    if "missing" in row:
        return f"none: {row['missing']}"
    return f"{row['mean']:{sign}.1f} ({row['low']:{sign}.1f} to {row['high']:{sign}.1f})"


def write_report(out: Path, settings: dict[str, Any], encoders: Sequence[str], seeds: int, cells: Cells) -> None:
    """Prints the tables and writes results.json."""
    from vlm.files import write_json

    summary = summarize(encoders, seeds, cells)
    seconds = {" / ".join(map(str, name)): cell["seconds"] for name, cell in cells.items()}
    write_json(out / "results.json", {"settings": settings, "seeds": seeds, **summary, "seconds": seconds})
    print("\n".join(lines(summary)))
    print(
        f"\n{settings['val']} held-out scenes, {seeds} seeds; for contrastive alone there is no second look: {NO_HEAD}"
    )
    print(f"there, and + matching, re-ranked, is compared with its embeddings. Written to {out}/results.json")


if __name__ == "__main__":
    sys.exit(main())
