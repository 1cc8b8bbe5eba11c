"""Find photographs by words: python demos/retrieve.py IMG|FOLDER|- [...] "TEXT" [--model DIR] [--top N] [--rerank N] [--out PNG] [--no-cache]
[--json] [--device D] [--int8]

The images that fit the text best, the best first: similarity, tab, path. A bad image gives a line on stderr and exit status 1. Images are encoded
once: their embeddings are kept in the cache folder ($VLM_CACHE, else ~/.cache/vlm), and a further search encodes what is new or has changed.
"""

import argparse
import io
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from caption import MODEL, listed, load

if TYPE_CHECKING:
    from torch import Tensor

    from vlm.predictor import Predictor


def main() -> int:
    parser = argparse.ArgumentParser(description="List the images that fit a text best.")
    parser.add_argument(
        "images", nargs="+", metavar="IMG|FOLDER|-", help="image files, folders of images, or - for paths on stdin"
    )
    parser.add_argument("text", metavar="TEXT", help="what to look for, such as 'two dogs on a beach'")
    parser.add_argument("--model", default=str(MODEL), metavar="DIR", help="checkpoint folder (default: %(default)s)")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="how many to list (default: %(default)s)")
    parser.add_argument(
        "--rerank", type=int, default=0, metavar="N", help="look at the N best again, with image and text together"
    )
    parser.add_argument("--out", type=Path, metavar="PNG", help="draw the best as a contact sheet; needs matplotlib")
    parser.add_argument("--no-cache", action="store_true", help="encode every image, and keep nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: image, similarity")
    parser.add_argument("--device", metavar="D", help="cpu or cuda (default: a GPU where there is one)")
    parser.add_argument("--int8", action="store_true", help="weights of 8 bits, in less memory; needs torchao")
    arguments = parser.parse_args()
    if arguments.top < 1:
        parser.error(f"--top {arguments.top}: give at least 1")
    if arguments.rerank < 0:
        parser.error(f"--rerank {arguments.rerank}: give 0 or more")
    if not arguments.text.strip():
        parser.error("TEXT is empty")
    if os.path.exists(arguments.text) and not os.path.exists(arguments.images[0]):
        parser.error(f"{arguments.text} is a path; give the images first and the text last")

    from vlm.errors import UserError

    try:
        return retrieve(arguments)
    except UserError as error:
        print(f"retrieve: {error}", file=sys.stderr)
        return error.exit_code


def retrieve(arguments: argparse.Namespace) -> int:
    """Writes the best images; the exit status.

    Raises:
        UserError: nothing can be compared, or drawn.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # paths go out with the bytes they came in with
    paths = list(listed(arguments.images))
    predictor = load(arguments.model, arguments.device, arguments.int8)
    wanted = predictor.embed_texts([arguments.text])[0]
    embeddings = embed(predictor, paths, cached=not arguments.no_cache)
    found = [(float(embedding @ wanted), path) for path, embedding in embeddings.items()]
    found.sort(key=lambda pair: -pair[0])
    if arguments.rerank:
        near = found[: arguments.rerank]
        scores = predictor.rerank([path for _, path in near], arguments.text)
        order = sorted(range(len(near)), key=lambda place: -scores[place])
        found = [near[place] for place in order] + found[arguments.rerank :]
    best = found[: arguments.top]
    for similarity, path in best:
        told = {"image": path, "similarity": round(similarity, 4)}
        print(json.dumps(told) if arguments.json else f"{similarity:.3f}\t{path}")
    if arguments.out is not None and best:
        from contact_sheet import draw

        draw(
            [{"path": path, "caption": f"{value:.3f} {Path(path).name}", "answers": []} for value, path in best],
            arguments.out,
        )
        print(f"retrieve: wrote {arguments.out}", file=sys.stderr)
    return 0 if len(embeddings) == len({Path(path) for path in paths}) else 1


def embed(predictor: "Predictor", paths: list[str], cached: bool) -> "dict[str, Tensor]":
    """Embeddings of the good images by path; the others are named on stderr."""
    from tqdm import tqdm

    from vlm.image_index import ImageIndex, index_file

    def say(line: str) -> None:
        tqdm.write(f"retrieve: {line}", file=sys.stderr)

    folders: dict[Path, dict[str, str]] = defaultdict(dict)
    for path in paths:
        folders[Path(path).parent].setdefault(Path(path).name, path)
    found = {}
    with tqdm(total=len(paths), unit="image", disable=len(paths) < 50 or not sys.stderr.isatty(), leave=False) as bar:
        for folder, names in folders.items():
            index = ImageIndex(folder, index_file(predictor, folder) if cached else None, say)
            for _ in index.update(predictor, list(names)):
                bar.update()
            found |= {path: index.entries[name][1] for name, path in names.items() if name in index.entries}
    return found


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(1)
