"""What a task is: the model with its objectives, its predictions and its scores. The trainer sees nothing else of it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from vlm.data.batch import Batch
from vlm.model.attention import CrossMemory, CrossMemoryProjection
from vlm.model.image_encoder import ImageEncoder
from vlm.model.lengths import by_length
from vlm.model.text_transformer import TextTransformer
from vlm.model.vision_language import ImageFeatures, TextFeatures, VisionLanguageModel
from vlm.objectives.cached import CachedLoss, Embedded, cached_losses
from vlm.objectives.objective import Features, Loss, Objective, PairObjective, Pass, Taught
from vlm.objectives.pairs import Pairs, largest, pairs

Record = dict[str, Any]


class Task(nn.Module):
    """The base of every task.

    Attributes: `model`; `weights`, of each loss in the total; `metric`, the score that selects the best checkpoint (higher is better);
    `learned`, the objectives that have parameters, which the trainer trains beside the model's, or a state of their own; `paired`, those of scope
    pair; `blank_images`, whether images are replaced by grey; `reads_texts`, whether an objective reads the states of the plain texts; `compares`,
    whether ranks compare their texts with each other's; `exchanges_texts`, whether they send the tokens; `rate_factors`, by parameter a factor of
    its learning rate, 1 where it is not named.
    """

    metric: str

    def __init__(
        self, model: VisionLanguageModel, objectives: Mapping[str, Objective], weights: Mapping[str, float]
    ) -> None:
        super().__init__()
        self.model = model
        self.objectives: dict[str, Objective] = {}
        self.weights: dict[str, float] = {}
        self.learned = nn.ModuleDict()
        self.paired: dict[str, PairObjective] = {}
        self.blank_images = self.reads_texts = self.compares = self.exchanges_texts = False
        self.rate_factors: dict[str, float] = {}
        for name, objective in objectives.items():
            self.learn(name, objective, weights[name])

    def learn(self, name: str, objective: Objective, weight: float) -> None:
        """Adds an objective, or puts it in the place of the one of that name."""
        self.objectives[name], self.weights[name] = objective, weight
        if isinstance(objective, nn.Module):
            self.learned[name] = objective
        if objective.scope == "pair":
            self.paired[name] = cast(PairObjective, objective)
            self.compares = True
        self.reads_texts |= name in ("contrastive", "matching", "word_patch")

    def forward(self, batch: Batch, cached: Mapping[str, CachedLoss] | None = None) -> dict[str, Loss]:
        """The losses of one micro-batch. Each view is encoded once, each memory projected once, all passes joined.

        cached: of the objectives of scope pair, where several micro-batches are compared as one batch; see `compare`.
        """
        batch = self._evened(batch)
        features = self.features(batch, compares=cached is None)
        losses: dict[str, Loss] = {}
        if cached is not None:
            own = pairs(features.image.embedding, features.texts["plain"].embedding, batch)
            losses = {name: known.loss(own) for name, known in cached.items()}
        left = {name: o for name, o in self.objectives.items() if name not in losses}
        wanted = [(name, p) for name, o in left.items() for p in o.requests(self.model, features, batch)]
        outputs: dict[str, list[Tensor]] = {name: [] for name in left}
        for (name, _), states in zip(wanted, self._run([p for _, p in wanted], features), strict=True):
            outputs[name].append(states)
        losses |= {name: o.loss(self.model, outputs[name], features, batch) for name, o in left.items()}
        return {name: losses[name] for name in self.objectives}

    def embed(self, batch: Batch) -> Embedded:
        """The first pass over a micro-batch: what the objectives of scope pair compare, without gradient.

        It draws the random numbers that `forward` draws first. It runs as if a gradient were wanted, though none is taken: otherwise PyTorch chooses
        other kernels (in bf16 on a CPU), and the second pass must repeat its embeddings to the last bit.
        """
        batch = self._evened(batch)
        return Embedded(self._own_pairs(batch), self.taught(batch, predicts=False))

    def _own_pairs(self, batch: Batch) -> Pairs:
        image, text = self._encode(batch)
        return pairs(image.embedding, text.embedding, batch).detached()

    def compare(self, parts: Sequence[Embedded]) -> list[dict[str, CachedLoss]]:
        """For each micro-batch what `forward` is to be told of the losses of all of them as one batch."""
        return cached_losses(self.model, self.paired, parts)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """What each loss will be divided by, before the forward pass."""
        batch = self._evened(batch)
        return {name: objective.count(batch) for name, objective in self.objectives.items()}

    def _evened(self, batch: Batch) -> Batch:
        """As many texts on every rank where ranks compare them (images differ in their number of captions), as long where they exchange them."""
        if self.compares:
            batch = batch.filled_up(largest(len(batch.texts.ids)))
        if self.exchanges_texts:
            batch = batch.lengthened(largest(batch.texts.ids.shape[1]), self.model.config.text.pad_id)
        return batch

    def features(self, batch: Batch, compares: bool = True) -> Features:
        """What the objectives share. compares: whether those of scope pair are among them."""
        names = set(self.objectives)
        image, text = self._encode(batch)
        views = {"plain": text}
        if batch.masked is not None and "masked_language" in names:
            views["masked"] = self.model.text_view(batch.masked.ids, batch.texts.mask)
        memory: dict[str, CrossMemory] = {}
        if names & {"matching", "masked_language"}:
            memory["fusion"] = self.model.memory(image.tokens, None, "fusion")
        if names & {"captioning", "answering", "self_critical"}:
            shared = "fusion" in memory and self.model.decoder is None
            memory["decoder"] = memory["fusion"] if shared else self.model.memory(image.tokens, None, "decoder")
        return Features(image, views, memory, self.taught(batch, compares=compares))

    def _encode(self, batch: Batch) -> tuple[ImageFeatures, TextFeatures]:
        """The images and the plain texts, of which the ids alone where no objective reads more."""
        image = self.encode_image(batch.images)
        encode = self.model.encode_text if self.reads_texts else TextFeatures
        return image, encode(batch.texts.ids, batch.texts.mask)

    def taught(self, batch: Batch, compares: bool = True, predicts: bool = True) -> Taught | None:  # noqa: ARG002 (for tasks with a teacher)
        """What a momentum teacher says, where there is one, to objectives of scope pair (compares) and to the others (predicts)."""
        return None

    def encode_image(self, images: Tensor, model: VisionLanguageModel | None = None) -> ImageFeatures:
        """The images' features (by the task's model, or another), or those of grey where the run measures what the text alone gives."""
        model = self.model if model is None else model
        if not self.blank_images:
            return model.encode_image(images)
        grey = model.encode_image(torch.full_like(images[:1], 127 if images.dtype == torch.uint8 else 0))
        count = len(images)
        projected = None if grey.projected is None else grey.projected.expand(count, -1)
        return ImageFeatures(grey.tokens.expand(count, -1, -1), projected)

    def _run(self, passes: list[Pass], features: Features) -> list[Tensor]:
        outputs: list[Tensor | None] = [None] * len(passes)
        for causal in (False, True):
            chosen = [i for i, p in enumerate(passes) if p.causal == causal]
            if not chosen:
                continue
            group = [passes[i] for i in chosen]
            text = TextFeatures.join(
                [
                    self.model.fusion_view(features.texts[p.view] if p.text is None else p.text).select(p.text_rows)
                    for p in group
                ]
            )
            memory = _memory(features.memory["decoder" if causal else "fusion"], group)

            def run(
                rows: Tensor,
                length: int,
                text: TextFeatures = text,
                memory: CrossMemory = memory,
                causal: bool = causal,
            ) -> Tensor:
                part, read = text.select(rows, length), memory.select(rows)
                return self.model.decode_states(part.ids, read) if causal else self.model.fuse(part, read)

            states = by_length(text.mask, run)
            for i, part in zip(chosen, states.split([len(p.text_rows) for p in group]), strict=True):
                outputs[i] = part
        return [o for o in outputs if o is not None]

    def heavy_parts(self) -> list[nn.Module]:
        """The parts that take the time, a teacher's too, each of which can be compiled: image encoders, stacks of text layers, projections."""
        kinds = (ImageEncoder, TextTransformer, CrossMemoryProjection)
        return [module for module in self.modules() if isinstance(module, kinds)]

    def prepare(self, epoch_steps: int) -> None:
        """Called once before training, with the number of optimizer steps an epoch."""

    def after_step(self, taken: Tensor | None = None) -> None:  # noqa: ARG002 (for tasks that keep more than weights)
        """Called after each optimizer step. taken: () bool on the device; where it is false the step was skipped, and nothing may change."""
        self.model.clamp_temperature()

    def predict(self, batch: Batch) -> list[Record]:
        """What evaluation needs of a batch: one record an image or a question."""
        raise NotImplementedError

    def evaluate(self, records: Iterable[Record]) -> dict[str, float]:
        """Scores of all records, in the units of their official form."""
        raise NotImplementedError

    def intervals(self, records: Sequence[Record]) -> dict[str, tuple[float, float]]:  # noqa: ARG002 (for tasks whose scores are means)
        """By score its 95 % bootstrap interval over images."""
        return {}

    def official(self, records: Iterable[Record]) -> list[Record]:  # noqa: ARG002 (for tasks that have such a form)
        """The predictions in the form that evaluation servers and `vlm score` take; none where there is no such form."""
        return []

    def training_state(self) -> dict[str, Tensor]:
        """Tensors outside the model that must survive a restart: those of the task's other modules."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("model.")}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Takes back what `training_state` gave.

        Raises:
            ValueError, RuntimeError: it is of a task with other modules, or of others' size.
        """
        names = self.training_state().keys()
        if strangers := sorted(names ^ state.keys()):
            raise ValueError(f"the task's state is of other settings, {len(strangers)} such as {strangers[0]}")
        self.load_state_dict(state, strict=False)


def _memory(shared: CrossMemory, passes: Sequence[Pass]) -> CrossMemory:
    """What the passes read, below each other: their rows of the batch's memory, or of their own."""
    if all(p.memory is None for p in passes):
        return shared.select(torch.cat([p.memory_rows for p in passes]))
    parts = [(shared if p.memory is None else p.memory).select(p.memory_rows) for p in passes]
    keys = [torch.cat(layer) for layer in zip(*(part.keys for part in parts), strict=True)]
    return CrossMemory(keys, [torch.cat(layer) for layer in zip(*(part.values for part in parts), strict=True)])
