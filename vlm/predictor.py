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
from PIL import Image
from torch import Tensor

from vlm.config import GenerationConfig
from vlm.data.images import EvaluationTransform, decode_image
from vlm.data.text import Tokenizer, clean_caption, clean_question, tidy
from vlm.errors import CheckpointError, ConfigError
from vlm.hub import local_folder
from vlm.model.generation import Generated, sample
from vlm.model.pretrained import CONFIG, TOKENIZER, load_pretrained
from vlm.model.vision_language import TextFeatures, VisionLanguageModel

if TYPE_CHECKING:
    from vlm.model.ranking import AnswerTree

ImageLike = str | Path | bytes | Image.Image


@dataclass(frozen=True)
class Said:
    """A caption or an answer. confidence: 0..1; for a caption the geometric mean of its words' probabilities, for an answer its probability."""

    text: str
    confidence: float


class Predictor:
    """A model with its tokenizer, transform and settings, ready to use."""

    def __init__(
        self, model: VisionLanguageModel, tokenizer: Tokenizer, metadata: dict[str, Any], answers: Sequence[str] = ()
    ) -> None:
        """metadata: config.json of the checkpoint. answers: its answer list.

        Raises:
            CheckpointError: the parts do not belong together.
        """
        self.model, self.tokenizer, self.metadata, self.answers = model.eval(), tokenizer, metadata, list(answers)
        self.transform = EvaluationTransform(model.image_encoder.image_size)
        known = model.config.text.vocab_size
        if tokenizer.vocab_size > known:
            raise CheckpointError(
                f"{TOKENIZER} has {tokenizer.vocab_size} tokens, the model {known}: they do not belong together; copy the checkpoint again."
            )
        generation, text = metadata.get("generation") or {}, metadata.get("text") or {}
        try:
            names = {f.name for f in fields(GenerationConfig)}
            self.generation = GenerationConfig(**{k: v for k, v in generation.items() if k in names})
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
        cls, source: str | Path, device: str | torch.device | None = None, revision: str | None = None
    ) -> "Predictor":
        """From a checkpoint folder, a folder of transformers' BLIP, or a model on the hub (owner/name; see `vlm.hub.local_folder`).

        device: by default a GPU where there is one. revision: the hub's branch, tag or commit.

        Raises:
            CheckpointError: the folder is incomplete or damaged, or the hub does not give it. ConfigError: there is no such device.
        """
        from vlm.checkpoint import read_answers

        place, folder = _device(device), local_folder(source, revision)
        model, metadata = load_pretrained(folder)
        if not (folder / TOKENIZER).exists():
            raise CheckpointError(f"{folder}: {TOKENIZER} is missing; copy the checkpoint again.")
        return cls(model.to(place), Tokenizer.load(folder), metadata, read_answers(folder))

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

        beams, settings: in place of the checkpoint's (see GenerationConfig). sampled: drawn (nucleus 0.9) instead of searched, for each image
        anew from `seed`.

        Raises:
            BadImage: an image cannot be used. CheckpointError: the checkpoint makes no captions. ConfigError: an unusable setting.
        """
        from vlm.tasks.captioning import caption_start, generate_captions, generation_rules

        self._need("language", "make captions")
        if self._reads_question:
            raise CheckpointError(
                "this checkpoint answers questions only: its decoder reads the question, not the image, and cannot caption; "
                "give one that was trained with a config of configs/finetune/captioning."
            )
        generation = self._settings({**settings, **({} if beams is None else {"beams": beams})})

        def decode(batch: Tensor) -> list[Generated]:
            memory = self.model.memory(self.model.encode_image(batch).tokens, None, "decoder")
            if not sampled:
                return generate_captions(self.model, memory, self.tokenizer, self.prompt, generation)
            ids = caption_start(self.model, self.tokenizer, self.prompt, len(batch))
            rules = generation_rules(generation, self.tokenizer)
            # One generator for each image, so that its caption depends on nothing but itself and the seed.
            generators = [torch.Generator(batch.device).manual_seed(seed) for _ in batch]
            return sample(self.model, memory, ids, None, rules, top_p=0.9, generator=generators)

        found = [g for batch in self._batches(images, batch_size) for g in decode(batch)]
        return [Said(tidy(self.tokenizer.decode(g.ids)), g.confidence) for g in found]

    @torch.no_grad()
    def answer(self, image: ImageLike, question: str, beams: int | None = None) -> Said:
        """The answer to a question about an image: the best of the checkpoint's answer list, exactly, or by open generation if it has none.

        Raises:
            BadImage: the image cannot be used. CheckpointError: the checkpoint answers no questions. ConfigError: unusable beams.
        """
        from vlm.tasks.vqa import answer_questions

        task = self.metadata.get("task")
        if task in ("pretraining", "captioning") and not self.answers:
            raise CheckpointError(
                f"this checkpoint was trained for {task} and answers no questions; "
                "give one that was trained with a config of configs/finetune/vqa."
            )
        self._need("language", "answer questions")
        generation = self._settings({} if beams is None else {"beams": beams})
        tokens = self.model.encode_image(self._tensor([image])).tokens
        if self._reads_question:
            ids = torch.tensor(
                [self.tokenizer.encode(clean_question(question), self.max_tokens)], device=self.model.device
            )
            view = self.model.text_view(ids, torch.ones_like(ids, dtype=torch.bool))
            states = self.model.fuse(view, self.model.memory(tokens, None, "fusion"))
            memory, prompt = self.model.memory(states, None, "decoder"), [self.tokenizer.cls_id]
        else:
            memory, prompt = self.model.memory(tokens, None, "decoder"), self._question_ids(question)
        start = torch.tensor([prompt], device=self.model.device)
        tree, answers = self._answer_tree or (None, [])
        ((text, probability),) = answer_questions(
            self.model,
            self.tokenizer,
            memory,
            start,
            torch.ones_like(start, dtype=torch.bool),
            tree,
            answers,
            generation,
            self.max_answer_tokens,
        )
        return Said(text if answers else tidy(text), probability)

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
    def _reads_question(self) -> bool:
        settings = self.model.config
        return settings.decoder == "separate" and settings.decoder_reads == "question"

    @cached_property
    def _answer_tree(self) -> "tuple[AnswerTree, list[str]] | None":
        from vlm.tasks.vqa import answer_tree

        return answer_tree(self.tokenizer, self.answers, self.max_answer_tokens) if self.answers else None

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

        _refuse_single(texts)
        prompt = self.prompt if self.metadata.get("task") == "pretraining" else ""  # there it began every text
        rows = [self.tokenizer.encode(clean_caption(text), self.max_tokens, prompt) for text in texts]
        for first in range(0, len(rows), batch_size):
            ids, mask = pad(rows[first : first + batch_size], self.tokenizer.pad_id)
            yield self.model.encode_text(ids.to(self.model.device), mask.to(self.model.device))

    def _question_ids(self, question: str) -> list[int]:
        from vlm.data.samples import QuestionEncoder

        encoder = QuestionEncoder(
            self.tokenizer, self.transform, False, "prompted", self.question_prompt, max_question_tokens=self.max_tokens
        )
        return encoder.prompt_ids(question)

    def _tensor(self, images: Sequence[ImageLike]) -> Tensor:
        return torch.stack([self.transform(decode_image(image)) for image in images]).to(self.model.device)

    def _batches(self, images: Sequence[ImageLike], size: int) -> Iterator[Tensor]:
        _refuse_single(images)
        return (self._tensor(images[first : first + size]) for first in range(0, len(images), size))


def _refuse_single(items: object) -> None:
    """A string is a sequence too, of its letters: nobody means that."""
    if isinstance(items, str | bytes | Path | Image.Image):
        shown = f"[{items!r}]" if isinstance(items, str | Path) else "[image]"
        raise TypeError(f"got a single {type(items).__name__}, expected a list; write {shown}.")


def _device(wanted: str | torch.device | None) -> torch.device:
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(wanted)
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError) as error:  # NotImplementedError is a RuntimeError
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"device {str(wanted)!r} cannot be used ({reason}); give cpu, or cuda where there is a GPU."
        ) from None
    return place
