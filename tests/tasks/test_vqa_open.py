"""Open answers: where the settings' penalties hold."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vlm.config import GenerationConfig
from vlm.data.samples import QuestionEncoder
from vlm.model.vision_language import VisionLanguageModel
from vlm.tasks.vqa import EncoderDecoderVqa, PromptedVqa


@pytest.mark.parametrize("penalty", [{"repetition_penalty": 100.0}, {"no_repeat_ngram": 1}])
@pytest.mark.parametrize("form", ["prompted", "encoder_decoder"])
def test_penalties_keep_an_answer_from_repeating_itself_where_the_question_is_no_prompt(
    scenes: Any, tiny_model: Callable[..., VisionLanguageModel], form: Any, penalty: dict[str, Any]
) -> None:
    """Where it is the decoder's prompt, its words would count as said: there they do not hold."""
    text = {"vocab_size": scenes.tokenizer.vocab_size, "layers": 2, "cross_attention": (0, 1)}
    decoder = {"decoder": "separate", "decoder_layers": 2, "decoder_reads": "question"}
    model = tiny_model(text=text, **(decoder if form == "encoder_decoder" else {}))
    (favourite,) = scenes.tokenizer.pieces("red")
    head = model.language_head
    for parameter in (head.norm.weight, head.norm.bias, head.bias):
        torch.nn.init.zeros_(parameter)
    # Whatever was asked or said, it has half of the probability: all of it, whose logarithm is 0, no penalty would lower.
    head.bias.data[favourite] = torch.tensor(float(len(head.bias))).log()
    kind = EncoderDecoderVqa if form == "encoder_decoder" else PromptedVqa
    encode = QuestionEncoder(scenes.tokenizer, scenes.transform, False, form, texts_per_image="all")
    batch = scenes.batch(encode, [0])

    def repeats(settings: GenerationConfig) -> list[bool]:
        task = kind(model, scenes.tokenizer, 0.0, settings, [], 10)
        return ["red red" in record["answer"] for record in task.predict(batch)]

    assert repeats(GenerationConfig(beams=2, repetition_penalty=1.0, no_repeat_ngram=0)) == [True] * 4
    settings = GenerationConfig(beams=2, **{"repetition_penalty": 1.0, "no_repeat_ngram": 0} | penalty)
    assert repeats(settings) == [form == "prompted"] * 4
