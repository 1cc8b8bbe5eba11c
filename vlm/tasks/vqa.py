"""Visual question answering in two forms.

encoder_decoder (ALBEF, BLIP): the question is fused with the image, the decoder attends to the question's states. prompted: the decoder reads the
image and the question is its prompt, so that one model makes captions and answers. Answers count by the share of annotators who gave them.

Letters: B images, T questions, A answers, L tokens, D width.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vlm.config import Config, GenerationConfig
from vlm.data.batch import Answers, Batch
from vlm.data.index import ShardSet
from vlm.data.scan import scan
from vlm.data.text import Tokenizer, clean_answer, tidy
from vlm.errors import ConfigError
from vlm.metrics.interval import bootstrap
from vlm.metrics.vqa import accuracy
from vlm.model.attention import CrossMemory
from vlm.model.beam_search import beam_search
from vlm.model.generation import Rules
from vlm.model.ranking import AnswerTree, rank_answers
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.cached import CachedLoss
from vlm.objectives.captioning import Captioning, sequence_loss
from vlm.objectives.objective import Loss
from vlm.tasks.task import Record, Task


def answer_list(sets: Iterable[ShardSet], minimum: int = 1) -> list[str]:
    """The cleaned answers of the training questions, each counted once a question, the commonest first."""
    counts: Counter[str] = Counter()
    for record in scan(sets):
        for question in record.questions:
            given = Counter(cleaned for answer in question.get("answers") or () if (cleaned := clean_answer(answer)))
            counts.update(given.keys())
    return [
        answer for answer, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])) if count >= minimum
    ]


def build_vqa(model: VisionLanguageModel, tokenizer: Tokenizer, config: Config, answers: Sequence[str]) -> "Vqa":
    """The task in the form that `config.vqa` names.

    Raises:
        ConfigError: the form needs another decoder, or the answer list is empty.
    """
    form, settings = config.vqa.form, config.model
    if form == "encoder_decoder" and (settings.decoder != "separate" or settings.decoder_reads != "question"):
        raise ConfigError("vqa.form=encoder_decoder needs model.decoder=separate and model.decoder_reads=question.")
    if form == "prompted" and settings.decoder == "separate" and settings.decoder_reads == "question":
        raise ConfigError(
            "vqa.form=prompted needs a decoder that reads the image; set model.decoder=separate and model.decoder_reads=image."
        )
    if config.vqa.inference == "rank" and not answers:
        raise ConfigError(
            "vqa.inference=rank needs an answer list, and the training questions gave none; lower vqa.min_answer_count."
        )
    kind = EncoderDecoderVqa if form == "encoder_decoder" else PromptedVqa
    return kind(
        model, tokenizer, config.objectives.label_smoothing, config.generation, answers, config.data.max_answer_tokens
    )


def answer_tree(tokenizer: Tokenizer, answers: Sequence[str], max_tokens: int) -> tuple[AnswerTree, list[str]]:
    """The prefix tree over the answers' tokens and the answer that each of its leaves stands for (the first of those with equal tokens)."""
    kept: dict[tuple[int, ...], str] = {}
    for answer in answers:
        ids = tuple(tokenizer.encode(answer, max_tokens)[1:-1])
        if ids:
            kept.setdefault(ids, answer)
    return AnswerTree(list(kept), tokenizer.sep_id), list(kept.values())


class Vqa(Task):
    """What both forms share: exact ranking over an answer list or open generation, and the official accuracy."""

    metric = "accuracy"

    def __init__(
        self,
        model: VisionLanguageModel,
        tokenizer: Tokenizer,
        label_smoothing: float,
        generation: GenerationConfig,
        answers: Sequence[str],
        max_answer_tokens: int,
    ) -> None:
        super().__init__(model, {"captioning": Captioning(label_smoothing, per="texts")}, {"captioning": 1.0})
        self.tokenizer, self.generation, self.label_smoothing = tokenizer, generation, label_smoothing
        self.max_answer_tokens = max_answer_tokens
        self.tree: AnswerTree | None = None
        self.answers: list[str] = []
        if answers:
            self.tree, self.answers = answer_tree(tokenizer, answers, max_answer_tokens)

    def prompt(self, batch: Batch) -> tuple[CrossMemory, Tensor, Tensor]:
        """What decoding an answer starts from: the memory (T rows), ids (T, L) and mask (T, L) of the prompts."""
        raise NotImplementedError

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Record]:
        """One record a question: its answer, confidence and annotators' answers."""
        answers = answer_questions(
            self.model,
            self.tokenizer,
            *self.prompt(batch),
            self.tree,
            self.answers,
            self.generation,
            self.max_answer_tokens,
        )
        images = batch.texts.image.tolist()
        return [
            {
                **source,
                "key": batch.keys[image],
                "answer": answer,
                "confidence": confidence,
                "references": source.get("answers", []),
            }
            for source, image, (answer, confidence) in zip(batch.sources, images, answers, strict=True)
        ]

    def evaluate(self, records: Iterable[Record]) -> dict[str, float]:
        """Official accuracy in percent, over all questions that have annotators' answers and by answer type."""
        scored: dict[str, list[float]] = {}
        for record in records:
            if not record["references"]:  # a test split, whose answers only its server has
                continue
            value = 100 * accuracy(record["answer"], record["references"])
            scored.setdefault("accuracy", []).append(value)
            if record.get("answer_type"):
                scored.setdefault(f"accuracy/{record['answer_type']}", []).append(value)
        scores = {name: sum(values) / len(values) for name, values in scored.items()}
        return {**scores, "questions": float(len(scored.get("accuracy", ())))}

    def intervals(self, records: Sequence[Record]) -> dict[str, tuple[float, float]]:
        """The accuracy's; an image is drawn with all its questions."""
        scored = [r for r in records if r["references"]]
        values = [100 * accuracy(r["answer"], r["references"]) for r in scored]
        return {"accuracy": bootstrap(values, [r["key"] for r in scored])} if scored else {}

    def official(self, records: Iterable[Record]) -> list[Record]:
        """The evaluation server's form."""
        return [{"question_id": r["question_id"], "answer": r["answer"]} for r in records]


