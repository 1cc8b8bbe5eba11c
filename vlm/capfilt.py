"""Captions drawn by a model, and pairs judged by one: CapFilt's two halves (Li et al. 2022, BLIP, section 3.3).

`caption` is `vlm shards caption`, `filter_by_model` is `vlm shards filter --model`. Both may take days, and go on after a stop (work_log.py).
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from vlm.data.dropped import Report
from vlm.data.filter import Rules, filter_shards
from vlm.data.images import decode_image
from vlm.data.index import ShardSet
from vlm.data.records import BadRecord, Record
from vlm.data.text import clean_caption
from vlm.data.walk import UNDECODABLE, Found, copy, progress, rewriting, walk
from vlm.errors import BadImage, ConfigError, UserError
from vlm.predictor import Predictor
from vlm.work_log import WorkLog

By = Literal["similarity", "matching"]
Opened = tuple[int, Record, Image.Image]  # its row in the batch


@dataclass(frozen=True)
class Captioned:
    """What came of it. images: written; bad: records that could not be, by cause; undecodable: images that no model can look at, which keep the
    captions that they have; added: captions written beside the given ones; drawn: candidates looked at; threshold: the least similarity kept, None
    where all were; bare: images that had no text and got none, which are left out."""

    images: int
    bad: dict[str, int]
    undecodable: int
    added: int
    drawn: int
    threshold: float | None
    bare: int = 0

    def __str__(self) -> str:
        least = "" if self.threshold is None else f" (similarity at least {self.threshold:.3f})"
        blind = f"; {self.undecodable:,} images cannot be decoded and got none" if self.undecodable else ""
        bad = f"; unusable records left out: {_by_cause(self.bad)}" if self.bad else ""
        bare = f"; {self.bare:,} images left out, which have no text" if self.bare else ""
        return f"{self.images:,} images, {self.added:,} captions added of {self.drawn:,} drawn{least}{blind}{bad}{bare}"


def caption(
    predictor: Predictor,
    shards: ShardSet,
    out: Path,
    below: int | None = None,
    quantile: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> Captioned:
    """Writes the records of `shards` into `out`, each with one caption more, marked as synthetic; or, with `below`, up to that many in all. Images
    that have no text are captioned too.

    Of an image's captions the first is searched as the checkpoint says, others are drawn (nucleus 0.9); one that repeats another is left out, and an
    image that cannot be decoded keeps the captions that it has. With `quantile` one more is drawn than is needed, and the most similar to the image
    are kept if their similarity reaches that quantile of the similarities between all images and the captions given with them.

    Raises:
        ConfigError: an unusable setting. CheckpointError: the model makes no captions, or with `quantile` no embeddings. Stopped: on request, to be
        gone on with. UserError: no image can be used, there is no caption to compare with, or `out` cannot be written.
    """
    if (below is not None and below < 1) or (quantile is not None and not 0 <= quantile < 1):
        raise ConfigError(f"below={below}, quantile={quantile}: give below >= 1 and 0 <= quantile < 1.")
    predictor.caption([])  # says at once where it cannot
    if quantile is not None:
        predictor.embed_texts([])
        if not any(record.captions for _, record, _ in _opened(walk(shards, strict=True))):
            raise UserError(f"{shards.root}: no image that can be decoded has a caption to compare drawn ones with.")
    writer = rewriting(shards, out)
    compared = quantile is not None
    settings = {"model": fingerprint(predictor), "below": below, "filter": compared, "seed": seed}
    log = WorkLog(shards, out, settings, batch_size, bare=True)
    log.fill(lambda batch: _draw(predictor, batch, below, compared, seed), "captioning")
    given = array("d", (value for result in log.results() for value in result["given"]))
    threshold = float(np.quantile(given, quantile)) if quantile is not None else None
    images = undecodable = added = drawn = bare = 0
    bad: Counter[str] = Counter()
    with writer:
        for (_, record), result in zip(
            progress(walk(shards, strict=True, bare=True), shards, "writing"), log.results(), strict=True
        ):
            if isinstance(record, BadRecord):
                bad[record.cause] += 1
                continue
            undecodable += not result.get("opened", True)
            new = _best(result["drawn"], threshold)[: _room(record, below)]
            drawn += len(result["drawn"])
            if not (record.captions or record.questions or new):
                bare += 1
                continue
            copy(writer, record, [*record.captions, *new], new)
            images, added = images + 1, added + len(new)
        if bad.total() + undecodable == shards.samples:
            log.remove()  # else mended shards would be refused as not those that were begun with
            causes = _by_cause(bad | Counter({UNDECODABLE: undecodable} if undecodable else {}))
            raise UserError(
                f"no image of {shards.root} can be used ({causes}), so nothing was written; `vlm shards check` names them."
            )
        if not images:
            raise UserError(f"nothing would be left of {shards.root}, so nothing was written: no image has a text.")
    log.remove()
    return Captioned(images, dict(bad), undecodable, added, drawn, threshold, bare)


def filter_by_model(
    predictor: Predictor,
    shards: ShardSet,
    out: Path,
    rules: Rules,
    by: By = "similarity",
    worst: float | None = None,
    batch_size: int = 32,
) -> Report:
    """As `filter_shards`, with the scores that the model gives to every image with each of its captions.

    by: "similarity" of the embeddings (as DFN; Fang et al. 2023), or the probability of the matching head (as CapFilt). worst: the share of all
    pairs that is dropped, those of the lowest scores, in place of `rules.min_score`.

    Raises:
        ConfigError: an unusable setting. CheckpointError: the model has no such head. Stopped: on request, to be gone on with. UserError: as there.
    """
    if (rules.min_score is None) == (worst is None):
        raise ConfigError(
            "with a model give either min-score, the least score kept, or worst, the share of the pairs to drop."
        )
    if worst is not None and not 0 < worst < 1:
        raise ConfigError(f"worst={worst}: give a share between 0 and 1.")
    score = {"similarity": _similarities, "matching": _matches}[by]
    score(predictor, [])  # says at once where it cannot
    rewriting(shards, out)
    log = WorkLog(shards, out, {"model": fingerprint(predictor), "by": by}, batch_size)

    def scores(batch: list[Found]) -> list[Any]:
        opened = list(_opened(batch))
        of_row = dict(zip((row for row, *_ in opened), score(predictor, opened), strict=True))
        return [of_row.get(row) for row in range(len(batch))]

    log.fill(scores, "scoring")
    every = np.array(array("d", (value for result in log.results() for value in result or ())))
    if worst is not None and len(every):
        rules = replace(rules, min_score=float(np.quantile(every, worst)))
    quantiles = {
        f"{share:.0%}": float(np.quantile(every, share)) for share in (0.05, 0.25, 0.5, 0.75, 0.95) if len(every)
    }
    told = {"by": by, "worst": worst, "scores": quantiles}
    report = filter_shards(shards, out, rules, log.results(), {k: v for k, v in told.items() if v is not None})
    log.remove()
    return report


def fingerprint(predictor: Predictor) -> str:
    """Of all that a model's captions and scores depend on: its numbers, prompt and way of decoding."""
    digest = hashlib.blake2b(repr((predictor.prompt, asdict(predictor.generation))).encode(), digest_size=8)
    for name, tensor in sorted(predictor.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _room(record: Record, below: int | None) -> int:
    """How many captions are to be added."""
    return 1 if below is None else max(0, below - len(record.captions))


def _best(drawn: Sequence[tuple[float | None, str]], threshold: float | None) -> list[str]:
    """In the order in which they are taken: as drawn, or those that reach the threshold, the most similar first."""
    if threshold is None:
        return [text for _, text in drawn]
    fitting = [(value, text) for value, text in drawn if value is not None and value >= threshold]
    return [text for _, text in sorted(fitting, reverse=True)]


def _by_cause(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {cause}" for cause, count in sorted(counts.items()))


def _draw(
    predictor: Predictor, batch: Sequence[Found], below: int | None, compared: bool, seed: int
) -> list[dict[str, Any]]:
    """For each place {"drawn": [(similarity, caption)], "given": [similarities of its captions]}, with "opened": False where there
    is no image to look at; without `compared` there are no similarities."""
    results: list[dict[str, Any]] = [{"drawn": [], "given": []} for _ in batch]
    opened = list(_opened(batch))
    for row in {*range(len(batch))} - {row for row, *_ in opened}:
        results[row]["opened"] = False
    texts: list[list[str]] = [[] for _ in opened]
    wanted = [room + compared if (room := _room(record, below)) else 0 for _, record, _ in opened]
    for number in range(max(wanted, default=0)):
        rows = [i for i, count in enumerate(wanted) if number < count]
        images = [opened[i][2] for i in rows]
        said = predictor.caption(images) if number == 0 else predictor.caption(images, sampled=True, seed=seed + number)
        for i, new in zip(rows, said, strict=True):
            known = {clean_caption(text) for text in (*opened[i][1].captions, *texts[i])}
            if new.text and clean_caption(new.text) not in known:
                texts[i].append(new.text)
    if not compared:
        for (row, *_), new_texts in zip(opened, texts, strict=True):
            results[row]["drawn"] = [(None, text) for text in new_texts]
        return results
    both = [[*record.captions, *new_texts] for (_, record, _), new_texts in zip(opened, texts, strict=True)]
    for (row, record, _), new_texts, values in zip(opened, texts, _similarities(predictor, opened, both), strict=True):
        given = len(record.captions)
        results[row] = {"drawn": list(zip(values[given:], new_texts, strict=True)), "given": values[:given]}
    return results


def _opened(batch: Iterable[Found]) -> Iterator[Opened]:
    """Those whose image can be decoded. The others keep the captions that they have: training counts them by cause."""
    for row, (_, record) in enumerate(batch):
        if isinstance(record, BadRecord):
            continue
        try:
            yield row, record, decode_image(record.image)
        except BadImage:
            continue


def _similarities(
    predictor: Predictor, opened: Sequence[Opened], texts: Sequence[Sequence[str]] | None = None
) -> list[list[float]]:
    """Of the embeddings of each image and of each of its captions, or `texts`."""
    texts = [record.captions for _, record, _ in opened] if texts is None else texts
    images = predictor.embed_images([image for *_, image in opened])
    rows = [i for i, several in enumerate(texts) for _ in several]
    embedded = predictor.embed_texts([text for several in texts for text in several])
    values = iter((embedded * images[rows]).sum(1).tolist())
    return [[next(values) for _ in several] for several in texts]


def _matches(predictor: Predictor, opened: Sequence[Opened]) -> list[list[float]]:
    """The matching head's probability for each image and each of its captions."""
    if not opened:
        predictor.match(Image.new("RGB", (32, 32)), [])
    return [predictor.match(image, record.captions) for _, record, image in opened]
