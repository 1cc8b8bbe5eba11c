"""Self-critical sequence training (Rennie et al. 2017): sampled captions that score above their image's other samples become likelier.

The baseline is the mean reward of the image's other samples, so that no second decoding is needed (Luo 2020, arXiv:2003.09971).

Letters: B images, S samples of an image, L tokens, D width.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from vlm.data.batch import Batch
from vlm.model.generation import Rules
from vlm.model.lengths import by_length
from vlm.model.sampling import Policy, sample
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.objective import Features, Loss, Pass, exact

Reward = Callable[[Sequence[Sequence[int]], Sequence[Sequence[str]]], Sequence[float]]
"""Captions as token ids, without end token, and the references of each one's image -> a number for each caption."""


class SelfCritical:
    """Minus the mean over samples of (reward - baseline) x log-probability of the sample's tokens, its end included."""

    scope: Literal["pair", "micro"] = "micro"

    def __init__(
        self, prompt: Sequence[int], rules: Rules, reward: Reward, samples: int = 5, temperature: float = 1.0
    ) -> None:
        """prompt: leading tokens of each caption. rules: end token and longest caption; the samples are drawn without any other rule.

        temperature: of the policy, the distribution that is drawn from and learned; below 1 its samples are nearer to what a search finds.
        """
        self.prompt, self.rules, self.reward, self.samples = list(prompt), rules, reward, samples
        self.temperature = temperature

    def count(self, batch: Batch) -> Tensor:
        """Samples of all images with a caption."""
        return self.samples * _described(batch).sum()

    def requests(self, model: VisionLanguageModel, features: Features, batch: Batch) -> Sequence[Pass]:  # noqa: ARG002
        """None: what passes through the decoder is drawn first, from the decoder."""
        return ()

    def loss(self, model: VisionLanguageModel, outputs: Sequence[Tensor], features: Features, batch: Batch) -> Loss:  # noqa: ARG002
        """Draws S captions of each image with a caption, and learns from their rewards."""
        described = _described(batch)
        rows = described.nonzero().squeeze(1)
        if len(rows) == 0:
            return Loss(features.memory["decoder"].keys[0].sum() * 0.0, self.count(batch))
        rows = rows.repeat_interleave(self.samples)
        drawn = self._draw(model, features, rows)
        reward = torch.tensor(
            self.reward(drawn, self._references(batch, rows)), device=rows.device, dtype=torch.float32
        )
        grouped = reward.view(-1, self.samples)
        baseline = (grouped.sum(1, keepdim=True) - grouped) / (self.samples - 1)
        ids, mask, predicted = self._texts(drawn, rows.device)
        memory = features.memory["decoder"].select(rows)
        states = by_length(mask, lambda part, length: model.decode_states(ids[part, :length], memory.select(part)))
        log_probabilities = (exact(model.language_logits(states[:, :-1][predicted])) / self.temperature).log_softmax(1)
        chosen = log_probabilities.gather(1, ids[:, 1:][predicted][:, None]).squeeze(1)
        advantage = (grouped - baseline).flatten()[:, None].expand_as(predicted)[predicted]
        count = self.count(batch)
        return Loss(-(advantage * chosen).sum(), count, {"reward": (reward.sum(), count)})

    @torch.no_grad()
    def _draw(self, model: VisionLanguageModel, features: Features, rows: Tensor) -> list[list[int]]:
        memory = features.memory["decoder"].select(rows[:: self.samples])
        prompts = torch.tensor([self.prompt], device=rows.device).expand(len(rows), -1)
        training = model.training
        model.eval()  # what is rewarded is the model as it will be used, without dropout
        drawn = sample(model, memory, prompts, None, self.rules, Policy(temperature=self.temperature))
        model.train(training)
        return [text.ids for text in drawn]

    @staticmethod
    def _references(batch: Batch, rows: Tensor) -> list[list[str]]:
        """All captions of each row's image, as Rennie et al. take them, not only those that the batch has as texts."""
        texts = zip(batch.texts.image.tolist(), batch.texts.describes.tolist(), batch.sources, strict=True)
        references = {image: source["references"] for image, describes, source in texts if describes}
        return [references[row] for row in rows.tolist()]

    def _texts(self, drawn: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """ids (R, L), mask (R, L) and, (R, L - 1), which next tokens were drawn."""
        longest, first = self.rules.max_length, len(self.prompt)
        texts = [[*self.prompt, *ids, *([self.rules.end_id] if len(ids) < longest else [])] for ids in drawn]
        length = -(-max(map(len, texts)) // 8) * 8
        ids = torch.tensor([[*text, *[self.rules.end_id] * (length - len(text))] for text in texts], device=device)
        position = torch.arange(length, device=device)
        mask = position < torch.tensor([len(text) for text in texts], device=device)[:, None]
        return ids, mask, mask[:, 1:] & (position[1:] >= first)


def _described(batch: Batch) -> Tensor:
    """(B,) bool: images with a caption of any weight."""
    texts = batch.texts
    captions = (texts.describes & (texts.weight > 0)).long()
    return torch.zeros(len(batch), dtype=torch.long, device=captions.device).index_add_(0, texts.image, captions) > 0
