"""A checkpoint as ONNX graphs, for programs without PyTorch: `vlm export DIR --out DST --onnx`; `vlm.onnx.runner` runs them.

Letters: B images, S side in pixels, P image tokens, D their width, E width of the embeddings, n texts of an image, L new tokens, K tokens before
them, T texts, V vocabulary; of the attention C cross-attention layers, A layers, H heads, W width of a head.

    image.onnx    images uint8 (B, 3, S, S) -> tokens (B, P, D), image_embedding (B, E), memory (B, C, 2, H, P, W)
    text.onnx     ids int64 (T, L), mask bool (T, L) -> text_embedding (T, E)
    decoder.onnx  ids int64 (B, n, L), cache (B, n, A, 2, H, K, W), memory (B, C, 2, H, P, W)
                  -> logits (B, n, V), new_cache (B, n, A, 2, H, K + L, W)

B, n, L, K and T are free; K is 0 at first. Logits are of the token after the last one. The memory is what the decoder's cross-attention reads,
projected once. A model without the contrastive head has no embeddings, one without the language head no memory and no decoder.onnx.
"""

import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from vlm.errors import CheckpointError, UserError
from vlm.model.attention import CrossMemory
from vlm.model.pretrained import CONFIG, TOKENIZER, load_pretrained, replacing_folder
from vlm.model.text_cache import TextCache
from vlm.model.vision_language import VisionLanguageModel


def export_onnx(checkpoint: Path, out: Path) -> list[str]:
    """Writes `out`: the graphs that the checkpoint's heads allow, their weights beside them in fp32, tokenizer.json and config.json, which says how
    to use them. The names of the graphs.

    Raises:
        CheckpointError: the folder is incomplete, or its decoder reads the question. UserError: onnx is not installed, `out` exists or cannot be
            written.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError("ONNX graphs need onnx and onnxscript: pip install 'vlm-fusion[onnx]'.") from None
    if out.exists():
        raise UserError(f"{out} exists; give another --out, or remove it.")
    model, metadata = load_pretrained(checkpoint)
    if not (checkpoint / TOKENIZER).exists():
        raise CheckpointError(f"{checkpoint}: {TOKENIZER} is missing; copy the checkpoint again.")
    if model.config.decoder == "separate" and model.config.decoder_reads == "question":
        raise CheckpointError(
            f"{checkpoint}: its decoder reads the question, not the image; export one that makes captions or compares."
        )
    graphs = list(_graphs(model.eval()))
    with replacing_folder(out) as new:
        for graph in graphs:
            _write(graph, new / f"{graph.name}.onnx")
        shutil.copyfile(checkpoint / TOKENIZER, new / TOKENIZER)
        (new / CONFIG).write_text(json.dumps(metadata | {"onnx": _shapes(model)}, indent=1, ensure_ascii=False) + "\n")
    return [f"{graph.name}.onnx" for graph in graphs]


@dataclass(frozen=True)
class _Graph:
    """What torch.onnx.export takes. free: for each input its axes that have no fixed size."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: list[str]
    free: dict[str, dict[int, Dim]]


def _graphs(model: VisionLanguageModel) -> Iterator[_Graph]:
    """Examples are of sizes above 1 and all different, so that none is taken for a constant or for another."""
    batch, texts, length, seen = (
        Dim("batch"),
        Dim("texts"),
        Dim("length", max=model.config.text.max_positions),
        Dim("seen"),
    )
    compares, speaks = "contrastive" in model.config.heads, "language" in model.config.heads
    side, config = model.image_encoder.image_size, model.config.text
    images = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    encoder = _Image(model, compares, speaks)
    names = ["tokens", *(["image_embedding"] if compares else []), *(["memory"] if speaks else [])]
    yield _Graph("image", encoder, {"images": images}, names, {"images": {0: batch}})
    if compares:
        ids, mask = torch.full((5, 7), 5), torch.arange(7) < torch.tensor([7, 3, 4, 5, 6])[:, None]
        axes: dict[int, Dim] = {0: texts, 1: length}
        yield _Graph("text", _Text(model), {"ids": ids, "mask": mask}, ["text_embedding"], {"ids": axes, "mask": axes})
    if speaks:
        with torch.no_grad():
            memory = encoder(images)[-1]
        stack = model.text if model.decoder is None else model.decoder
        cache = torch.zeros(2, 3, stack.config.layers, 2, config.heads, 5, config.dim // config.heads)
        example = {"ids": torch.full((2, 3, 4), 5), "cache": cache, "memory": memory}
        free = {"ids": {0: batch, 1: texts, 2: length}, "cache": {0: batch, 1: texts, 5: seen}, "memory": {0: batch}}
        yield _Graph("decoder", _Decoder(model), example, ["logits", "new_cache"], free)


def _write(graph: _Graph, path: Path) -> None:
    with _quiet():
        program = torch.onnx.export(
            graph.module,
            kwargs=graph.inputs,
            input_names=list(graph.inputs),
            output_names=graph.outputs,
            dynamic_shapes=graph.free,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=True)  # one file of a graph holds 2 GiB at most


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's own advice, which is for those who write exporters."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _shapes(model: VisionLanguageModel) -> dict[str, Any]:
    """What a program that runs the graphs must know beside the checkpoint's own settings."""
    text = model.config.text
    stack = model.text if model.decoder is None else model.decoder
    return {
        "image_size": model.image_encoder.image_size,
        "cache": [stack.config.layers, 2, text.heads, text.dim // text.heads],
        "max_positions": text.max_positions,
        "decoder_first_token": model.config.first_token.get("decoder"),
    }


class _Image(nn.Module):
    def __init__(self, model: VisionLanguageModel, compares: bool, speaks: bool) -> None:
        super().__init__()
        self.model, self.compares, self.speaks = model, compares, speaks

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.model.encode_image(images)
        found = [features.tokens]
        if self.compares:
            found.append(features.embedding)
        if self.speaks:
            memory = self.model.memory(features.tokens, None, "decoder")
            pairs = [torch.stack(pair, 1) for pair in zip(memory.keys, memory.values, strict=True)]
            found.append(torch.stack(pairs, 1))
        return tuple(found)


class _Text(nn.Module):
    def __init__(self, model: VisionLanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        embedding = self.model.encode_text(ids, mask).embedding
        assert embedding is not None
        return embedding


class _Decoder(nn.Module):
    def __init__(self, model: VisionLanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, cache: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        stack = self.model.text if self.model.decoder is None else self.model.decoder
        keys, values = ([layer[:, part] for layer in memory.unbind(1)] for part in (0, 1))
        grown = _GrowingCache(cache.flatten(0, 1))
        offset = torch.full_like(ids[:, :, 0].flatten(), cache.shape[5])
        states = stack.embed(ids.flatten(0, 1), offset)
        states = stack(states, None, CrossMemory(keys, values), causal=True, cache=grown)
        logits = self.model.language_logits(states[:, -1]).unflatten(0, ids.shape[:2])
        return logits, torch.stack(grown.layers_read, 1).unflatten(0, ids.shape[:2])


class _GrowingCache(TextCache):
    """A cache that is given and handed on, where `TextCache` writes in place: a graph has no state of its own. past: (R, A, 2, H, K, W)."""

    def __init__(self, past: Tensor) -> None:
        super().__init__(len(past), 0, past.shape[1])
        self.length = past.shape[4]
        self.past = past
        self.layers_read: list[Tensor] = []

    def append(self, slot: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See `TextCache.append`."""
        grown = torch.cat([self.past[:, slot], torch.stack([keys, values], 1)], dim=3)
        self.layers_read.append(grown)
        return grown[:, 0], grown[:, 1]
