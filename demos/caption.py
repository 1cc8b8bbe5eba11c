"""Captions of photographs: python demos/caption.py IMG|FOLDER|- [...] [--model DIR] [--beams N] [--sample] [--count N] [--json] [--device D]

One caption a line on stdout, in order, nothing else; `-` reads paths from stdin. A bad image among several gives an empty line, a line on stderr and
exit status 1. With --count each image has so many lines, empty ones where there are no captions, and with --json also the list `captions`.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm.predictor import Predictor

SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
SUFFIXES |= {".heic", ".heif"}  # not read, but an iPhone's photographs must be named as such, not passed over
MODEL = Path(__file__).parent / "model"
POLICY = ("temperature", "top_k", "top_p")


def main() -> int:
    parser = argparse.ArgumentParser(description="Print one caption a line for each image.")
    parser.add_argument(
        "images", nargs="+", metavar="IMG|FOLDER|-", help="image files, folders of images, or - for paths on stdin"
    )
    parser.add_argument("--model", default=str(MODEL), metavar="DIR", help="checkpoint folder (default: %(default)s)")
    parser.add_argument("--beams", type=int, metavar="N", help="beams; 1 is greedy (default: the checkpoint's)")
    parser.add_argument("--count", type=int, metavar="N", help="different captions of each image, the best first")
    parser.add_argument("--prompt", metavar="TEXT", help="words that the captions continue (default: the checkpoint's)")
    parser.add_argument("--sample", action="store_true", help="draw the words instead of searching the likeliest")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of --sample: other seeds, other captions")
    parser.add_argument("--temperature", type=float, metavar="T", help="of --sample: below 1 keeps to likely words")
    parser.add_argument(
        "--top-k", type=int, metavar="N", help="of --sample: only the N likeliest words each time; 0: all"
    )
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="of --sample: only the likeliest words of this probability"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line: image, caption, confidence")
    parser.add_argument("--device", metavar="D", help="cpu or cuda (default: a GPU where there is one)")
    parser.add_argument("--int8", action="store_true", help="weights of 8 bits, in less memory; needs torchao")
    parser.add_argument("--compile", action="store_true", help="compile first: for many images, above all on a GPU")
    arguments = parser.parse_args()
    for name in ("beams", "count"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: give at least 1")
    for name in POLICY:
        if getattr(arguments, name) is not None and not arguments.sample:
            parser.error(f"--{name.replace('_', '-')} is of drawn captions; add --sample")

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
    predictor = load(arguments.model, arguments.device, arguments.int8, arguments.compile)
    policy = {name: getattr(arguments, name) for name in POLICY if getattr(arguments, name) is not None}
    count, status = arguments.count or 1, 0
    for path in paths:
        said: list[dict[str, Any]] = []
        try:
            (found,) = predictor.captions(
                [path], count, arguments.beams, arguments.sample, arguments.seed, prompt=arguments.prompt, **policy
            )
            said = [{"caption": s.text, "confidence": round(s.confidence, 4)} for s in found]
            shown = {**said[0], **({"captions": said} if arguments.count else {})}
        except BadImage as error:
            shown, status = {"error": " ".join(str(error).splitlines())}, 1  # a file's name may have several lines
            print(f"caption: {shown['error']}", file=sys.stderr)
        if arguments.json:
            print(json.dumps({"image": path, **shown}), flush=True)
        else:
            texts = [s["caption"] for s in said]
            print("\n".join(texts + [""] * (count - len(texts))), flush=True)
    return status


def load(model: str, device: str | None, int8: bool = False, compile: bool = False) -> "Predictor":
    """The checkpoint that a demo was given, or the one beside it; int8: with weights of 8 bits; compile: see `Predictor.load`.

    Raises:
        UserError: it is not there, or cannot be used.
    """
    from vlm.errors import CheckpointError

    if model == str(MODEL) and not MODEL.exists():
        raise CheckpointError(f"{MODEL} is not there; give a checkpoint folder with --model DIR.")
    from vlm.predictor import Predictor

    return Predictor.load(model, device, quantize="int8" if int8 else None, compile=compile)


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
