"""Captions of photographs: python demos/caption.py IMG|FOLDER|- [...] [--model DIR] [--beams N] [--sample] [--json] [--device D]

One caption a line on stdout, in order, nothing else; `-` reads paths from stdin. A bad image among several gives an empty line, a line on stderr and
exit status 1.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description="Print one caption a line for each image.")
    parser.add_argument(
        "images", nargs="+", metavar="IMG|FOLDER|-", help="image files, folders of images, or - for paths on stdin"
    )
    parser.add_argument(
        "--model", default=str(HERE / "model"), metavar="DIR", help="checkpoint folder (default: %(default)s)"
    )
    parser.add_argument("--beams", type=int, metavar="N", help="beams; 1 is greedy (default: the checkpoint's)")
    parser.add_argument("--sample", action="store_true", help="draw the words instead of searching the likeliest")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: image, caption, confidence")
    parser.add_argument("--device", metavar="D", help="cpu or cuda (default: a GPU where there is one)")
    arguments = parser.parse_args()
    if arguments.beams is not None and arguments.beams < 1:
        parser.error(f"--beams {arguments.beams}: give at least 1")

    from vlm.errors import BadImage, UserError

    try:
        paths = list(listed(arguments.images))
        from vlm.predictor import Predictor, Said

        predictor = Predictor.load(arguments.model, arguments.device)
    except UserError as error:
        print(f"caption: {error}", file=sys.stderr)
        return error.exit_code

    status = 0
    for path in paths:
        found: Said | str
        try:
            found = predictor.caption([path], beams=arguments.beams, sampled=arguments.sample)[0]
        except BadImage as error:
            found, status = str(error), 1
            print(f"caption: {error}", file=sys.stderr)
        if arguments.json:
            what = (
                {"error": found}
                if isinstance(found, str)
                else {"caption": found.text, "confidence": round(found.confidence, 4)}
            )
            print(json.dumps({"image": str(path)} | what, ensure_ascii=False), flush=True)
        else:
            print("" if isinstance(found, str) else found.text, flush=True)
    return status


def listed(names: list[str]) -> Iterator[Path]:
    """The images that the arguments name, folders in the order of their files' names.

    Raises:
        UserError: a folder holds no image.
    """
    from vlm.errors import UserError

    for name in names:
        if name == "-":
            yield from (Path(line.rstrip("\n")) for line in sys.stdin if line.strip())
        elif Path(name).is_dir():
            inside = sorted(p for p in Path(name).iterdir() if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise UserError(f"{name}: no images in this folder (looked for {', '.join(sorted(SUFFIXES))}).")
            yield from inside
        else:
            yield Path(name)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(1)
