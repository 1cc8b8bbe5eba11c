"""Every option of `vlm shards filter` and `vlm shards caption` arrives where it is meant to, and what is not given stands at its default."""

import inspect
from pathlib import Path
from typing import Any

import pytest

from vlm import capfilt
from vlm.cli import _parser, main
from vlm.data import filter as filtering
from vlm.data.filter import Rules
from vlm.data.shards import ShardWriter
from vlm.predictor import Predictor


@pytest.fixture
def folder(tmp_path: Path) -> str:
    with ShardWriter(tmp_path / "in", "toy") as writer:
        writer.write("k", b"img", captions=["a caption"])
    (tmp_path / "stop.txt").write_text("Stock photo\n")
    return str(tmp_path / "in")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What the commands called, with all arguments by name."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def record(module: Any, name: str) -> None:
        signature = inspect.signature(getattr(module, name))

        def instead(*given: Any, **named: Any) -> str:
            bound = signature.bind(*given, **named)
            bound.apply_defaults()
            calls.append((name, bound.arguments))
            return "done"

        monkeypatch.setattr(module, name, instead)

    record(capfilt, "caption")
    record(capfilt, "filter_by_model")
    record(filtering, "filter_shards")
    monkeypatch.setattr(Predictor, "load", lambda source: f"model of {source}")
    return calls


def options(kind: str) -> set[str]:
    """The long options of a kind of `vlm shards`."""
    parser = _parser()
    for word in ("shards", kind):
        (commands,) = (action for action in parser._actions if hasattr(action, "add_parser"))
        parser = commands.choices[word]  # type: ignore[index]
    return {name for action in parser._actions for name in action.option_strings if name.startswith("--")} - {"--help"}


RULES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "--min-words": (["3"], {"min_words": 3}),
    "--max-words": (["7"], {"max_words": 7}),
    "--stop-list": (["stop.txt"], {"stop": frozenset({"stock photo"})}),
    "--min-side": (["40"], {"min_side": 40}),
    "--max-aspect": (["2.5"], {"max_aspect": 2.5}),
    "--near-duplicates": (["4"], {"near_duplicates": 4}),
    "--min-score": (["0.25"], {"min_score": 0.25}),
}
JUDGED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "--worst": (["0.1"], {"worst": 0.1}),
    "--by": (["matching"], {"by": "matching"}),
}
CAPTION: dict[str, tuple[list[str], dict[str, Any]]] = {
    "--below": (["5"], {"below": 5}),
    "--filter": (["0.3"], {"quantile": 0.3}),
    "--seed": (["11"], {"seed": 11}),
}


def test_filter(
    folder: str, tmp_path: Path, called: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert options("filter") == {*RULES, *JUDGED, "--model", "--out"}
    command = ["shards", "filter", folder, "--out", "new"]
    for given in [[], *([name] for name in RULES), [*RULES]]:
        words = [word for name in given for word in (name, *RULES[name][0])]
        expected = {key: value for name in given for key, value in RULES[name][1].items()}
        assert main([*command, *words]) == 0
        name, arguments = called.pop()
        assert (name, arguments["rules"]) == ("filter_shards", Rules(**expected))
        assert (arguments["shards"].root, arguments["out"]) == (folder, Path("new"))
        assert main([*command, *words, "--model", "some"]) == 0
        name, arguments = called.pop()
        assert (name, arguments["rules"]) == ("filter_by_model", Rules(**expected))
        assert (arguments["predictor"], arguments["out"]) == ("model of some", Path("new"))
        assert (arguments["by"], arguments["worst"]) == ("similarity", None)
    for option, (words, expected) in JUDGED.items():
        assert main([*command, "--model", "some", option, *words]) == 0
        _, arguments = called.pop()
        assert {"by": "similarity", "worst": None} | expected == {key: arguments[key] for key in ("by", "worst")}
    assert main([*command, "--near-duplicates"]) == 0
    assert called.pop()[1]["rules"] == Rules(near_duplicates=6)


def test_caption(folder: str, called: list[tuple[str, dict[str, Any]]]) -> None:
    assert options("caption") == {*CAPTION, "--model", "--out"}
    command = ["shards", "caption", folder, "--out", "new", "--model", "some"]
    defaults = {"below": None, "quantile": None, "seed": 0}
    for given in [[], *([name] for name in CAPTION), [*CAPTION]]:
        words = [word for name in given for word in (name, *CAPTION[name][0])]
        expected = {key: value for name in given for key, value in CAPTION[name][1].items()}
        assert main([*command, *words]) == 0
        name, arguments = called.pop()
        assert (name, arguments["predictor"], arguments["out"]) == ("caption", "model of some", Path("new"))
        assert arguments["shards"].root == folder
        assert {key: arguments[key] for key in defaults} == defaults | expected
    assert main([*command, "--filter"]) == 0
    assert called.pop()[1]["quantile"] == 0.5
