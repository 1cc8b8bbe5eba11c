"""What a user hands over, in lists: checked without PyTorch, for the predictor and for the runner of ONNX graphs."""

from pathlib import Path

from PIL import Image

ImageLike = str | Path | bytes | Image.Image


def refuse_single(items: object) -> None:
    """A string is a sequence too, of its letters: nobody means that.

    Raises:
        TypeError: a text or an image where a list is expected.
    """
    if isinstance(items, str | bytes | Path | Image.Image):
        shown = f"[{items!r}]" if isinstance(items, str | Path) else "[image]"
        raise TypeError(f"got a single {type(items).__name__}, expected a list; write {shown}.")
