"""Captions of photographs: python demos/caption.py IMG|FOLDER|- [...] [--model DIR] [--beams N] [--sample] [--json] [--device D]

One caption a line on stdout, in order, nothing else; `-` reads paths from stdin. A bad image among several gives an empty line, a line on stderr and
exit status 1.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm.predictor import Predictor

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
MODEL = Path(__file__).parent / "model"


def main() -> int:
    parser = argparse.ArgumentParser(description="Print one caption a line for each image.")
    parser.add_argument(
        "images", nargs="+", metavar="IMG|FOLDER|-", help="image files, folders of images, or - for paths on stdin"
    )
    parser.add_argument("--model", default=str(MODEL), metavar="DIR", help="checkpoint folder (default: %(default)s)")
    parser.add_argument("--beams", type=int, metavar="N", help="beams; 1 is greedy (default: the checkpoint's)")
    parser.add_argument("--sample", action="store_true", help="draw the words instead of searching the likeliest")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of --sample: other seeds, other captions")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: image, caption, confidence")
    parser.add_argument("--device", metavar="D", help="cpu or cuda (default: a GPU where there is one)")
    arguments = parser.parse_args()
    if arguments.beams is not None and arguments.beams < 1:
        parser.error(f"--beams {arguments.beams}: give at least 1")

    from vlm.errors import UserError

    try:
        return caption(arguments)
    except UserError as error:
        print(f"caption: {error}", file=sys.stderr)
        return error.exit_code


def caption(arguments: argparse.Namespace) -> int:
    """Writes the captions; the exit status.

    Raises:
        UserError: nothing can be captioned.
    """
    from vlm.errors import BadImage

    paths = list(listed(arguments.images))
    predictor = load(arguments.model, arguments.device)
    from vlm.predictor import Said

    status = 0
    for path in paths:
        found: Said | str
        try:
            found = predictor.caption([path], arguments.beams, arguments.sample, arguments.seed)[0]
        except BadImage as error:
            found, status = " ".join(str(error).splitlines()), 1  # a file's name may have several lines
            print(f"caption: {found}", file=sys.stderr)
        if arguments.json:
            words = {"caption": found.text, "confidence": round(found.confidence, 4)} if isinstance(found, Said) else {}
            print(json.dumps({"image": path, **(words or {"error": found})}), flush=True)
        else:
            print(found.text if isinstance(found, Said) else "", flush=True)
    return status


def load(model: str, device: str | None) -> "Predictor":
    """The checkpoint that a demo was given, or the one beside it.

    Raises:
        UserError: it is not there, or cannot be used.
    """
    from vlm.errors import CheckpointError

    if model == str(MODEL) and not MODEL.exists():
        raise CheckpointError(f"{MODEL} is not there; give a checkpoint folder with --model DIR.")
    from vlm.predictor import Predictor

    return Predictor.load(model, device)


def listed(names: list[str]) -> Iterator[str]:
    """The paths that the arguments name, folders in the order of their files' names.

    Raises:
        UserError: a folder holds no image or cannot be read.
    """
    from vlm.errors import UserError

    for name in names:
        if name == "-":
            lines = (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer)
            yield from (line for line in lines if line.strip())
        elif os.path.isdir(name):
            try:
                inside = sorted(str(p) for p in Path(name).iterdir() if p.suffix.lower() in SUFFIXES)
            except OSError as error:
                raise UserError(f"{name}: the folder cannot be read ({error.strerror}).") from None
            if not inside:
                raise UserError(f"{name}: no images in this folder (looked for {', '.join(sorted(SUFFIXES))}).")
            yield from inside
        else:
            yield name


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(1)  # 3 would say that a state was saved
    except BrokenPipeError:  # the reader has enough; what is left in the buffer must not be tried again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
