"""Drawn scenes with exact captions, questions and answers: for tests and for a first run without any download.

A scene has one to three objects, each with a shape, a colour and a size; within a scene no shape and no colour occurs twice. One object lies in one
of nine places; several stand in a row or in a column. The first caption of a scene has the canonical form, which follows from the picture alone
(left to right, top to bottom), so that an exact match means that everything was seen:

    a small red circle at the top left
    a large blue square above a small green cross
    a small red circle left of a large blue square left of a small yellow triangle

Answers are balanced, so that the question alone is of little use. Best accuracy without the picture, in expectation: color 1/5, shape 1/4 (one
object) or 1/3 (several), yes/no 1/2 for every question text, count 2/5; 0.35 over all four questions of a scene.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from vlm.data.prepare import keyed_hash, whole_number
from vlm.data.references import write_references
from vlm.errors import ConfigError, UserError

COLORS = {
    "red": (215, 40, 40),
    "green": (40, 165, 70),
    "blue": (45, 85, 220),
    "yellow": (235, 200, 35),
    "purple": (150, 60, 190),
}
SHAPES = ("circle", "square", "triangle", "cross")
RADII = {"small": (0.095, 0.11), "large": (0.148, 0.158)}  # in picture widths; three large ones just fit into a row
COUNT_WEIGHTS = (1, 2, 2)  # scenes with one, two and three objects
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
VAL_EVERY = 5  # of the possible canonical captions, about one in five belongs to val
PARAPHRASED_EVERY = 3  # training scenes with paraphrases too: rare enough that the canonical form stays the likeliest
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """One drawn object; x, y (centre) and radius in picture widths."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float

    def __str__(self) -> str:
        return f"a {self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class Layout:
    """What a scene shows, before it is drawn. `things` from left to right (`axis` x), or from top to bottom (y), or one thing in `place`."""

    things: tuple[Thing, ...]
    axis: str
    place: str

    @property
    def caption(self) -> str:
        """The canonical caption."""
        if self.place:
            return f"{self.things[0]} {self.place}"
        return (" left of " if self.axis == "x" else " above ").join(map(str, self.things))


@dataclass(frozen=True)
class Scene:
    """A picture with what is true of it. captions[0] is canonical, the others say the same in other words."""

    image: Image.Image
    captions: list[str]
    questions: list[dict[str, Any]]
    layout: Layout


@dataclass(frozen=True)
class SceneRecord:
    """What the reference files need of a scene."""

    image_id: int
    captions: list[str]
    questions: list[dict[str, Any]]


def draw_scene(seed: int, size: int = 64) -> Scene:
    """The scene of this seed, `size` x `size` pixels: always the same for the same arguments. Question ids count from 0."""
    rng = random.Random(seed)
    layout = _layout(rng)
    questions = _questions(rng, layout)
    return Scene(_draw(rng, layout, size), [layout.caption, *_paraphrases(layout)], questions, layout)


def scene_layout(seed: int) -> Layout:
    """What draw_scene(seed) shows, without the drawing."""
    return _layout(random.Random(seed))


