"""Text: the tokenizer, the cleaning of captions, questions and answers, and masking.

Token ids of a text are always `[CLS] w1 .. wn [SEP]`.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from vlm.config.data import QuestionCleaning
from vlm.errors import CheckpointError, UserError
from vlm.files import replace_text

if TYPE_CHECKING:  # what reads and writes words works without PyTorch: `vlm.onnx.runner` does
    import torch

_ROLES = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>", "<cls>"),
    "sep": ("[SEP]", "</s>", "<sep>"),
    "mask": ("[MASK]", "<mask>"),
}
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# What the authors' pre_question does to characters (salesforce/BLIP data/utils.py, salesforce/ALBEF dataset/utils.py).
_ASKED = {"blip": str.maketrans("", "", '.!"()*#:;~'), "albef": str.maketrans("-/", "  ", ",.'!?\"()*#:;~")}


class Tokenizer:
    """A Hugging Face `tokenizers` tokenizer with BERT's special tokens by role.

    Attributes: `vocab_size`; `pad_id`, `unk_id`, `cls_id`, `sep_id`, `mask_id`; `special_ids`, all ids that stand for no word; `question_cleaning`,
    how `clean_question` prepares a question for the model of this tokenizer.
    """

    def __init__(self, inner: tokenizers.Tokenizer, question_cleaning: QuestionCleaning = "vlm") -> None:
        """Raises UserError where a special token is missing."""
        # A file may bring the padding and truncation of its author; the lengths are ours to choose.
        inner.no_padding()
        inner.no_truncation()
        inner.encode_special_tokens = True  # "[SEP]" typed in a caption is text
        self._inner = inner
        self.question_cleaning = question_cleaning
        vocab = inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
            _role(vocab, role, names) for role, names in _ROLES.items()
        )
        roles = (self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id)
        added = inner.get_added_tokens_decoder()
        self.special_ids = frozenset(roles) | {i for i, token in added.items() if token.special}

    @cached_property
    def continuing_ids(self) -> frozenset[int]:
        """Ids of WordPiece's pieces that go on with a word (##ing); empty for other kinds of tokenizers."""
        return frozenset(i for token, i in self._inner.get_vocab().items() if token.startswith("##"))

    def __getstate__(self) -> tuple[str, QuestionCleaning]:
        return self.to_json(), self.question_cleaning

    def __setstate__(self, state: tuple[str, QuestionCleaning]) -> None:
        self.__init__(tokenizers.Tokenizer.from_str(state[0]), state[1])  # type: ignore[misc]

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """From a tokenizer.json, a BERT vocab.txt (taken as lower-case WordPiece), or a folder with one of them; a checkpoint's folder also says how
        its questions are cleaned."""
        path = Path(path)
        cleaning = _stored_cleaning(path / "config.json")
        if path.is_dir():
            found = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()]
            if not found:
                raise UserError(f"{path}: no tokenizer here; expected tokenizer.json or vocab.txt.")
            path = found[0]
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected a tokenizer.json, a vocab.txt, or a folder with one.")
        try:
            if path.suffix == ".txt":
                tokens = path.read_text(encoding="utf-8").splitlines()
                return cls(_bert({token: i for i, token in enumerate(tokens)}), cleaning)
            return cls(tokenizers.Tokenizer.from_file(str(path)), cleaning)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except Exception as error:  # the Rust library raises plain Exception
            raise UserError(f"{path}: not a tokenizer ({str(error)[:200]}); expected a tokenizer.json.") from error

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json that Hugging Face's libraries read too; into `path/tokenizer.json` where `path` is a folder.

        Raises:
            UserError: it cannot be written; what was there stays.
        """
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        replace_text(path, self.to_json())

    def to_json(self) -> str:
        """What `save` writes."""
        return self._inner.to_str(pretty=True)

    def pieces(self, text: str) -> list[int]:
        """Token ids of a text alone, without [CLS] and [SEP]."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode(self, text: str, max_length: int | None = None, prompt: str = "") -> list[int]:
        """`[CLS] prompt text [SEP]`, cut to `max_length` tokens by leaving out the last ones before [SEP]."""
        return self.encode_with_prompt(prompt, text, max_length)[0]

    def encode_with_prompt(self, prompt: str, text: str, max_length: int | None = None) -> tuple[list[int], int]:
        """As `encode`, and how many leading tokens are not to be predicted: [CLS] and the prompt's.

        The prompt is encoded apart, so its tokens are the same whatever follows.
        """
        before = [self.cls_id, *self.pieces(prompt)] if prompt else [self.cls_id]
        ids = [*before, *self.pieces(text)]
        if max_length is not None:
            ids = ids[: max(max_length - 1, 1)]
        return [*ids, self.sep_id], min(len(before), len(ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids: special tokens left out, word pieces joined, no space before punctuation (as transformers does it)."""
        special = self.special_ids
        return self._inner.decode([i for i in ids if i not in special]).strip()

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The token strings of ids, "" for an id without a token."""
        return [self._inner.id_to_token(i) or "" for i in ids]


def _stored_cleaning(file: Path) -> QuestionCleaning:
    """What config.json says; checkpoints of before and folders of others say nothing."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))["text"]["question_cleaning"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # damage is told by whoever reads the model
        return "vlm"
    return known_cleaning(stored, str(file))


def known_cleaning(name: Any, source: str) -> QuestionCleaning:
    """`name`, if it is one. Raises CheckpointError otherwise; source: what messages call the file."""
    known = get_args(QuestionCleaning)
    if name not in known:
        raise CheckpointError(
            f"{source}: question_cleaning is {name!r}, expected one of {', '.join(known)}; copy it again, or update the library."
        )
    found: QuestionCleaning = name
    return found


def _role(vocab: dict[str, int], role: str, names: Sequence[str]) -> int:
    for name in names:
        if name in vocab:
            return vocab[name]
    raise UserError(f"the tokenizer has no {role} token; expected one of {', '.join(names)} in its vocabulary.")


def _bert(vocab: dict[str, int]) -> tokenizers.Tokenizer:
    """BERT's uncased tokenizer over a vocabulary, which may still be empty."""
    inner = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    present = [token for token in _SPECIAL if token in vocab]
    inner.add_special_tokens(present)
    _frame(inner)
    return inner


def _frame(inner: tokenizers.Tokenizer) -> None:
    """Let other readers of the tokenizer.json put [CLS] and [SEP] around a text, as we do."""
    cls_id, sep_id = inner.token_to_id("[CLS]"), inner.token_to_id("[SEP]")
    if cls_id is not None and sep_id is not None:
        inner.post_processor = processors.BertProcessing(("[SEP]", sep_id), ("[CLS]", cls_id))


def train_wordpiece(texts: Iterable[str], vocab_size: int, min_frequency: int = 2) -> Tokenizer:
    """A lower-case WordPiece vocabulary of at most `vocab_size` tokens, of pieces that occur `min_frequency` times in `texts`.

    Ids 0 to 4 are [PAD] [UNK] [CLS] [SEP] [MASK], then come the single characters. Equal texts give equal vocabularies.
    """
    texts = list(texts)
    inner = _bert({})
    # Left to itself the trainer numbers the ##characters in the order of a hash map, and breaks ties between pieces by these numbers.
    characters = sorted({c for text in texts for c in inner.normalizer.normalize_str(text) if not c.isspace()})
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*_SPECIAL, *characters, *(f"##{c}" for c in characters)],
        show_progress=False,
    )
    with _one_thread():
        inner.train_from_iterator(texts, trainer)
    return Tokenizer(_bert(inner.get_vocab(with_added_tokens=False)))


