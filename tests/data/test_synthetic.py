"""Scenes: deterministic, captions and answers true to the picture, balanced, and val unlike train."""

import json
import re
import tarfile
from collections import Counter, defaultdict

import numpy as np
import pytest

from vlm.data.synthetic import COLORS, draw_scene, main, write_scenes


def seen(image):
    """What is in a picture, measured from its pixels alone: colour -> (x, y, width, height, filled share of the box)."""
    pixels = np.asarray(image).astype(int)
    found = {}
    for color in COLORS:
        ys, xs = np.nonzero(np.abs(pixels - COLORS[color]).max(-1) <= 16)  # not the blended edges
        if len(xs) >= 20:
            width, height = np.ptp(xs) + 1, np.ptp(ys) + 1
            found[color] = (xs.mean(), ys.mean(), width, height, len(xs) / (width * height))
    return found


def named(caption):
    return re.findall(r"a (small|large) (\w+) (\w+)", caption)


@pytest.mark.parametrize("size", [64, 96])
def test_same_seed_same_scene(size):
    a, b, c = draw_scene(5, size), draw_scene(5, size), draw_scene(6, size)
    assert a.image.size == (size, size)
    assert a.image.tobytes() == b.image.tobytes() != c.image.tobytes()
    assert (a.captions, a.questions) == (b.captions, b.questions)


def test_captions_are_true_to_the_picture():
    for seed in range(200):
        scene = draw_scene(seed, 128)
        things = seen(scene.image)
        canonical = scene.captions[0]
        words = named(canonical)
        assert {color for _, color, _ in words} == set(things), (seed, canonical, things)
        assert len({shape for *_, shape in words}) == len(words)
        for size, color, shape in words:
            _, _, width, height, filled = things[color]
            assert (max(width, height) > 30) == (size == "large"), (seed, canonical, things[color])
            low, high = {"square": (0.93, 1.01), "circle": (0.7, 0.88), "triangle": (0.4, 0.66), "cross": (0.4, 0.66)}[
                shape
            ]
            assert low <= filled <= high, (seed, canonical, things[color])
        axis = 0 if " left of " in canonical else 1
        if len(words) > 1:
            along = [things[color][axis] for _, color, _ in words]
            across = [things[color][1 - axis] for _, color, _ in words]
            assert along == sorted(along)
            assert min(np.diff(along)) > np.ptp(across) / (len(words) - 1) * 0.9 or min(np.diff(along)) > 20
        else:
            x, y = things[words[0][1]][:2]
            columns = ("left" in canonical, "right" in canonical)
            rows = ("top" in canonical, "bottom" in canonical)
            assert columns == (x < 128 * 0.36, x > 128 * 0.64)
            assert rows == (y < 128 * 0.36, y > 128 * 0.64)


def test_paraphrases_say_the_same():
    for seed in range(100):
        canonical, backwards, there_is = draw_scene(seed).captions
        assert sorted(named(backwards)) == sorted(named(canonical)) == sorted(named(there_is))
        if len(named(canonical)) > 1:
            assert named(backwards) == named(canonical)[::-1]
            assert ("right of" in backwards, "below" in backwards) == ("left of" in canonical, "above" in canonical)


def test_answers_are_true_to_the_picture():
    for seed in range(200):
        scene = draw_scene(seed, 128)
        things = seen(scene.image)
        color_of = {shape: color for _, color, shape in named(scene.captions[0])}
        assert len(scene.questions) == 4
        for q in scene.questions:
            (answer,) = q["answers"]
            text = q["question"]
            if q["question_type"] == "what color":
                assert answer == color_of[text.split()[-1].rstrip("?")]
            elif q["question_type"] == "is there":
                color, shape = text.rstrip("?").split()[-2:]
                assert answer == ("yes" if color_of.get(shape) == color else "no")
            elif q["question_type"] == "how many":
                assert int(answer) == len(things)
            elif match := re.match(r"what shape is (left of|right of|above|below) the (\w+)\?", text):
                axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[match[1]]
                place = {shape: things[color][axis] * sign for shape, color in color_of.items()}
                assert [s for s in place if place[s] > place[match[2]]] == [answer]
            else:
                assert color_of == {answer: text.split()[-2]}


