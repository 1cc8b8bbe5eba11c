"""What every datasets/NAME/prepare.py shares: arguments, reading the download, writing the splits, and the account of what came out.

A recipe turns the official download into `Photograph`s by split; `write_splits` passes their bytes unchanged into shards OUT/train, val and test.
Those of an earlier run are replaced only when every photograph has been read, and equal input gives equal bytes.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.data.references import write_references
from vlm.errors import BadImage, UserError

SPLITS = ("train", "val", "test")
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class Photograph:
    """One record to be: its key in the shard, the file with its bytes, and what is said and asked about it."""

    key: str
    path: Path
    image_id: int | str
    captions: tuple[str, ...] = ()
    questions: tuple[dict[str, Any], ...] = ()


@dataclass
class LeftOut:
    """Counts what does not get into the shards, by cause, with the first case of each as an example."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, cause: str, example: object, count: int = 1) -> None:
        self.counts[cause] = self.counts.get(cause, 0) + count
        self.examples.setdefault(cause, str(example))


def run(
    description: str,
    arguments: Callable[[argparse.ArgumentParser], None],
    prepare: Callable[[argparse.Namespace], None],
    argv: Sequence[str] | None = None,
    source: str = "the folder of the extracted download",
) -> int:
    """Parse the arguments and prepare; returns the exit status: 0 done, 1 something stopped the work, 2 bad arguments, 3 stopped on request."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, metavar="PATH", help=source)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where train/, val/ and test/ are written"
    )
    parser.add_argument(
        "--samples-per-shard", type=whole_number(1), default=1000, metavar="N", help="photographs in a tar"
    )
    arguments(parser)
    args = parser.parse_args(argv)
    try:
        prepare(args)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"error: {error}. Mend it and run the same command again; finished splits are kept.\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("Stopped on request; finished splits of an earlier run are kept.\n")
        return 3
    return 0


def whole_number(least: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least `least`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least {least}")
        return int(text)

    return parse


def require(path: Path, download: str) -> Path:
    """`path` if it is there; else an error that names the download that has it."""
    if not path.exists():
        raise UserError(f"{path} is missing. It comes from: {download}")
    return path


def read_lines(path: Path, download: str) -> list[str]:
    """The lines of a text file, without line ends and empty lines."""
    try:
        text = require(path, download).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); download it again: {download}"
        ) from None
    return [line for line in text.split("\n") if line.strip()]


def read_json(path: Path, download: str, keys: Iterable[str] = ()) -> Any:
    """The content of a JSON file, an object that has all `keys`."""
    try:
        content = json.loads(require(path, download).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not whole JSON ({error}); download it again: {download}") from None
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            raise UserError(f"{path} has no {key!r} at its top; expected the file from: {download}")
    return content


def shard_key(name: str) -> str:
    """A record's key from a file's name without its ending: what tar members and webdataset cannot hold becomes "_"."""
    return re.sub(r"[./\\\s\x00-\x1f]", "_", name)


def keyed_hash(name: str, key: str) -> int:
    """64 bits that depend on the name (and the data set) alone, so that a photograph keeps its place whatever else is there."""
    # half characters stand for bytes of a file's name that are not UTF-8
    text, salt = name.encode(errors="surrogatepass"), key.encode(errors="surrogatepass")[:64]
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, key=salt).digest(), "big")


def image_extension(data: bytes) -> str:
    """The record's ending for an image file, judged by its bytes; BadImage says why it cannot be one. Reads the header, not the pixels."""
    if not data:
        raise BadImage("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(BytesIO(data)) as image:
                image.verify()
                kind = image.format
    except Image.DecompressionBombError:
        raise BadImage("image has too many pixels") from None
    except Exception:  # Pillow's readers raise many kinds for damaged files; all mean the same here
        raise BadImage("not a readable image file") from None
    if kind not in EXTENSIONS:
        raise BadImage(f"{kind} image; shards hold JPEG, PNG and WebP")
    return EXTENSIONS[kind]


def write_splits(
    out: Path,
    source: str,
    splits: Mapping[str, Sequence[Photograph]],
    left_out: LeftOut,
    samples_per_shard: int,
    missing: str,
) -> dict[str, list[Photograph]]:
    """Write the shards and reference files of all splits under `out`, print the account, and return what each split holds.

    Photographs without a caption or question, without a file or with an unreadable one are left out and counted. `missing` names the download that
    holds the photographs. A split of an earlier run that now is empty is removed, so that no photograph stays behind in a split it has left: one
    that is named in `splits` whatever its source, as it would be replaced, another where it is of the same source.
    """
    _check_keys(splits)
    written: dict[str, list[Photograph]] = {}
    with ExitStack() as stack:
        for split in SPLITS:
            photographs = splits.get(split, ())
            if split == "train":  # well mixed shards, whatever order the download has
                photographs = sorted(photographs, key=lambda p: keyed_hash(p.key, source))
            written[split] = _write_split(stack, out / split, source, split, photographs, left_out, samples_per_shard)
        if not any(written.values()):
            causes = "; ".join(
                f"{count} x {cause} (e.g. {left_out.examples[cause]})" for cause, count in left_out.counts.items()
            )
            raise UserError(
                f"nothing to write: no usable photograph was found ({causes or 'the lists are empty'}). Photographs come from: {missing}"
            )
    for split in SPLITS:
        if not written[split]:
            _remove_earlier(out / split, None if split in splits else source)
        write_references(out, split, written[split])
    account = _account(out, written, left_out)
    sys.stdout.write(account.encode(errors="backslashreplace").decode() + "\n")  # no terminal takes half characters
    return written


def _write_split(
    stack: ExitStack,
    folder: Path,
    source: str,
    split: str,
    photographs: Sequence[Photograph],
    left_out: LeftOut,
    samples_per_shard: int,
) -> list[Photograph]:
    from tqdm import tqdm

    from vlm.data.shards import ShardWriter

    writer: ShardWriter | None = None
    written = []
    for photograph in tqdm(
        photographs, desc=split, unit=" images", mininterval=0.5, file=sys.stderr, disable=not photographs
    ):
        if not photograph.captions and not photograph.questions:
            left_out.add("photograph without a caption or question", photograph.path.name)
            continue
        try:
            data = photograph.path.read_bytes()
            extension = image_extension(data)
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no file can have this name
            left_out.add("listed photograph that is not in the folder", photograph.path.name)
            continue
        except (IsADirectoryError, PermissionError):
            left_out.add("photograph that cannot be read", photograph.path.name)
            continue
        except BadImage as error:
            left_out.add(str(error), photograph.path.name)
            continue
        if writer is None:
            writer = stack.enter_context(ShardWriter(folder, source=source, samples_per_shard=samples_per_shard))
        writer.write(
            photograph.key,
            data,
            extension=extension,
            captions=photograph.captions,
            questions=photograph.questions,
            image_id=photograph.image_id,
        )
        written.append(photograph)
    return written


def _check_keys(splits: Mapping[str, Sequence[Photograph]]) -> None:
    """No photograph twice, neither in one split nor in two: the honest split is checked, not hoped for."""
    seen: dict[object, tuple[str, str]] = {}
    for split, photographs in splits.items():
        for photograph in photographs:
            for name in (photograph.key, ("id", photograph.image_id)):
                if name in seen:
                    other, where = seen[name]
                    raise UserError(
                        f"photograph {photograph.path.name} ({split}) has the key or id of {other} ({where}); each may occur once"
                    )
                seen[name] = (photograph.path.name, split)


def _remove_earlier(folder: Path, source: str | None) -> None:
    """Remove the shards that an earlier run wrote, of this source or of any, for a split that now is empty; whatever else lies there stays."""
    from vlm.data.shards import MADE_BY

    try:
        index = json.loads((folder / "index.json").read_bytes())
        if index["made_by"] != MADE_BY or source not in (None, index["source"]):
            return
        listed = {shard["name"] for shard in index["shards"]}
    except (OSError, ValueError, KeyError, TypeError):
        return
    for tar in folder.glob("*.tar"):
        if tar.name in listed:
            tar.unlink()
    (folder / "index.json").unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _account(out: Path, written: Mapping[str, Sequence[Photograph]], left_out: LeftOut) -> str:
    """The closing table: what each split holds, and what was left out and why."""
    rows: list[tuple[str, ...]] = [("split", "images", "captions", "questions", "shards", "bytes", "folder")]
    for split, photographs in written.items():
        if photographs:
            shards = json.loads((out / split / "index.json").read_text())["shards"]
            counts = (
                len(photographs),
                sum(len(p.captions) for p in photographs),
                sum(len(p.questions) for p in photographs),
            )
            sizes = (len(shards), sum(shard["bytes"] for shard in shards))
            rows.append((split, *(f"{n:,}" for n in counts + sizes), os.fspath(out / split)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i in (0, 6) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    if left_out.counts:
        lines.append("left out:")
        lines += [
            f"  {count:,}  {cause}, e.g. {left_out.examples[cause]}" for cause, count in sorted(left_out.counts.items())
        ]
    else:
        lines.append("left out: nothing")
    return "\n".join(line.rstrip() for line in lines)
