"""Find photographs by words: python demos/retrieve.py "TEXT" IMG|FOLDER|- [...] [--model DIR] [--top N] [--json] [--device D]

The images that fit the text best, the best first: similarity, tab, path. A bad image gives a line on stderr and exit status 1.
"""

import argparse
import json
import sys

from caption import MODEL, listed, load


def main() -> int:
    parser = argparse.ArgumentParser(description="List the images that fit a text best.")
    parser.add_argument("text", metavar="TEXT", help="what to look for, such as 'two dogs on a beach'")
    parser.add_argument(
        "images", nargs="+", metavar="IMG|FOLDER|-", help="image files, folders of images, or - for paths on stdin"
    )
    parser.add_argument("--model", default=str(MODEL), metavar="DIR", help="checkpoint folder (default: %(default)s)")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="how many to list (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: image, similarity")
    parser.add_argument("--device", metavar="D", help="cpu or cuda (default: a GPU where there is one)")
    arguments = parser.parse_args()
    if arguments.top < 1:
        parser.error(f"--top {arguments.top}: give at least 1")
    if not arguments.text.strip():
        parser.error("TEXT is empty")

    from vlm.errors import UserError

    try:
        return retrieve(arguments)
    except UserError as error:
        print(f"retrieve: {error}", file=sys.stderr)
        return error.exit_code


def retrieve(arguments: argparse.Namespace) -> int:
    """Writes the best images; the exit status.

    Raises:
        UserError: nothing can be compared.
    """
    from tqdm import tqdm

    from vlm.errors import BadImage

    paths = list(listed(arguments.images))
    predictor = load(arguments.model, arguments.device)
    wanted = predictor.embed_texts([arguments.text])[0]
    found: list[tuple[float, str]] = []
    for path in tqdm(paths, unit="image", disable=len(paths) < 50 or not sys.stderr.isatty(), leave=False):
        try:
            found.append((float(predictor.embed_images([path])[0] @ wanted), path))
        except BadImage as error:
            print(f"retrieve: {' '.join(str(error).splitlines())}", file=sys.stderr)
    for similarity, path in sorted(found, key=lambda pair: -pair[0])[: arguments.top]:
        line = (
            json.dumps({"image": path, "similarity": round(similarity, 4)})
            if arguments.json
            else f"{similarity:.3f}\t{path}"
        )
        print(line)
    return 0 if len(found) == len(paths) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(1)
