"""Visual question answering by a decoder, in two forms, and which form a run takes (classification: `vqa_classify`).

encoder_decoder (ALBEF, BLIP): the question is fused with the image, the decoder attends to the question's states. prompted: the decoder reads the
image and the question is its prompt, so that one model makes captions and answers. Answers count by the share of annotators who gave them.

Letters: B images, T questions, A answers, L tokens, D width.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vlm.config import Config, GenerationConfig
from vlm.data.batch import Answers, Batch, answer_positions
from vlm.data.index import ShardSet
from vlm.data.scan import scan
from vlm.data.text import Tokenizer, clean_answer, tidy
from vlm.errors import ConfigError
from vlm.metrics.vqa import normalize_answer
from vlm.model.attention import CrossMemory
from vlm.model.beam_search import beam_search
from vlm.model.generation import Rules
from vlm.model.ranking import AnswerTree, rank_answers, share
from vlm.model.vision_language import ImageFeatures, VisionLanguageModel
from vlm.objectives.cached import CachedLoss
from vlm.objectives.captioning import Captioning, sequence_loss
from vlm.objectives.objective import Loss
from vlm.tasks.task import Record
from vlm.tasks.vqa_classify import ClassifyVqa
from vlm.tasks.vqa_task import VqaTask
from vlm.tasks.yes_no import YesNoJudge


def answer_list(sets: Iterable[ShardSet], minimum: int = 1, commonest: bool = False) -> list[str]:
    """The answers of the training questions that are different after the official normalisation, those of most questions first.

    Each stands as it is written most often: the official evaluator compares answers as they are where all annotators agree, and "two" is what the
    decoder learned if people write so. Each counts once a question; commonest: for its questions' commonest answer alone, as METER counts.
    """
    counts: Counter[str] = Counter()
    written: defaultdict[str, Counter[str]] = defaultdict(Counter)
    forms: dict[str, tuple[str, str]] = {}
    for record in scan(sets):
        for question in record.questions:
            given: Counter[str] = Counter()
            for answer in question.get("answers") or ():
                if answer not in forms:
                    forms[answer] = _forms(answer)
                name, form = forms[answer]
                if name:
                    given[name] += 1
                    written[name][form] += 1
            counts.update([min(given, key=lambda name: (-given[name], name))] if commonest and given else given.keys())
    names = [name for name, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])) if count >= minimum]
    return [min(written[name], key=lambda form: (-written[name][form], form)) for name in names]


def _forms(answer: str) -> tuple[str, str]:
    """The answer normalised, and how a model says it: cleaned, but where cleaning makes another answer of it ("#1")."""
    name, cleaned = normalize_answer(answer), clean_answer(answer)
    return name, cleaned if normalize_answer(cleaned) == name else name


def build_vqa(model: VisionLanguageModel, tokenizer: Tokenizer, config: Config, answers: Sequence[str]) -> VqaTask:
    """The task in the form that `config.vqa` names.

    Raises:
        ConfigError: the form needs another decoder, or the answer list is empty. CheckpointError: the classifier is of another answer list.
    """
    form, settings = config.vqa.form, config.model
    if form == "classify":
        return ClassifyVqa(model, answers)
    if form == "encoder_decoder" and (settings.decoder != "separate" or settings.decoder_reads != "question"):
        raise ConfigError("vqa.form=encoder_decoder needs model.decoder=separate and model.decoder_reads=question.")
    if form == "prompted" and settings.decoder == "separate" and settings.decoder_reads == "question":
        raise ConfigError(
            "vqa.form=prompted needs a decoder that reads the image; set model.decoder=separate and model.decoder_reads=image."
        )
    inference = config.vqa.inference
    if inference != "generate" and not answers:
        raise ConfigError(
            f"vqa.inference={inference} needs an answer list, and the training questions gave none; lower vqa.min_answer_count."
        )
    kind = EncoderDecoderVqa if form == "encoder_decoder" else PromptedVqa
    return kind(
        model,
        tokenizer,
        config.objectives.label_smoothing,
        config.generation,
        [] if inference == "generate" else answers,
        config.data.max_answer_tokens,
        whole_list=inference == "rank_all",
    )


def answer_tree(tokenizer: Tokenizer, answers: Sequence[str], max_tokens: int) -> tuple[AnswerTree, list[str]]:
    """The prefix tree over the answers' tokens and the answer that each of its leaves stands for (the first of those with equal tokens)."""
    kept: dict[tuple[int, ...], str] = {}
    for answer in answers:
        ids = tuple(tokenizer.encode(answer, max_tokens)[1:-1])
        if ids:
            kept.setdefault(ids, answer)
    return AnswerTree(list(kept), tokenizer.sep_id), list(kept.values())