@contextmanager
def _one_thread() -> Iterator[None]:
    """`tokenizers` that has used threads complains in every process forked later, thus in all loader workers."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def trim(
    tokenizer: Tokenizer, texts: Iterable[str], min_count: int = 1, always: Iterable[str] = ()
) -> tuple[Tokenizer, list[int]]:
    """A WordPiece tokenizer with fewer tokens, and for each of its ids the id before: `embedding[kept]` is its embedding.

    Kept are the tokens that occur in `texts` at least `min_count` times or in `always`, the special ones, and the single characters of ASCII, so
    that any other word can still be spelt. With a `min_count` of 1 the texts are tokenized as before: WordPiece takes the longest piece that fits,
    and that one is still there.
    """
    content: dict[str, Any] = json.loads(tokenizer.to_json())
    if content["model"]["type"] != "WordPiece":
        raise UserError(
            f"only WordPiece can be trimmed, this tokenizer is {content['model']['type']}; set trim to false."
        )
    vocab: dict[str, int] = tokenizer._inner.get_vocab(with_added_tokens=True)
    kept = set(tokenizer.special_ids)
    kept.update(i for token, i in vocab.items() if len(token.removeprefix("##")) == 1 and token.isascii())
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(tokenizer.pieces(text))
    kept.update(i for i, count in counts.items() if count >= min_count)
    for text in always:
        kept.update(tokenizer.pieces(text))
    old_ids = sorted(kept)
    new_ids = {old: new for new, old in enumerate(old_ids)}

    words: dict[str, int] = content["model"]["vocab"]
    content["model"]["vocab"] = {token: new_ids[i] for token, i in words.items() if i in new_ids}
    added = [token for token in content["added_tokens"] if token["id"] in new_ids]
    content["added_tokens"] = [{**token, "id": new_ids[token["id"]]} for token in added]
    content["post_processor"] = None  # holds old ids
    inner = tokenizers.Tokenizer.from_str(json.dumps(content))
    _frame(inner)
    return Tokenizer(inner), old_ids


def tidy(text: str) -> str:
    """A decoded text as people write it: "t - shirt" and "man ' s", as BERT's tokenizer takes them apart, become "t-shirt" and "man's"."""
    text = re.sub(r"(?<=\w) ' (?=(?:s|t|re|ve|ll|d|m)\b)", "'", text)
    return re.sub(r"(?<=\w) - (?=\w)", "-", text)


