"""The written contract between data and model.

Letters: B images, T texts, L tokens of the longest text (rounded up to a multiple of 8), A answers, La tokens of the longest answer, M masked tokens,
K hidden patches of an image, N predicted tokens.

Every text is `[CLS] w1 .. wn [SEP]` followed by padding. Several texts may belong to one image and several answers to one question; the index
tensors say which.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

SET_WEIGHT = "set_weight"
"""Key in a text's source: the weight of the set that it comes from, where that is not 1."""


class _Tensors:
    """Moves every tensor of a dataclass, and of the dataclasses inside it, at once."""

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        changes: dict[str, Any] = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                changes[f.name] = change(value)
            elif isinstance(value, _Tensors):
                changes[f.name] = value._map(change)
        return replace(self, **changes)  # type: ignore[type-var]

    def to(self, device: torch.device | str) -> Self:
        """The same batch on `device`; the copy does not wait when the source is pinned."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin(self) -> Self:
        """The same batch in page-locked memory, from which a GPU copies without waiting."""
        return self._map(lambda t: t.pin_memory())


@dataclass(frozen=True)
class Texts(_Tensors):
    """Captions, or questions, or a prompt with its continuation.

    ids: (T, L) int64. mask: (T, L) bool, true where a token stands. image: (T,) int64, the row of its image. prompt: (T,) int64, how many leading
    tokens are not predicted, the first token included (1 without a prompt). weight: (T,) float32, 0 for the slot of a bad sample. describes: (T,)
    bool, true for captions, which can be compared with images, false for questions.
    """

    ids: Tensor
    mask: Tensor
    image: Tensor
    prompt: Tensor
    weight: Tensor
    describes: Tensor


@dataclass(frozen=True)
class Answers(_Tensors):
    """Answers to the texts, which are questions. ids: (A, La), mask: (A, La), text: (A,) row of its question, weight: (A,) float32, count / 10."""

    ids: Tensor
    mask: Tensor
    text: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Masked(_Tensors):
    """The texts with some tokens hidden. ids: (T, L); positions: (M,) indices into the flattened T x L; labels: (M,) the tokens hidden there."""

    ids: Tensor
    positions: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Targets(_Tensors):
    """Where the tokens stand that are predicted from those before them, as `target_positions` finds them.

    texts: (N,), among all texts. captions, questions: (N,), among the rows `Batch.captions` and `Batch.questions`; None where these are.
    answers: (N,), among `Batch.answers`; None where there are none.
    """

    texts: Tensor
    captions: Tensor | None
    questions: Tensor | None
    answers: Tensor | None


def behind_prompt(mask: Tensor, prompt: Tensor) -> Tensor:
    """(T, L) bool: tokens that are predicted from those before them, the first never. mask: (T, L). prompt: (T,)."""
    position = torch.arange(mask.shape[1], device=mask.device)
    return mask & (position >= prompt.clamp(min=1)[:, None])


def target_positions(mask: Tensor, prompt: Tensor, weight: Tensor) -> Tensor:
    """(N,) ascending indices into the flattened T x L of the predicted tokens of texts with weight. A GPU is waited for, as their number is its own.

    mask: (T, L). prompt, weight: (T,).
    """
    wanted = behind_prompt(mask, prompt) & (weight > 0)[:, None]
    return torch.arange(wanted.numel(), device=wanted.device)[wanted.flatten()]


def answer_positions(answers: Answers, weight: Tensor) -> Tensor:
    """As `target_positions`, of answers in texts of their own. weight: (T,), of their questions."""
    return target_positions(answers.mask, torch.ones_like(answers.text), answers.weight * weight[answers.text])


@dataclass(frozen=True)
class Batch(_Tensors):
    """One step's data.

    images: (B, 3, H, W), uint8 (0..255) or already normalised float, or what a frozen encoder made of them (`vlm.data.features`), (B, P, D0). keys:
    B record names. image_ids: (B,) int64, equal for equal images.     sources: for each text the record that it came from (caption, or question
    with its id and answers): what evaluation and logs need.     filled: how many slots hold the preceding good sample because their own was bad, by
    cause. hidden: (B, K) int64, the patches of each image that     are hidden for masked image modelling, by number (row by row), ascending.
    captions, questions: (C,), (Q,) int64, the rows of the texts that     describe their image, and of those that ask; both None where no text asks.
    The loader counts them, so that no step waits for the device. targets: for the same reason, of exactly these texts (None: looked up at each use).
    """

    images: Tensor
    keys: list[str]
    image_ids: Tensor
    texts: Texts
    answers: Answers | None = None
    masked: Masked | None = None
    sources: list[dict[str, Any]] = field(default_factory=list)
    filled: dict[str, int] = field(default_factory=dict)
    hidden: Tensor | None = None
    captions: Tensor | None = None
    questions: Tensor | None = None
    targets: Targets | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def weight(self) -> Tensor:
        """(T,) float32: the texts' weights times those of the sets that they come from, for a loss that is divided by the texts' weights alone."""
        if not any(SET_WEIGHT in source for source in self.sources):
            return self.texts.weight
        weights = [source.get(SET_WEIGHT, 1.0) for source in self.sources]
        return self.texts.weight * torch.tensor(weights, dtype=torch.float32).to(self.texts.weight.device)

    def with_targets(self) -> Self:
        """The same with targets; the batch itself where it has them."""
        if self.targets is not None:
            return self
        mask, prompt, weight = self.texts.mask, self.texts.prompt, self.weight

        def of(rows: Tensor | None) -> Tensor | None:
            return None if rows is None else target_positions(mask[rows], prompt[rows], weight[rows])

        answers = None if self.answers is None else answer_positions(self.answers, weight)
        targets = Targets(target_positions(mask, prompt, weight), of(self.captions), of(self.questions), answers)
        return replace(self, targets=targets)

    def to(self, device: torch.device | str) -> Self:
        """The same batch on `device`; the copy does not wait when the source is pinned. Targets are found before, while no device has to be asked."""
        return self.with_targets()._map(lambda t: t.to(device, non_blocking=True))

    def lengthened(self, length: int, pad_id: int) -> "Batch":
        """The same with texts of `length` tokens, padded at their ends; the batch itself where that is their length."""
        more = length - self.texts.ids.shape[1]
        if more == 0:
            return self

        def wider(ids: Tensor, value: int) -> Tensor:
            return torch.nn.functional.pad(ids, (0, more), value=value)

        def moved(positions: Tensor) -> Tensor:
            return positions + torch.div(positions, length - more, rounding_mode="floor") * more

        texts = replace(self.texts, ids=wider(self.texts.ids, pad_id), mask=wider(self.texts.mask, 0))
        masked, targets = self.masked, self.targets
        if masked is not None:
            masked = replace(masked, ids=wider(masked.ids, pad_id), positions=moved(masked.positions))
        if targets is not None:
            targets = replace(targets._map(moved), answers=targets.answers)
        return replace(self, texts=texts, masked=masked, targets=targets)

    def filled_up(self, count: int) -> "Batch":
        """The same with `count` texts: those that are missing repeat the last one, without weight, and describe nothing."""
        more = count - len(self.texts.ids)
        if more == 0:
            return self

        def longer(rows: Tensor) -> Tensor:
            return torch.cat([rows, rows[-1:].expand(more, *rows.shape[1:])])

        texts = self.texts._map(longer)
        texts = replace(
            texts,
            weight=torch.cat([self.texts.weight, self.texts.weight.new_zeros(more)]),
            describes=torch.cat([self.texts.describes, self.texts.describes.new_zeros(more)]),
        )
        masked = None if self.masked is None else replace(self.masked, ids=longer(self.masked.ids))
        sources = [*self.sources, *({} for _ in range(more))] if self.sources else []
        return replace(self, texts=texts, masked=masked, sources=sources)

    @classmethod
    def fake(
        cls,
        images: int = 4,
        image_size: int = 32,
        vocab_size: int = 64,
        length: int = 8,
        texts_per_image: int = 1,
        answers: bool = False,
        masked: bool = False,
        patches: int = 0,
        seed: int = 0,
    ) -> "Batch":
        """A valid batch of random content: ids 0..4 are special (PAD, UNK, CLS, SEP, MASK), words are 5 and above.

        patches: of an image; half of them are hidden.
        """
        g = torch.Generator().manual_seed(seed)
        count = images * texts_per_image
        ids, mask = _fake_tokens(count, length, vocab_size, g)
        texts = Texts(
            ids,
            mask,
            torch.arange(images).repeat_interleave(texts_per_image),
            torch.ones(count, dtype=torch.long),
            torch.ones(count),
            torch.ones(count, dtype=torch.bool),
        )
        answer_part = masked_part = None
        if answers:
            a_ids, a_mask = _fake_tokens(count, 8, vocab_size, g, longest=4)
            answer_part = Answers(a_ids, a_mask, torch.arange(count), torch.ones(count))
        if masked:
            words = (ids >= 5).flatten().nonzero().squeeze(1)
            positions = words[torch.randperm(len(words), generator=g)[: max(1, len(words) // 4)]].sort().values
            hidden = ids.flatten().clone()
            labels = hidden[positions]
            hidden[positions] = 4
            masked_part = Masked(hidden.view_as(ids), positions, labels)
        pixels = torch.randint(0, 256, (images, 3, image_size, image_size), generator=g, dtype=torch.uint8)
        drawn = [torch.randperm(patches, generator=g)[: patches // 2].sort().values for _ in range(images)]
        return cls(
            pixels,
            [f"fake{i}" for i in range(images)],
            torch.arange(1, images + 1),
            texts,
            answer_part,
            masked_part,
            hidden=torch.stack(drawn) if patches else None,
        )


def _fake_tokens(
    count: int, length: int, vocab_size: int, g: torch.Generator, longest: int | None = None
) -> tuple[Tensor, Tensor]:
    lengths = torch.randint(3, (longest or length) + 1, (count,), generator=g)
    position = torch.arange(length)
    mask = position < lengths[:, None]
    ids = torch.randint(5, vocab_size, (count, length), generator=g)
    ids = torch.where(position == lengths[:, None] - 1, torch.tensor(3), ids)
    ids[:, 0] = 2
    return ids.masked_fill(~mask, 0), mask
