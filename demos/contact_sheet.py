"""A picture of photographs with their captions and answers: python demos/contact_sheet.py [FOLDER] [--model DIR] [--out PNG] [--device D]

FOLDER holds images and may hold questions.json, {"cat.jpg": [{"question": ..., "answer": ...}]}; answers that differ from these are drawn in red.
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from caption import MODEL, listed, load

IMAGES = Path(__file__).parent / "images"
COLUMNS = 5


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw photographs with their captions and answers.")
    parser.add_argument(
        "folder", nargs="?", default=str(IMAGES), metavar="FOLDER", help="images (default: %(default)s)"
    )
    parser.add_argument("--model", default=str(MODEL), metavar="DIR", help="checkpoint folder (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("contact_sheet.png"), metavar="PNG", help="default: %(default)s"
    )
    parser.add_argument("--device", metavar="D", help="cpu or cuda (default: a GPU where there is one)")
    arguments = parser.parse_args()

    from vlm.errors import UserError

    try:
        rows = describe(arguments.folder, arguments.model, arguments.device)
        draw(rows, arguments.out)
    except UserError as error:
        print(f"contact_sheet: {error}", file=sys.stderr)
        return error.exit_code
    print(arguments.out)
    return 0


def describe(folder: str, model: str, device: str | None) -> list[dict[str, Any]]:
    """For each image its path, caption and answered questions.

    Raises:
        UserError: the model, an image or questions.json cannot be used.
    """
    from vlm.errors import UserError

    paths = [Path(path) for path in listed([folder])]
    file = paths[0].parent / "questions.json"
    try:
        asked = json.loads(file.read_text()) if file.exists() else {}
        wanted = {path: [(q["question"], q["answer"]) for q in asked.get(path.name, [])] for path in paths}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f'{file}: expected {{"image.jpg": [{{"question": ..., "answer": ...}}]}}.') from None
    predictor = load(model, device)
    captions = predictor.caption(paths)
    return [
        {
            "path": path,
            "caption": said.text,
            "answers": [(question, predictor.answer(path, question).text, right) for question, right in wanted[path]],
        }
        for path, said in zip(paths, captions, strict=True)
    ]


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """The images in a grid, captions above, questions below.

    Raises:
        UserError: matplotlib is not installed, an image cannot be used, or the picture cannot be written.
    """
    from vlm.errors import UserError

    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install 'vlm-fusion[demo]'.") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    from vlm.data.images import decode_image
    from vlm.files import write_figure

    lines = -(-len(rows) // COLUMNS)
    figure, axes = pyplot.subplots(
        lines, COLUMNS, figsize=(3.4 * COLUMNS, 3.9 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, row in zip(axes.flat, rows, strict=False):
        axis.imshow(decode_image(row["path"]))
        axis.set_title("\n".join(textwrap.wrap(_drawable(row["caption"]), 36)), fontsize=10, parse_math=False)
        for number, (question, answer, right) in enumerate(row["answers"]):
            colour = "darkgreen" if answer == right else "firebrick"
            axis.text(
                0,
                -0.05 - 0.1 * number,
                f"{question} {answer}",
                transform=axis.transAxes,
                fontsize=9,
                color=colour,
                va="top",
                parse_math=False,  # a $ is a $
            )
    write_figure(figure, out, dpi=80)
    pyplot.close(figure)


def _drawable(text: str) -> str:
    """With ? for half characters, which stand for bytes of a file's name that are not UTF-8: matplotlib does not draw them."""
    return text.encode(errors="replace").decode()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(1)