def clean_caption(text: str, max_words: int = 50) -> str:
    """Lower case, without the punctuation `.!"()*#:;~`, single spaces, the first `max_words` words: BLIP's way."""
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", text.lower()).split()[:max_words])


def clean_question(text: str, max_words: int = 50, cleaning: QuestionCleaning = "vlm") -> str:
    """The way of `cleaning` (`DataConfig.question_cleaning`); vlm: as captions, and without the question mark."""
    if cleaning == "none":
        return text
    if cleaning == "vlm":
        return clean_caption(text.replace("?", " "), max_words)
    return " ".join(text.lower().translate(_ASKED[cleaning]).rstrip(" ").split(" ")[:max_words])


def clean_answer(text: str) -> str:
    """Lower case, single spaces, without punctuation at either end; "" where nothing is left."""
    return " ".join(text.lower().split()).strip(" .,!?;:\"'()*#~")


def mask_tokens(
    ids: Sequence[int],
    special_ids: Collection[int],
    vocab_size: int,
    mask_id: int,
    probability: float,
    generator: "torch.Generator",
    continuing: Collection[int] = (),
) -> tuple[list[int], list[int]]:
    """BERT's masking: the ids with some hidden, and the positions of those, which are to be predicted.

    Each token that is not special is chosen with `probability`, so a short text may have none chosen. A chosen one becomes [MASK] in 80 % of
    the cases, any token but a special one in 10 %, and stays in 10 %. continuing: ids of pieces that are chosen where the piece before them is,
    so that whole words are (`Tokenizer.continuing_ids`).
    """
    import torch

    chosen, kind = torch.rand(2, len(ids), generator=generator).tolist()
    for at, i in enumerate(ids):
        if i in continuing and at:
            chosen[at] = chosen[at - 1]
    positions = [at for at, i in enumerate(ids) if chosen[at] < probability and i not in special_ids]
    masked = list(ids)
    for at in positions:
        if kind[at] < 0.8:
            masked[at] = mask_id
        elif kind[at] < 0.9:
            masked[at] = _random_word(special_ids, vocab_size, generator)
    return masked, positions


def _random_word(special_ids: Collection[int], vocab_size: int, generator: "torch.Generator") -> int:
    import torch

    word = int(torch.randint(vocab_size - len(special_ids), (), generator=generator))
    for special in sorted(special_ids):  # count over the special ids
        word += word >= special
    return word
