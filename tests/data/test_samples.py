"""From records to samples: which texts, which tokens, what is predicted, and that all choices are drawn by key."""

import io
import pickle
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from vlm.data.collate import collate, silenced
from vlm.data.hiding import PatchHiding
from vlm.data.images import EvaluationTransform, TrainingTransform
from vlm.data.records import BadRecord, Record
from vlm.data.samples import CaptionEncoder, JointEncoder, QuestionEncoder, answer_weights
from vlm.data.text import Tokenizer, train_wordpiece
from vlm.errors import BadImage

CAPTIONS = [f"{number} dogs run over the green grass" for number in ("two", "three", "four", "five", "six")]
QUESTIONS: list[dict[str, Any]] = [
    {
        "question_id": 7,
        "question": "How many dogs?",
        "answers": ["2"] * 6 + ["two", "Two.", "3", ""],
        "answer_type": "number",
    },
    {"question_id": 8, "question": "Is the grass green?", "answers": ["yes"] * 10, "note": "ignored"},
]
TEXTS = [*CAPTIONS, "how many dogs is the grass green", "question answer : a picture of", "0123456789 yes no"]
TOKENIZER = train_wordpiece(TEXTS, 300, min_frequency=1)


def image_bytes() -> bytes:
    image = Image.new("RGB", (40, 32))
    image.paste((255, 255, 255), (0, 0, 20, 32))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def record(captions: list[str] = CAPTIONS, questions: list[dict[str, Any]] = QUESTIONS, key: str = "k1") -> Record:
    return Record("coco", key, image_bytes(), list(captions), list(questions), 42)


def captioner(training: bool = True, **settings: Any) -> CaptionEncoder:
    transform = TrainingTransform(16, randaugment=(2, 7)) if training else EvaluationTransform(16)
    return CaptionEncoder(TOKENIZER, transform, training, **settings)


def questioner(training: bool = True, **settings: Any) -> QuestionEncoder:
    transform = TrainingTransform(16) if training else EvaluationTransform(16)
    return QuestionEncoder(TOKENIZER, transform, training, **settings)


def words(ids: list[int], tokenizer: Tokenizer = TOKENIZER) -> str:
    return " ".join(tokenizer.tokens(ids))


def test_training_takes_one_caption_by_key() -> None:
    encode = captioner(seed=5)
    drawn = Counter()
    for epoch in range(300):
        (text,) = encode(record(), epoch).texts
        drawn[text.source["caption"]] += 1
        assert text.source.keys() == {"caption", "references"}
        assert (text.prompt, text.weight, text.masked_ids) == (1, 1.0, None)
    assert set(drawn) == set(CAPTIONS)
    assert max(drawn.values()) < 60 + 4 * 48**0.5
    assert len(captioner(texts_per_image="all")(record(), 0).texts) == 5


def test_whichever_caption_is_drawn_its_references_are_all_that_training_could_take() -> None:
    """Rewards are counted against them (Rennie et al. 2017), so they may not depend on texts_per_image, nor on questions beside."""
    captions = [*CAPTIONS, "four dogs " * 20, "..."]  # one that would be cut, one without a word
    for encode in (captioner(max_tokens=16), JointEncoder(captioner(max_tokens=16), questioner())):
        for epoch in range(5):
            (drawn,) = (text for text in encode(record(captions), epoch).texts if text.describes)
            assert drawn.source["references"] == CAPTIONS
    together = captioner(max_tokens=16, texts_per_image="all")(record(captions), 0).texts
    assert [text.source["caption"] for text in together] == CAPTIONS
    assert all(text.source["references"] == CAPTIONS for text in together)


def test_evaluation_takes_all_captions_in_order() -> None:
    sample = captioner(training=False, texts_per_image="all")(record(), 0)
    assert [text.source["caption"] for text in sample.texts] == CAPTIONS
    assert all(text.source["references"] == CAPTIONS for text in sample.texts)
    assert (sample.key, sample.image_id, sample.image.dtype) == ("k1", 42, torch.uint8)
    (first,) = captioner(training=False)(record(), 3).texts
    assert words(first.ids) == "[CLS] two dogs run over the green grass [SEP]"


def test_captions_are_cleaned_prompted_and_cut() -> None:
    encode = captioner(prompt="a picture of", max_tokens=8)
    (text,) = encode(record(captions=['Two "DOGS" run over the green grass.']), 0).texts
    assert words(text.ids) == "[CLS] a picture of two dogs run [SEP]"
    assert text.prompt == 4
    assert text.source["caption"] == 'Two "DOGS" run over the green grass.'


