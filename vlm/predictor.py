"""What a user of the library calls: a checkpoint folder in, captions, answers, matches and embeddings out.

    predictor = Predictor.load("runs/photos/captioning/best")
    predictor.caption(["img.jpg"])[0].text

Imports stay light: a caption must not wait for what only training needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlm.config import GenerationConfig
from vlm.data.images import EvaluationTransform, decode_image
from vlm.data.text import Tokenizer, clean_caption, clean_question, tidy
from vlm.errors import CheckpointError
from vlm.model.beam_search import beam_search
from vlm.model.generation import Generated, Rules, sample
from vlm.model.pretrained import TOKENIZER, load_pretrained
from vlm.model.vision_language import TextFeatures, VisionLanguageModel

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
        self.model, self.tokenizer, self.metadata, self.answers = model.eval(), tokenizer, metadata, list(answers)
        self.transform = EvaluationTransform(model.image_encoder.image_size)
        known = {f.name for f in fields(GenerationConfig)}
        self.generation = GenerationConfig(**{k: v for k, v in metadata.get("generation", {}).items() if k in known})
        text = metadata.get("text", {})
        self.prompt: str = text.get("prompt", "")
        self.question_prompt: str = text.get("question_prompt", "question: {question} answer:")
        self.max_tokens: int = text.get("max_tokens", 32)
        self.max_answer_tokens: int = text.get("max_answer_tokens", 8)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device | None = None) -> "Predictor":
        """From a checkpoint folder. device: by default a GPU where there is one.

        Raises:
            CheckpointError: the folder is incomplete or damaged.
        """
        folder = Path(folder)
        model, metadata = load_pretrained(folder)
        if not (folder / TOKENIZER).exists():
            raise CheckpointError(f"{folder}: {TOKENIZER} is missing; copy the checkpoint again.")
        place = (
            torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
        )
        from vlm.checkpoint import read_answers

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
        """One caption for each image. beams, settings: in place of the checkpoint's (see GenerationConfig). sampled: drawn (nucleus 0.9) instead of searched.

        Raises:
            BadImage: an image cannot be used.
        """
        generation = replace(self.generation, **({"beams": beams} if beams else {}), **settings)
        start = self.tokenizer.encode("", prompt=self.prompt)[:-1]
        rules = self._rules(generation)
        generator = torch.Generator(self.model.device).manual_seed(seed)

        def decode(batch: Tensor) -> list[Generated]:
            memory = self.model.memory(self.model.encode_image(batch).tokens, None, "decoder")
            ids = torch.tensor([start] * len(batch), device=batch.device)
            if sampled:
                return sample(self.model, memory, ids, None, rules, top_p=0.9, generator=generator)
            return beam_search(self.model, memory, ids, None, rules, generation.beams, generation.length_penalty)

        found = [g for batch in self._batches(images, batch_size) for g in decode(batch)]
        return [Said(tidy(self.tokenizer.decode(g.ids)), g.confidence) for g in found]

    @torch.no_grad()
    def answer(self, image: ImageLike, question: str, beams: int | None = None) -> Said:
        """The answer to a question about an image: the best of the checkpoint's answer list, exactly, or by open generation if it has none.

        Raises:
            BadImage: the image cannot be used. CheckpointError: the checkpoint answers no questions.
        """
        from vlm.model.ranking import rank_answers
        from vlm.tasks.vqa import answer_tree

        settings = self.model.config
        tokens = self.model.encode_image(self._tensor([image])).tokens
        if settings.decoder == "separate" and settings.decoder_reads == "question":
            ids = torch.tensor(
                [self.tokenizer.encode(clean_question(question), self.max_tokens)], device=self.model.device
            )
            states = self.model.fuse(
                self.model.text_view(ids, torch.ones_like(ids, dtype=torch.bool)),
                self.model.memory(tokens, None, "fusion"),
            )
            memory, prompt = self.model.memory(states, None, "decoder"), [self.tokenizer.cls_id]
        else:
            memory, prompt = self.model.memory(tokens, None, "decoder"), self._question_ids(question)
        ids = torch.tensor([prompt], device=self.model.device)
        if self.answers:
            tree, kept = answer_tree(self.tokenizer, self.answers, self.max_answer_tokens)
            best = rank_answers(self.model, memory, ids, None, tree)[0][0]
            return Said(kept[best.answer], best.probability)
        rules = Rules(end_id=self.tokenizer.sep_id, max_length=self.max_answer_tokens, min_length=1)
        text = beam_search(self.model, memory, ids, None, rules, beams or self.generation.beams)[0]
        return Said(tidy(self.tokenizer.decode(text.ids)), text.probability)

    @torch.no_grad()
    def match(self, image: ImageLike, texts: Sequence[str]) -> list[float]:
        """The probability, by the matching head, that each text describes the image."""
        features = self._texts(texts)
        memory = self.model.memory(self.model.encode_image(self._tensor([image])).tokens, None, "fusion")
        logits = self.model.matching_logits(self.model.fuse(self.model.fusion_view(features), memory))
        probabilities: list[float] = logits.float().softmax(1)[:, 1].tolist()
        return probabilities

    @torch.no_grad()
    def embed_images(self, images: Sequence[ImageLike], batch_size: int = 16) -> Tensor:
        """(N, E) unit vectors on the CPU; their products with `embed_texts` are similarities."""
        return torch.cat(
            [self.model.encode_image(batch).embedding.cpu() for batch in self._batches(images, batch_size)]
        )

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(N, E) unit vectors on the CPU."""
        embedding = self._texts(texts).embedding
        assert embedding is not None
        return embedding.cpu()

    def _texts(self, texts: Sequence[str]) -> TextFeatures:
        from vlm.data.collate import pad

        ids, mask = pad(
            [self.tokenizer.encode(clean_caption(text), self.max_tokens) for text in texts], self.tokenizer.pad_id
        )
        return self.model.encode_text(ids.to(self.model.device), mask.to(self.model.device))

    def _rules(self, generation: GenerationConfig) -> Rules:
        return Rules(
            end_id=self.tokenizer.sep_id,
            max_length=generation.max_length,
            min_length=min(generation.min_length, generation.max_length - 1),
            repetition_penalty=generation.repetition_penalty,
            no_repeat_ngram=generation.no_repeat_ngram,
        )

    def _question_ids(self, question: str) -> list[int]:
        from vlm.data.samples import QuestionEncoder

        encoder = QuestionEncoder(
            self.tokenizer, self.transform, False, "prompted", self.question_prompt, max_question_tokens=self.max_tokens
        )
        return encoder.prompt_ids(question)

    def _tensor(self, images: Sequence[ImageLike]) -> Tensor:
        return torch.stack([self.transform(_open(image)) for image in images]).to(self.model.device)

    def _batches(self, images: Sequence[ImageLike], size: int) -> "map[Tensor]":
        parts = [images[i : i + size] for i in range(0, len(images), size)]
        load: Callable[[Sequence[ImageLike]], Tensor] = self._tensor
        return map(load, parts)


def _open(image: ImageLike) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    return decode_image(Path(image) if isinstance(image, str) else image)
