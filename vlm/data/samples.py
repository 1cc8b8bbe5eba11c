"""From records to encoded samples: which texts are taken, how they become tokens, what is masked and hidden, how the image
is transformed.

Every choice is drawn by key (seed, epoch, source, key, purpose), so a sample is the same wherever and whenever it is encoded.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from torch import Tensor

from vlm.data.batch import SET_WEIGHT
from vlm.data.collate import EncodedSample, EncodedText, SampleEncoder
from vlm.data.features import StoredFeatures, record_texts
from vlm.data.hiding import PatchHiding
from vlm.data.images import EvaluationTransform, TrainingTransform, decode_image, mentions_side
from vlm.data.jpeg import decode_pixels
from vlm.data.random import keyed_generator, keyed_random, keyed_seed
from vlm.data.records import BadRecord, Record
from vlm.data.text import Tokenizer, clean_answer, clean_caption, clean_question, mask_tokens

Transform = EvaluationTransform | TrainingTransform | StoredFeatures
TextsPerImage = Literal["one", "all"]


@dataclass(frozen=True)
class CaptionEncoder(SampleEncoder):
    """A record's captions as texts: in training one drawn by key (or all), in evaluation all (or the first)."""

    tokenizer: Tokenizer
    transform: Transform
    training: bool
    max_tokens: int = 40
    """Longest text in tokens, [CLS], prompt and [SEP] included."""
    prompt: str = ""
    """Text before every caption, not to be predicted, such as "a picture of"."""
    texts_per_image: TextsPerImage = "one"
    masking_probability: float | None = None
    """Share of the tokens to hide for masked language modelling; None: no masking."""
    whole_words: bool = False
    """Hide all pieces of a word or none."""
    hiding: PatchHiding | None = None
    """Which patches of the image to hide for masked image modelling; None: none."""
    seed: int = 0
    views: int | None = None
    """Augmentations of an image before they repeat."""

    @property
    def pad_id(self) -> int:
        """The padding token."""
        return self.tokenizer.pad_id

    def sample(self, record: Record, epoch: int, texts: list[EncodedText]) -> EncodedSample:
        """The record's image with these texts. Raises BadImage without an image."""
        sample = _sample(self, record, epoch, texts)
        if self.hiding is None:
            return sample
        generator = keyed_generator(self.seed, epoch, record.source, record.key, "patches")
        return replace(sample, hidden=self.hiding.draw(generator))

    def texts(self, record: Record, epoch: int) -> list[EncodedText]:
        """The texts of the sample. Raises BadRecord without a caption."""
        captions = [(raw, cleaned) for raw in record.captions if (cleaned := clean_caption(raw))]
        if not captions:
            raise BadRecord("no caption", f"no caption in record {record.source}/{record.key}")
        captions = self._whole(captions)
        # In training those that it could take, for rewards: the same ones whichever it takes.
        references = [raw for raw, _ in captions] if self.training else list(record.captions)
        if self.texts_per_image == "one":
            captions = [_draw(captions, self.training, self.seed, epoch, record, "caption")]
        texts = []
        for number, (raw, cleaned) in enumerate(captions):
            ids, prompt = self.tokenizer.encode_with_prompt(self.prompt, cleaned, self.max_tokens)
            source: dict[str, Any] = {"caption": raw, "references": references}
            if not self.training:
                source["image"] = record.name
            text = EncodedText(ids, prompt, source=source)
            texts.append(text if self.masking_probability is None else self._mask(text, record, epoch, number))
        return texts

    def _whole(self, captions: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """In training those that fit, if any: a caption that is cut would teach to stop in the middle of a sentence."""
        if not self.training or len(captions) == 1:
            return captions
        room = self.max_tokens - 1 - len(self.tokenizer.encode("", prompt=self.prompt)[:-1])
        return [c for c in captions if len(self.tokenizer.pieces(c[1])) <= room] or captions

    def _mask(self, text: EncodedText, record: Record, epoch: int, number: int) -> EncodedText:
        t, probability = self.tokenizer, self.masking_probability or 0.0
        generator = keyed_generator(self.seed, epoch, record.source, record.key, "mask", number)
        pieces = t.continuing_ids if self.whole_words else ()
        masked, at = mask_tokens(text.ids, t.special_ids, t.vocab_size, t.mask_id, probability, generator, pieces)
        return replace(text, masked_ids=masked, masked_at=at)


@dataclass(frozen=True)
class QuestionEncoder(SampleEncoder):
    """A record's questions and answers as texts.

    encoder_decoder: the question is the text, its distinct answers are the text's answers, in training. prompted: question and answer are one text,
    the question its prompt; in training one text for each distinct answer, in evaluation the prompt alone, without [SEP]. classify: the question is
    the text, and its answers stay words in the text's source. An answer's weight is its share of the answers given (count / 10 in VQA v2).
    """

    tokenizer: Tokenizer
    transform: Transform
    training: bool
    form: Literal["encoder_decoder", "prompted", "classify"] = "encoder_decoder"
    question_prompt: str = "question: {question} answer:"
    """The prompted form's prompt; {question} stands for the question."""
    max_question_tokens: int = 35
    """Longest question in tokens: `[CLS] question [SEP]`, or `[CLS]` and the whole prompt, in which the question is cut."""
    max_answer_tokens: int = 10
    """Longest answer in tokens, counted as `[CLS] answer [SEP]`."""
    texts_per_image: TextsPerImage = "one"
    """one: in training one question drawn by key, in evaluation the first."""
    set_weights: Mapping[str, float] = field(default_factory=dict)
    """By source, the weight of its questions in the loss, which goes into the texts' sources (`Batch.weight`)."""
    seed: int = 0
    views: int | None = None
    """Augmentations of an image before they repeat."""

    @property
    def pad_id(self) -> int:
        """The padding token."""
        return self.tokenizer.pad_id

    def sample(self, record: Record, epoch: int, texts: list[EncodedText]) -> EncodedSample:
        """The record's image with these texts. Raises BadImage without an image."""
        return _sample(self, record, epoch, texts)

    def texts(self, record: Record, epoch: int) -> list[EncodedText]:
        """The texts of the sample. Raises BadRecord without a question (in training: with an answer)."""
        questions = [(q, answer_weights(q.get("answers") or [])) for q in record.questions]
        if self.training:
            questions = [(q, weights) for q, weights in questions if weights]
        if not questions:
            missing = "question with an answer" if self.training else "question"
            raise BadRecord(f"no {missing}", f"no {missing} in record {record.source}/{record.key}")
        if self.texts_per_image == "one":
            questions = [_draw(questions, self.training, self.seed, epoch, record, "question")]
        encode = self._prompted if self.form == "prompted" else self._question
        texts = [text for question, weights in questions for text in encode(question, weights)]
        weight = self.set_weights.get(record.source, 1.0)
        if not self.training or weight == 1.0:
            return texts
        return [replace(text, source={**text.source, SET_WEIGHT: weight}) for text in texts]

    def _question(self, question: dict[str, Any], weights: dict[str, float]) -> list[EncodedText]:
        asked = clean_question(question["question"], cleaning=self.tokenizer.question_cleaning)
        ids = self.tokenizer.encode(asked, self.max_question_tokens)
        answers = []
        if self.training and self.form == "encoder_decoder":
            answers = [(self.tokenizer.encode(a, self.max_answer_tokens), w) for a, w in weights.items()]
        return [EncodedText(ids, source=_source(question), answers=answers, describes=False)]

    def _prompted(self, question: dict[str, Any], weights: dict[str, float]) -> list[EncodedText]:
        prompt = self.prompt_ids(question["question"])
        if not self.training:
            return [EncodedText(prompt, len(prompt), source=_source(question), describes=False)]
        texts = []
        for answer, weight in weights.items():
            rest = self.tokenizer.encode(answer, self.max_answer_tokens)[1:]
            texts.append(EncodedText([*prompt, *rest], len(prompt), weight, _source(question), describes=False))
        return texts

    def prompt_ids(self, question: str) -> list[int]:
        """`[CLS]` and the prompt with this question, which is cut where it is too long."""
        return question_prompt_ids(self.tokenizer, self.question_prompt, question, self.max_question_tokens)


@dataclass(frozen=True)
class JointEncoder(SampleEncoder):
    """Captions and questions of a record in one sample, for one model that learns both; a record may lack either."""

    caption: CaptionEncoder
    question: QuestionEncoder

    @property
    def pad_id(self) -> int:
        """The padding token."""
        return self.caption.pad_id

    def texts(self, record: Record, epoch: int) -> list[EncodedText]:
        """Those of both. Raises BadRecord with neither."""
        texts: list[EncodedText] = []
        failure: BadRecord | None = None
        for encoder in (self.caption, self.question):
            try:
                texts += encoder.texts(record, epoch)
            except BadRecord as error:
                failure = error
        if not texts and failure is not None:
            raise failure
        return texts

    def sample(self, record: Record, epoch: int, texts: list[EncodedText]) -> EncodedSample:
        """The record's image with these texts. Raises BadImage without an image."""
        return self.caption.sample(record, epoch, texts)


def question_prompt_ids(tokenizer: Tokenizer, prompt: str, question: str, max_tokens: int) -> list[int]:
    """`[CLS]` and the prompt with this question, which is cut where it is too long. prompt: with {question} in it."""
    before, _, after = prompt.partition("{question}")
    first, last = tokenizer.pieces(before), tokenizer.pieces(after)
    room = max(max_tokens - 1 - len(first) - len(last), 0)
    asked = clean_question(question, cleaning=tokenizer.question_cleaning)
    return [tokenizer.cls_id, *first, *tokenizer.pieces(asked)[:room], *last]


def answer_weights(answers: list[str]) -> dict[str, float]:
    """Each distinct cleaned answer with its share of the answers given; empty ones are left out."""
    counts = Counter(cleaned for answer in answers if (cleaned := clean_answer(answer)))
    return {answer: count / len(answers) for answer, count in counts.items()}


def _draw(choices: list[Any], training: bool, seed: int, epoch: int, record: Record, purpose: str) -> Any:
    """One of them: drawn by key in training, the first in evaluation."""
    if not training:
        return choices[0]
    return choices[keyed_seed(seed, epoch, record.source, record.key, purpose) % len(choices)]


def _source(question: dict[str, Any]) -> dict[str, Any]:
    names = ("question_id", "question", "answers", "answer_type", "question_type")
    return {name: question[name] for name in names if name in question}


def _sample(
    encoder: CaptionEncoder | QuestionEncoder, record: Record, epoch: int, texts: list[EncodedText]
) -> EncodedSample:
    image = _image(encoder.transform, encoder.seed, record, epoch if encoder.views is None else epoch % encoder.views)
    return EncodedSample(record.key, record.image_id, image, texts)


def _image(transform: Transform, seed: int, record: Record, epoch: int) -> Tensor:
    if isinstance(transform, StoredFeatures):
        return transform(record, epoch)
    name = f"{record.source}/{record.key}"
    if isinstance(transform, EvaluationTransform):
        return transform(decode_image(record.image, name=name))
    return augmented(decode_pixels(record.image, name, transform.at_least), transform, seed, record, epoch)


def augmented(pixels: np.ndarray, transform: TrainingTransform, seed: int, record: Record, epoch: int) -> Tensor:
    """A record's image (H, W, 3), decoded, as training sees it in an epoch: (3, S, S) uint8."""
    with keyed_random(seed, epoch, record.source, record.key, "image"):
        return transform(pixels, allow_flip=not mentions_side(record_texts(record)))
