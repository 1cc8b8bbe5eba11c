"""README.md: each of its commands is covered by exactly one rule, which executes it, executes it scaled down, or checks its arguments.

Executed commands run in a folder that looks like the repository to them; what they name (images, checkpoints, shards, score files) is provided there
in miniature. A command that no rule knows fails: add a rule, or leave the command out.
"""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.cli import _parser, main
from vlm.data.shards import ShardWriter
from vlm.errors import UserError
from vlm.model.pretrained import load_metadata
from vlm.settings import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SMALL = ["--data.batch-size", "4", "--data.workers", "0", "--train.epochs", "0.01", "--train.evaluate-images", "4"]
STAND_IN = """
```bash
make demo   # a comment
vlm score vqa --questions "my q.json" \\
    --annotations a.json && vlm plot runs/x
```
```python
print(1)
```
```
not a command
```
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of README.md, and where it stands."""

    line: int
    language: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a bash block: comments left out, continued lines joined, `&&` separated."""
        lines = self.text.replace("\\\n", " ").splitlines()
        split = (shlex.split(part, comments=True) for line in lines for part in line.split(" && "))
        return [words for words in split if words]


def blocks(text: str) -> list[Block]:
    """The blocks fenced as bash or python."""
    found = re.finditer(r"^```(bash|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(text[: m.start()].count("\n") + 1, m[1], m[2]) for m in found]


class Place:
    """A folder that looks like the repository, in which what a command names is provided in miniature."""

    def __init__(self, folder: Path, checkpoint: Callable[..., Path], scenes: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.checkpoint, self.scenes, self.patch = folder, checkpoint, scenes, patch
        for name in ("configs", "datasets", "benchmarks", "vlm", "Makefile"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "demos").mkdir()  # not a link itself: what a test puts there must not land in the repository
        for path in (ROOT / "demos").iterdir():
            (folder / "demos" / path.name).symlink_to(path)
        patch.chdir(folder)

    def image(self, name: str) -> None:
        path = self.folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(path)

    def model(self, name: str, task: str) -> None:
        answers = ("yes", "no", "three") if task == "vqa" else ()
        self.link(name, self.checkpoint(task, answers))

    def shards(self, name: str) -> None:
        self.link(name, self.scenes / ("train" if name.endswith("train") else "val"))

    def link(self, name: str, target: Path) -> None:
        path = self.folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(target)

    def photographs(self, name: str) -> None:
        """A folder of images with texts beside them, of which some will be held out."""
        for number in range(40):
            self.image(f"{name}/{number}.png")
            (self.folder / name / f"{number}.txt").write_text("a picture\n")

    def json(self, name: str, content: Any) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))

    def vlm(self, *arguments: str) -> None:
        try:
            status = main(arguments)
        except SystemExit as ended:  # --help, and what argparse or tyro refuses
            status = int(ended.code or 0)
        assert status == 0, f"vlm {shlex.join(arguments)}: exit status {status}"

    def script(self, *words: str, **replaced: Any) -> None:
        """Runs `python words` as a user does; `replaced`: functions of the script to take the place of its own."""
        self.patch.setattr(sys, "argv", list(words))
        self.patch.syspath_prepend(
            str(ROOT / Path(words[0]).parent)
        )  # where Python looks first for what a script imports
        start = runpy.run_path(words[0], run_name="readme")["main"]
        start.__globals__.update(replaced)
        try:
            status = start()
        except SystemExit as ended:
            status = int(ended.code or 0)
        assert status == 0, f"python {shlex.join(words)}: exit status {status}"


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def make(place: Place, words: list[str]) -> None:
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def pip(place: Place, words: list[str]) -> None:
    """Only the project's own extras and plain requirements."""
    from packaging.requirements import Requirement

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words[2:]:
        if local := re.fullmatch(r"\.(?:\[(.*)\])?", word):
            assert set(filter(None, (local[1] or "").split(","))) <= set(extras)
        elif not word.startswith("-") and words[1] == "install":
            Requirement(word)


