"""The command `vlm`: thin, no logic.

Exit status: 0 done; 1 something stopped the work; 2 unusable arguments or config; 3 stopped on request with the state saved.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm.cli_convert import Commands, add_convert
from vlm.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; the exit status. Errors that the user can mend are one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    try:
        known, rest = parser.parse_known_args(arguments)
        if rest and known.command != "train" and known.command != "evaluate":
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return int(known.run(known, rest))
    except UserError as error:
        print(f"vlm: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except KeyboardInterrupt:
        print("vlm: stopped at once, nothing more was saved", file=sys.stderr)  # noqa: T201
        return 1
    except BrokenPipeError:
        return 1
    except OSError as error:  # a full disk, a path that is a folder, no permission
        what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        print(f"vlm: {what}", file=sys.stderr)  # noqa: T201
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlm", description="Train, evaluate and score compact vision-language models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_runs(commands)
    _add_score(commands)
    _add_checkpoints(commands)
    plot = commands.add_parser("plot", help="draw the curves of one or several runs")
    plot.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    plot.add_argument("--out", type=Path, metavar="PNG", help="default: curves.png in the first run's folder")
    plot.set_defaults(run=_plot)

    _add_shards(commands)
    return parser


def _add_runs(commands: Commands) -> None:
    train = commands.add_parser(
        "train",
        help="train from a config",
        description="Train from a config; --key value overrides any setting (vlm train CONFIG --help lists all with their values).",
        add_help=False,
    )
    train.add_argument(
        "config", metavar="CONFIG", nargs="?", help="YAML file of settings, e.g. configs/pretrain/tiny.yaml"
    )
    train.add_argument("--resume", choices=["auto"], help="auto: go on from OUT/latest if it is there")
    train.add_argument(
        "--dry-run", action="store_true", help="show settings, sizes, the first batch and one step, and leave"
    )
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="score a checkpoint on a split")
    evaluate.add_argument("config", metavar="CONFIG")
    evaluate.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    evaluate.add_argument(
        "--split", choices=["train", "val", "test"], required=True, metavar="NAME", help="train, val or test"
    )
    evaluate.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where predictions.json and results.json go"
    )
    evaluate.set_defaults(run=_evaluate)


def _add_score(commands: Commands) -> None:
    score = commands.add_parser("score", help="score a prediction file in the official form").add_subparsers(
        dest="kind", required=True, metavar="KIND"
    )
    vqa = score.add_parser("vqa", help="official VQA accuracy")
    vqa.add_argument("--questions", type=Path, required=True, metavar="Q.json")
    vqa.add_argument("--annotations", type=Path, required=True, metavar="A.json")
    captions = score.add_parser("captions", help="BLEU, ROUGE-L, CIDEr as pycocoevalcap")
    captions.add_argument("--references", type=Path, required=True, metavar="R.json")
    for kind in (vqa, captions):
        kind.add_argument("--predictions", type=Path, required=True, metavar="P.json")
        kind.add_argument("--json", action="store_true", help="print one JSON object")
        kind.set_defaults(run=_score)


def _add_checkpoints(commands: Commands) -> None:
    export = commands.add_parser("export", help="make checkpoints ready to hand on: averaged, halved, cut into files")
    export.add_argument(
        "checkpoints", type=Path, nargs="+", metavar="DIR", help="one checkpoint, or several of one shape to average"
    )
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new checkpoint folder")
    export.add_argument("--half", action="store_true", help="float16 on the disk")
    export.add_argument(
        "--max-file-mib", type=float, default=5120, metavar="N", help="largest file of weights (default: %(default)g)"
    )
    export.set_defaults(run=_export)

    add_convert(commands)


def _add_shards(commands: Commands) -> None:
    shards = commands.add_parser("shards", help="look after shards").add_subparsers(
        dest="kind", required=True, metavar="KIND"
    )
    index = shards.add_parser("index", help="count the records of a folder of shards anew and write index.json")
    index.add_argument("folder", type=Path, metavar="DIR")
    index.add_argument(
        "--source", help="name of the source that image identities begin with; default: the folder's name"
    )
    index.set_defaults(run=_index)
    join = shards.add_parser(
        "join",
        help="make one folder of several with the same photographs: each once, with all its captions and questions",
    )
    join.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="shards of one source")
    join.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new shards")
    join.set_defaults(run=_join)
    bootstrap = shards.add_parser(
        "bootstrap", help="add captions drawn by a model, and filtered by it, to images that have few"
    )
    bootstrap.add_argument("folder", type=Path, metavar="DIR", help="shards of images, some with captions by people")
    bootstrap.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="a model that captions and compares (pretraining)"
    )
    bootstrap.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new shards")
    bootstrap.add_argument(
        "--captions", type=int, default=5, metavar="N", help="captions of an image in all (default: %(default)s)"
    )
    bootstrap.add_argument(
        "--quantile",
        type=float,
        default=0.5,
        metavar="Q",
        help="a drawn caption must be as similar to its image as this share of people's captions are to theirs (default: %(default)s)",
    )
    bootstrap.add_argument("--seed", type=int, default=0, metavar="N")
    bootstrap.set_defaults(run=_bootstrap)


def _train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from vlm.settings import load_config

    if arguments.config is None:
        print(
            "usage: vlm train CONFIG [--key value ...] [--resume auto] [--dry-run]\n\n"
            "Trains from a YAML config. `vlm train CONFIG --help` lists every setting with its meaning and present value; any can be overridden:\n"
            "  vlm train configs/pretrain/tiny.yaml --optimizer.lr 1e-3 --out runs/mine",
            file=sys.stdout if "--help" in overrides or "-h" in overrides else sys.stderr,
        )
        return 0 if "--help" in overrides or "-h" in overrides else 2
    config = load_config(arguments.config, overrides)
    from vlm.run import dry_run, train
    from vlm.train.trainer import StoppedOnRequest

    if arguments.dry_run:
        dry_run(config)
        return 0
    try:
        train(config, resume=arguments.resume == "auto")
    except StoppedOnRequest:
        command = shlex.join(["vlm", "train", arguments.config, *overrides, "--resume", "auto"])
        print(f"vlm: stopped on request, the state is saved; go on with: {command}", file=sys.stderr)  # noqa: T201
        return 3
    return 0


def _evaluate(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from vlm.run import evaluate
    from vlm.settings import load_config

    evaluate(
        load_config(arguments.config, overrides, "vlm evaluate"), arguments.checkpoint, arguments.split, arguments.out
    )
    return 0


def _score(arguments: argparse.Namespace, _: list[str]) -> int:
    from vlm.metrics.score import format_scores, score_captions, score_vqa

    if arguments.kind == "vqa":
        scores = score_vqa(arguments.questions, arguments.annotations, arguments.predictions)
    else:
        scores = score_captions(arguments.references, arguments.predictions)
    print(json.dumps(scores) if arguments.json else format_scores(scores))  # noqa: T201
    return 0


def _export(arguments: argparse.Namespace, _: list[str]) -> int:
    from vlm.export import export

    size = export(arguments.checkpoints, arguments.out, arguments.half, int(arguments.max_file_mib * 2**20))
    print(f"{arguments.out}: {size / 1e6:.1f} MB of weights")  # noqa: T201
    return 0


def _plot(arguments: argparse.Namespace, _: list[str]) -> int:
    from vlm.train.plot import plot_runs

    print(plot_runs(arguments.runs, arguments.out))  # noqa: T201
    return 0


def _index(arguments: argparse.Namespace, _: list[str]) -> int:
    from vlm.data.index import write_index

    found = write_index(arguments.folder, arguments.source)
    print(f"{arguments.folder}: {len(found.shards)} shards, {found.samples:,} records, source {found.source}")  # noqa: T201
    return 0


def _join(arguments: argparse.Namespace, _: list[str]) -> int:
    from vlm.data.index import load_index
    from vlm.data.join import join

    done = join([load_index(folder) for folder in arguments.folders], arguments.out)
    print(f"{arguments.out}: {done.images:,} images of {done.records:,} records, {done.shared:,} of them in several")  # noqa: T201
    return 0


def _bootstrap(arguments: argparse.Namespace, _: list[str]) -> int:
    from vlm.bootstrap import bootstrap
    from vlm.data.index import load_index
    from vlm.predictor import Predictor

    shards = load_index(arguments.folder)
    predictor = Predictor.load(arguments.checkpoint)
    done = bootstrap(predictor, shards, arguments.out, arguments.captions, arguments.quantile, arguments.seed)
    print(  # noqa: T201
        f"{arguments.out}: {done.images:,} images, {done.added:,} captions added of {done.drawn:,} drawn "
        f"(similarity at least {done.threshold:.3f})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
