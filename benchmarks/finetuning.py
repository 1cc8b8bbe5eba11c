"""Ways of fine-tuning for captions, for as long each, from one start: python benchmarks/finetuning.py [--start DIR] [--minutes 10] [--out DIR]

Every method trains for the same time on this machine (`--minutes`: the seconds of a step are tried first), or for as many steps (`--steps`), from
one checkpoint, on the same photographs in the same order. Each is scored on held-out ones: CIDEr of its captions, and R@1 of its embeddings (mean of
image to text and text to image), which captioning may cost. The baseline, everything trained, runs with several seeds: their spread is the noise
that a difference must exceed. Prints a Markdown table. What is finished is not run again, so the same command goes on after a stop.
`optimizer.new_lr_factor` has no row: a start that brings everything has no new parts.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commands import Stopped, exit_status

ROOT = Path(__file__).resolve().parent.parent
CONFIG = str(ROOT / "configs/finetune/captioning/photos_small.yaml")
BASELINE = "everything"
METHODS: dict[str, tuple[str, ...]] = {
    BASELINE: (),
    "image encoder at the full rate": ("--optimizer.lr-factors.image-encoder", "1"),  # the baseline: 0.2 of it
    "image encoder frozen": ("--model.image.frozen", "True"),
    "text encoder frozen": ("--model.text.frozen", "True"),
    "last 2 text layers": ("--model.text.trainable-layers", "2"),
    "layer decay 0.75": ("--optimizer.layer-decay", "0.75"),
    "LoRA, rank 8": ("--finetune.low-rank.rank", "8", "--optimizer.lr", "1e-3"),
    "contrastive kept on": ("--finetune.contrastive", "0.3"),
    "R-Drop": ("--finetune.consistency", "1"),
    "FreeLB": ("--finetune.adversarial.steps", "2"),
    "stochastic depth": ("--model.image.drop-path", "0.1"),
    "a larger teacher": ("--finetune.teacher",),  # with --teacher
}
TRIED = 8  # steps that tell how long one takes; the first two are not counted
COLUMNS = ("method", "CIDEr", "R@1", "steps", "s a step", "GiB")


def main() -> int:
    parser = argparse.ArgumentParser(description="Ways of fine-tuning beside each other; a Markdown table.")
    add = parser.add_argument
    shards = ROOT / "data/shards/flickr8k"
    add("--start", default=str(ROOT / "demos/model"), metavar="DIR", help="checkpoint to start from (%(default)s)")
    add("--train", nargs="+", default=[str(shards / "train")], metavar="DIR", help="shards to train on (%(default)s)")
    add("--val", default=str(shards / "val"), metavar="DIR", help="held-out shards (%(default)s)")
    add(
        "--teacher",
        metavar="DIR",
        help="a larger checkpoint with the start's tokenizer; without it that row is left out",
    )
    add("--minutes", type=float, default=10, metavar="M", help="of training, each (default: %(default)s)")
    add("--steps", type=int, metavar="N", help="of training, each, instead of --minutes")
    add("--seeds", type=int, default=2, metavar="N", help="of the baseline (default: %(default)s)")
    add("--methods", nargs="+", choices=METHODS, metavar="NAME", help=f"of: {', '.join(METHODS)} (default: all)")
    add(
        "--set",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="",
        help="last: settings of all runs, e.g. --data.batch-size 8",
    )
    add("--out", type=Path, default=Path("runs/finetuning"), metavar="DIR", help="(%(default)s)")
    given = parser.parse_args()
    for name in ("minutes", "steps", "seeds"):
        if getattr(given, name) is not None and getattr(given, name) <= 0:
            parser.error(f"--{name} {getattr(given, name)}: give more than 0")

    def work() -> None:
        settle(given)
        print(table(measure_all(given)))

    return exit_status("finetuning", work)


def settle(given: argparse.Namespace) -> None:
    """Remembers what all rows share; UserError where the folder holds a comparison of something else."""
    from vlm.errors import UserError
    from vlm.files import write_json

    shared = {name: getattr(given, name) for name in ("start", "train", "val", "teacher", "minutes", "steps", "set")}
    made = given.out / "settings.json"
    if made.exists() and (before := json.loads(made.read_text())) != shared:
        raise UserError(f"{given.out} was made with {before}, now {shared} is asked for; choose another --out.")
    write_json(made, shared)


def rows(given: argparse.Namespace) -> list[tuple[str, int, tuple[str, ...]]]:
    """Name, seed and settings of every run, the baseline's first."""
    chosen = given.methods or [name for name in METHODS if given.teacher or METHODS[name] != ("--finetune.teacher",)]
    found = [(BASELINE, seed, ()) for seed in range(given.seeds)]
    for name in chosen:
        more = (given.teacher,) if METHODS[name] == ("--finetune.teacher",) else ()
        if name != BASELINE:
            found.append((name, 0, METHODS[name] + more))
    return found


