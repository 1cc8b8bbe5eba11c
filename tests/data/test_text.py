"""The tokenizer agrees with transformers' BERT, trimming changes no token, masking has BERT's frequencies."""

import json
import pickle
import string
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data.text import (
    Tokenizer,
    clean_answer,
    clean_caption,
    clean_question,
    mask_tokens,
    tidy,
    train_wordpiece,
    trim,
)
from vlm.errors import UserError

CAPTIONS = [
    "a black dog runs across the snowy field",
    "two children play in the water near a boat",
    "a man in a red t-shirt rides a bicycle down the street",
    "the brown dog catches a frisbee in the park",
    "a woman wearing sunglasses sits on a bench, reading",
    "people walking by shops at night in the rain",
] * 3
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece([*CAPTIONS, string.ascii_lowercase + string.digits + "?.,'"], 300, min_frequency=1)


def test_training_gives_berts_conventions(tokenizer: Tokenizer) -> None:
    t = tokenizer
    assert (t.pad_id, t.unk_id, t.cls_id, t.sep_id, t.mask_id) == (0, 1, 2, 3, 4)
    assert t.special_ids == {0, 1, 2, 3, 4}
    assert t.tokens(range(5)) == SPECIAL
    assert t.vocab_size <= 300
    ids = t.encode("A black DOG")
    assert t.tokens(ids) == ["[CLS]", "a", "black", "dog", "[SEP]"]
    assert t.decode(ids) == "a black dog"


def test_training_is_reproducible() -> None:
    first = train_wordpiece(CAPTIONS, 200).to_json()
    for texts in (iter(CAPTIONS), reversed(CAPTIONS), CAPTIONS, CAPTIONS):
        assert train_wordpiece(texts, 200).to_json() == first


def test_training_leaves_no_thread_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    train_wordpiece(CAPTIONS, 100)
    assert "TOKENIZERS_PARALLELISM" not in os.environ


@pytest.mark.parametrize(
    "text", ["A man's T-shirt, (really)!", "café  naïve\n東京", "two [SEP] dogs", "x" * 120, "", "2:30 p.m."]
)
def test_equals_transformers_bert(tokenizer: Tokenizer, text: str, tmp_path: Path) -> None:
    from transformers import BertTokenizer

    tokenizer.save(tmp_path / "tokenizer.json")
    words = tokenizer.tokens(range(tokenizer.vocab_size))
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    reference = BertTokenizer(vocab={w: i for i, w in enumerate(words)})
    expected = reference(text.replace("[SEP]", "[ SEP ]"))["input_ids"]
    for loaded in (tokenizer, Tokenizer.load(tmp_path), Tokenizer.load(tmp_path / "vocab.txt")):
        assert loaded.encode(text) == expected
        assert loaded.decode(expected) == reference.decode(expected, skip_special_tokens=True)