def synthetic(place: Place, words: list[str]) -> None:
    from vlm.data import synthetic

    drawn: list[tuple[int, int]] = []
    place.patch.setattr(synthetic, "write_scenes", lambda out, train, val, *_: drawn.append((train, val)))
    assert synthetic.main(words[3:]) == 0
    assert drawn


def caption(place: Place, words: list[str]) -> None:
    for word in words[2:]:
        if Path(word).suffix in (".jpg", ".png"):
            place.image(word)
    if "--model" in words:
        place.model(option(words, "--model"), "captioning")
    place.script(*words[1:])


def vqa(place: Place, words: list[str]) -> None:
    place.image(words[2])
    if "--model" in words:
        place.model(option(words, "--model"), "vqa")
    place.script(*words[1:])


def retrieve(place: Place, words: list[str]) -> None:
    place.photographs(words[2])
    place.patch.setenv("VLM_CACHE", str(place.folder / "cache"))
    if "--model" in words:
        place.model(option(words, "--model"), "pretraining")
    place.script(*words[1:])


def prepare_folder(place: Place, words: list[str]) -> None:
    place.photographs(option(words, "--source"))
    place.script(*words[1:])


def unrun(name: str) -> Callable[[Place, list[str]], None]:
    """The arguments are parsed, the function of this name that would do the work is not run."""

    def check(place: Place, words: list[str]) -> None:
        called = []
        place.script(*words[1:], **{name: lambda *_: called.append(1)})
        assert called, f"{words[1]} never came to {name}"

    return check


def startup(place: Place, words: list[str]) -> None:
    done = subprocess.CompletedProcess([], 0, "", "")
    with place.patch.context() as patch:
        patch.setattr(subprocess, "run", lambda *_, **__: done)
        place.script(*words[1:])


def settings(words: list[str]) -> Any:
    """The settings of `vlm train CONFIG ...` or `vlm evaluate CONFIG ...`, without the options that are not settings."""
    known, overrides = _parser().parse_known_args(words[1:])
    return load_config(known.config, [word for word in overrides if word != "--help"])


def check_settings(place: Place, words: list[str]) -> None:
    settings(words)


