"""What a produced text must keep to, and which settings of decoding can be used.

Without PyTorch: `vlm.onnx` decodes without it, and must refuse what the library refuses.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

from vlm.config import GenerationConfig
from vlm.errors import ConfigError

SMALLEST_DIVISOR, LARGEST_DIVISOR = 1e-6, 1e6
"""Of scores. Beyond them fp32 scores become infinite or all equal, and the text is no longer the model's."""
LARGEST_LENGTH_PENALTY = 10.0
"""With either sign: a length of 2048 to this power is 1e33, which fp32 scores still bear."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a produced text must keep to. The penalties count the prompt's tokens too, as transformers does.

    end_id: the token that ends a text ([SEP]). max_length: most tokens produced, the end included. min_length: tokens before the end is allowed.
    repetition_penalty: divides the score of a token already used where it is positive, multiplies it where negative (Keskar et al. 2019; 1: none).
    no_repeat_ngram: no n-gram of this size occurs twice (0: allowed). no_doubled: no token right after itself (`decoding_constraint` of
    github.com/ruotianluo/ImageCaptioning.pytorch). banned: sequences of tokens that do not occur. A row with no token left may only end.

    Raises:
        ConfigError: a limit that no text can keep to, or that is no number.
    """

    end_id: int
    max_length: int
    min_length: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    no_doubled: bool = False
    banned: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ConfigError(f"max_length={self.max_length}: give at least 1, the token that ends a text.")
        if not 0 <= self.min_length < self.max_length:
            raise ConfigError(
                f"min_length={self.min_length} and max_length={self.max_length}: give 0 <= min_length < max_length."
            )
        if not SMALLEST_DIVISOR <= self.repetition_penalty <= LARGEST_DIVISOR:
            raise ConfigError(
                f"repetition_penalty={self.repetition_penalty} must be above 0: give {SMALLEST_DIVISOR:g} to {LARGEST_DIVISOR:g}; 1 is none."
            )
        if self.no_repeat_ngram < 0:
            raise ConfigError(f"no_repeat_ngram={self.no_repeat_ngram} must not be negative; 0 allows repetition.")
        if not all(self.banned):
            raise ConfigError("banned holds a sequence without tokens, which would ban every text; leave it out.")

    @classmethod
    def of(cls, settings: GenerationConfig, end_id: int, spell: Callable[[str], Iterable[tuple[int, ...]]]) -> Self:
        """Those of the settings, whose min_length is cut to what max_length leaves. spell: the sequences of tokens that a banned word may be.

        Raises:
            ConfigError: as above, or the banned words are a single text.
        """
        if isinstance(settings.banned_words, str):
            raise ConfigError(f"banned_words is a single text, expected several; write [{settings.banned_words!r}].")
        return cls(
            end_id=end_id,
            max_length=settings.max_length,
            min_length=min(settings.min_length, settings.max_length - 1),
            repetition_penalty=settings.repetition_penalty,
            no_repeat_ngram=settings.no_repeat_ngram,
            no_doubled=settings.no_doubled_words,
            banned=tuple(dict.fromkeys(tokens for words in settings.banned_words for tokens in spell(words))),
        )


def check_search(beams: int, length_penalty: float) -> None:
    """What a beam search takes beside its limits.

    Raises:
        ConfigError: no beams, or an exponent that no score bears.
    """
    if beams < 1:
        raise ConfigError(f"beams={beams}: give at least 1, which is greedy decoding.")
    if not abs(length_penalty) <= LARGEST_LENGTH_PENALTY:
        raise ConfigError(
            f"length_penalty={length_penalty}: give {-LARGEST_LENGTH_PENALTY:g} to {LARGEST_LENGTH_PENALTY:g}; 0 ignores the length."
        )


def check_drawing(temperature: float, top_k: int, top_p: float) -> None:
    """What texts are drawn by instead of searched.

    Raises:
        ConfigError: nothing can be drawn so.
    """
    if not 0 < temperature < math.inf or top_k < 0 or not 0 < top_p <= 1:
        raise ConfigError(
            f"temperature={temperature}, top_k={top_k}, top_p={top_p}: give 0 < temperature < inf, top_k >= 0 and 0 < top_p <= 1."
        )
    if not SMALLEST_DIVISOR <= temperature <= LARGEST_DIVISOR:
        raise ConfigError(
            f"temperature={temperature}: give {SMALLEST_DIVISOR:g}, which is as good as the likeliest token, to {LARGEST_DIVISOR:g}."
        )
