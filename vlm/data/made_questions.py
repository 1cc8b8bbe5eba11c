"""Questions made from captions by plain rules, for photographs that nobody asked about: `vlm shards ask` (after Ren et al. 2015, COCO-QA, and
Changpinyo et al. 2022, VQ2A). English only.

"two men in red shirts are riding horses on a beach" gives: How many men are there? 2. What color are the shirts? red. What are the men riding?
horses. Where are the men? beach. Is there a dog? no. What a caption does not say is not asked, but for things that none of an image's captions
names: they are taken to be absent.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


COLORS = _set("red blue green yellow black white brown orange pink purple gray grey tan blonde")
NUMBERS = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
ARTICLES = _set("a an the his her their its another")
PEOPLE = _set(
    "man woman boy girl person child guy lady kid toddler player baby men women people boys girls children kids"
)
ANIMALS = _set("dog cat horse cow sheep elephant giraffe zebra bear bird duck goat bull lion monkey")
PLURALS = _set("men women people children")
SPORTS = {
    **{
        name: name
        for name in ("baseball", "tennis", "soccer", "football", "basketball", "volleyball", "rugby", "hockey")
    },
    **dict.fromkeys(("skiing", "skis", "skier", "skiers"), "skiing"),
    **dict.fromkeys(("snowboarding", "snowboarder", "snowboard"), "snowboarding"),
    **dict.fromkeys(("surfing", "surfer", "surfers", "surfboard"), "surfing"),
    **dict.fromkeys(("skateboarding", "skateboarder", "skateboard"), "skateboarding"),
    "frisbee": "frisbee",
}
ROOMS = _set("kitchen bathroom bedroom office living-room")
PLACES = ROOMS | _set(
    "beach park street field pool water snow grass ocean sidewalk forest road lake desert mountain airport zoo sand woods river"
)
TRANSITIVE = _set("wearing holding riding carrying throwing eating catching chasing pulling")
ACTIONS = _set(
    "walking running sitting standing jumping surfing swimming skiing skateboarding climbing sleeping eating laying lying talking smiling flying "
    "dancing cooking reading snowboarding swinging"
)
AFTER_NOUNS = (
    ACTIONS
    | TRANSITIVE
    | _set(
        "is are in on at with and of . , that to near by while who through over from as next for up down into behind under along has playing "
        "looking outside inside"
    )
)
UNCOUNTED = _set("water snow grass sand ocean")
NO_THINGS = _set(
    "other young large small side front top group couple background day one middle way back edge close bunch picture lot end pair air series "
    "stands walks runs jumps watches looks rides left right"
)
COMMON = 250  # nouns that are asked for where they are absent
AGREED = 20  # images that must name a noun before it is asked for


class Made(NamedTuple):
    """kind: of the question, by which each image gets few of any one."""

    kind: str
    question: str
    answer: str


class QuestionMaker:
    """Makes questions from an image's captions; what is a noun, and which are common, it learns from the captions of all images."""

    def __init__(self, captions: Iterable[Sequence[str]]) -> None:
        """captions: of each image."""
        seen, followed, images = Counter[str](), Counter[str](), Counter[str]()
        for own in captions:
            texts = [_words(caption) for caption in own]
            images.update({word for text in texts for word in text})
            for text in texts:
                for before, word, after in zip(text, text[1:], text[2:], strict=False):
                    if before in ARTICLES:
                        seen[word] += 1
                        followed[word] += after in AFTER_NOUNS
        known = COLORS | NO_THINGS | AFTER_NOUNS | frozenset(NUMBERS)
        nouns = {
            word
            for word, count in seen.items()
            if count >= 5 and 2 * followed[word] > count and len(word) > 2 and word not in known and word[-3:] != "ing"
        }
        plurals = {f"{word}s" for word in nouns} - known
        self.nouns = frozenset(nouns | plurals)
        singular = Counter({word: n for word, n in images.items() if word in self.nouns and not _plural(word)})
        self.common = dict(singular.most_common(COMMON))
        self.agreed = frozenset(word for word, n in singular.items() if n >= AGREED)

    def __call__(self, captions: Sequence[str], seed: int, most: int = 4) -> list[Made]:
        """At most `most` for an image, of each kind one; none that its captions would answer in two ways. seed: chooses among them."""
        chance = random.Random(seed)
        texts = [_words(caption) for caption in captions]
        answers: dict[tuple[str, str], set[str]] = defaultdict(set)
        for text in texts:
            for kind, question, answer in self._of_caption(text):
                answers[kind, question].add(answer)
        for kind, question, answer in (*self._of_image(texts), *self._presence(texts, chance)):
            answers[kind, question].add(answer)
        found = [Made(*asked, *told) for asked, told in answers.items() if len(told) == 1]
        chance.shuffle(found)
        first = {made.kind: made for made in reversed(found)}
        return [made for made in found if first[made.kind] is made][:most]

    def _of_caption(self, text: Sequence[str]) -> Iterator[Made]:
        for i, (word, after) in enumerate(pairwise(text)):
            if word in COLORS and after in self.nouns - PEOPLE and text[i + 2 : i + 3] and text[i + 2] in AFTER_NOUNS:
                color = word.replace("grey", "gray")
                if i > 1 and text[i - 1] == "and" and text[i - 2] in COLORS:
                    color = f"{text[i - 2]} and {color}"
                yield Made("color", f"What color {_is(after)} the {after}?", color)
            if word in NUMBERS and _plural(after) and after in self.nouns | PEOPLE:
                yield Made("number", f"How many {after} are there?", NUMBERS[word])
            who = next((w for w in reversed(text[:i]) if w in PEOPLE or w in ANIMALS), None)
            if who is None:
                continue
            if word in TRANSITIVE and (thing := self._object(text[i + 1 : i + 5])) is not None:
                yield Made(word, f"What {_is(who)} the {who} {word}?", thing)
            if word in ACTIONS and who in text[max(0, i - 3) : i]:
                doing = "lying down" if word in ("lying", "laying") else word
                yield Made("doing", f"What {_is(who)} the {who} doing?", doing)

    def _object(self, words: Sequence[str]) -> str | None:
        """The thing that a verb's next words name: a noun behind articles and at most two other words."""
        for i, word in enumerate(words):
            if word in self.nouns:
                return None if word in PEOPLE else word
            if word in AFTER_NOUNS or (i > 1 and word not in ARTICLES and word not in COLORS):
                break
        return None

    def _of_image(self, texts: Sequence[Sequence[str]]) -> Iterator[Made]:
        words = sorted({word for text in texts for word in text})
        who = next((word for text in texts for word in text if word in PEOPLE or word in ANIMALS), None)
        for word in words:
            animal = word if word in ANIMALS else word.removesuffix("s")
            if animal in ANIMALS:
                yield Made("animal", "What animal is this?", animal)
            if word in SPORTS:
                yield Made("sport", "What sport is this?", SPORTS[word])
            if word in ROOMS:
                yield Made("room", "What room is this?", word.replace("-", " "))
            elif word in PLACES and who is not None and any(_stands_there(text, word) for text in texts):
                yield Made("place", f"Where {_is(who)} the {who}?", word)

    def _presence(self, texts: Sequence[Sequence[str]], chance: random.Random) -> Iterator[Made]:
        """One thing that half of an image's captions name, and a common one that none does."""
        named = Counter(word for text in texts for word in set(text))
        there = sorted(word for word in named.keys() & self.agreed if 2 * named[word] >= min(len(texts), 3))
        if not there:
            return
        yield Made("yes", _is_there(chance.choice(there), chance), "yes")
        stems = {word.removesuffix("s") for word in named}
        absent = {
            word: n for word, n in self.common.items() if word.removesuffix("s") not in stems and word not in PEOPLE
        }
        if absent:
            yield Made("no", _is_there(chance.choices([*absent], [*absent.values()])[0], chance), "no")


def _words(caption: str) -> list[str]:
    return [*re.findall(r"[a-z]+(?:-[a-z]+)*|[.,]", caption.lower().replace("living room", "living-room")), "."]


def _plural(noun: str) -> bool:
    return noun in PLURALS or (noun.endswith("s") and not noun.endswith("ss"))


def _is(noun: str) -> str:
    return "are" if _plural(noun) else "is"


def _is_there(noun: str, chance: random.Random) -> str:
    article = "" if noun in UNCOUNTED else "an " if re.match("[aeio]|u(?!ni|s)", noun) else "a "
    form = chance.choice(("Is there {}?", "Is there {} in the picture?", "Do you see {}?", "Can you see {}?"))
    return form.format(article + noun)


def _stands_there(text: Sequence[str], place: str) -> bool:
    """Whether a caption says that something is at the place, and not that it is beside or has it."""
    return any(
        word == place and i > 1 and text[i - 1] in ARTICLES and text[i - 2] in ("in", "on", "at")
        for i, word in enumerate(text)
    )
