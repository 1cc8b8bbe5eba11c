"""The command `vlm shards`: thin, no logic."""

import argparse
import json
from pathlib import Path

from vlm.cli.convert import Commands
from vlm.errors import ConfigError


def add_shards(commands: Commands) -> None:
    """Adds it to the command's parser."""
    kinds = commands.add_parser("shards", help="look after shards").add_subparsers(
        dest="kind", required=True, metavar="KIND"
    )
    info = kinds.add_parser("info", help="counts, sizes and text statistics of a folder of shards")
    info.add_argument("folder", metavar="DIR")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(run=_info)
    check = kinds.add_parser(
        "check", help="decode everything and name what cannot be used, by cause; exit 1 if there is any"
    )
    check.add_argument("folder", metavar="DIR")
    check.set_defaults(run=_check)
    index = kinds.add_parser("index", help="count the records of a folder of shards anew and write index.json")
    index.add_argument("folder", type=Path, metavar="DIR")
    index.add_argument(
        "--source",
        metavar="NAME",
        help="name of the source that image identities begin with; default: as index.json has it, else the folder's name",
    )
    index.set_defaults(run=_index)
    join = kinds.add_parser(
        "join",
        help="make one folder of several with the same photographs: each once, with all its captions and questions",
    )
    join.add_argument("folders", nargs="+", metavar="DIR", help="shards of one source")
    join.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new shards")
    join.set_defaults(run=_join)
    ask = kinds.add_parser(
        "ask",
        help="add questions made from the captions by plain rules (English)",
        description="Write new shards in which images have questions and answers that their captions give: colours, numbers, what somebody does or "
        "holds, where, what animal, sport or room, whether something is there.",
    )
    ask.add_argument("folder", metavar="DIR", help="shards of images with captions")
    ask.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new shards")
    ask.add_argument("--per-image", type=int, default=4, metavar="N", help="at most (default: %(default)s)")
    ask.add_argument("--seed", type=int, default=0, metavar="N", help="which of an image's questions are taken")
    ask.set_defaults(run=_ask)
    _add_filter(kinds)
    _add_caption(kinds)


def _add_filter(kinds: Commands) -> None:
    filtered = kinds.add_parser(
        "filter",
        help="leave out near-duplicates, unsuitable captions and images, and pairs that a model finds not to fit",
        description="Write new shards without what the options name; without options only records that cannot be read are left out. Beside them "
        "come report.json (counts by cause) and dropped.html (examples). A caption that falls leaves its image's others in place.",
    )
    filtered.add_argument("folder", metavar="DIR")
    filtered.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new shards")
    captions = filtered.add_argument_group("captions")
    captions.add_argument("--min-words", type=int, metavar="N", help="captions of fewer words fall")
    captions.add_argument("--max-words", type=int, metavar="N", help="captions of more words fall")
    captions.add_argument(
        "--stop-list",
        type=Path,
        metavar="FILE",
        help="captions that stand in this file fall (one a line; case and punctuation do not count)",
    )
    images = filtered.add_argument_group("images")
    images.add_argument("--min-side", type=int, metavar="PIXELS", help="images whose shorter side is less fall")
    images.add_argument(
        "--max-aspect",
        type=float,
        metavar="RATIO",
        help="images whose longer side is more than this times the shorter fall",
    )
    images.add_argument(
        "--near-duplicates",
        type=int,
        nargs="?",
        const=6,
        metavar="BITS",
        help="images whose perceptual hash is within so many of 64 bits of an earlier one's fall (default: %(const)s)",
    )
    pairs = filtered.add_argument_group("pairs of an image and a caption")
    pairs.add_argument(
        "--model", metavar="DIR", help="a checkpoint (or a name on the hub) that compares images and texts"
    )
    pairs.add_argument("--min-score", type=float, metavar="S", help="pairs that score less fall")
    pairs.add_argument(
        "--worst", type=float, metavar="SHARE", help="this share of all pairs falls, those that score least"
    )
    pairs.add_argument(
        "--by",
        choices=["similarity", "matching"],
        help="the score: similarity of the embeddings, or the matching head's probability (default: similarity)",
    )
    filtered.set_defaults(run=_filter)


