"""The compiled step gives what the plain one gives, however many rows are left, and is compiled once for each number of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from vlm.model.beam_search import beam_search
from vlm.model.compiled_step import CompiledDecoder
from vlm.model.generation import Rules, greedy
from vlm.model.vision_language import VisionLanguageModel

Make = Callable[..., Any]
END = 3
PROMPTS = torch.tensor([[2, 8, 9, 11, 6], [2, 7, 0, 0, 0], [2, 12, 12, 0, 0], [2, 0, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()


@pytest.mark.parametrize("search", [greedy, beam_search])
def test_texts_and_scores_are_equal(tiny_decoder: Make, search: Callable[..., Any]) -> None:
    """Prompts of several lengths leave holes in the cache, and rows leave the batch when they have ended."""
    model, rules = tiny_decoder(1), Rules(end_id=END, max_length=10, repetition_penalty=1.2)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = CompiledDecoder(model, torch.device("cpu"), backend=counter, fullgraph=True)
    for ids, mask in ((PROMPTS, MASK), (PROMPTS[:, :2].clone(), None)):
        expected = search(model, model.memory(), ids, mask, rules)
        found = search(compiled, model.memory(), ids, mask, rules)
        assert [text.ids for text in found] == [text.ids for text in expected]
        for one, other in zip(found, expected, strict=True):
            assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-10)
    assert len({len(text.ids) for text in expected}) > 1
    before = counter.frame_count
    assert 0 < before <= 8
    search(compiled, model.memory(), PROMPTS, MASK, rules)
    assert counter.frame_count == before, "nothing is compiled anew at another step or call"


@pytest.mark.gpu
@torch.no_grad()
def test_captured_steps_on_a_gpu_say_the_same(tiny_model: Callable[..., VisionLanguageModel]) -> None:
    model = tiny_model().eval().double().cuda()
    images = torch.randn(1, 3, model.image_encoder.image_size, model.image_encoder.image_size).double().cuda()
    ids, rules = torch.tensor([[2]], device="cuda"), Rules(end_id=END, max_length=12, min_length=8)
    memory = model.memory(model.encode_image(images).tokens, None, "decoder")
    compiled = CompiledDecoder(model, torch.device("cuda"))
    expected = beam_search(model, memory, ids, None, rules)
    for _ in range(3):  # the first compiles, the second captures, the third replays
        assert [t.ids for t in beam_search(compiled, memory, ids, None, rules)] == [t.ids for t in expected]