def test_every_choice_is_a_function_of_the_key() -> None:
    encode = captioner(seed=1, masking_probability=0.3)
    again = pickle.loads(pickle.dumps(encode))

    def content(encoder: CaptionEncoder, key: str = "k1", epoch: int = 0) -> tuple[Any, ...]:
        sample = encoder(record(key=key), epoch)
        (text,) = sample.texts
        return sample.image.numpy().tobytes(), tuple(text.ids), tuple(text.masked_ids or ()), tuple(text.masked_at)

    first = content(encode)
    torch.manual_seed(99)  # the process's own randomness has no influence, and is not touched
    state = torch.get_rng_state()
    assert content(again) == first
    assert torch.equal(torch.get_rng_state(), state)
    others = [content(encode, epoch=1), content(encode, key="k2"), content(replace(encode, seed=2))]
    assert all(image != first[0] for image, *_ in others)
    # whatever else changes, the picture's choices stay: they have a key of their own
    assert content(replace(encode, masking_probability=None))[0] == first[0]


def test_masking_is_drawn_for_each_text() -> None:
    encode = captioner(texts_per_image="all", masking_probability=0.5)
    texts = encode(record(captions=[CAPTIONS[0]] * 4), 0).texts
    assert len({tuple(text.masked_at) for text in texts}) > 1
    for text in texts:
        assert text.masked_ids is not None
        assert len(text.masked_ids) == len(text.ids)
        assert 0 not in text.masked_at
        assert len(text.ids) - 1 not in text.masked_at
    batch = collate([encode(record(), 0)], encode.pad_id)
    assert batch.masked is not None
    assert torch.equal(batch.texts.ids.flatten()[batch.masked.positions], batch.masked.labels)


def test_hidden_patches_are_drawn_by_key() -> None:
    encode = captioner(hiding=PatchHiding((8, 8), 2, 0.6), seed=3)

    def hidden(encoder: CaptionEncoder | JointEncoder, key: str = "k1", epoch: int = 0) -> list[int]:
        found = encoder(record(key=key), epoch).hidden
        assert found is not None
        return found.tolist()

    first = hidden(encode)
    assert len(first) == 40
    assert hidden(pickle.loads(pickle.dumps(encode))) == hidden(JointEncoder(encode, questioner())) == first
    others = [hidden(encode, epoch=1), hidden(encode, key="k2"), hidden(replace(encode, seed=4))]
    assert first not in others
    plain = captioner(seed=3)(record(), 0)
    assert plain.hidden is None
    assert torch.equal(plain.image, encode(record(), 0).image)  # the picture's choices stay
    samples = [encode(record(), 0), silenced(encode(record(key="k2"), 0))]
    batch = collate(samples, encode.pad_id)
    assert batch.hidden is not None
    assert batch.hidden.tolist() == [first, others[1]]
    assert collate([plain], encode.pad_id).hidden is None


def mirrored(encode: CaptionEncoder | QuestionEncoder, sample: Record) -> set[bool]:
    return {bool(encode(sample, epoch).image[0, 8, 0] < 128) for epoch in range(30)}


def test_images_are_not_mirrored_where_a_text_says_left_or_right() -> None:
    plain = TrainingTransform(16, scale=(0.9, 1.0))
    captions = replace(captioner(), transform=plain)
    assert mirrored(captions, record(questions=[])) == {False, True}
    # in any caption, not only the one drawn; in a question or an answer, though captions are learned
    assert mirrored(captions, record([*CAPTIONS, "a dog on the Left"], [])) == {False}
    assert mirrored(captions, record(questions=[{"question": "What is right of it?"}])) == {False}
    assert mirrored(captions, record(questions=[{"question": "Which side?", "answers": ["left"]}])) == {False}
    assert mirrored(replace(questioner(), transform=plain), record(["a dog on the right"])) == {False}


def test_questions_for_an_encoder_and_a_decoder() -> None:
    encode = questioner(texts_per_image="all")
    many, green = encode(record(), 0).texts
    assert words(many.ids) == "[CLS] how many dogs [SEP]"
    assert [(words(ids), weight) for ids, weight in many.answers] == [
        ("[CLS] 2 [SEP]", 0.6),
        ("[CLS] two [SEP]", pytest.approx(0.2)),
        ("[CLS] 3 [SEP]", 0.1),
    ]
    assert many.source == QUESTIONS[0]
    assert green.source.keys() == {"question_id", "question", "answers"}
    assert [weight for _, weight in green.answers] == [1.0]
    drawn = Counter(questioner(seed=3)(record(), epoch).texts[0].source["question_id"] for epoch in range(100))
    assert drawn.keys() == {7, 8}
    assert min(drawn.values()) > 30
    batch = collate([encode(record(), 0)], encode.pad_id)
    assert batch.answers is not None
    assert batch.answers.text.tolist() == [0, 0, 0, 1]


