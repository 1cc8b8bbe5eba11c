"""The ways in which a tokenizer's tokens can spell a text: what must be forbidden so that a word is not said."""

from collections.abc import Iterator
from itertools import product
from math import prod

from vlm.data.text import Tokenizer
from vlm.errors import ConfigError

MOST = 5000
"""Spellings of one text."""


def spellings(tokenizer: Tokenizer, text: str) -> list[tuple[int, ...]]:
    """Sequences of token ids that decode to `text`; none where it needs letters that the tokenizer does not have.

    WordPiece spells "cat" as `cat`, `ca ##t`, `c ##at` or `c ##a ##t`, as far as its vocabulary has these pieces, and all are given. Of another kind
    of tokenizer those are given that it makes itself, at the beginning of a text and behind a space.

    Raises:
        ConfigError: there is no word in `text`, or there are more than `MOST` spellings.
    """
    canonical = tokenizer.pieces(text)
    if not canonical:
        raise ConfigError(f"the banned word {text!r} has no letters; leave it out.")
    if tokenizer.unk_id in canonical:
        return []
    if not tokenizer.continuing_ids:
        return list(dict.fromkeys((tuple(canonical), tuple(tokenizer.pieces(f" {text}")))))
    words: list[str] = []
    for piece, i in zip(tokenizer.tokens(canonical), canonical, strict=True):
        if i in tokenizer.continuing_ids:
            words[-1] += piece.removeprefix("##")
        else:
            words.append(piece)
    ids = {piece: i for i, piece in enumerate(tokenizer.tokens(range(tokenizer.vocab_size)))}
    counts = [_count(word, ids) for word in words]
    if prod(counts) > MOST:
        raise ConfigError(f"{text!r} can be spelt in {prod(counts)} ways, more than {MOST}; ban a shorter part of it.")
    ways = [_ways(word, ids) for word in words]
    return [tuple(i for word in spelling for i in word) for spelling in product(*ways)]


def _ways(word: str, ids: dict[str, int]) -> list[tuple[int, ...]]:
    """Spellings of one word by WordPiece's pieces."""
    found: list[list[tuple[int, ...]]] = [[()]]  # of the first letters, by their number
    for end in range(1, len(word) + 1):
        found.append([(*before, i) for start, i in _last_pieces(word, end, ids) for before in found[start]])
    return found[-1]


def _count(word: str, ids: dict[str, int]) -> int:
    """How many `_ways` there are, without making them: they can be as many as two to the power of the letters."""
    counts = [1]
    for end in range(1, len(word) + 1):
        counts.append(sum(counts[start] for start, _ in _last_pieces(word, end, ids)))
    return counts[-1]


def _last_pieces(word: str, end: int, ids: dict[str, int]) -> Iterator[tuple[int, int]]:
    """Where a piece may begin that ends before the letter `end`, and its id."""
    for start in range(end):
        piece = ("##" if start else "") + word[start:end]
        if piece in ids:
            yield start, ids[piece]
