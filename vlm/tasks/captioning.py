"""Captioning: the decoder reads the image and continues the prompt."""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from vlm.config import GenerationConfig
from vlm.data.batch import Batch
from vlm.data.index import ShardSet
from vlm.data.scan import scan
from vlm.data.spellings import spellings
from vlm.data.text import Tokenizer, tidy
from vlm.errors import ConfigError
from vlm.metrics.captions import CaptionScores, CiderD, caption_scores
from vlm.metrics.interval import bootstrap
from vlm.metrics.ptb import tokenize_all
from vlm.model.attention import CrossMemory
from vlm.model.beam_search import best_texts
from vlm.model.generation import Decoder, Generated, Rules
from vlm.model.sampling import Policy, distinct_samples, sample
from vlm.model.vision_language import VisionLanguageModel
from vlm.objectives.captioning import Captioning
from vlm.objectives.objective import Objective
from vlm.objectives.self_critical import Reward, SelfCritical
from vlm.tasks.retrieval import embedded, recalls
from vlm.tasks.task import Record, Task


def generation_rules(settings: GenerationConfig, tokenizer: Tokenizer) -> Rules:
    """The settings in the form that decoding takes."""
    return Rules.of(settings, tokenizer.sep_id, partial(spellings, tokenizer))


def generate_captions(
    model: VisionLanguageModel, memory: CrossMemory, tokenizer: Tokenizer, prompt: str, settings: GenerationConfig
) -> list[Generated]:
    """One caption for each row of the images' decoder memory."""
    return [best for best, *_ in generate_several(model, memory, tokenizer, prompt, settings, 1)]


def generate_several(
    model: VisionLanguageModel,
    memory: CrossMemory,
    tokenizer: Tokenizer,
    prompt: str,
    settings: GenerationConfig,
    count: int,
    decoder: Decoder | None = None,
) -> list[list[Generated]]:
    """The `count` best captions that the search finds for each row of the images' decoder memory, best first. decoder: takes the model's steps in its
    place (compiled)."""
    ids, rules = caption_start(model, tokenizer, prompt, len(memory)), generation_rules(settings, tokenizer)
    penalty = settings.length_penalty
    return best_texts(decoder or model, memory, ids, None, rules, settings.beams, penalty, count=count)


