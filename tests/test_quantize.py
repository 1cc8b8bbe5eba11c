"""int8 weights: near the same, in less memory, nothing else changed."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vlm.errors import ConfigError, UserError
from vlm.model.vision_language import VisionLanguageModel
from vlm.predictor import Predictor
from vlm.quantize import quantize


def held(model: VisionLanguageModel) -> int:
    """Bytes of its tensors."""
    total = 0
    for tensor in model.state_dict().values():
        inner = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else None
        total += tensor.nbytes if inner is None else sum(getattr(tensor, name).nbytes for name in inner)
    return total


@pytest.fixture
def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    return [Image.fromarray(pixels).resize((40, 30)) for pixels in noise]


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(1)  # of unit vectors


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_near_the_same_in_less_memory(
    checkpoint: Callable[..., Path], pictures: list[Image.Image], precision: torch.dtype
) -> None:
    pytest.importorskip("torchao")
    folder = checkpoint("pretraining", decoder="separate", decoder_layers=1)
    whole, small = Predictor.load(folder, "cpu"), Predictor.load(folder, "cpu", quantize="int8")
    assert held(small.model) < 0.6 * held(whole.model)  # words and positions stay
    texts = ["two dogs", "a man with a hat"]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        assert cosine(whole.embed_images(pictures), small.embed_images(pictures)).min() > 0.995
        assert cosine(whole.embed_texts(texts), small.embed_texts(texts)).min() > 0.995
        wanted, found = ([said.confidence for said in p.caption(pictures)] for p in (whole, small))
        assert found == pytest.approx(wanted, abs=0.1)
        assert found != wanted
    linear = [m for m in small.model.modules() if isinstance(m, nn.Linear)]
    kept = [m for m in linear if type(m.weight) is nn.Parameter]
    assert set(map(id, kept)) == {
        id(m)
        for name, m in small.model.named_modules()
        if isinstance(m, nn.Linear) and ("head" in name or ("projection" in name and "image_encoder" not in name))
    }


def test_what_cannot_be_done_is_said(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint("pretraining")
    with pytest.raises(ConfigError, match="quantize='int4' is not known"):
        Predictor.load(folder, "cpu", quantize="int4")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"pip install 'vlm-fusion\[int8\]'"):
        quantize(Predictor.load(folder, "cpu").model, "int8")