class Vqa(VqaTask):
    """What both forms share: exact ranking over an answer list or open generation, and the official accuracy."""

    def __init__(
        self,
        model: VisionLanguageModel,
        tokenizer: Tokenizer,
        label_smoothing: float,
        generation: GenerationConfig,
        answers: Sequence[str],
        max_answer_tokens: int,
        whole_list: bool = False,
    ) -> None:
        super().__init__(model, {"captioning": Captioning(label_smoothing, per="texts")}, {"captioning": 1.0})
        self.tokenizer, self.generation, self.label_smoothing = tokenizer, generation, label_smoothing
        self.max_answer_tokens, self.whole_list = max_answer_tokens, whole_list
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
        return self.records(batch, self.decoded(*self.prompt(batch)))

    def decoded(self, memory: CrossMemory, ids: Tensor, mask: Tensor) -> list[tuple[str, float]]:
        """The decoder's answers to these prompts, and their probabilities."""
        return answer_questions(
            self.model,
            self.tokenizer,
            memory,
            ids,
            mask,
            self.tree,
            self.answers,
            self.generation,
            self.max_answer_tokens,
            self.whole_list,
        )


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
    whole_list: bool = False,
) -> list[tuple[str, float]]:
    """Answer and probability for each prompt: the best of the list if there is a tree, exactly; else by open generation, at least one token.

    whole_list: all of the list is scored, and the probability is the answer's share of the list's.
    """
    if tree is not None:
        found = rank_answers(model, memory, ids, mask, tree, k=len(tree) if whole_list else 1)
        return [(answers[ranked[0].answer], share(ranked) if whole_list else ranked[0].probability) for ranked in found]
    rules = Rules(end_id=tokenizer.sep_id, max_length=max_answer_tokens, min_length=min(1, max_answer_tokens - 1))
    if model.config.decoder == "separate" and model.config.decoder_reads == "question":
        # Penalties count the prompt's tokens. Where that is the question there are none: an answer may well repeat its words.
        penalty, size = generation.repetition_penalty, generation.no_repeat_ngram
        rules = replace(rules, repetition_penalty=penalty, no_repeat_ngram=size)
        ids = model.with_first_token(ids, "decoder")
    texts = beam_search(model, memory, ids, mask, rules, generation.beams, generation.length_penalty)
    return [(tidy(tokenizer.decode(text.ids)), text.probability) for text in texts]


class PromptedVqa(Vqa):
    """The loss is captioning's: the question is the prompt, masked from the loss. Texts are (question, answer) pairs in training.

    judge: of yes and no, set by an evaluation of a checkpoint that has both witnesses.
    """

    judge: YesNoJudge | None = None

    def prompt(self, batch: Batch) -> tuple[CrossMemory, Tensor, Tensor]:
        return self._prompt(self.encode_image(batch.images), batch)

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Record]:
        """One record a question; with a judge also the `evidence` for yes or no, where there is any."""
        if self.judge is None:
            return super().predict(batch)
        image = self.encode_image(batch.images)
        prompt = self._prompt(image, batch)
        answers, asked = self.decoded(*prompt), [source["question"] for source in batch.sources]
        evidence = self.judge.evidence(answers, asked, image.embedding[batch.texts.image], *prompt)
        records = self.records(batch, self.judge.decide(answers, evidence))
        return [r if seen is None else {**r, "evidence": seen} for r, seen in zip(records, evidence, strict=True)]

    def _prompt(self, image: ImageFeatures, batch: Batch) -> tuple[CrossMemory, Tensor, Tensor]:
        memory = self.model.memory(image.tokens, None, "decoder")
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
        weights, targets = batch.weight, batch.targets
        at = targets.answers if targets is not None else answer_positions(answers, weights)
        assert at is not None  # the loader finds them wherever there are answers
        weight = answers.weight * weights[answers.text]
        total, right, tokens = sequence_loss(self.model, states, answers.ids, weight, at, self.label_smoothing)
        return {"captioning": Loss(total, answers.weight.sum(), {"accuracy": (right, tokens)})}

    def prompt(self, batch: Batch) -> tuple[CrossMemory, Tensor, Tensor]:
        start = torch.full((len(batch.texts.ids), 1), self.tokenizer.cls_id, device=batch.texts.ids.device)
        return self._question_memory(batch), start, torch.ones_like(start, dtype=torch.bool)

    def _question_memory(self, batch: Batch) -> CrossMemory:
        states = self.question_states(batch)
        # The mask matters: peers let the decoder attend to padding, so that an answer depends on the batch's other questions.
        return self.model.memory(states, batch.texts.mask, "decoder")

    @staticmethod
    def _answers(batch: Batch) -> Answers:
        if batch.answers is None:
            raise ValueError(
                "the batch has no answers; the loader makes them in training with vqa.form=encoder_decoder."
            )
        return batch.answers
