"""More captions for photographs that have few, drawn by a captioner and filtered by similarity (CapFilt; Li et al. 2022, BLIP, section 3.3)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from vlm.data.images import decode_image
from vlm.data.index import ShardSet
from vlm.data.records import Record, extension_of
from vlm.data.scan import scan
from vlm.data.shards import ShardWriter
from vlm.data.text import clean_caption
from vlm.errors import BadImage, ConfigError, UserError
from vlm.predictor import Predictor


@dataclass(frozen=True)
class Bootstrapped:
    """What came of it. added: captions written beside the given ones; drawn: candidates looked at; threshold: the least similarity kept."""

    images: int
    added: int
    drawn: int
    threshold: float


def bootstrap(
    predictor: Predictor,
    shards: ShardSet,
    out: Path,
    captions: int = 5,
    quantile: float = 0.5,
    seed: int = 0,
    batch_size: int = 32,
) -> Bootstrapped:
    """Writes the records of `shards` into `out`, each with drawn captions up to `captions` in all; images and questions stay as they are.

    For every image that lacks captions as many are drawn (nucleus 0.9), and one is searched by beams. Kept are the most similar ones, if their
    similarity reaches the `quantile` of that between all images and the captions given by people. Images keep their identities, so that a model
    trained on the result is still refused an evaluation on them.

    Raises:
        ConfigError: an unusable setting. UserError: there is no caption to compare with, or `out` cannot be written.
    """
    if captions < 1 or not 0 <= quantile < 1:
        raise ConfigError(f"captions={captions}, quantile={quantile}: give captions >= 1 and 0 <= quantile < 1.")
    candidates: dict[str, list[tuple[float, str]]] = {}
    given: list[float] = []
    with tqdm(total=shards.samples, desc="drawing captions", unit="image") as bar:
        for records in _batches(shards, batch_size):
            found, similarities = _draw(predictor, records, captions, seed)
            candidates |= found
            given += similarities
            bar.update(len(records))
    if not given:
        raise UserError(f"{shards.root}: no image has a caption, so there is nothing to compare drawn ones with.")
    threshold = float(np.quantile(given, quantile))
    images = added = 0
    with ShardWriter(out, shards.source) as writer:
        for record in scan([shards]):
            room = max(0, captions - len(record.captions))
            best = sorted(candidates.get(record.key, []), reverse=True)
            new = [text for similarity, text in best if similarity >= threshold][:room]
            writer.write(
                record.key,
                record.image,
                extension_of(record.image),
                [*record.captions, *new],
                record.questions,
                record.name,
            )
            images, added = images + 1, added + len(new)
    return Bootstrapped(images, added, sum(map(len, candidates.values())), threshold)


def _batches(shards: ShardSet, size: int) -> Iterator[list[Record]]:
    records = scan([shards])
    while batch := list(islice(records, size)):
        yield batch


def _draw(
    predictor: Predictor, records: Sequence[Record], captions: int, seed: int
) -> tuple[dict[str, list[tuple[float, str]]], list[float]]:
    """By key the (similarity, caption) of what was drawn for the images that lack captions; similarities of the given captions of all."""
    opened = [(record, image) for record in records if (image := _open(record)) is not None]
    if not opened:
        return {}, []
    usable = [record for record, _ in opened]
    embeddings = predictor.embed_images([image for _, image in opened], len(opened))
    texts: list[list[str]] = [[] for _ in usable]
    lacking = [i for i, record in enumerate(usable) if len(record.captions) < captions]
    most = max((captions - len(usable[i].captions) for i in lacking), default=0)
    for number in range(most + 1 if lacking else 0):
        rows = [i for i in lacking if number <= captions - len(usable[i].captions)]
        images = [opened[i][1] for i in rows]
        said = predictor.caption(images) if number == 0 else predictor.caption(images, sampled=True, seed=seed + number)
        for i, caption in zip(rows, said, strict=True):
            known = {clean_caption(text) for text in (*usable[i].captions, *texts[i])}
            if caption.text and clean_caption(caption.text) not in known:
                texts[i].append(caption.text)
    given = [(i, text) for i, record in enumerate(usable) for text in record.captions]
    drawn = [(i, text) for i, several in enumerate(texts) for text in several]
    rows_of = [i for i, _ in (*given, *drawn)]
    similarity = (predictor.embed_texts([text for _, text in (*given, *drawn)]) * embeddings[rows_of]).sum(1).tolist()
    found: dict[str, list[tuple[float, str]]] = {}
    for value, (i, text) in zip(similarity[len(given) :], drawn, strict=True):
        found.setdefault(usable[i].key, []).append((value, text))
    return found, similarity[: len(given)]


def _open(record: Record) -> Image.Image | None:
    """None for a bad image, which keeps the captions that it has: training counts it by its cause."""
    try:
        return decode_image(record.image)
    except BadImage:
        return None