def measure_all(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By row what it came to; those that are finished are read."""
    from vlm.files import write_json
    from vlm.train.report import duration

    results: dict[str, dict[str, Any]] = {}
    wanted = [("the start itself", 0, None), *rows(given)]
    spent: list[float] = []
    for done, (name, seed, settings) in enumerate(wanted):
        title = f"{name}, seed {seed}" if name == BASELINE else name
        here = given.out / title.replace(", ", "_").replace(" ", "_")
        if (file := here / "result.json").exists():
            results[title] = json.loads(file.read_text())
            continue
        begun = time.perf_counter()
        run = {} if settings is None else train(given, here, seed, settings)
        results[title] = run | score(given, Path(given.start) if settings is None else here / "run/latest", here)
        write_json(file, results[title])
        if settings is not None:
            spent.append(time.perf_counter() - begun)
        left = len(wanted) - done - 1
        eta = f", ETA {duration(left * statistics.mean(spent))}" if spent else ""
        print(f"=== {title}: {results[title]}", file=sys.stderr)
        print(f"=== {left} of {len(wanted)} left{eta}", file=sys.stderr, flush=True)
    return results


def train(given: argparse.Namespace, here: Path, seed: int, settings: Sequence[str]) -> dict[str, Any]:
    """Trains as long as asked for; the steps, the seconds of one, and the largest memory of the process."""
    from vlm.data.index import load_index
    from vlm.settings import load_config

    common = ["--init-from", given.start, "--seed", str(seed), "--model.image.trainable-blocks", "None"]
    common += ["--model.text.dropout", "0.1", "--data.splits.train", *given.train, "--data.splits.val"]
    common += ["--train.averaging", "0", "--train.log-every", "1", "--train.keep", "0", *settings, *given.set]
    epoch = sum(load_index(folder).samples for folder in given.train) // load_config(CONFIG, common).data.batch_size
    steps = given.steps
    if steps is None:
        vlm(
            "train", CONFIG, "--out", f"{here}/trial", *common, "--train.epochs", str(TRIED / epoch), "--resume", "auto"
        )
        steps = max(1, round(60 * given.minutes / step_seconds(here / "trial")))
    length = ["--train.epochs", str(steps / epoch)]
    memory = vlm("train", CONFIG, "--out", f"{here}/run", *common, *length, "--resume", "auto")
    last = logged(here / "run")[-1]
    return {"steps": last["step"], "step_seconds": step_seconds(here / "run"), "memory_gib": memory}


def logged(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def step_seconds(run: Path) -> float:
    """The median of a step, without the first two."""
    from vlm.settings import load_config

    batch = load_config(run / "config.yaml").data.batch_size
    lines = logged(run)
    return statistics.median(batch / line["samples_per_second"] for line in lines[2:] or lines)


def score(given: argparse.Namespace, checkpoint: Path, here: Path) -> dict[str, float]:
    """CIDEr and R@1 in percent; the objective that is named is only to have the embeddings compared."""
    vlm(
        *("evaluate", CONFIG, "--checkpoint", str(checkpoint), "--split", "val", "--out", f"{here}/evaluation"),
        *("--data.splits.val", given.val, "--data.splits.train", "--finetune.contrastive", "1", *given.set),
    )
    (scores,) = json.loads((here / "evaluation/results.json").read_text())["scores"].values()
    return {"CIDEr": scores["CIDEr"], "R@1": scores["mean_R@1"]}


def vlm(*arguments: str) -> float:
    """Runs a `vlm` command in a process of its own, for its memory: GiB at most."""
    print(f"$ vlm {shlex.join(arguments)}", file=sys.stderr, flush=True)
    code = "import resource, sys; from vlm.cli import main; status = main(sys.argv[1:]); "
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(status)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise Stopped(f"vlm {arguments[0]}", done.returncode)
    return int(done.stdout.split()[-1]) / (2**30 if sys.platform == "darwin" else 2**20)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown; the baseline's spread in the last line."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"| {' | '.join('---' for _ in COLUMNS)} |"]
    for name, found in results.items():
        cells = [name, f"{found['CIDEr']:.1f}", f"{found['R@1']:.1f}"]
        if "steps" in found:
            cells += [str(found["steps"]), f"{found['step_seconds']:.2f}", f"{found['memory_gib']:.1f}"]
        lines.append(f"| {' | '.join(cells + [''] * (len(COLUMNS) - len(cells)))} |")
    seeds = [found for name, found in results.items() if name.startswith(f"{BASELINE}, seed")]
    spread = {key: max(s[key] for s in seeds) - min(s[key] for s in seeds) for key in ("CIDEr", "R@1")}
    told = ", ".join(f"{key} {value:.1f}" for key, value in spread.items())
    return "\n".join([*lines, "", f"{len(seeds)} seeds of the baseline lie apart by: {told}"])


if __name__ == "__main__":
    sys.exit(main())