def test_saved_file_frames_texts_for_other_libraries(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer.save(tmp_path)
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert reference("a black dog")["input_ids"] == tokenizer.encode("a black dog")


def test_saving_replaces_atomically(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("before")

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("vlm.files.os.replace", fail)
    with pytest.raises(UserError, match="disk full"):
        tokenizer.save(path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_pickles(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("two [SEP] dogs") == tokenizer.encode("two [SEP] dogs")
    assert copy.special_ids == tokenizer.special_ids


def test_special_tokens_typed_in_a_text_stay_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a [SEP] dog [PAD] [MASK]")
    assert ids[0] == tokenizer.cls_id
    assert ids[-1] == tokenizer.sep_id
    assert not {tokenizer.sep_id, tokenizer.pad_id, tokenizer.mask_id, tokenizer.cls_id} & set(ids[1:-1])


def test_an_authors_padding_and_truncation_are_undone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    content = json.loads(tokenizer.to_json())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 128},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    path.write_text(json.dumps(content))
    text = "a black dog runs across the snowy field"
    assert Tokenizer.load(path).encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("length", [2, 3, 5, 50, None])
def test_truncation_keeps_the_frame(tokenizer: Tokenizer, length: int | None) -> None:
    whole = tokenizer.encode(CAPTIONS[0])
    ids = tokenizer.encode(CAPTIONS[0], length)
    assert len(ids) == min(length or 99, len(whole))
    assert ids[-1] == tokenizer.sep_id
    assert ids[:-1] == whole[: len(ids) - 1]


@given(st.text(alphabet="abcdo 'x-?", max_size=20), st.text(alphabet="abcdo 'x-?", max_size=20))
@settings(max_examples=50, deadline=None)
def test_prompt_tokens_do_not_depend_on_the_text(prompt: str, text: str) -> None:
    t = WORDS
    ids, count = t.encode_with_prompt(prompt, text)
    alone, same = t.encode_with_prompt(prompt, "")
    assert count == same == len(alone) - 1
    assert ids[:count] == alone[:count]
    assert ids[count:] == t.encode(text)[1:]
    assert t.encode(text, prompt=prompt) == ids


WORDS = train_wordpiece(["abcdo ' x - ?", *CAPTIONS], 120, min_frequency=1)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected tokenizer\.json or vocab.txt"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match=r"none\.json: no such file"):
        Tokenizer.load(tmp_path / "none.json")
    path = tmp_path / "tokenizer.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.load(path)
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[CLS]\n[SEP]\n[UNK]\na")
    with pytest.raises(UserError, match=r"vocab\.txt: the tokenizer has no mask token; expected one of \[MASK\]"):
        Tokenizer.load(path)


def test_trimming_spells_the_same(tokenizer: Tokenizer) -> None:
    texts = CAPTIONS[:2]
    trimmed, kept = trim(tokenizer, texts)
    assert trimmed.vocab_size == len(kept) < tokenizer.vocab_size
    assert trimmed.tokens(range(trimmed.vocab_size)) == tokenizer.tokens(kept)
    for text in [*texts, "a boat near the black field"]:
        assert trimmed.tokens(trimmed.encode(text)) == tokenizer.tokens(tokenizer.encode(text))
        assert [kept[i] for i in trimmed.encode(text)] == tokenizer.encode(text)
    other = "bicycle sunglasses"
    assert trimmed.unk_id not in trimmed.encode(other)  # letter by letter if need be
    assert trimmed.decode(trimmed.encode(other)) == other
    again, all_kept = trim(trimmed, texts)
    assert again.vocab_size == trimmed.vocab_size
    assert all_kept == list(range(trimmed.vocab_size))


def test_trimming_drops_what_is_rare_except_what_must_stay(tokenizer: Tokenizer) -> None:
    texts = ["a dog runs", "a dog jumps", "a cat sleeps"]
    trimmed, _ = trim(tokenizer, texts, min_count=2, always=["cat"])
    known = set(trimmed.tokens(range(trimmed.vocab_size)))
    assert {"a", "dog", "cat"} <= known
    assert "sleeps" not in known
    assert trimmed.decode(trimmed.encode("a cat sleeps")) == "a cat sleeps"  # spelt in pieces


def test_trimming_moves_special_ids(tmp_path: Path) -> None:
    """BERT's own order: [PAD] first, the other special tokens after [unused] ones; and BLIP's two added at the end."""
    words = ["[PAD]", *(f"[unused{i}]" for i in range(9)), *SPECIAL[1:], "a", "b", "##b", "cat", "dog", "##s"]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(words))
    bert = Tokenizer.load(path)
    bert._inner.add_special_tokens(["[DEC]"])
    bert = Tokenizer(bert._inner)
    trimmed, kept = trim(bert, ["dogs"])
    expected = ["[PAD]", *SPECIAL[1:], "a", "b", "##b", "dog", "##s", "[DEC]"]
    assert trimmed.tokens(range(trimmed.vocab_size)) == expected
    assert kept[-1] == bert.vocab_size - 1
    assert (trimmed.unk_id, trimmed.cls_id, trimmed.sep_id, trimmed.mask_id) == (1, 2, 3, 4)
    assert trimmed.vocab_size - 1 in trimmed.special_ids
    assert trimmed.encode("dogs") == [2, 8, 9, 3]
    trimmed.save(tmp_path)
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode("dogs") == [2, 8, 9, 3]


def test_only_wordpiece_is_trimmed() -> None:
    import tokenizers

    vocab = {token: i for i, token in enumerate([*SPECIAL, "a"])}
    levels = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]")))
    with pytest.raises(UserError, match="this tokenizer is WordLevel; set trim to false"):
        trim(levels, ["a"])


def test_cleaning() -> None:
    assert clean_caption('  A man; "riding" (fast)... a\tbike!\n') == "a man riding fast a bike"
    assert clean_caption("A man's T-shirt, red & blue?") == "a man's t-shirt, red & blue?"
    assert clean_caption("one two three four", max_words=2) == "one two"
    assert clean_caption(" ... ") == ""
    assert clean_question("Is the man wearing a hat?") == "is the man wearing a hat"
    assert clean_question("What's this?  ", 1) == "what's"
    assert clean_answer(" Yes. ") == "yes"
    assert clean_answer("New  York") == "new york"
    assert clean_answer("3.5") == "3.5"
    assert clean_answer("?!") == ""


def test_tidying_undoes_what_the_tokenizer_took_apart(tokenizer: Tokenizer) -> None:
    for text in ("a man's t-shirt isn't red", "a black-and-white dog, running", "they're here"):
        assert tidy(tokenizer.decode(tokenizer.encode(text))) == text
    assert tidy("the boys ' team") == "the boys ' team"


def test_masking_frequencies() -> None:
    """80 % mask, 10 % another word, 10 % unchanged of 15 %, each within 3 standard deviations."""
    special, vocab_size, mask_id = {0, 1, 2, 3, 4, 99}, 100, 4
    n, hidden, masked, random, kept = 0, 0, 0, 0, 0
    generator = torch.Generator().manual_seed(0)
    drawn = set()
    for _ in range(400):
        ids = [2, *torch.randint(5, 99, (50,), generator=generator).tolist(), 3]
        result, positions = mask_tokens(ids, special, vocab_size, mask_id, 0.15, generator)
        assert len(result) == len(ids)
        assert all(result[at] == ids[at] for at in range(len(ids)) if at not in positions)
        assert 0 not in positions
        assert len(ids) - 1 not in positions
        n += 50
        hidden += len(positions)
        for at in positions:
            masked += result[at] == mask_id
            kept += result[at] == ids[at]
            random += result[at] not in (mask_id, ids[at])
            drawn.add(result[at])

    def near(count: int, total: int, p: float) -> bool:
        return abs(count - total * p) < 3 * (total * p * (1 - p)) ** 0.5

    assert near(hidden, n, 0.15)
    assert near(masked, hidden, 0.8)
    assert near(random, hidden, 0.1 * 93 / 94)  # one of the 94 words is the hidden one
    assert near(kept, hidden, 0.1 * 95 / 94)
    assert drawn & special == {mask_id}


def test_random_words_are_any_but_special() -> None:
    special = {0, 1, 5, 9}
    generator = torch.Generator().manual_seed(0)
    drawn = set()
    for _ in range(300):
        result, positions = mask_tokens([2] * 40, special, 10, 1, 1.0, generator)
        assert positions == list(range(40))
        drawn |= set(result)
    assert drawn == {1, 2, 3, 4, 6, 7, 8}


def test_masking_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    assert mask_tokens([2, 7, 8, 3], {2, 3}, 20, 4, 0.0, generator) == ([2, 7, 8, 3], [])
    assert mask_tokens([2, 3], {2, 3}, 20, 4, 1.0, generator) == ([2, 3], [])


def test_whole_words_are_masked_together() -> None:
    """Of a word of three pieces all are chosen or none, each then hidden or not on its own; the share of tokens stays."""
    special, continuing, length = {0, 1, 2, 3, 4}, {50, 51}, 62
    ids = [2, *[10, 50, 51] * 20, 3]
    generator = torch.Generator().manual_seed(0)
    total, kept_beside_masked = 0, 0
    for _ in range(300):
        result, positions = mask_tokens(ids, special, 100, 4, 0.15, generator, continuing)
        total += len(positions)
        chosen = [at in positions for at in range(1, length - 1)]
        assert all(len(set(chosen[word : word + 3])) == 1 for word in range(0, 60, 3))
        kept_beside_masked += sum(result[at] == ids[at] for at in positions)
    words, p = 300 * 20, 0.15
    assert abs(total / 3 - words * p) < 3 * (words * p * (1 - p)) ** 0.5
    assert 0 < kept_beside_masked < 0.2 * total


def test_the_pieces_that_go_on_with_a_word(tokenizer: Tokenizer) -> None:
    pieces = tokenizer.continuing_ids
    assert pieces
    for i in range(tokenizer.vocab_size):
        (token,) = tokenizer.tokens([i])
        assert (i in pieces) == token.startswith("##")