def write_scenes(
    out: Path | str, train: int, val: int, seed: int = 0, size: int = 64, samples_per_shard: int = 1000
) -> None:
    """Write shards OUT/train and OUT/val (source "scenes") and val's reference files.

    No canonical caption of val occurs in train, so no val scene is like one that was trained on. Val records carry the canonical caption only.
    """
    from tqdm import tqdm

    from vlm.data.shards import ShardWriter

    if train < 1 or val < 1:
        raise ConfigError(f"train={train} and val={val} scenes; expected at least one of each")
    out = Path(out)
    wanted = {"train": train, "val": val}
    chosen = _choose(wanted, seed)
    records: dict[str, list[SceneRecord]] = {split: [] for split in wanted}
    with (
        ShardWriter(out / "train", "scenes", samples_per_shard) as a,
        ShardWriter(out / "val", "scenes", samples_per_shard) as b,
    ):
        for split, writer in (("train", a), ("val", b)):
            for index in tqdm(chosen[split], desc=split, unit=" scenes", mininterval=0.5, file=sys.stderr):
                scene = draw_scene(_scene_seed(seed, index), size)
                paraphrased = split == "train" and index % PARAPHRASED_EVERY == 0
                questions = [{**q, "question_id": index * 10 + q["question_id"]} for q in scene.questions]
                record = SceneRecord(index, scene.captions if paraphrased else scene.captions[:1], questions)
                data = BytesIO()
                scene.image.save(data, "PNG")
                writer.write(
                    f"scene-{index:07d}",
                    data.getvalue(),
                    extension="png",
                    captions=record.captions,
                    questions=record.questions,
                    image_id=index,
                )
                records[split].append(record)
    for split, part in records.items():
        write_references(out, split, part)


def _scene_seed(seed: int, index: int) -> int:
    return keyed_hash(f"{seed}/{index}", "scene")


def _choose(wanted: dict[str, int], seed: int) -> dict[str, list[int]]:
    """Scene indices by split: the first of each kind, where the canonical caption alone decides the kind."""
    chosen: dict[str, list[int]] = {split: [] for split in wanted}
    index = 0
    while any(len(chosen[split]) < count for split, count in wanted.items()):
        caption = scene_layout(_scene_seed(seed, index)).caption
        split = "val" if keyed_hash(caption, "scene split") % VAL_EVERY == 0 else "train"
        if len(chosen[split]) < wanted[split]:
            chosen[split].append(index)
        index += 1
    return chosen


def _layout(rng: random.Random) -> Layout:
    count = rng.choices((1, 2, 3), COUNT_WEIGHTS)[0]
    shapes, colors = rng.sample(SHAPES, count), rng.sample(sorted(COLORS), count)
    sizes = [rng.choice(("small", "large")) for _ in range(count)]
    radii = [rng.uniform(*RADII[size]) for size in sizes]
    if count == 1:
        row, column = rng.randrange(3), rng.randrange(3)
        words = " ".join(word for word in (ROWS[row], COLUMNS[column]) if word)
        place = "in the middle" if not words else f"on the {words}" if words in ("left", "right") else f"at the {words}"
        x, y = (0.19 + 0.31 * step + rng.uniform(-0.03, 0.03) for step in (column, row))
        return Layout((Thing(shapes[0], colors[0], sizes[0], x, y, radii[0]),), "", place)
    axis = rng.choice("xy")
    # Along the axis the free space is shared out by chance; across it all stand near one line, so that "left of" is never "above".
    free = 0.98 - 2 * sum(radii)
    cuts = [0.01, *sorted(rng.uniform(0.01, 0.01 + free) for _ in range(count))]
    line = rng.uniform(0.2, 0.8)
    things = []
    for i in range(count):
        along = cuts[i + 1] + 2 * sum(radii[:i]) + radii[i]
        across = min(max(line + rng.uniform(-0.05, 0.05), radii[i] + 0.01), 0.99 - radii[i])
        x, y = (along, across) if axis == "x" else (across, along)
        things.append(Thing(shapes[i], colors[i], sizes[i], x, y, radii[i]))
    return Layout(tuple(things), axis, "")


def _paraphrases(layout: Layout) -> list[str]:
    if layout.place:
        return [f"there is {layout.caption}", f"{layout.place} there is {layout.things[0]}"]
    backwards = (" right of " if layout.axis == "x" else " below ").join(map(str, reversed(layout.things)))
    return [backwards, f"there is {layout.caption}"]


