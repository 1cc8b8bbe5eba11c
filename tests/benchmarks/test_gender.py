"""benchmarks/gender.py: counts what captions say against what references say."""

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/gender.py"
REFERENCES = {
    1: ["A woman runs.", "a lady running"],
    2: ["the man's hat", "someone with a hat"],
    3: ["a person on a bike"],
    4: ["a red car"],
    5: ["a man and a woman"],
    6: ["people in a crowd"],
}
CAPTIONS = {
    1: "a man runs",
    2: "a man in a hat",
    3: "a boy on a bike",
    4: "a car",
    5: "two people",
    6: "a man and a girl",
}


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, captions: dict[int, str]) -> int:
    annotations = [{"image_id": image, "caption": text} for image, texts in REFERENCES.items() for text in texts]
    (tmp_path / "r.json").write_text(json.dumps({"annotations": annotations}))
    (tmp_path / "p.json").write_text(json.dumps([{"image_id": i, "caption": text} for i, text in captions.items()]))
    files = ["--references", str(tmp_path / "r.json"), "--predictions", str(tmp_path / "p.json")]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *files])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return int(ended.value.code or 0)


def test_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, tmp_path, CAPTIONS) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:18].strip(): line[18:].replace("%", "").split() for line in lines[1:6]}
    assert rows == {
        "female": ["1", "0.0", "100.0", "0.0", "0.0"],
        "male": ["1", "0.0", "100.0", "0.0", "0.0"],
        "both": ["1", "0.0", "0.0", "0.0", "100.0"],
        "people, no gender": ["2", "0.0", "50.0", "50.0", "0.0"],
        "no people": ["1", "0.0", "0.0", "0.0", "100.0"],
    }
    assert lines[6] == "a gender where no reference states one: 2 of 3 images (66.7 %)"


def test_files_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, {9: "a car"}) == 1
    assert "1 images have no references, such as 9" in capsys.readouterr().err
    (tmp_path / "p.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", [*sys.argv[:4], str(tmp_path / "none.json")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 1
    assert "none.json: not captions in COCO's form" in capsys.readouterr().err
