"""`vlm shards ask`: shards with questions made from their captions."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from vlm.data.index import ShardSet
from vlm.data.made_questions import QuestionMaker
from vlm.data.random import keyed_seed
from vlm.data.records import BadRecord, extension_of
from vlm.data.walk import progress, rewriting, walk
from vlm.errors import ConfigError, UserError


@dataclass
class Asked:
    """What came of it. images: written; bad: records that could not be; kinds: the questions made, by kind."""

    images: int = 0
    bad: int = 0
    kinds: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.most_common())
        bad = f"; {self.bad:,} unusable records left out" if self.bad else ""
        return f"{self.images:,} images, {self.kinds.total():,} questions made ({kinds}){bad}"


def ask(shards: ShardSet, out: Path, most: int = 4, seed: int = 0) -> Asked:
    """Writes the records of `shards` into `out`, each with at most `most` questions made from its captions behind those that it has, marked as
    synthetic. A question that the record has already is not asked again.

    Raises:
        ConfigError: an unusable setting. UserError: no caption gives a question, or `out` cannot be written.
    """
    if most < 1:
        raise ConfigError(f"--per-image {most}: give at least 1.")
    writer = rewriting(shards, out)
    records = (record for _, record in progress(walk(shards, strict=True), shards, "reading"))
    maker = QuestionMaker([record.captions for record in records if not isinstance(record, BadRecord)])
    done = Asked()
    with writer:
        for _, record in progress(walk(shards, strict=True), shards, "writing"):
            if isinstance(record, BadRecord):
                done.bad += 1
                continue
            key, questions = writer.free_key(record.key), list(record.questions)
            asked = {question["question"].casefold() for question in questions}
            for made in maker(record.captions, keyed_seed(seed, record.source, record.key, "made questions"), most):
                if made.question.casefold() not in asked:
                    question = {"question_id": f"{record.key}/{made.kind}", "question": made.question}
                    questions.append({**question, "answers": [made.answer], "synthetic": True})
                    done.kinds[made.kind] += 1
            extension = extension_of(record.image)
            writer.write(key, record.image, extension, record.captions, questions, record.name, record.synthetic)
            done.images += 1
        if not done.kinds:
            raise UserError(
                f"no caption of {shards.root} gives a question, so nothing was written: the rules know English captions, such as "
                "'a man in a red shirt is riding a horse'."
            )
    return done