def test_answers_are_balanced_and_the_question_alone_is_of_little_use():
    answers, by_text = defaultdict(Counter), defaultdict(Counter)
    for seed in range(2500):
        for q in draw_scene(seed, 16).questions:
            answers[q["question_type"]][q["answers"][0]] += 1
            by_text[q["question"]][q["answers"][0]] += 1
    share = {kind: max(c.values()) / c.total() for kind, c in answers.items()}
    assert share["is there"] == pytest.approx(0.5, abs=0.03)
    assert share["what color"] == pytest.approx(1 / 5, abs=0.03)
    assert share["what shape"] == pytest.approx(1 / 4, abs=0.03)
    assert share["how many"] == pytest.approx(2 / 5, abs=0.03)
    blind = (
        sum(c.most_common(1)[0][1] for c in by_text.values()) / 10000
    )  # fitted to these very questions: an upper bound
    assert blind < 0.42


def test_written_scenes_hold_out_captions_and_carry_references(tmp_path):
    write_scenes(tmp_path, train=120, val=40, seed=3, size=32, samples_per_shard=50)
    records = {}
    for split in ("train", "val"):
        index = json.loads((tmp_path / split / "index.json").read_text())
        assert index["source"] == "scenes"
        records[split] = {}
        for shard in index["shards"]:
            with tarfile.open(tmp_path / split / shard["name"]) as tar:
                for member in tar:
                    key, _, extension = member.name.partition(".")
                    content = tar.extractfile(member).read()
                    records[split].setdefault(key, {})[extension] = (
                        json.loads(content) if extension == "json" else content
                    )
    train, val = records["train"], records["val"]
    assert (len(train), len(val)) == (120, 40)
    assert not set(train) & set(val)
    assert not {r["json"]["captions"][0] for r in train.values()} & {r["json"]["captions"][0] for r in val.values()}
    assert len({r["png"] for part in records.values() for r in part.values()}) == 160
    assert all(len(r["json"]["captions"]) == 1 for r in val.values())
    assert 0 < sum(len(r["json"]["captions"]) > 1 for r in train.values()) < 60
    ids = [q["question_id"] for part in records.values() for r in part.values() for q in r["json"]["questions"]]
    assert len(ids) == len(set(ids)) == 640

    references = json.loads((tmp_path / "val_references.json").read_text())
    said = {r["json"]["image_id"]: r["json"]["captions"][0] for r in val.values()}
    assert {a["image_id"]: a["caption"] for a in references["annotations"]} == said
    annotations = json.loads((tmp_path / "val_annotations.json").read_text())["annotations"]
    questions = json.loads((tmp_path / "val_questions.json").read_text())["questions"]
    assert [a["question_id"] for a in annotations] == [q["question_id"] for q in questions]
    assert all(len({x["answer"] for x in a["answers"]}) == 1 and len(a["answers"]) == 10 for a in annotations)


def test_writing_twice_gives_identical_bytes(tmp_path, capsys):
    content = []
    for name in ("a", "b"):
        assert main(["--out", str(tmp_path / name), "--train", "5", "--val", "2", "--size", "16"]) == 0
        content.append(
            {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        )
    assert content[0] == content[1]
    assert "5 training and 2 held-out scenes" in capsys.readouterr().out


def test_more_scenes_begin_with_the_same_ones(tmp_path):
    names = {}
    for count in (6, 12):
        write_scenes(tmp_path / str(count), train=count, val=2, size=16)
        with tarfile.open(tmp_path / str(count) / "train" / "shard-000000.tar") as tar:
            names[count] = [m.name for m in tar]
    assert names[12][:12] == names[6]
