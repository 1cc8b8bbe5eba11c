"""The pretraining steps of ALBEF (Li et al. 2021) and BLIP (Li et al. 2022) from transformers' own modules, as the originals compute them.

What `pretrain_step.py` compares with: eager attention (a matrix product, a softmax, a matrix product); one pass for the positive pairs, another one
for both kinds of negatives, each projecting the image tokens anew; negatives drawn one after the other; logits of the whole vocabulary at every
position; a second model as the momentum teacher, averaged by a loop over its parameters; a queue that is copied at each step, and moved on by a
pointer that the processor reads. Read in models/model_pretrain.py of salesforce/ALBEF and models/blip_pretrain.py of salesforce/BLIP.

Letters: B image-text pairs, L tokens, P image tokens, D width, E width of the embeddings, K slots of the queue, V vocabulary.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel, BlipVisionConfig, BlipVisionModel
from transformers.models.bert.modeling_bert import BertLayer

from vlm.config import ModelConfig
from vlm.model.convert.blip import VitShape


@dataclass(frozen=True)
class Given:
    """A batch as the originals' loaders and tokenizers give it.

    images: (B, 3, H, W), normalised. ids: (B, L) int64. mask: (B, L) int64, 1 at tokens. masked: (B, L) the ids with some hidden, and labels: (B, L)
    those hidden, -100 elsewhere; None for a step without masked language modelling. negatives: images (B,) for the texts and texts (B,) for the
    images, in place of drawn ones.
    """

    images: Tensor
    ids: Tensor
    mask: Tensor
    masked: Tensor | None = None
    labels: Tensor | None = None
    negatives: tuple[Tensor, Tensor] | None = None

    def to(self, device: torch.device) -> "Given":
        """The same on `device`."""
        return replace(
            self,
            images=self.images.to(device),
            ids=self.ids.to(device),
            mask=self.mask.to(device),
            masked=None if self.masked is None else self.masked.to(device),
            labels=None if self.labels is None else self.labels.to(device),
        )


class Encoders(nn.Module):
    """What there are two of, the student's and the teacher's."""

    def __init__(self, config: ModelConfig, vit: VitShape) -> None:
        super().__init__()
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=vit.dim,
                intermediate_size=vit.feed_forward_dim,
                num_hidden_layers=vit.layers,
                num_attention_heads=vit.heads,
                image_size=config.image.image_size,
                patch_size=vit.patch,
                layer_norm_eps=1e-6,
            )
        )
        self.vision_proj = nn.Linear(vit.dim, config.embed_dim)
        self.text = text_model(config)
        self.text_proj = nn.Linear(config.text.dim, config.embed_dim)

    def image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, P, D) and embedding (B, E)."""
        tokens = self.vision(images).last_hidden_state
        return tokens, F.normalize(self.vision_proj(tokens[:, 0]), dim=-1)

    def embedding(self, states: Tensor) -> Tensor:
        """(B, E) of text states (B, L, D)."""
        return F.normalize(self.text_proj(states[:, 0]), dim=-1)


def text_model(config: ModelConfig) -> BertLMHeadModel:
    """BERT with a vocabulary head and cross-attention in the layers that have it."""
    text = config.text
    settings: dict[str, Any] = {
        "vocab_size": text.vocab_size,
        "hidden_size": text.dim,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "intermediate_size": text.feed_forward_dim,
        "max_position_embeddings": text.max_positions,
        "hidden_dropout_prob": text.dropout,
        "attention_probs_dropout_prob": text.attention_dropout,
    }
    reading = BertConfig(**settings, is_decoder=True, add_cross_attention=True, attn_implementation="eager")
    model = BertLMHeadModel(reading)
    plain = BertConfig(**settings, attn_implementation="eager")
    for index in sorted(set(range(text.layers)) - set(text.cross_attention)):
        model.bert.encoder.layer[index] = BertLayer(plain, layer_idx=index)
    return model


def run_layers(
    layers: nn.ModuleList, states: Tensor, mask: Tensor, image: Tensor | None, causal: bool = False
) -> Tensor:
    """(B, L, D) -> (B, L, D). mask: (B, L), 1 at tokens. image: (B, P, D) tokens to attend to, under a mask that allows all, as there."""
    allowed = mask[:, None, None, :].to(states.dtype)
    if causal:
        allowed = allowed * torch.ones(mask.shape[1], mask.shape[1], device=mask.device).tril().to(states.dtype)
    excluded = (1.0 - allowed) * -10000.0
    image_excluded = None if image is None else image.new_zeros(image.shape[0], 1, 1, image.shape[1])
    for layer in layers:
        states = layer(states, excluded, image, encoder_attention_mask=image_excluded)
    return states