def _questions(rng: random.Random, layout: Layout) -> list[dict[str, Any]]:
    """One question of each type. Every choice is symmetric in shapes and colours, which is what balances the answers."""
    things = layout.things
    asked = rng.choice(things)
    rows = [(f"what color is the {asked.shape}?", asked.color, "other", "what color")]
    if len(things) == 1:
        rows.append((f"what shape is the {asked.color} object?", asked.shape, "other", "what shape"))
    else:  # of three, only the middle one has a single neighbour on either side
        centre = rng.choice((0, 1)) if len(things) == 2 else 1
        step = rng.choice((-1, 1)) if len(things) == 3 else 1 - 2 * centre
        words = {("x", -1): "left of", ("x", 1): "right of", ("y", -1): "above", ("y", 1): "below"}[layout.axis, step]
        rows.append(
            (f"what shape is {words} the {things[centre].shape}?", things[centre + step].shape, "other", "what shape")
        )
    present = {(t.color, t.shape) for t in things}
    if rng.random() < 0.5:
        color, shape = rng.choice(sorted(present))
        answer = "yes"
    else:  # half right: the colour or the shape is in the picture, the pair is not
        thing = rng.choice(things)
        near = [(c, s) for c in COLORS for s in SHAPES if (c == thing.color) != (s == thing.shape)]
        kind = rng.random() < 0.5
        color, shape = rng.choice([pair for pair in near if (pair[0] == thing.color) == kind and pair not in present])
        answer = "no"
    rows.append((f"is there a {color} {shape}?", answer, "yes/no", "is there"))
    rows.append(("how many objects are there?", str(len(things)), "number", "how many"))
    return [
        {"question_id": i, "question": text, "answers": [answer], "answer_type": kind, "question_type": start}
        for i, (text, answer, kind, start) in enumerate(rows)
    ]


def _draw(rng: random.Random, layout: Layout, size: int) -> Image.Image:
    side = size * SUPERSAMPLING
    canvas = _background(rng, side)
    pen = ImageDraw.Draw(canvas)
    for thing in layout.things:
        color = tuple(min(255, max(0, level + rng.randint(-14, 14))) for level in COLORS[thing.color])
        x, y, r = thing.x * side, thing.y * side, thing.radius * side
        if thing.shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=color)
        elif thing.shape == "square":
            pen.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=color)
        elif thing.shape == "triangle":
            pen.polygon(((x, y - r), (x + r, y + 0.85 * r), (x - r, y + 0.85 * r)), fill=color)
        else:
            pen.rectangle((x - r, y - 0.34 * r, x + r, y + 0.34 * r), fill=color)
            pen.rectangle((x - 0.34 * r, y - r, x + 0.34 * r, y + r), fill=color)
    return canvas.reduce(SUPERSAMPLING)


def _background(rng: random.Random, side: int) -> Image.Image:
    """A plain grey, light or dark, or the same with a soft texture: never mistaken for one of the colours."""
    grey = rng.choice((rng.randint(15, 70), rng.randint(185, 245)))
    if rng.random() < 0.5:
        return Image.new("RGB", (side, side), (grey, grey, grey))
    coarse = Image.frombytes("L", (8, 8), bytes(min(255, max(0, grey + rng.randint(-14, 14))) for _ in range(64)))
    return coarse.resize((side, side), Image.Resampling.BILINEAR).convert("RGB")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw scenes with captions and questions into shards.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where train/ and val/ are written")
    parser.add_argument(
        "--train", type=whole_number(1), default=4000, metavar="N", help="training scenes (%(default)s)"
    )
    parser.add_argument("--val", type=whole_number(1), default=400, metavar="N", help="scenes held out (%(default)s)")
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, metavar="N", help="another seed, other scenes (%(default)s)"
    )
    parser.add_argument(
        "--size", type=whole_number(16), default=64, metavar="PX", help="width and height (%(default)s)"
    )
    args = parser.parse_args(argv)
    try:
        write_scenes(args.out, args.train, args.val, args.seed, args.size)
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code if isinstance(error, UserError) else 1
    sys.stdout.write(
        f"{args.train:,} training and {args.val:,} held-out scenes in {args.out}; no held-out caption occurs in training.\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
