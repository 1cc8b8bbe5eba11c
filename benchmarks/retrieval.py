"""Time and memory of retrieval looked at twice, and what 5,000 images x 25,000 captions would take: python benchmarks/retrieval.py [--shape NAME]

Random weights, image tokens and captions: neither time nor memory depends on what they say. Tokens lie in half precision in the host's memory. The
time of all pairs at a smaller size, over their number, is multiplied by the pairs of COCO's test set: the k nearest texts of each image and the k
nearest images of each text, the most there can be. Prints a Markdown table.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Image encoder, its size in pixels; width, heads, layers, cross-attention layers and vocabulary of the text.
SHAPES: dict[str, tuple[str, int, int, int, int, tuple[int, ...], int]] = {
    "blip_base": ("vit_base_patch16_224", 384, 768, 12, 12, tuple(range(12)), 30524),
    "compact": ("tf_efficientnet_lite2", 192, 384, 12, 5, (1, 2, 3, 4), 6114),
    "tiny": ("test_vit", 32, 32, 2, 2, (0, 1), 64),
}
FULL_IMAGES, FULL_CAPTIONS, FULL_K = 5000, 25000, 128


def main() -> int:
    parser = argparse.ArgumentParser(description="Time and memory of retrieval looked at twice; a Markdown table.")
    parser.add_argument("--shape", choices=SHAPES, default="compact", help="of the model (default: %(default)s)")
    parser.add_argument("--images", type=int, default=50, metavar="N", help="default: %(default)s")
    parser.add_argument("--captions", type=int, default=250, metavar="N", help="default: %(default)s")
    parser.add_argument("--k", type=int, nargs="+", default=[4, 16], metavar="N", help="default: 4 16")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", metavar="D", help="default: %(default)s")
    given = parser.parse_args()
    if min(given.images, given.captions, *given.k) < 1:
        parser.error("--images, --captions and --k: give at least 1")
    for line in report(given):
        print(line, flush=True)
    return 0


def report(given: argparse.Namespace) -> Iterator[str]:
    """Lines to print."""
    import numpy as np
    import torch

    from vlm.tasks.reranking import join_texts, rerank

    model = build(given.shape).to(given.device).eval()
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(
        8, 17, (given.captions,), generator=draw
    ).tolist()  # COCO's captions have 13 tokens on average
    texts = join_texts([([2, *[5] * (n - 2), 3], 1) for n in lengths], 0, model.device)
    similarity = np.random.default_rng(0).normal(size=(given.images, given.captions))
    side, device = model.image_encoder.image_size, torch.device(given.device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=given.precision == "bf16")
    with torch.no_grad(), autocast:
        pixels = torch.zeros(4, 3, side, side, dtype=torch.uint8, device=device)
        model.encode_image(pixels)
        encoding = seconds(lambda: model.encode_image(pixels)) / len(pixels)
        tokens = torch.randn(given.images, *model.encode_image(pixels).tokens.shape[1:], generator=draw).half()
        rerank(model, tokens[:2], texts, similarity[:2], 1, "matching")
        yield f"{given.shape}, {given.precision}, {device.type}, {torch.get_num_threads()} threads: {1000 * encoding:.1f} ms to encode an image"
        yield ""
        yield "| images x captions, k | pairs | s | ms a pair | more memory than before | 5,000 x 25,000, k = 128 |"
        yield "| --- | --- | --- | --- | --- | --- |"
        for k in given.k:
            before = memory(device)
            spent = seconds(lambda k=k: rerank(model, tokens, texts, similarity, k, "matching"))
            pairs = count_pairs(similarity, k)
            hours = (FULL_K * (FULL_IMAGES + FULL_CAPTIONS) * spent / pairs + FULL_IMAGES * encoding) / 3600
            more = (memory(device, peak=True) - before) / 2**20
            yield (
                f"| {given.images} x {given.captions}, {k} | {pairs} | {spent:.1f} | {1000 * spent / pairs:.2f} | {more:.0f} MiB "
                f"| {hours:.2f} h |"
            )
    yield ""
    for name, size in held(model, tokens.shape[1:]).items():
        yield f"- {name}: {size / 2**30:.2f} GiB"


def build(shape: str) -> Any:
    """A model with random weights."""
    import torch

    from vlm.config import ImageConfig, ModelConfig, TextConfig
    from vlm.model.vision_language import VisionLanguageModel

    torch.manual_seed(0)
    name, side, dim, heads, layers, cross, words = SHAPES[shape]
    text = TextConfig(
        vocab_size=words,
        dim=dim,
        heads=heads,
        layers=layers,
        feed_forward_dim=4 * dim,
        max_positions=64,
        cross_attention=cross,
    )
    image = ImageConfig(name=name, image_size=side, stages=4 if shape == "compact" else None)
    return VisionLanguageModel(ModelConfig(image=image, text=text, fusion="full"), load=False)


def held(model: Any, tokens: tuple[int, int]) -> dict[str, int]:
    """Bytes at the full size, computed; on the device in fp32."""
    text, count = model.config.text, tokens[0]
    matrix = FULL_IMAGES * FULL_CAPTIONS
    return {
        "host, image tokens of 5,000 images": FULL_IMAGES * count * tokens[1] * 2,
        "host, similarities (fp32), candidates, at most five matrices of scores (fp64)": matrix * (4 + 1 + 5 * 8),
        "device, weights": sum(p.nbytes for p in model.parameters()),
        "device, memories of 16 images": 16 * 2 * len(text.cross_attention) * count * text.dim * 4,
        "device, 256 pairs of 24 tokens, a feed-forward's states": 256 * 24 * 6 * text.dim * 4,
    }


def count_pairs(similarity: Any, k: int) -> int:
    """How many are looked at again."""
    import numpy as np

    chosen = np.zeros(similarity.shape, dtype=bool)
    for axis in (1, 0):
        np.put_along_axis(
            chosen, np.argsort(-similarity, axis).take(range(min(k, similarity.shape[axis])), axis), True, axis
        )
    return int(chosen.sum())


def seconds(act: Any) -> float:
    """Of wall clock on a GPU; on a CPU the processor's over the threads, which other programs disturb less."""
    import torch

    if torch.cuda.is_available():
        start = time.perf_counter()
        act()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    act()
    return (time.process_time() - start) / torch.get_num_threads()


def memory(device: Any, peak: bool = False) -> float:
    """Bytes that PyTorch holds on a GPU, or of this process; peak: the most since the last call without it."""
    import torch

    if device.type == "cuda":
        if not peak:
            torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated())
    if not peak:
        Path("/proc/self/clear_refs").write_text("5")  # the largest so far becomes the present size
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(status["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(main())