def answer_questions(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    memory: CrossMemory,
    ids: Tensor,
    mask: Tensor,
    tree: AnswerTree | None,
    answers: Sequence[str],
    generation: GenerationConfig,
    max_answer_tokens: int,
) -> list[tuple[str, float]]:
    """Answer and probability for each prompt: the best of the list if there is a tree, exactly; else by open generation, at least one token."""
    if tree is not None:
        return [(answers[best[0].answer], best[0].probability) for best in rank_answers(model, memory, ids, mask, tree)]
    rules = Rules(end_id=tokenizer.sep_id, max_length=max_answer_tokens, min_length=min(1, max_answer_tokens - 1))
    if model.config.decoder == "separate" and model.config.decoder_reads == "question":
        # Penalties count the prompt's tokens. Where that is the question there are none: an answer may well repeat its words.
        penalty, size = generation.repetition_penalty, generation.no_repeat_ngram
        rules = replace(rules, repetition_penalty=penalty, no_repeat_ngram=size)
        ids = model.with_first_token(ids, "decoder")
    texts = beam_search(model, memory, ids, mask, rules, generation.beams, generation.length_penalty)
    return [(tidy(tokenizer.decode(text.ids)), text.probability) for text in texts]


class PromptedVqa(Vqa):
    """The loss is captioning's: the question is the prompt, masked from the loss. Texts are (question, answer) pairs in training."""

    def prompt(self, batch: Batch) -> tuple[CrossMemory, Tensor, Tensor]:
        memory = self.model.memory(self.encode_image(batch.images).tokens, None, "decoder")
        return memory.select(batch.texts.image), batch.texts.ids, batch.texts.mask


class EncoderDecoderVqa(Vqa):
    """Texts are questions; answers come apart and attend to the states of their question fused with the image."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The weights' sum: each question's answers sum to 1."""
        return {"captioning": self._answers(batch).weight.sum()}

    def forward(self, batch: Batch, cached: Mapping[str, CachedLoss] | None = None) -> dict[str, Loss]:  # noqa: ARG002
        """Fuses the questions once, then decodes all their answers."""
        answers = self._answers(batch)
        memory = self._question_memory(batch).select(answers.text)
        states = self.model.decode_states(answers.ids, memory)
        prompt = torch.ones_like(answers.text)
        total, right, tokens = sequence_loss(
            self.model, states, answers.ids, answers.mask, prompt, answers.weight, self.label_smoothing
        )
        return {"captioning": Loss(total, answers.weight.sum(), {"accuracy": (right, tokens)})}

    def prompt(self, batch: Batch) -> tuple[CrossMemory, Tensor, Tensor]:
        start = torch.full((len(batch.texts.ids), 1), self.tokenizer.cls_id, device=batch.texts.ids.device)
        return self._question_memory(batch), start, torch.ones_like(start, dtype=torch.bool)

    def _question_memory(self, batch: Batch) -> CrossMemory:
        image = self.model.memory(self.encode_image(batch.images).tokens, None, "fusion").select(batch.texts.image)
        states = self.model.fuse(self.model.text_view(batch.texts.ids, batch.texts.mask), image)
        # The mask matters: peers let the decoder attend to padding, so that an answer depends on the batch's other questions.
        return self.model.memory(states, batch.texts.mask, "decoder")

    @staticmethod
    def _answers(batch: Batch) -> Answers:
        if batch.answers is None:
            raise ValueError(
                "the batch has no answers; the loader makes them in training with vqa.form=encoder_decoder."
            )
        return batch.answers
