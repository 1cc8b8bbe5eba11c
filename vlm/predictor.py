"""What a user of the library calls: a checkpoint folder in, captions, answers, matches and embeddings out.

    predictor = Predictor.load("runs/photos/captioning/best")
    predictor.caption(["img.jpg"])[0].text

Imports stay light: a caption must not wait for what only training needs.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlm.config import GenerationConfig
from vlm.data.images import EvaluationTransform, decode_image
from vlm.data.text import Tokenizer, clean_caption, tidy
from vlm.device import usable_device
from vlm.errors import CheckpointError, ConfigError
from vlm.hub import local_folder
from vlm.inputs import ImageLike, refuse_single
from vlm.model.compiled_step import CompiledDecoder
from vlm.model.generation import Decoder, Generated
from vlm.model.pretrained import CONFIG, TOKENIZER, load_pretrained
from vlm.model.vision_language import TextFeatures, VisionLanguageModel

if TYPE_CHECKING:
    from vlm.answering import Answerer


@dataclass(frozen=True)
class Said:
    """A caption or an answer. confidence: 0..1; for a caption the geometric mean of its words' probabilities, for an answer its
    probability, at the temperature that the checkpoint stores (see `vlm.metrics.calibration`)."""

    text: str
    confidence: float


class Predictor:
    """A model with its tokenizer, transform and settings, ready to use."""

    def __init__(
        self,
        model: VisionLanguageModel,
        tokenizer: Tokenizer,
        metadata: dict[str, Any],
        answers: Sequence[str] = (),
        compile: bool = False,
    ) -> None:
        """metadata: config.json of the checkpoint. answers: its answer list. compile: as `load`'s.

        Raises:
            CheckpointError: the parts do not belong together.
        """
        self.model, self.tokenizer, self.metadata, self.answers = model.eval(), tokenizer, metadata, list(answers)
        self._decoder: Decoder = CompiledDecoder(model, model.device) if compile else model
        self.transform = EvaluationTransform(model.image_encoder.image_size)
        known = model.config.text.vocab_size
        if tokenizer.vocab_size > known:
            raise CheckpointError(
                f"{TOKENIZER} has {tokenizer.vocab_size} tokens, the model {known}: they do not belong together; copy the checkpoint again."
            )
        generation, text = metadata.get("generation") or {}, metadata.get("text") or {}
        try:
            names = {f.name for f in fields(GenerationConfig)}
            known_settings: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in generation.items() if k in names
            }
            self.generation = GenerationConfig(**known_settings)
            self.prompt: str = text.get("prompt", "")
            self.question_prompt: str = text.get("question_prompt", "question: {question} answer:")
            self.max_tokens: int = text.get("max_tokens", 32)
            self.max_answer_tokens: int = text.get("max_answer_tokens", 8)
        except AttributeError:
            raise CheckpointError(
                f"{CONFIG}: `generation` and `text` must be settings; copy the checkpoint again."
            ) from None

    @classmethod
    def load(
        cls,
        source: str | Path,
        device: str | torch.device | None = None,
        revision: str | None = None,
        quantize: str | None = None,
        compile: bool = False,
    ) -> "Predictor":
        """From a checkpoint folder, a folder of transformers' BLIP, or a model on the hub (owner/name; see `vlm.hub.local_folder`).

        device: by default a GPU where there is one. revision: the hub's branch, tag or commit. quantize: "int8" keeps the linear maps' weights in
        a quarter of the memory (see `vlm.quantize`). compile: the steps of captions are compiled, and on a GPU captured as graphs, which takes half
        a minute at the first ones (see `vlm.model.compiled_step`).

        Raises:
            CheckpointError: the folder is incomplete or damaged, or the hub does not give it. ConfigError: there is no such device, or kind.
        """
        from vlm.checkpoint import read_answers

        place, folder = usable_device(device), local_folder(source, revision)
        model, metadata = load_pretrained(folder)
        if not (folder / TOKENIZER).exists():
            raise CheckpointError(f"{folder}: {TOKENIZER} is missing; copy the checkpoint again.")
        model = model.to(place)
        if quantize is not None:
            from vlm.quantize import quantize as quantized

            model = quantized(model, quantize)
        return cls(model, Tokenizer.load(folder), metadata, read_answers(folder), compile)

    @torch.no_grad()
    def caption(
        self,
        images: Sequence[ImageLike],
        beams: int | None = None,
        sampled: bool = False,
        seed: int = 0,
        batch_size: int = 16,
        **settings: Any,
    ) -> list[Said]:
        """One caption for each image, whatever else is in the batch.

        beams, settings: in place of the checkpoint's (see GenerationConfig), and `prompt`, the words that the captions continue and do not repeat.
        sampled: drawn, by the temperature, top_k and top_p of the settings, instead of searched, for each image anew from `seed`.

        Raises:
            BadImage: an image cannot be used. CheckpointError: the checkpoint makes no captions. ConfigError: an unusable setting.
        """
        return [said for said, *_ in self.captions(images, 1, beams, sampled, seed, batch_size, **settings)]

    @torch.no_grad()
    def captions(
        self,
        images: Sequence[ImageLike],
        count: int,
        beams: int | None = None,
        sampled: bool = False,
        seed: int = 0,
        batch_size: int = 16,
        prompt: str | None = None,
        **settings: Any,
    ) -> list[list[Said]]:
        """As `caption`, for each image `count` different captions: the best that the search finds, or, sampled, drawn without replacement.

        There are fewer where no more are possible. ConfigError too where the beams are fewer.
        """
        from vlm.tasks.captioning import draw_captions, generate_several

        self._need("language", "make captions")
        if self._reads_question:
            raise CheckpointError(
                "this checkpoint answers questions only: its decoder reads the question, not the image, and cannot caption; "
                "give one that was trained with a config of configs/finetune/captioning."
            )
        generation = self._settings({**settings, **({} if beams is None else {"beams": beams})})

        words = self.prompt if prompt is None else prompt

        def decode(batch: Tensor) -> list[list[Generated]]:
            memory = self.model.memory(self.model.encode_image(batch).tokens, None, "decoder")
            if sampled:
                return draw_captions(self.model, memory, self.tokenizer, words, generation, count, seed, self._decoder)
            return generate_several(self.model, memory, self.tokenizer, words, generation, count, self._decoder)

        found = [texts for batch in self._batches(images, batch_size) for texts in decode(batch)]
        return [[Said(tidy(self.tokenizer.decode(g.ids)), g.confidence) for g in texts] for texts in found]

    @torch.no_grad()
    def answer(self, image: ImageLike, question: str, beams: int | None = None) -> Said:
        """The answer to a question about an image: by the checkpoint's classifier, the best of its answer list, exactly, or by open generation.

        Yes or no is decided by the similarity of statement and image, too, where the checkpoint was calibrated so (`vlm.tasks.yes_no`).

        Raises:
            BadImage: the image cannot be used. CheckpointError: the checkpoint answers no questions. ConfigError: unusable beams.
        """
        task = self.metadata.get("task")
        if task in ("pretraining", "captioning") and not self.answers:
            raise CheckpointError(
                f"this checkpoint was trained for {task} and answers no questions; "
                "give one that was trained with a config of configs/finetune/vqa."
            )
        if "classifier" not in self.model.config.heads:
            self._need("language", "answer questions")
        generation = self._settings({} if beams is None else {"beams": beams})
        return Said(*self._answerer(self._tensor([image]), question, generation))

    @torch.no_grad()
    def match(self, image: ImageLike, texts: Sequence[str]) -> list[float]:
        """The probability, by the matching head, that each text describes the image.

        Raises:
            BadImage: the image cannot be used. CheckpointError: the checkpoint has no matching head.
        """
        self._need("matching", "match texts to images")
        memory = self.model.memory(self.model.encode_image(self._tensor([image])).tokens, None, "fusion")
        probabilities: list[float] = []
        for features in self._texts(texts, 64):
            logits = self.model.matching_logits(self.model.fuse(self.model.fusion_view(features), memory))
            probabilities += logits.float().softmax(1)[:, 1].tolist()
        return probabilities

    @torch.no_grad()
    def rerank(self, images: Sequence[ImageLike], text: str, batch_size: int = 16) -> list[float]:
        """How well each image goes with the text, looked at again by cross-attention: log ratios, higher is better, comparable among these images.

        To the embeddings' similarity comes what the matching head says or, without one, the likelihood of the caption (vlm.tasks.reranking).

        Raises:
            BadImage: an image cannot be used. CheckpointError: the checkpoint has no contrastive head, or neither of the others.
        """
        from vlm.tasks.reranking import By, join_texts, rerank

        wanted = self.embed_texts([text])
        matching = "matching" in self.model.config.heads
        self._need("matching" if matching else "language", "look at images again")
        found = [self.model.encode_image(batch) for batch in self._batches(images, batch_size)]
        if not found:
            return []
        similarity = torch.cat([features.embedding.float().cpu() for features in found]) @ wanted.T.float()
        before = self._text_prompt if matching else self.prompt
        encoded = self.tokenizer.encode_with_prompt(before, clean_caption(text), self.max_tokens)
        texts, tokens = join_texts([encoded], self.tokenizer.pad_id, self.model.device), [f.tokens for f in found]
        by: By = "matching" if matching else "captioning"
        return rerank(self.model, torch.cat(tokens), texts, similarity.numpy(), len(similarity), by)[:, 0].tolist()  # type: ignore[no-any-return]

    @torch.no_grad()
    def embed_images(self, images: Sequence[ImageLike], batch_size: int = 16) -> Tensor:
        """(N, E) unit vectors on the CPU; their products with `embed_texts` are similarities.

        Raises:
            BadImage: an image cannot be used. CheckpointError: the checkpoint has no contrastive head.
        """
        self._need("contrastive", "embed images")
        parts = [self.model.encode_image(batch).embedding.cpu() for batch in self._batches(images, batch_size)]
        return torch.cat([torch.empty(0, self.model.config.embed_dim), *parts])

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """(N, E) unit vectors on the CPU.

        Raises:
            CheckpointError: the checkpoint has no contrastive head.
        """
        self._need("contrastive", "embed texts")
        parts = [features.embedding for features in self._texts(texts, batch_size)]
        return torch.cat([torch.empty(0, self.model.config.embed_dim), *(p.cpu() for p in parts if p is not None)])

    def _need(self, head: str, what: str) -> None:
        heads = self.model.config.heads
        if head not in heads:
            raise CheckpointError(
                f"this checkpoint has no {head} head (it has: {', '.join(heads) or 'none'}) and cannot {what}; give one that has it."
            )

    @property
    def _text_prompt(self) -> str:
        """What texts that are compared begin with: in pretraining the prompt began every text."""
        return self.prompt if self.metadata.get("task") == "pretraining" else ""

    @property
    def _reads_question(self) -> bool:
        settings = self.model.config
        return settings.decoder == "separate" and settings.decoder_reads == "question"

    @cached_property
    def _answerer(self) -> "Answerer":
        from vlm.answering import Answerer
        from vlm.calibration import stored_temperature
        from vlm.tasks.yes_no import make_judge

        return Answerer(
            self.model,
            self.tokenizer,
            self.answers,
            self.question_prompt,
            self.max_tokens,
            self.max_answer_tokens,
            (self.metadata.get("vqa") or {}).get("inference") == "rank_all",
            stored_temperature(self.metadata),
            make_judge(self.model, self.tokenizer, self.metadata),
        )

    def _settings(self, changes: dict[str, Any]) -> GenerationConfig:
        names = [f.name for f in fields(GenerationConfig)]
        for name in changes:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}."
                raise ConfigError(f"unknown generation setting {name}; {hint}")
        return replace(self.generation, **changes)

    def _texts(self, texts: Sequence[str], batch_size: int) -> Iterator[TextFeatures]:
        from vlm.data.collate import pad

        refuse_single(texts)
        rows = [self.tokenizer.encode(clean_caption(text), self.max_tokens, self._text_prompt) for text in texts]
        for first in range(0, len(rows), batch_size):
            ids, mask = pad(rows[first : first + batch_size], self.tokenizer.pad_id)
            yield self.model.encode_text(ids.to(self.model.device), mask.to(self.model.device))

    def _tensor(self, images: Sequence[ImageLike]) -> Tensor:
        return torch.stack([self.transform(decode_image(image)) for image in images]).to(self.model.device)

    def _batches(self, images: Sequence[ImageLike], size: int) -> Iterator[Tensor]:
        refuse_single(images)
        return (self._tensor(images[first : first + size]) for first in range(0, len(images), size))