def _add_caption(kinds: Commands) -> None:
    caption = kinds.add_parser(
        "caption",
        help="add captions drawn by a model, and perhaps filtered by it",
        description="Write new shards in which every image has one caption more, by beam search; with --below several, the others sampled. "
        "A stop keeps what is done: the same command goes on.",
    )
    caption.add_argument("folder", metavar="DIR", help="shards of images with texts")
    caption.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="a checkpoint (or a name on the hub, or a folder of transformers' BLIP) that captions",
    )
    caption.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new shards")
    caption.add_argument(
        "--below", type=int, metavar="N", help="images with fewer than N captions get as many as they lack, others none"
    )
    caption.add_argument(
        "--filter",
        type=float,
        nargs="?",
        const=0.5,
        metavar="Q",
        help="keep a drawn caption only if it is as similar to its image as this share of the given captions are to theirs; the model must compare "
        "images and texts (default: %(const)s)",
    )
    caption.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampled captions")
    caption.set_defaults(run=_caption)


def _say(text: object) -> None:
    """Prints it; half characters, which stand for bytes of a file's name that are not UTF-8, as escapes: no terminal takes them."""
    print(str(text).encode(errors="backslashreplace").decode())  # noqa: T201


def _info(arguments: argparse.Namespace, _: list[str]) -> int:
    from vlm.data.index import load_index
    from vlm.data.info import info

    found = info(load_index(arguments.folder))
    _say(json.dumps(found.as_json(), ensure_ascii=False) if arguments.json else found)
    return 0


def _check(arguments: argparse.Namespace, _: list[str]) -> int:
    from vlm.data.check import check
    from vlm.data.index import load_index

    faults = check(load_index(arguments.folder))
    _say(f"{arguments.folder}: {faults}")
    return 1 if faults.counts else 0


def _index(arguments: argparse.Namespace, _: list[str]) -> int:
    from vlm.data.index import write_index

    found = write_index(arguments.folder, arguments.source)
    _say(f"{arguments.folder}: {len(found.shards)} shards, {found.samples:,} records, source {found.source}")
    return 0


def _join(arguments: argparse.Namespace, _: list[str]) -> int:
    from vlm.data.index import load_index
    from vlm.data.join import join

    done = join([load_index(folder) for folder in arguments.folders], arguments.out)
    _say(f"{arguments.out}: {done}")
    return 0


def _ask(arguments: argparse.Namespace, _: list[str]) -> int:
    from vlm.data.ask import ask
    from vlm.data.index import load_index

    done = ask(load_index(arguments.folder), arguments.out, arguments.per_image, arguments.seed)
    _say(f"{arguments.out}: {done}")
    return 0


def _filter(arguments: argparse.Namespace, _: list[str]) -> int:
    from vlm.data.filter import Rules, filter_shards, read_stop_list
    from vlm.data.index import load_index

    rules = Rules(
        min_words=arguments.min_words,
        max_words=arguments.max_words,
        stop=read_stop_list(arguments.stop_list) if arguments.stop_list else frozenset(),
        min_score=arguments.min_score,
        min_side=arguments.min_side,
        max_aspect=arguments.max_aspect,
        near_duplicates=arguments.near_duplicates,
    )
    shards = load_index(arguments.folder)
    if arguments.model:
        from vlm.capfilt import filter_by_model
        from vlm.predictor import Predictor

        predictor = Predictor.load(arguments.model)
        done = filter_by_model(predictor, shards, arguments.out, rules, arguments.by or "similarity", arguments.worst)
    elif arguments.worst is not None or arguments.by is not None:
        option = "--by" if arguments.worst is None else "--worst"
        raise ConfigError(f"{option} needs scores: give a model that compares images and texts with --model.")
    else:
        done = filter_shards(shards, arguments.out, rules)
    _say(f"{arguments.out}: {done}")
    return 0


def _caption(arguments: argparse.Namespace, _: list[str]) -> int:
    from vlm.capfilt import caption
    from vlm.data.index import load_index
    from vlm.predictor import Predictor

    shards = load_index(arguments.folder)
    predictor = Predictor.load(arguments.model)
    done = caption(predictor, shards, arguments.out, arguments.below, arguments.filter, arguments.seed)
    _say(f"{arguments.out}: {done}")
    return 0
