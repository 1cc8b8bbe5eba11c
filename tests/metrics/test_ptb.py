"""The tokens are those of pycocoevalcap's Java tokenizer; golden_ptb.json holds its output."""

# ruff: noqa: RUF001   (curly quotes and dashes are what this file is about)
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.metrics.ptb import PUNCTUATION, tokenize, tokenize_all

GOLDEN = json.loads((Path(__file__).parent / "golden_ptb.json").read_text(encoding="utf-8"))

PIECES = (
    "A dog isn't don't he's o'clock U.S. p.m. etc. St. no. 5 1/2 3.5 10:30 555 1234 t-shirt a/b AT&T #1 @me x@y.com $5"
    " £3 ½ … — “ ” ’ ' '' ` \" ( ) [ { } < > <b> &amp; ... -- - . , ! ? ; : :) * _ ~ é 中 😀 \u00ad \u200b K."
)
HARD = st.sampled_from(PIECES.split())


def test_tokens_equal_the_java_program_on_every_golden_line():
    differing = [(line, expected, tokenize(line)) for line, expected in GOLDEN["lines"] if tokenize(line) != expected]
    assert len(GOLDEN["lines"]) > 400
    assert differing == []


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [  # run with pycocoevalcap 1.2 and Java, independently of the golden file
        ("A man's dog isn't on the T-shirt, (really)!", "a man 's dog is n't on the t-shirt -lrb- really -rrb-"),
        (
            'Two "cats" -- one is 3.5 years old; the other: $5.',
            "two cats one is 3.5 years old the other $ 5",
        ),
        (
            "A girl with her mom's phone at 2:30 p.m. in the U.S. & more...",
            "a girl with her mom 's phone at 2:30 p.m. in the u.s. & more",
        ),
        ("A traffic light/street sign", "a traffic light/street sign"),
    ],
)
def test_published_golden_lines(caption, tokens):
    assert tokenize(caption) == tokens


def test_a_file_of_captions_is_read_as_one_text_where_a_lone_letter_ends_one():
    captions = [caption for caption, _ in GOLDEN["file"]]
    assert tokenize_all([*captions, "end"])[:-1] == [expected for _, expected in GOLDEN["file"]]
    assert tokenize_all(["a sign that reads K.", "A dog"]) == ["a sign that reads k", "a dog"]
    assert tokenize_all(["a sign that reads K.", "dogs"]) == ["a sign that reads k.", "dogs"]
    assert tokenize_all([]) == []


@pytest.mark.parametrize("separator", ["\n", "\r", "\t", "\x0b", "\x0c", "\u2028", "\u2029", "\u00a0", "\u3000"])
def test_any_white_space_separates_words(separator):
    assert tokenize(f"a dog{separator}runs") == "a dog runs"


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(st.text(max_size=60), st.lists(HARD, max_size=12).map(" ".join), st.lists(HARD, max_size=9).map("".join))
)
def test_any_text_gives_clean_tokens(caption):
    tokens = tokenize(caption).split(" ")
    assert tokens == [""] or all(tokens)
    assert not PUNCTUATION & set(tokens)
    assert tokenize(caption + " ") == tokenize(" " + caption) == tokenize(caption)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.from_regex(r"[A-Za-z]{2,8}", fullmatch=True), max_size=8))
def test_plain_words_only_become_lower_case(words):
    joined = {"cannot", "gonna", "gotta", "wanna", "gimme", "lemme"}
    words = [word for word in words if word.lower() not in joined]
    assert tokenize(" ".join(words)) == " ".join(words).lower()
    assert tokenize("  ".join(words) + " .") == " ".join(words).lower()
