"""Captions equal transformers' `generate` on random BLIP models, and do not depend on what else is in the batch."""

import itertools
import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BlipConfig, BlipForConditionalGeneration

from vlm.model.attention import CrossMemory
from vlm.model.beam_search import best_texts
from vlm.model.convert.blip import CAPTIONING, from_blip_state_dict
from vlm.model.convert.blip_config import from_blip_config
from vlm.model.generation import Generated, Rules
from vlm.model.vision_language import VisionLanguageModel

WORDS, START, END, LONGEST = 40, 38, 39, 12
SETTINGS: list[dict[str, Any]] = [
    {},
    {"length_penalty": 0.0, "prompt": (7, 9, 7)},
    {"length_penalty": 2.0, "min_length": 6},
    {"length_penalty": -1.0, "repetition_penalty": 1.3},
    {"repetition_penalty": 2.0, "prompt": (5, 6)},
    {"no_repeat_ngram": 2},
    {"no_repeat_ngram": 3, "min_length": 4, "length_penalty": 0.6, "repetition_penalty": 1.1},
    {"banned": tuple((i,) for i in range(4, 38, 3))},
    {"banned": tuple(itertools.product(range(4, 38, 2), range(5, 38, 2))), "prompt": (6,)},
]


@dataclass
class Pair:
    """The same random weights in both, fp64, and four images, normalised."""

    reference: Any
    model: VisionLanguageModel
    images: Tensor

    def ours(self, beams: int, count: int, settings: dict[str, Any]) -> list[list[int]]:
        tokens = self.model.encode_image(self.images).tokens
        found = search(self.model, self.model.memory(tokens, None, "decoder"), beams, count, settings)
        return [text.ids for texts in found for text in texts]

    def theirs(self, beams: int, count: int, settings: dict[str, Any]) -> list[list[int]]:
        prompt = settings.get("prompt", ())
        start = torch.tensor([[0, *prompt, END]]).repeat(len(self.images), 1)  # the first is replaced, the last cut off
        produced = self.reference.generate(
            pixel_values=self.images,
            input_ids=start,
            num_beams=beams,
            num_return_sequences=count,
            do_sample=False,
            max_new_tokens=LONGEST,
            min_new_tokens=settings.get("min_length", 0),
            repetition_penalty=settings.get("repetition_penalty", 1.0),
            no_repeat_ngram_size=settings.get("no_repeat_ngram", 0),
            bad_words_ids=[list(sequence) for sequence in settings.get("banned", ())] or None,
            **({"length_penalty": settings.get("length_penalty", 1.0)} if beams > 1 else {}),
        )
        texts = [row[1 + len(prompt) :] for row in produced.tolist()]
        return [text[: text.index(END)] if END in text else text for text in texts]


def search(
    model: VisionLanguageModel, memory: CrossMemory, beams: int, count: int, settings: dict[str, Any]
) -> list[list[Generated]]:
    own = ("min_length", "repetition_penalty", "no_repeat_ngram", "banned")
    rules = Rules(end_id=END, max_length=LONGEST, **{name: settings[name] for name in own if name in settings})
    ids = torch.tensor([[START, *settings.get("prompt", ())]]).repeat(len(memory), 1)
    penalty = settings.get("length_penalty", 1.0)
    return best_texts(model, memory, ids, None, rules, beams, penalty, count=count)


def make_pair(seed: int) -> Pair:
    """Weights as large as trained ones, so that what is said depends on the image; captions end by themselves, some early."""
    torch.set_num_threads(1)  # faster for shapes as small as these
    torch.manual_seed(seed)
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"vocab_size": WORDS, "max_position_embeddings": 24, "bos_token_id": START, "sep_token_id": END}
    vision = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6, "num_attention_heads": 2}
    reference = BlipForConditionalGeneration(
        BlipConfig(text_config=text, vision_config=vision | {"image_size": 32})
    ).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            norm = name.endswith("weight") and "norm" in name.lower()
            # With words of like size most captions would say one word again and again.
            std = 0.9 if "position_embeddings" in name else 0.15 if "word_embeddings" in name else 0.3
            parameter.normal_(mean=1.0 if norm else 0.0, std=std)
        reference.text_decoder.cls.predictions.bias[END] += 1.0
    foreign = {**json.loads(reference.config.to_json_string(use_diff=False)), "architectures": [CAPTIONING.name]}
    config = from_blip_config(foreign, "the reference")
    model = VisionLanguageModel(config, load=False).eval()
    state = from_blip_state_dict(reference.state_dict(), CAPTIONING, config, "the reference")
    model.load_state_dict({**model.state_dict(), **state})
    return Pair(reference.double(), model.double(), torch.randn(4, 3, 32, 32, dtype=torch.float64))


@torch.no_grad()
def same(seed: int, chosen: list[dict[str, Any]]) -> None:
    pair = make_pair(seed)
    said = set()
    for settings in chosen:
        for beams, count in ((1, 1), (3, 1), (3, 3)):
            ours = pair.ours(beams, count, settings)
            assert ours == pair.theirs(beams, count, settings), (seed, beams, count, settings)
            said.update(map(tuple, ours))
    assert len(said) > 2, "captions that are all alike show nothing"


@pytest.mark.parametrize("seed", range(8, 14))
def test_captions_equal_transformers_generate(seed: int) -> None:
    """Each with a third of the settings; together all, twice."""
    same(seed, SETTINGS[seed % 3 :: 3])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 150))
def test_captions_of_fifty_models_equal_transformers_generate(seed: int) -> None:
    same(seed, SETTINGS)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, SETTINGS[6]], ids=["plain", "penalties"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
def test_captions_do_not_depend_on_the_batch(
    settings: dict[str, Any], beams: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Alone, together, in another order, beside other images, with a memory padded to another length: the same texts, scores within the tolerance."""
    pair = make_pair(14)
    model, g = pair.model.to(dtype), torch.Generator().manual_seed(3)
    images = torch.randn(9, 3, 32, 32, dtype=dtype, generator=g)

    def run(rows: list[int], padding: int = 0) -> dict[int, Generated]:
        tokens = model.encode_image(images[rows]).tokens
        mask = None
        if padding:
            mask = torch.arange(tokens.shape[1] + padding).expand(len(rows), -1) < tokens.shape[1]
            tokens = torch.cat([tokens, torch.randn(len(rows), padding, tokens.shape[2], dtype=dtype)], dim=1)
        found = search(model, model.memory(tokens, mask, "decoder"), beams, 1, settings)
        return {row: text for row, (text,) in zip(rows, found, strict=True)}

    together = run(list(range(9)))
    assert len({tuple(text.ids) for text in together.values()}) > 2
    for rows, padding in (([8, 3, 5, 0, 1, 7, 2, 6, 4], 0), ([4], 0), ([0, 1], 0), ([6, 6, 2], 0), ([0, 5, 8], 3)):
        for row, text in run(rows, padding).items():
            assert text.ids == together[row].ids
            assert text.score == pytest.approx(together[row].score, abs=tolerance)
            assert text.key == pytest.approx(together[row].key, abs=tolerance)