class ReferenceStep(nn.Module):
    """What both steps share: embeddings of student and teacher, the queue, contrastive and matching."""

    image_queue: Tensor
    text_queue: Tensor

    def __init__(self, config: ModelConfig, vit: VitShape, queue: int, momentum: float, alpha: float) -> None:
        super().__init__()
        self.config, self.momentum, self.alpha = config, momentum, alpha
        self.student = Encoders(config, vit)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.temp = nn.Parameter(torch.tensor(config.temperature))
        self.itm_head = nn.Linear(config.text.dim, 2)
        self.register_buffer("image_queue", F.normalize(torch.randn(config.embed_dim, queue), dim=0))
        self.register_buffer("text_queue", F.normalize(torch.randn(config.embed_dim, queue), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, given: Given) -> dict[str, Tensor]:
        """The losses by our names."""
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        tokens, image = self.student.image(given.images)
        states = self.text_states(self.student, given.ids, given.mask)
        text = self.student.embedding(states)
        with torch.no_grad():
            self.average()
            tokens_m, image_m = self.teacher.image(given.images)
            text_m = self.teacher.embedding(self.text_states(self.teacher, given.ids, given.mask))
        contrastive, to_text, to_image = self.contrastive(image, text, image_m, text_m)
        self.enqueue(image_m, text_m)
        matching = self.matching(given, tokens, states, to_text, to_image)
        return {"contrastive": contrastive, "matching": matching} | self.words(given, tokens, tokens_m)

    @torch.no_grad()
    def average(self) -> None:
        """The teacher's weights, one parameter after the other."""
        for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mine.data = mine.data * self.momentum + theirs.data * (1.0 - self.momentum)

    @torch.no_grad()
    def enqueue(self, image: Tensor, text: Tensor) -> None:
        """The teacher's features (B, E) in place of the oldest."""
        pointer, size = int(self.queue_ptr), self.image_queue.shape[1]
        if size % len(image):
            raise ValueError(
                f"a queue of {size} is not a multiple of the batch of {len(image)}; the published one must be."
            )
        self.image_queue[:, pointer : pointer + len(image)] = image.T
        self.text_queue[:, pointer : pointer + len(image)] = text.T
        self.queue_ptr[0] = (pointer + len(image)) % size

    def contrastive(
        self, image: Tensor, text: Tensor, image_m: Tensor, text_m: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and the logits (B, B + K) of images against texts and of texts against images."""
        with torch.no_grad():
            images = torch.cat([image_m.t(), self.image_queue.clone().detach()], dim=1)
            texts = torch.cat([text_m.t(), self.text_queue.clone().detach()], dim=1)
            taught_text, taught_image = image_m @ texts / self.temp, text_m @ images / self.temp
            own = torch.zeros_like(taught_text).fill_diagonal_(1)
            text_targets = self.alpha * F.softmax(taught_text, dim=1) + (1 - self.alpha) * own
            image_targets = self.alpha * F.softmax(taught_image, dim=1) + (1 - self.alpha) * own
        to_text, to_image = image @ texts / self.temp, text @ images / self.temp
        text_loss = -(F.log_softmax(to_text, dim=1) * text_targets).sum(1).mean()
        image_loss = -(F.log_softmax(to_image, dim=1) * image_targets).sum(1).mean()
        return (text_loss + image_loss) / 2, to_text, to_image

    def matching(self, given: Given, tokens: Tensor, states: Tensor, to_text: Tensor, to_image: Tensor) -> Tensor:
        """A pass for the positive pairs, then one for texts with other images and images with other texts."""
        count = len(tokens)
        positive = self.fused(given.ids, given.mask, states, tokens)
        other_image, other_text = given.negatives or (self.draw(to_image[:, :count]), self.draw(to_text[:, :count]))
        rows_image, rows_text = other_image.tolist(), other_text.tolist()
        negative = self.fused(
            torch.cat([given.ids, torch.stack([given.ids[row] for row in rows_text])]),
            torch.cat([given.mask, torch.stack([given.mask[row] for row in rows_text])]),
            torch.cat([states, torch.stack([states[row] for row in rows_text])]),
            torch.cat([torch.stack([tokens[row] for row in rows_image]), tokens]),
        )
        logits = self.itm_head(torch.cat([positive[:, 0], negative[:, 0]]))
        labels = torch.cat([torch.ones(count, dtype=torch.long), torch.zeros(2 * count, dtype=torch.long)])
        return F.cross_entropy(logits, labels.to(logits.device))

    @torch.no_grad()
    def draw(self, logits: Tensor) -> Tensor:
        """One other column for each row of (B, B), one row after the other: each waits for the device (1e-4 as in BLIP: else a sum may be 0)."""
        weights = (F.softmax(logits, dim=1) + 1e-4).fill_diagonal_(0)
        return torch.tensor([int(torch.multinomial(row, 1).item()) for row in weights])

    def text_states(self, encoders: Encoders, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L, D) of the texts alone."""
        raise NotImplementedError

    def fused(self, ids: Tensor, mask: Tensor, states: Tensor, tokens: Tensor) -> Tensor:
        """(B, L, D) of the texts given the images."""
        raise NotImplementedError

    def words(self, given: Given, tokens: Tensor, tokens_m: Tensor) -> dict[str, Tensor]:
        """The loss of the words."""
        raise NotImplementedError


class AlbefStep(ReferenceStep):
    """Lower layers read the text, upper ones fuse; masked language modelling with the teacher's soft targets."""

    def text_states(self, encoders: Encoders, ids: Tensor, mask: Tensor) -> Tensor:
        bert, first = encoders.text.bert, min(self.config.text.cross_attention)
        return run_layers(bert.encoder.layer[:first], bert.embeddings(ids), mask, None)

    def fused(self, ids: Tensor, mask: Tensor, states: Tensor, tokens: Tensor) -> Tensor:  # noqa: ARG002
        first = min(self.config.text.cross_attention)
        return run_layers(self.student.text.bert.encoder.layer[first:], states, mask, tokens)

    def _logits(self, encoders: Encoders, given: Given, tokens: Tensor) -> Tensor:
        """(B, L, V), at every position."""
        first = min(self.config.text.cross_attention)
        states = self.text_states(encoders, given.masked, given.mask)
        return encoders.text.cls(run_layers(encoders.text.bert.encoder.layer[first:], states, given.mask, tokens))

    def words(self, given: Given, tokens: Tensor, tokens_m: Tensor) -> dict[str, Tensor]:
        assert given.labels is not None
        with torch.no_grad():
            soft = F.softmax(self._logits(self.teacher, given, tokens_m), dim=-1)
        logits = self._logits(self.student, given, tokens)
        hard = F.cross_entropy(logits.flatten(0, 1), given.labels.flatten())
        taught = -(F.log_softmax(logits, dim=-1) * soft).sum(-1)[given.labels != -100].mean()
        return {"masked_language": (1 - self.alpha) * hard + self.alpha * taught}


class BlipStep(ReferenceStep):
    """All layers fuse, from the tokens on; a decoder that shares all but its self-attention captions."""

    def __init__(self, config: ModelConfig, vit: VitShape, queue: int, momentum: float, alpha: float) -> None:
        super().__init__(config, vit, queue, momentum, alpha)
        self.decoder = text_model(config)
        mine, theirs = self.decoder.bert, self.student.text.bert
        mine.embeddings = theirs.embeddings
        for layer, shared in zip(mine.encoder.layer, theirs.encoder.layer, strict=True):
            layer.crossattention, layer.intermediate, layer.output = (
                shared.crossattention,
                shared.intermediate,
                shared.output,
            )
        self.decoder.cls.predictions.decoder.weight = mine.embeddings.word_embeddings.weight
        # The encoders have no vocabulary head.
        del self.student.text.cls, self.teacher.text.cls

    def text_states(self, encoders: Encoders, ids: Tensor, mask: Tensor) -> Tensor:
        bert = encoders.text.bert
        return run_layers(bert.encoder.layer, bert.embeddings(ids), mask, None)

    def fused(self, ids: Tensor, mask: Tensor, states: Tensor, tokens: Tensor) -> Tensor:  # noqa: ARG002
        bert = self.student.text.bert
        return run_layers(bert.encoder.layer, bert.embeddings(self._begun(ids, "fused")), mask, tokens)

    def words(self, given: Given, tokens: Tensor, tokens_m: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        ids, bert = self._begun(given.ids, "decoder"), self.decoder.bert
        states = run_layers(bert.encoder.layer, bert.embeddings(ids), given.mask, tokens, causal=True)
        logits = self.decoder.cls(states)[:, :-1]
        labels = ids.masked_fill(given.mask == 0, -100)[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
        return {"captioning": loss}

    def _begun(self, ids: Tensor, mode: str) -> Tensor:
        """The ids with the mode's first token, [ENC] or [DEC]."""
        ids = ids.clone()
        ids[:, 0] = self.config.first_token[mode]
        return ids
