"""How a checkpoint answers a question about an image: by its classifier, the best of its answer list, or open generation."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vlm.config import GenerationConfig
from vlm.data.samples import question_prompt_ids
from vlm.data.text import Tokenizer, clean_question, tidy
from vlm.metrics.calibration import calibrated
from vlm.model.attention import CrossMemory
from vlm.model.ranking import AnswerTree
from vlm.model.vision_language import VisionLanguageModel
from vlm.tasks.vqa import answer_questions, answer_tree
from vlm.tasks.vqa_classify import best_answers, check_answers
from vlm.tasks.yes_no import YesNoJudge


@dataclass(frozen=True)
class Answerer:
    """A model with what the checkpoint says about questions. question_prompt: of the form `prompted`. whole_list: an answer's confidence is its share
    of the list's probability. temperature: that of the confidence. judge: of yes and no."""

    model: VisionLanguageModel
    tokenizer: Tokenizer
    answers: Sequence[str]
    question_prompt: str
    max_tokens: int
    max_answer_tokens: int
    whole_list: bool = False
    temperature: float = 1.0
    judge: YesNoJudge | None = None

    def __call__(self, image: Tensor, question: str, generation: GenerationConfig) -> tuple[str, float]:
        """Answer and confidence. image: (1, 3, H, W).

        Raises:
            CheckpointError: the answer list is not the classifier's.
        """
        features = self.model.encode_image(image)
        tokens = features.tokens
        if "classifier" in self.model.config.heads:
            check_answers(self.model, self.answers)
            ((text, probability),) = best_answers(self.model, self._fused(tokens, question), self.answers)
        else:
            memory, start = self._prompt(tokens, question)
            mask = torch.ones_like(start, dtype=torch.bool)
            tree, answers = self._tree or (None, [])
            found = answer_questions(
                self.model,
                self.tokenizer,
                memory,
                start,
                mask,
                tree,
                answers,
                generation,
                self.max_answer_tokens,
                self.whole_list,
            )
            if self.judge is not None:
                seen = self.judge.evidence(found, [question], features.embedding, memory, start, mask)
                found = self.judge.decide(found, seen)
            ((text, probability),) = found
        return text if self.answers else tidy(text), calibrated(probability, self.temperature)

    def prompt_ids(self, question: str) -> list[int]:
        """The tokens of the prompt in the form `prompted`."""
        return question_prompt_ids(self.tokenizer, self.question_prompt, question, self.max_tokens)

    def _prompt(self, tokens: Tensor, question: str) -> tuple[CrossMemory, Tensor]:
        """What decoding starts from: the memory, and the ids (1, L)."""
        settings, device = self.model.config, tokens.device
        if settings.decoder == "separate" and settings.decoder_reads == "question":
            start = [self.tokenizer.cls_id]
            return self.model.memory(self._fused(tokens, question), None, "decoder"), torch.tensor(
                [start], device=device
            )
        return self.model.memory(tokens, None, "decoder"), torch.tensor([self.prompt_ids(question)], device=device)

    def _fused(self, tokens: Tensor, question: str) -> Tensor:
        """(1, L, D) states of the question."""
        asked = clean_question(question, cleaning=self.tokenizer.question_cleaning)
        ids = torch.tensor([self.tokenizer.encode(asked, self.max_tokens)], device=tokens.device)
        view = self.model.text_view(ids, torch.ones_like(ids, dtype=torch.bool))
        return self.model.fuse(view, self.model.memory(tokens, None, "fusion"))

    @cached_property
    def _tree(self) -> tuple[AnswerTree, list[str]] | None:
        return answer_tree(self.tokenizer, self.answers, self.max_answer_tokens) if self.answers else None