def torchrun(place: Place, words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    known = get_args_parser().parse_args(words[1:])
    assert known.no_python
    assert known.training_script == "vlm"
    settings([known.training_script, *known.training_script_args])


def provide(place: Place, config: Any) -> None:
    splits = config.data.splits
    for folder in (*splits.train, *splits.val, *splits.test, *config.tokenizer.trim_to):
        place.shards(folder)
    if config.init_from is not None:
        place.model(config.init_from, "pretraining")


def train(place: Place, words: list[str]) -> None:
    """Scaled down: a step with a small batch."""
    config = settings(words)
    provide(place, config)
    place.vlm(*words[1:], *SMALL)


def evaluate(place: Place, words: list[str]) -> None:
    config = settings(words)
    provide(place, config)
    place.model(option(words, "--checkpoint"), config.task)
    place.vlm(*words[1:], *SMALL[:4])
    assert json.loads((place.folder / option(words, "--out") / "results.json").read_text())["scores"]


def score(place: Place, words: list[str]) -> None:
    if words[2] == "vqa":
        question = {"question_id": 1, "image_id": 1, "question": "what?"}
        given = [{"answer": "cat", "answer_confidence": "yes", "answer_id": i} for i in range(10)]
        annotation = question | {"answers": given, "answer_type": "other", "question_type": "what"}
        place.json(option(words, "--questions"), {"questions": [question]})
        place.json(option(words, "--annotations"), {"annotations": [annotation]})
        place.json(option(words, "--predictions"), [{"question_id": 1, "answer": "cat"}])
    else:
        captions = [{"id": i, "image_id": i % 2, "caption": f"a dog number {i} runs"} for i in range(4)]
        place.json(option(words, "--references"), {"images": [{"id": 0}, {"id": 1}], "annotations": captions})
        place.json(option(words, "--predictions"), [{"image_id": i, "caption": "a dog runs"} for i in (0, 1)])
    place.vlm(*words[1:])


def plot(place: Place, words: list[str]) -> None:
    for run in (word for word in words[2:] if (word + "/").startswith("runs/")):
        if not (place.folder / run / "log.jsonl").exists():
            place.json(f"{run}/log.jsonl", {"kind": "train", "step": 1, "loss": 1.0, "lr": 0.1})
    place.vlm(*words[1:])


def export(place: Place, words: list[str]) -> None:
    place.model(words[2], "captioning")
    place.vlm(*words[1:])
    assert load_metadata(place.folder / option(words, "--out"))["task"] == "captioning"


def index(place: Place, words: list[str]) -> None:
    shutil.copytree(place.scenes / "train", place.folder / words[3])
    place.vlm(*words[1:])


def filter_or_caption(place: Place, words: list[str]) -> None:
    shutil.copytree(place.scenes / "train", place.folder / words[3], dirs_exist_ok=True)
    if "--model" in words:
        place.model(option(words, "--model"), "pretraining")
    if "--min-side" in words:  # the scenes are smaller than photographs
        words[words.index("--min-side") + 1] = "30"
    place.vlm(*words[1:])


def ask(place: Place, words: list[str]) -> None:
    """Of photographs' captions: what is a noun is told by how often a word stands where nouns do."""
    place.image("mine.jpg")
    with ShardWriter(place.folder / words[3], "mine") as writer:
        for number in range(10):
            writer.write(
                str(number), (place.folder / "mine.jpg").read_bytes(), "jpg", ["a dog is near the fence"], [], number
            )
    place.vlm(*words[1:])


def join(place: Place, words: list[str]) -> None:
    for folder in words[3 : words.index("--out")]:
        place.shards(folder)
    place.vlm(*words[1:])


def parsed(place: Place, words: list[str]) -> None:
    """The arguments are such as the command takes; what it does has tests of its own."""
    _parser().parse_args(words[1:])


def nothing(place: Place, words: list[str]) -> None:
    """What the pattern says is all that there is to check."""


RULES: dict[str, tuple[str, Callable[[Place, list[str]], None]]] = {
    r"make [a-z]+( [A-Z]+=\S+)*": ("checked", make),
    r"pip (install|download) .*": ("checked", pip),
    r"source .venv/bin/activate|git clone \S+|cd [\w-]+|python -m zipfile -e \S+\.whl weights": ("checked", nothing),
    r"python -m vlm\.data\.synthetic .*": ("checked", synthetic),
    r"python demos/caption\.py .*": ("executed", caption),
    r"python demos/vqa\.py .*": ("executed", vqa),
    r"python demos/retrieve\.py .*": ("executed", retrieve),
    r"python demos/quickstart\.py.*": ("checked", unrun("quickstart")),
    r"python benchmarks/startup\.py .*": ("checked", startup),
    r"python datasets/folder/prepare\.py .*": ("executed", prepare_folder),
    r"python datasets/(?!folder/)\w+/prepare\.py .*": ("checked", unrun("prepare")),
    r"vlm train configs/pretrain/(?!tiny)\S+( --.*)?": ("checked", check_settings),
    r"vlm train configs/(pretrain/tiny|finetune/\w+/\w+)\.yaml( --.*)?": ("scaled down", train),
    r"torchrun .*": ("checked", torchrun),
    r"vlm evaluate configs/.*": ("scaled down", evaluate),
    r"vlm score (vqa|captions) .*": ("executed", score),
    r"vlm export .*": ("executed", export),
    r"vlm convert .*": ("checked", parsed),
    r"vlm plot .*": ("executed", plot),
    r"vlm shards index .*": ("executed", index),
    r"vlm shards (filter|caption) .*": ("executed", filter_or_caption),
    r"vlm shards ask .*": ("executed", ask),
    r"vlm shards join .*": ("executed", join),
}


def rules_of(words: list[str]) -> list[str]:
    """The patterns that know this command."""
    return [pattern for pattern in RULES if re.fullmatch(pattern, " ".join(words))]


def run(place: Place, words: list[str]) -> None:
    """By its rule."""
    (pattern,) = rules_of(words)
    RULES[pattern][1](place, words)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a few drawn scenes."""
    from vlm.data.synthetic import write_scenes

    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 12, 4, size=32)
    return folder


@pytest.fixture
def place(tmp_path: Path, checkpoint: Callable[..., Path], scenes: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, checkpoint, scenes, monkeypatch)


def test_blocks_and_commands_are_found() -> None:
    bash, python = blocks(STAND_IN)
    assert (bash.line, bash.language, python.language, python.text) == (2, "bash", "python", "print(1)\n")
    assert bash.commands == [
        ["make", "demo"],
        ["vlm", "score", "vqa", "--questions", "my q.json", "--annotations", "a.json"],
        ["vlm", "plot", "runs/x"],
    ]
    assert len(blocks(README)) > 4


def test_every_command_of_the_readme_has_one_rule() -> None:
    commands = [words for block in blocks(README) if block.language == "bash" for words in block.commands]
    found = {shlex.join(words): rules_of(words) for words in commands}
    assert {command: rules for command, rules in found.items() if len(rules) != 1} == {}
    assert {RULES[rules[0]][0] for rules in found.values()} == {"executed", "scaled down", "checked"}


@pytest.mark.parametrize("block", [pytest.param(b, id=f"line {b.line}") for b in blocks(README)])
def test_the_readme_s_blocks_work(block: Block, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    if block.language == "bash":
        for words in block.commands:
            run(place, words)
        return
    for name in re.findall(r'"([^"\s]+\.(?:jpg|png))"', block.text):
        place.image(name)
    for name in re.findall(r'Predictor\.load\("([^"]+)"', block.text):
        place.model(name, "vqa" if "vqa" in name else "captioning")
    exec(compile(block.text, f"README.md, line {block.line}", "exec"), {"__name__": "readme"})
    assert all(line.strip() for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    "command",
    [
        "make demoo",
        "vlm train configs/pretrain/tinny.yaml",
        "vlm train configs/pretrain/photos_small.yaml --optimizer.lrr 1",
        "vlm score vqa --questions q.json --annotations a.json --predictions p.json --jsn",
        "python demos/caption.py img.jpg --modle x",
        "python datasets/flickr9k/prepare.py --source a --out b",
        "python datasets/coco/prepare.py --sauce a --out b",
        "torchrun --no-python --nproc-per-node 2 vlm train configs/pretrain/tiny.yaml --data.batchsize 2",
        "pip install -e .[demos]",
        "python benchmarks/startup.py --image i.jpg",
    ],
)
def test_a_command_that_is_wrong_would_be_found(command: str, place: Place) -> None:
    words = shlex.split(command)
    assert len(rules_of(words)) == 1
    with pytest.raises((AssertionError, UserError, FileNotFoundError, SystemExit)):
        run(place, words)


def test_a_command_that_nobody_knows_has_no_rule() -> None:
    for command in ("vlm transmute a b", "python demos/app.py", "rm -rf runs", "vlm train my.yaml"):
        assert rules_of(command.split()) == []


@pytest.mark.parametrize("words", re.findall(r"`(--[a-z]\w*\.[^`]*)`", README))
def test_settings_named_in_the_text_are_there(words: str) -> None:
    load_config(ROOT / "configs/pretrain/tiny.yaml", shlex.split(words) if " " in words else [words, "1"])


def test_files_named_in_the_text_are_there() -> None:
    named = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"`((?:configs|demos|datasets)/[^`*]*)`", README)
    assert len(named) > 5
    assert [path for path in named if not (ROOT / path).exists()] == []
