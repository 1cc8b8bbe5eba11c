"""Demos run in this process, as a user starts them, and images of every kind."""

import io
import runpy
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@dataclass
class Done:
    """How a demo ended: its exit status, the lines on stdout and on stderr."""

    status: int
    out: list[str]
    err: list[str]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """demo(name, *arguments, stdin=b""): runs demos/NAME.py."""

    def run(name: str, *arguments: object, stdin: bytes = b"") -> Done:
        monkeypatch.setattr(sys, "argv", [f"demos/{name}.py", *map(str, arguments)])
        monkeypatch.syspath_prepend(str(ROOT / "demos"))  # where Python looks first for what a script imports
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "demos" / f"{name}.py"), run_name="__main__")
        captured = capsys.readouterr()
        return Done(int(ended.value.code or 0), captured.out.splitlines(), captured.err.splitlines())

    return run


def _picture(seed: int = 0, width: int = 40, height: int = 30) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Four good images whose names sort in this order."""
    paths = [tmp_path / "pictures" / f"{name}.png" for name in "abcd"]
    paths[0].parent.mkdir()
    for seed, path in enumerate(paths):
        _picture(seed).save(path)
    return paths


@pytest.fixture
def odd_pictures(tmp_path: Path) -> list[Path]:
    """Every kind of image that must work."""
    folder = tmp_path / "odd"
    folder.mkdir()
    photo = _picture(9)
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = np.asarray(photo.convert("L"))
    frames = [_picture(seed) for seed in range(3)]
    kinds: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "alpha.png": (photo.convert("RGBA"), {}),
        "animated.gif": (frames[0], {"save_all": True, "append_images": frames[1:]}),
        "animated.webp": (frames[0], {"save_all": True, "append_images": frames[1:]}),
        "bits1.png": (photo.convert("1"), {}),
        "bits16.png": (Image.fromarray(grey.astype(np.uint16) * 257), {}),
        "cmyk.jpg": (photo.convert("CMYK"), {}),
        "exif.jpg": (photo, {"exif": exif}),
        "grey.jpg": (photo.convert("L"), {}),
        "palette.gif": (photo.convert("P"), {}),
        "palette.png": (photo.convert("P"), {"transparency": 0}),
        "pixel.png": (Image.new("RGB", (1, 1), (200, 10, 10)), {}),
        "wide.png": (_picture(9, 3000, 2), {}),
    }
    for name, (image, options) in kinds.items():
        image.save(folder / name, **options)
    return [folder / name for name in kinds]


@pytest.fixture
def bad_pictures(tmp_path: Path) -> dict[str, Path]:
    """What cannot be used, by what the message must say."""
    folder = tmp_path / "bad"
    folder.mkdir()
    whole = io.BytesIO()
    _picture().save(whole, "PNG")
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    contents = {
        "empty": b"",
        "cut short": whole.getvalue()[:-60],
        "too large": bomb + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")),
        "not an image": b"{'this': 'is text'}",
    }
    paths = {}
    for say, data in contents.items():
        paths[say] = folder / f"{say.replace(' ', '_')}.png"
        paths[say].write_bytes(data)
    return paths | {"no such file": folder / "missing.png"}
