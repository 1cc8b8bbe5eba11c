"""The command `vlm`: thin, no logic.

Exit status: 0 done; 1 something stopped the work; 2 unusable arguments or config; 3 stopped on request with the state saved.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm.cli.convert import Commands, add_convert
from vlm.cli.score import add_score
from vlm.cli.shards import add_shards
from vlm.errors import ConfigError, UserError


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
    except RuntimeError as error:
        # So torch says, in the midst of whatever this process does, that one of its readers was killed.
        if not str(error).startswith("DataLoader worker"):
            raise
        hint = "mostly memory has run out: lower data.workers or data.batch_size; --resume auto goes on from the last state"
        print(f"vlm: {str(error).strip()} {hint}", file=sys.stderr)  # noqa: T201
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
    add_score(commands)
    _add_checkpoints(commands)
    plot = commands.add_parser("plot", help="draw the curves of one or several runs")
    plot.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    plot.add_argument("--out", type=Path, metavar="PNG", help="default: curves.png in the first run's folder")
    plot.set_defaults(run=_plot)

    add_shards(commands)
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
    ways = evaluate.add_mutually_exclusive_group()  # the temperature is that of the weights as they are
    ways.add_argument(
        "--int8", action="store_true", help="with weights of 8 bits, which needs torchao: what it costs in score"
    )
    ways.add_argument(
        "--calibrate",
        action="store_true",
        help="of answers: fit the temperature of their confidence, and what yes or no is decided by, on this split, and store both in the checkpoint",
    )
    evaluate.set_defaults(run=_evaluate)


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
    export.add_argument(
        "--onnx", action="store_true", help="write ONNX graphs of one checkpoint instead, which run without PyTorch"
    )
    export.set_defaults(run=_export)

    add_convert(commands)


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
    if arguments.dry_run:
        from vlm.dry_run import dry_run

        dry_run(config)
        return 0
    from vlm.run import train
    from vlm.train.trainer import StoppedOnRequest

    try:
        train(config, resume=arguments.resume == "auto")
    except StoppedOnRequest:
        command = shlex.join(["vlm", "train", arguments.config, *overrides, "--resume", "auto"])
        kept = "the state is saved" if Path(config.out, "latest").is_dir() else "nothing was begun that had to be saved"
        print(f"vlm: stopped on request, {kept}; go on with: {command}", file=sys.stderr)  # noqa: T201
        return 3
    return 0


def _evaluate(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from vlm.evaluation import evaluate
    from vlm.settings import load_config

    config = load_config(arguments.config, overrides, "vlm evaluate")
    quantized = "int8" if arguments.int8 else None
    evaluate(config, arguments.checkpoint, arguments.split, arguments.out, quantized, arguments.calibrate)
    return 0


def _export(arguments: argparse.Namespace, _: list[str]) -> int:
    if not 0 < arguments.max_file_mib < math.inf:
        raise ConfigError(f"--max-file-mib {arguments.max_file_mib:g}: give a finite number above 0, such as 5120.")
    if arguments.onnx:
        from vlm.onnx.export import export_onnx

        if len(arguments.checkpoints) > 1 or arguments.half:
            raise ConfigError("--onnx takes one checkpoint and no --half; average and halve into a folder first.")
        graphs = export_onnx(arguments.checkpoints[0], arguments.out)
        print(f"{arguments.out}: {', '.join(graphs)}")  # noqa: T201
        return 0
    from vlm.export import export

    size = export(arguments.checkpoints, arguments.out, arguments.half, int(arguments.max_file_mib * 2**20))
    print(f"{arguments.out}: {size / 1e6:.1f} MB of weights")  # noqa: T201
    return 0


def _plot(arguments: argparse.Namespace, _: list[str]) -> int:
    from vlm.train.plot import plot_runs

    print(plot_runs(arguments.runs, arguments.out))  # noqa: T201
    return 0