def test_prompted_questions() -> None:
    encode = questioner(form="prompted", texts_per_image="all")
    texts = encode(record(), 0).texts
    assert [words(t.ids) for t in texts] == [
        "[CLS] question : how many dogs answer : 2 [SEP]",
        "[CLS] question : how many dogs answer : two [SEP]",
        "[CLS] question : how many dogs answer : 3 [SEP]",
        "[CLS] question : is the grass green answer : yes [SEP]",
    ]
    assert [t.weight for t in texts] == pytest.approx([0.6, 0.2, 0.1, 1.0])
    assert [t.prompt for t in texts] == [8, 8, 8, 9]
    assert not any(t.answers for t in texts)


def test_prompted_evaluation_ends_with_the_prompt() -> None:
    trained = questioner(form="prompted", texts_per_image="all")(record(), 0).texts
    texts = questioner(False, form="prompted", texts_per_image="all")(record(), 0).texts
    assert [words(t.ids) for t in texts] == [
        "[CLS] question : how many dogs answer :",
        "[CLS] question : is the grass green answer :",
    ]
    assert [t.ids for t in texts] == [trained[0].ids[: trained[0].prompt], trained[3].ids[: trained[3].prompt]]
    assert [(t.prompt, t.weight) for t in texts] == [(8, 1.0), (9, 1.0)]
    assert [t.source["question_id"] for t in texts] == [7, 8]


def test_a_long_question_is_cut_inside_its_prompt() -> None:
    long = record(questions=[{"question": "is the green grass green over the green grass?", "answers": ["yes"]}])
    (text,) = questioner(form="prompted", max_question_tokens=9)(long, 0).texts
    assert words(text.ids) == "[CLS] question : is the green grass answer : yes [SEP]"
    (text,) = questioner(max_question_tokens=5)(long, 0).texts
    assert words(text.ids) == "[CLS] is the green [SEP]"
    (text,) = questioner(max_answer_tokens=3)(record(questions=[{"question": "?", "answers": ["yes yes"]}]), 0).texts
    assert words(text.answers[0][0]) == "[CLS] yes [SEP]"


def test_answers_are_counted_as_cleaned() -> None:
    assert answer_weights(["Yes", "yes.", " YES ", "no"]) == {"yes": 0.75, "no": 0.25}
    assert answer_weights(["?"]) == {}
    assert answer_weights([]) == {}


def test_joint_encoder_takes_what_a_record_has() -> None:
    caption = captioner(prompt="a picture of", texts_per_image="all", masking_probability=0.5)
    encode = JointEncoder(caption, questioner(form="prompted", texts_per_image="all"))
    both = encode(record(), 0)
    assert len(both.texts) == 5 + 4
    assert torch.equal(both.image, caption(record(), 0).image)
    assert len(encode(record(captions=[]), 0).texts) == 4
    assert len(encode(record(questions=[]), 0).texts) == 5
    batch = collate([both], encode.pad_id)
    assert batch.texts.image.tolist() == [0] * 9
    assert batch.texts.describes.tolist() == [True] * 5 + [False] * 4
    assert batch.masked is not None  # of captions only
    assert set((batch.masked.positions // batch.texts.ids.shape[1]).tolist()) <= set(range(5))
    assert (batch.captions.tolist(), batch.questions.tolist()) == ([0, 1, 2, 3, 4], [5, 6, 7, 8])
    with pytest.raises(BadRecord, match="in record coco/k1"):
        encode(record([], []), 0)


def test_records_without_what_is_needed() -> None:
    with pytest.raises(BadRecord, match="no caption in record coco/k1") as caught:
        captioner()(record(captions=[]), 0)
    assert caught.value.cause == "no caption"
    with pytest.raises(BadRecord, match="no caption"):
        captioner()(record(captions=["..."]), 0)
    with pytest.raises(BadRecord, match="no question with an answer in record coco/k1"):
        questioner()(record(questions=[{"question": "Why?", "answers": []}]), 0)
    assert len(questioner(False)(record(questions=[{"question": "Why?"}]), 0).texts) == 1
    with pytest.raises(BadRecord, match="no question in record"):
        questioner(False)(record(questions=[]), 0)
    with pytest.raises(BadImage, match="coco/k1: not an image"):
        captioner()(replace(record(), image=b"<html>"), 0)


def test_an_empty_caption_is_passed_over() -> None:
    encode = captioner()
    assert {encode(record(["...", CAPTIONS[0]]), epoch).texts[0].source["caption"] for epoch in range(10)} == {
        CAPTIONS[0]
    }


def test_whole_words_are_hidden_where_asked_for() -> None:
    """A word that the vocabulary has to spell."""
    encode = captioner(masking_probability=0.4, whole_words=True)
    some = 0
    for number in range(60):
        (text,) = encode.texts(record(["two orange dogs"], key=f"k{number}"), 0)
        spelt = TOKENIZER.tokens(text.ids)
        piece = [at for at, token in enumerate(spelt) if token.startswith("##")]
        assert len(piece) >= 2
        word = {piece[0] - 1, *piece}
        hidden = word & set(text.masked_at)
        assert hidden in (set(), word)
        some += bool(hidden)
    assert 0 < some < 60
