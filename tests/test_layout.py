"""The rooms of the library: who may import whom, what stays out of a quick start, how large a file may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = (
    "vlm.config",
    "vlm.errors",
    "vlm.files",
    "vlm.memory",
)
# A room -> the parts of the library that its files may import beside the leaves, at their top or late, and its packages.
ROOMS: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "model": (("vlm.model",), {"torch", "timm", "safetensors"}),
    "data": (
        ("vlm.data",),
        {
            "torch",
            "torchvision",
            "numpy",
            "PIL",
            "safetensors",
            "tokenizers",
            "webdataset",
            "braceexpand",
            "fsspec",
            "tqdm",
            "simplejpeg",
        },
    ),
    "metrics": (("vlm.metrics",), {"numpy"}),
    "objectives": (("vlm.objectives", "vlm.model", "vlm.data.batch"), {"torch"}),
    "tasks": (("vlm.tasks", "vlm.objectives", "vlm.model", "vlm.metrics", "vlm.data"), {"torch", "numpy"}),
    "train": (
        ("vlm.train", "vlm.tasks.task", "vlm.data.batch", "vlm.data.page"),
        {"torch", "numpy", "PIL", "matplotlib", "wandb", "trackio"},
    ),
}
TOP = {"cli", "convert", "onnx"}  # see what they need, late
LARGEST_FILE = 320


def sources(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.py"))
    assert found
    return found


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports anywhere, `from a import b` as a.b where b is a module of ours."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            below = ROOT.joinpath(*module.split("."))
            for alias in node.names:
                inside = (below / f"{alias.name}.py").exists() or (below / alias.name).is_dir()
                yield f"{module}.{alias.name}" if module.startswith("vlm") and inside else module


def within(module: str, parts: tuple[str, ...]) -> bool:
    return any(module == part or module.startswith(f"{part}.") for part in parts)


def test_every_room_has_a_rule() -> None:
    assert {path.parent.name for path in (ROOT / "vlm").glob("*/__init__.py")} == {*ROOMS, *TOP, "config"}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room: str) -> None:
    parts, packages = ROOMS[room]
    for path in sources(ROOT / "vlm" / room):
        for module in imported(path):
            top, place = module.partition(".")[0], path.relative_to(ROOT)
            if top == "vlm":
                assert within(module, (*parts, *LEAVES)), f"{place} imports {module}"
            else:
                assert top in packages or top in sys.stdlib_module_names, f"{place} imports {module}"


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_import_the_standard_library_and_each_other(leaf: str) -> None:
    place = ROOT / leaf.replace(".", "/")
    for path in sources(place) if place.is_dir() else [place.with_suffix(".py")]:
        for module in imported(path):
            assert within(module, LEAVES) or module.partition(".")[0] in sys.stdlib_module_names, (
                f"{path} imports {module}"
            )


def test_scripts_are_run_and_never_imported() -> None:
    """A module or package of that name would shadow Hugging Face's `datasets`."""
    for folder in ("datasets", "demos", "benchmarks"):
        assert not list((ROOT / folder).rglob("__init__.py")), f"{folder} must not be a package"
    assert not list((ROOT / "datasets").glob("*.py"))
    for path in (ROOT / "datasets").iterdir():
        if path.is_dir() and not path.name.startswith(("_", ".")):
            assert (path / "README.md").exists(), path
    for path in sources(ROOT / "vlm"):
        for module in imported(path):
            assert not within(module, ("datasets", "demos", "benchmarks", "tests")), f"{path} imports {module}"


def test_a_caption_does_not_wait_for_what_training_needs() -> None:
    heavy = ("transformers", "pydantic", "tyro", "webdataset", "matplotlib", "vlm.train.trainer", "vlm.metrics")
    # What timm brings by itself (wandb and with it pydantic, where installed) is not ours.
    code = f"import sys, torch, timm; known = set(sys.modules); import vlm.predictor; print(*(set({heavy}) & (set(sys.modules) - known)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.split() == []


def test_files_are_small() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in sources(ROOT / "vlm")}
    assert {str(path): length for path, length in lengths.items() if length > LARGEST_FILE} == {}
