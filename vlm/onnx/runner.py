"""Captions and embeddings from the graphs of `vlm.onnx.export`, with onnxruntime and without PyTorch.

    runner = OnnxRunner("my-onnx")
    runner.caption(["img.jpg"])

Letters: B images, S side in pixels, n beams, L new tokens, N images or texts, E width of the embeddings. Captions and embeddings are those of
`vlm.predictor.Predictor`, greedy or by beam search.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm.config import GenerationConfig
from vlm.data.images import decode_image
from vlm.data.spellings import spellings
from vlm.data.text import Tokenizer, clean_caption, tidy
from vlm.errors import CheckpointError, ConfigError, UserError
from vlm.inputs import ImageLike, refuse_single
from vlm.model.limits import Limits, check_search
from vlm.onnx.search import search


class OnnxRunner:
    """A folder of graphs, ready to use."""

    def __init__(
        self, folder: str | Path, threads: int = 0, providers: Sequence[str] = ("CPUExecutionProvider",)
    ) -> None:
        """threads: of onnxruntime; 0 leaves the number to it. providers: onnxruntime's names of where it computes.

        Raises:
            CheckpointError: no such folder, or it was not made by `vlm export --onnx`. UserError: onnxruntime is not installed.
        """
        try:
            import onnxruntime
        except ImportError:
            raise UserError("running ONNX graphs needs onnxruntime: pip install 'vlm-fusion[onnx]'.") from None
        self.folder = Path(folder)
        try:
            self.settings: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            self.shapes: dict[str, Any] = self.settings["onnx"]
        except (OSError, ValueError, KeyError, TypeError):
            raise CheckpointError(
                f"{folder}: no ONNX graphs here; make them with vlm export DIR --out {folder} --onnx."
            ) from None
        self.tokenizer = Tokenizer.load(self.folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.graphs = {
            name: onnxruntime.InferenceSession(path, options, providers=list(providers))
            for name in ("image", "text", "decoder")
            if (path := self.folder / f"{name}.onnx").exists()
        }

    def caption(self, images: Sequence[ImageLike], beams: int | None = None, batch_size: int = 16) -> list[str]:
        """One caption for each image; beams: in place of the checkpoint's, 1 is greedy.

        Raises:
            BadImage: an image cannot be used. CheckpointError: the checkpoint makes no captions. ConfigError: unusable beams, or an unusable setting.
        """
        self._need("decoder", "make captions")
        names = {field.name for field in fields(GenerationConfig)}
        stored = {name: value for name, value in (self.settings.get("generation") or {}).items() if name in names}
        settings = GenerationConfig(**(stored | ({} if beams is None else {"beams": beams})))
        check_search(settings.beams, settings.length_penalty)
        limits = Limits.of(settings, self.tokenizer.sep_id, partial(spellings, self.tokenizer))
        start = self._start()
        longest, positions = len(start) + limits.max_length, self.shapes["max_positions"]
        if longest > positions:
            raise ConfigError(f"{longest} tokens do not fit max_positions={positions}; ask for at most that many.")
        found: list[list[int]] = []
        for batch in self._batches(images, batch_size):
            memory = self._run("image", ["memory"], images=batch)[0]
            layers, parts, heads, width = self.shapes["cache"]
            empty = np.zeros((len(batch), 1, layers, parts, heads, 0, width), dtype=memory.dtype)

            def step(ids: NDArray, cache: NDArray, memory: NDArray = memory) -> tuple[NDArray, NDArray]:
                logits, grown = self._run("decoder", ["logits", "new_cache"], ids=ids, cache=cache, memory=memory)
                return logits, grown

            found += search(step, start, empty, limits, settings.beams, settings.length_penalty)
        return [tidy(self.tokenizer.decode(ids)) for ids in found]

    def embed_images(self, images: Sequence[ImageLike], batch_size: int = 16) -> NDArray:
        """(N, E) unit vectors; their products with `embed_texts` are similarities.

        Raises:
            BadImage: an image cannot be used. CheckpointError: the checkpoint has no contrastive head.
        """
        self._need("text", "embed images")
        batches = self._batches(images, batch_size)
        return np.concatenate(
            [self._no_embeddings(), *(self._run("image", ["image_embedding"], images=batch)[0] for batch in batches)]
        )

    def embed_texts(self, texts: Sequence[str]) -> NDArray:
        """(N, E) unit vectors.

        Raises:
            CheckpointError: the checkpoint has no contrastive head.
        """
        self._need("text", "embed texts")
        refuse_single(texts)
        if len(texts) == 0:
            return self._no_embeddings()
        settings = self.settings.get("text", {})
        prompt = settings.get("prompt", "") if self.settings.get("task") == "pretraining" else ""
        rows = [self.tokenizer.encode(clean_caption(text), settings.get("max_tokens", 32), prompt) for text in texts]
        ids = np.full((len(rows), max(map(len, rows))), self.tokenizer.pad_id, dtype=np.int64)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = tokens
        mask = np.arange(ids.shape[1]) < np.array([len(tokens) for tokens in rows])[:, None]
        return self._run("text", ["text_embedding"], ids=ids, mask=mask)[0]

    def _no_embeddings(self) -> NDArray:
        """(0, E)."""
        (output,) = self.graphs["text"].get_outputs()
        return np.empty((0, output.shape[1]), dtype=np.float32)

    def _start(self) -> list[int]:
        """What captions continue: the prompt behind the decoder's own first token."""
        prompt = self.settings.get("text", {}).get("prompt", "")
        start = self.tokenizer.encode(prompt)[:-1] if prompt else [self.tokenizer.cls_id]
        first = self.shapes["decoder_first_token"]
        return start if first is None else [first, *start[1:]]

    def _need(self, graph: str, what: str) -> None:
        if graph not in self.graphs:
            raise CheckpointError(
                f"{self.folder} has no {graph}.onnx and cannot {what}; export a checkpoint whose heads allow it."
            )

    def _run(self, graph: str, outputs: list[str], **inputs: NDArray) -> list[NDArray]:
        result: list[NDArray] = self.graphs[graph].run(outputs, inputs)
        return result

    def _batches(self, images: Sequence[ImageLike], size: int) -> Iterator[NDArray]:
        """uint8 (B, 3, S, S), squashed to the square as `vlm.data.images.EvaluationTransform` does it."""
        refuse_single(images)
        side = (self.shapes["image_size"],) * 2

        def square(image: ImageLike) -> NDArray:
            return np.asarray(decode_image(image).resize(side, Image.Resampling.BICUBIC)).transpose(2, 0, 1)

        return (
            np.stack([square(image) for image in images[first : first + size]]) for first in range(0, len(images), size)
        )
