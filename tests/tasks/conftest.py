"""A few drawn scenes as records, and what a task needs to learn them by heart."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from vlm.data.batch import Batch
from vlm.data.collate import SampleEncoder, collate
from vlm.data.images import EvaluationTransform
from vlm.data.records import Record, image_hash
from vlm.data.synthetic import draw_scene
from vlm.data.text import Tokenizer, train_wordpiece
from vlm.tasks.task import Task

PROMPT = "a picture of"


@dataclass(frozen=True)
class Scenes:
    """Records with one caption and four questions each, and a tokenizer that knows all their words."""

    records: list[Record]
    tokenizer: Tokenizer
    transform: EvaluationTransform

    def batch(self, encode: SampleEncoder, rows: Sequence[int] | None = None) -> Batch:
        """The scenes `rows`, by default all."""
        chosen = self.records if rows is None else [self.records[row] for row in rows]
        return collate([encode(record, 0) for record in chosen], self.tokenizer.pad_id)


@pytest.fixture(scope="session")
def scenes() -> Scenes:
    """Four, with different captions and, among the questions, equal ones with different answers."""
    records = []
    for seed in range(4):
        scene = draw_scene(seed, 32)
        file = io.BytesIO()
        scene.image.save(file, "PNG")
        questions = [{**q, "question_id": 10 * seed + q["question_id"]} for q in scene.questions]
        key = f"scene{seed}"
        records.append(
            Record("scenes", key, file.getvalue(), scene.captions[:1], questions, image_hash("scenes", seed), seed)
        )
    texts = [text for record in records for text in record.captions]
    texts += [text for record in records for q in record.questions for text in (q["question"], *q["answers"])]
    tokenizer = train_wordpiece([*texts, PROMPT, "question: answer:", "0123456789"], 400, min_frequency=1)
    assert len({record.captions[0] for record in records}) == 4
    return Scenes(records, tokenizer, EvaluationTransform(32))


@pytest.fixture
def learn() -> Callable[[Task, Batch, int], list[float]]:
    """learn(task, batch, steps): the losses of so many steps on that one batch; leaves the task in evaluation mode."""

    def run(task: Task, batch: Batch, steps: int) -> list[float]:
        optimizer = torch.optim.AdamW(task.model.parameters(), lr=2e-3, weight_decay=0.0)
        task.train()
        totals = []
        for _ in range(steps):
            losses, counts = task(batch), task.counts(batch)
            total = sum(task.weights[name] * losses[name].sum / counts[name] for name in task.weights)
            assert isinstance(total, torch.Tensor)
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            task.after_step()
            totals.append(float(total.detach()))
        task.eval()
        return totals

    return run