def draw_captions(
    model: VisionLanguageModel,
    memory: CrossMemory,
    tokenizer: Tokenizer,
    prompt: str,
    settings: GenerationConfig,
    count: int,
    seed: int,
    decoder: Decoder | None = None,
) -> list[list[Generated]]:
    """`count` captions for each row of the images' decoder memory, drawn from `seed`; several are all different. decoder: as above.

    Raises:
        ConfigError: a seed that torch does not take, or an unusable policy or count.
    """
    if not -(2**63) <= seed < 2**64:
        raise ConfigError(f"seed={seed}: give a whole number from {-(2**63)} to {2**64 - 1}, which torch takes.")
    ids, rules = caption_start(model, tokenizer, prompt, len(memory)), generation_rules(settings, tokenizer)
    policy = Policy(temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
    # One generator for each image, so that its captions depend on nothing but itself and the seed.
    generators = [torch.Generator(ids.device).manual_seed(seed) for _ in ids]
    if count == 1:
        return [[text] for text in sample(decoder or model, memory, ids, None, rules, policy, generators)]
    return distinct_samples(decoder or model, memory, ids, None, rules, policy, count, generators)


def caption_start(model: VisionLanguageModel, tokenizer: Tokenizer, prompt: str, rows: int) -> Tensor:
    """(rows, L) ids that captions continue: the prompt behind the decoder's own first token, which the repetition penalty counts too."""
    return model.with_first_token(torch.tensor([first_ids(tokenizer, prompt)] * rows, device=model.device), "decoder")


def first_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """[CLS] and the prompt's tokens."""
    return tokenizer.encode(prompt)[:-1] if prompt else [tokenizer.cls_id]


def caption_reward(tokenizer: Tokenizer, sets: Iterable[ShardSet]) -> Reward:
    """CIDEr-D of produced captions, with the n-grams' weights of the training captions."""
    corpus = [record.captions for record in scan(sets) if record.captions]
    flat = [caption for captions in corpus for caption in captions]
    tokenized = dict(zip(flat, tokenize_all(flat), strict=True))
    metric = CiderD([tokenized[caption] for caption in captions] for captions in corpus)

    def reward(drawn: Sequence[Sequence[int]], references: Sequence[Sequence[str]]) -> list[float]:
        candidates = tokenize_all([tidy(tokenizer.decode(ids)) for ids in drawn])
        return [
            metric.score(candidate, [tokenized[caption] for caption in captions])
            for candidate, captions in zip(candidates, references, strict=True)
        ]

    return reward


class CaptioningTask(Task):
    """Fine-tuning for captions; BLEU, ROUGE-L and CIDEr-D by the official definitions."""

    metric = "CIDEr"

    def __init__(
        self,
        model: VisionLanguageModel,
        tokenizer: Tokenizer,
        label_smoothing: float,
        prompt: str,
        generation: GenerationConfig,
        self_critical: SelfCritical | None = None,
        captioning_weight: float = 1.0,
    ) -> None:
        """self_critical: learned from as well, with weight 1. captioning_weight: of the cross-entropy; 0 leaves it out."""
        objectives: dict[str, Objective] = {}
        weights: dict[str, float] = {}
        if captioning_weight > 0:
            objectives["captioning"], weights["captioning"] = Captioning(label_smoothing), captioning_weight
        if self_critical is not None:
            objectives["self_critical"], weights["self_critical"] = self_critical, 1.0
        super().__init__(model, objectives, weights)
        self.tokenizer, self.prompt, self.generation = tokenizer, prompt, generation

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Record]:
        """One record an image: its caption, confidence and references."""
        features = self.encode_image(batch.images)
        memory = self.model.memory(features.tokens, None, "decoder")
        captions = generate_captions(self.model, memory, self.tokenizer, self.prompt, self.generation)
        first = _first_rows(batch.texts.image, len(batch))
        compared = embedded(self.model, features, batch) if "contrastive" in self.objectives else [{}] * len(batch)
        return [
            {
                "key": key,
                "image_id": batch.sources[first[i]]["image"],
                "caption": tidy(self.tokenizer.decode(captions[i].ids)),
                "confidence": captions[i].confidence,
                "references": batch.sources[first[i]]["references"],
                **compared[i],
            }
            for i, key in enumerate(batch.keys)
        ]

    def evaluate(self, records: Iterable[Record]) -> dict[str, float]:
        """Bleu_1..4, ROUGE_L and CIDEr as pycocoevalcap gives them, in percent (CIDEr 100 is a score of 1.0); share of distinct captions;
        where the contrastive objective is kept on, the recalls of the embeddings too.
        """
        records = list(records)
        scores = _scores(records)
        names = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr")
        distinct = len({r["caption"] for r in records}) / len(records)
        return {
            **{name: 100 * getattr(scores, name) for name in names},
            "distinct": 100 * distinct,
            "images": float(len(records)),
            **(recalls(records).named() if "contrastive" in self.objectives else {}),
        }

    def intervals(self, records: Sequence[Record]) -> dict[str, tuple[float, float]]:
        """CIDEr's and ROUGE_L's; BLEU is no mean over images."""
        each = _scores(records).per_image.values()
        return {name: bootstrap([100 * scores[name] for scores in each]) for name in ("CIDEr", "ROUGE_L")}

    def official(self, records: Iterable[Record]) -> list[Record]:
        """COCO's prediction form; an image is named by its data set's own id, or by its record's key."""
        return [{"image_id": r["image_id"], "caption": r["caption"]} for r in records]


def _scores(records: Sequence[Record]) -> CaptionScores:
    """By place, not by key: tars may count theirs from the start again."""
    references = {place: record["references"] for place, record in enumerate(records)}
    return caption_scores(references, {place: record["caption"] for place, record in enumerate(records)})


def _first_rows(image: Tensor, count: int) -> list[int]:
    """For each image the row of its first text."""
    rows = [-1] * count
    for text, row in enumerate(image.tolist()):
        if rows[row] < 0:
            rows[row] = text
    return rows
