"""Encoded samples, what a loader's encoder makes of records, and how they are joined into a Batch.

Letters: B images, T texts, L tokens of the longest text (rounded up to a multiple of 8), A answers, K hidden patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from vlm.data.batch import Answers, Batch, Masked, Texts
from vlm.data.records import Record


@dataclass
class EncodedText:
    """One text of an image as token ids, `[CLS] w1 .. wn [SEP]` without padding.

    prompt: leading tokens that are not predicted. weight: 0 takes the text out of every loss. source: the record that it came from. masked_ids: `ids`
    with some tokens hidden, at the positions `masked_at`; None where nothing is masked. answers: (token ids, weight) of each answer to a
    question. describes: whether it says what the image shows; false for a question.
    """

    ids: list[int]
    prompt: int = 1
    weight: float = 1.0
    source: dict[str, Any] = field(default_factory=dict)
    masked_ids: list[int] | None = None
    masked_at: Sequence[int] = ()
    answers: Sequence[tuple[list[int], float]] = ()
    describes: bool = True


@dataclass
class EncodedSample:
    """One image with its texts. image: (3, H, W) uint8. image_id: equal for equal images. hidden: (K,) patches to hide, or None."""

    key: str
    image_id: int
    image: Tensor
    texts: list[EncodedText]
    hidden: Tensor | None = None


class SampleEncoder(Protocol):
    """Turns records into samples; pure, so that equal (record, epoch) give equal samples wherever they are read. Must be picklable."""

    @property
    def pad_id(self) -> int:
        """The padding token."""
        ...

    def texts(self, record: Record, epoch: int) -> list[EncodedText]:
        """The texts of the sample.

        Raises UserError (BadRecord, ...) for a record that cannot be used; ConfigError, and any other exception, stops the work.
        """
        ...

    def sample(self, record: Record, epoch: int, texts: list[EncodedText]) -> EncodedSample:
        """The record's image with these texts. Raises as `texts` does (BadImage, ...)."""
        ...

    def __call__(self, record: Record, epoch: int) -> EncodedSample:
        """The sample of a record. Raises as `texts` and `sample` do."""
        return self.sample(record, epoch, self.texts(record, epoch))


def silenced(sample: EncodedSample) -> EncodedSample:
    """The sample as a filler of a bad one's slot: no text or answer of it has weight, no token is to be guessed."""
    texts = [replace(t, weight=0.0, masked_at=(), answers=[(ids, 0.0) for ids, _ in t.answers]) for t in sample.texts]
    return replace(sample, texts=texts)


def collate(
    samples: Sequence[EncodedSample], pad_id: int, filled: dict[str, int] | None = None, pin: bool = False
) -> Batch:
    """Joins samples, in their order, into a Batch; `pin` puts it into page-locked memory. Answers, masked and hidden are
    None where no sample has any."""
    if not samples:
        raise ValueError("collate got no samples; expected at least one.")
    texts = [text for sample in samples for text in sample.texts]
    rows = [row for row, sample in enumerate(samples) for _ in sample.texts]
    ids, mask = pad([t.ids for t in texts], pad_id)
    images = [sample.image for sample in samples]
    captions, questions = ([row for row, text in enumerate(texts) if text.describes == kind] for kind in (True, False))
    hidden = [sample.hidden for sample in samples if sample.hidden is not None]
    joined = torch.empty((len(images), *images[0].shape), dtype=images[0].dtype, pin_memory=pin)
    batch = Batch(
        images=torch.stack(images, out=joined),
        keys=[sample.key for sample in samples],
        image_ids=torch.tensor([sample.image_id for sample in samples], dtype=torch.long),
        texts=Texts(
            ids,
            mask,
            torch.tensor(rows, dtype=torch.long),
            torch.tensor([t.prompt for t in texts], dtype=torch.long),
            torch.tensor([t.weight for t in texts], dtype=torch.float32),
            torch.tensor([t.describes for t in texts], dtype=torch.bool),
        ),
        answers=_answers(texts, pad_id),
        masked=_masked(texts, pad_id, ids.shape[1]),
        sources=[t.source for t in texts],
        filled=dict(filled or {}),
        hidden=torch.stack(hidden) if hidden else None,
        captions=torch.tensor(captions, dtype=torch.long) if questions else None,
        questions=torch.tensor(questions, dtype=torch.long) if questions else None,
    ).with_targets()
    return batch.pin() if pin else batch


def pad(rows: Sequence[Sequence[int]], pad_id: int, length: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of token ids as (T, L) int64 and their (T, L) bool mask; L is the longest row, or `length`, rounded up to a multiple of 8."""
    length = max(length, *(len(row) for row in rows), 1)
    length = -(-length // 8) * 8
    ids = torch.tensor([[*row, *[pad_id] * (length - len(row))] for row in rows], dtype=torch.long)
    mask = torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]
    return ids, mask


def _answers(texts: Sequence[EncodedText], pad_id: int) -> Answers | None:
    found = [(row, ids, weight) for row, text in enumerate(texts) for ids, weight in text.answers]
    if not found:
        return None
    ids, mask = pad([answer for _, answer, _ in found], pad_id)
    rows = torch.tensor([row for row, _, _ in found], dtype=torch.long)
    return Answers(ids, mask, rows, torch.tensor([weight for _, _, weight in found], dtype=torch.float32))


def _masked(texts: Sequence[EncodedText], pad_id: int, length: int) -> Masked | None:
    if all(t.masked_ids is None for t in texts):
        return None
    ids, _ = pad([t.ids if t.masked_ids is None else t.masked_ids for t in texts], pad_id, length)
    hidden = [
        (row * length + at, t.ids[at]) for row, t in enumerate(texts) if t.masked_ids is not None for at in t.masked_at
    ]
    positions = torch.tensor([position for position, _ in hidden], dtype=torch.long)
    return Masked(ids, positions, torch.tensor([label for _, label in hidden], dtype=torch.long))
