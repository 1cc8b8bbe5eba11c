"""Every way to spell a word is found, and no other."""

import itertools
import json
from pathlib import Path

import pytest
import tokenizers

from vlm.data.spellings import spellings
from vlm.data.text import Tokenizer
from vlm.errors import ConfigError

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "c",
    "ca",
    "cat",
    "at",
    "a",
    "##a",
    "##at",
    "##t",
    "##ca",
    "t",
    "-",
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return Tokenizer.load(tmp_path)


@pytest.mark.parametrize("text", ["cat", "Cat", "acat", "a cat", "a-cat", "at at"])
def test_spellings_are_all_that_decode_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    """By brute force over all sequences of tokens that are as long as the text at most."""
    found = spellings(tokenizer, text)
    wanted = text.lower().replace("-", " - ")
    longest = len(wanted.replace(" ", ""))
    tokens = [i for i in range(5, len(WORDS)) if WORDS[i].removeprefix("##") in wanted]

    def spelt(ids: tuple[int, ...]) -> str:
        return " ".join(WORDS[i] for i in ids).replace(" ##", "")

    everything = (ids for n in range(1, longest + 1) for ids in itertools.product(tokens, repeat=n))
    assert sorted(found) == sorted(ids for ids in everything if spelt(ids) == wanted)
    assert tuple(tokenizer.pieces(text)) in found
    assert len(found) == len(set(found)) > 0


def test_what_cannot_be_said_has_no_spelling(tokenizer: Tokenizer) -> None:
    assert spellings(tokenizer, "dog") == []


def test_unusable_words_are_told(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="' ' has no letters"):
        spellings(tokenizer, " ")
    with pytest.raises(ConfigError, match="more than 5000; ban a shorter part"):
        spellings(tokenizer, "catat" * 12)


def test_other_tokenizers_spell_a_word_behind_a_space_too() -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=80, show_progress=False, special_tokens=["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
    )
    inner.train_from_iterator(["a cat", "cat", "the cat"] * 5, trainer)
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(json.loads(inner.to_str()))))
    assert spellings(tokenizer, "cat") == [tuple(tokenizer.pieces("cat")), tuple(tokenizer.pieces(" cat"))]
