"""Held-out pictures with what the model says of them at each evaluation of a run: OUT/samples/step-000123.html, and the trackers' images."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vlm.build import Parts
from vlm.data.batch import Batch
from vlm.data.collate import EncodedSample, collate
from vlm.data.encoders import sample_encoder
from vlm.data.images import decode_image
from vlm.data.index import ShardSet
from vlm.data.page import thumbnail
from vlm.data.records import BadRecord, ShardReader
from vlm.data.samples import CaptionEncoder
from vlm.data.walk import place_of, read_at
from vlm.errors import UserError
from vlm.metrics.vqa import accuracy
from vlm.tasks.captioning import CaptioningTask
from vlm.tasks.pretraining import Pretraining
from vlm.tasks.reranking import join_texts, rerank
from vlm.tasks.task import Record, Task
from vlm.train.samples import SIDE, Said, Sample, write_samples
from vlm.train.trackers import RunLog

POOL = 64  # records whose texts a pretrained model chooses from
QUESTIONS = 4  # shown of a picture


@dataclass(frozen=True)
class Chosen:
    """The pictures of one set. pictures: (key, JPEG). batch: as the model reads them, with all their texts. pool: (token ids, prompt, caption) of
    texts to choose from, those of other records too."""

    pictures: list[tuple[str, bytes]]
    batch: Batch
    pool: list[tuple[list[int], int, str]]


class SampleBook:
    """Chooses pictures once and shows what the model says of them. Every rank does the same, as a model may lie on all of them; the first writes."""

    def __init__(self, parts: Parts, held_out: Mapping[str, ShardSet]) -> None:
        """held_out: by name. How many pictures of each set: train.samples, spread over the images that evaluations use."""
        self.parts = parts
        self.sets: dict[str, Chosen] = {}
        for name, shards in held_out.items() if parts.config.train.samples else ():
            chosen = self._choose(shards)
            if chosen is not None:
                self.sets[name] = chosen

    def show(self, task: Task, step: int, log: RunLog | None) -> None:
        """Writes the page of this step and gives the pictures to the trackers; `task` is in evaluation mode. log: of the first rank.

        Raises:
            UserError: the page cannot be written.
        """
        if not self.sets:
            return
        samples = {name: self._samples(task, chosen) for name, chosen in self.sets.items()}
        if log is not None:
            config = self.parts.config
            path = Path(config.out) / "samples" / f"step-{step:06d}.html"
            write_samples(path, f"{config.out}, step {step:,}", samples)
            log.pictures(step, samples)

    def _choose(self, shards: ShardSet) -> Chosen | None:
        """None where no record of those tried can be used."""
        config = self.parts.config
        size = self.parts.model.image_encoder.image_size
        encode = sample_encoder(config, self.parts.tokenizer, size, training=False)
        count = min(shards.samples, config.train.evaluate_images)
        pictures: list[tuple[str, bytes]] = []
        encoded: list[EncodedSample] = []
        pool: list[tuple[list[int], int, str]] = []
        wanted = set(_spread(count, config.train.samples))
        reader = ShardReader()
        try:
            for number in sorted(wanted | set(_spread(count, POOL) if isinstance(encode, CaptionEncoder) else ())):
                record = read_at(reader, shards, place_of(shards, number))
                try:
                    if isinstance(record, BadRecord):
                        raise record
                    if number in wanted:
                        encoded.append(encode(record, 0))
                        pictures.append((record.key, thumbnail(decode_image(record.image, at_least=SIDE), SIDE)))
                    if isinstance(encode, CaptionEncoder):
                        pool += [(text.ids, text.prompt, text.source["caption"]) for text in encode.texts(record, 0)]
                except UserError:  # the evaluation counts and names it
                    continue
        finally:
            reader.close()
        return Chosen(pictures, collate(encoded, encode.pad_id), pool) if encoded else None

    @torch.no_grad()
    def _samples(self, task: Task, chosen: Chosen) -> list[Sample]:
        batch = chosen.batch.to(task.model.device)
        said: list[list[Said]] = [[] for _ in chosen.pictures]
        if isinstance(task, Pretraining):
            for row, nearest in enumerate(self._nearest(task, batch, chosen)):
                said[row].append(nearest)
        for row, one in self._captions_or_answers(task, batch):
            said[row].append(one)
        rows = zip(chosen.pictures, said, _captions(batch), strict=True)
        return [Sample(jpeg, key, tuple(lines), texts) for (key, jpeg), lines, texts in rows]

    def _nearest(self, task: Pretraining, batch: Batch, chosen: Chosen) -> Iterator[Said]:
        """Of each picture the text that evaluation would retrieve for it from the pool."""
        model, settings = task.model, task.retrieval
        features = task.encode_image(batch.images)
        count = len(chosen.pool)
        texts = join_texts([(ids, prompt) for ids, prompt, _ in chosen.pool], model.config.text.pad_id, model.device)
        scores = np.zeros((len(features.tokens), count))
        if not task.all_pairs:
            embeddings = model.encode_text(texts.ids, texts.mask).embedding
            assert embeddings is not None
            # In numpy, as evaluation does: autocast would make the product bf16.
            scores = features.embedding.float().cpu().numpy() @ embeddings.float().cpu().numpy().T
        if k := count if task.all_pairs else settings.rerank:
            scores = rerank(model, features.tokens.half().cpu(), texts, scores, k, settings.by)
        captions = np.array([caption for *_, caption in chosen.pool], dtype=object)
        for row, own in enumerate(_captions(batch)):
            order = captions[np.argsort(-scores[row], kind="stable")]
            first = next((place for place, text in enumerate(order) if text in own), len(order))
            note = "" if first == 0 else f"the first of its own is number {first + 1}"
            yield Said(f"nearest of {len(order)} texts", order[0], note, first == 0)

    def _captions_or_answers(self, task: Task, batch: Batch) -> Iterator[tuple[int, Said]]:
        """(row, what was said) for models that speak."""
        objectives = self.parts.config.objectives
        if isinstance(task, Pretraining):
            if max(objectives.captioning, objectives.self_critical) == 0:
                return
            settings, prompt = self.parts.config.generation, self.parts.config.data.prompt
            speaker = CaptioningTask(task.model, self.parts.tokenizer, 0.0, prompt, settings).eval()
            speaker.blank_images = task.blank_images
            yield from _spoken(speaker, batch)
        else:
            yield from _spoken(task, batch)


def _spoken(task: Task, batch: Batch) -> Iterator[tuple[int, Said]]:
    records = task.predict(batch)
    rows = batch.texts.image.tolist() if "answer" in records[0] else range(len(records))
    shown: Counter[int] = Counter()
    for row, record in zip(rows, records, strict=True):
        shown[row] += 1
        if "caption" in record:
            yield row, Said("caption", record["caption"], f"{record['confidence']:.0%}")
        elif shown[row] <= QUESTIONS:
            yield row, _answer(record)


def _answer(record: Record) -> Said:
    references: list[str] = record["references"]
    people = Counter(references).most_common(3)
    told = ", ".join(answer if count == 1 else f"{answer} x {count}" for answer, count in people)
    right = accuracy(record["answer"], references) > 0 if people else None
    note = f"{record['confidence']:.0%}" + (f"; people: {told}" if told else "")
    return Said(record["question"], record["answer"], note, right)


def _captions(batch: Batch) -> list[tuple[str, ...]]:
    """Of each image."""
    found: list[list[str]] = [[] for _ in batch.keys]
    for row, source in zip(batch.texts.image.tolist(), batch.sources, strict=True):
        if "caption" in source:
            found[row].append(source["caption"])
    return [tuple(texts) for texts in found]


def _spread(count: int, wanted: int) -> Sequence[int]:
    """So many numbers below `count`, evenly."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]
