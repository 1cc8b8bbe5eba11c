"""Captions by ours and by transformers' BLIP, of the same images by the same weights: python benchmarks/captioning.py [--device D] [--precision bf16]

BLIP-base's size at 384 px, with random weights as large as trained ones, so that what is said depends on the image; images are patches of colour,
already resized and normalised. Every caption has `--tokens` tokens, so that both sides make equally many steps. First both caption some images
in fp64: unless all texts are equal, nothing is timed. Then each setting runs on both sides in turn, so that a change of the machine's speed meets
both; medians. "After the encoder" begins with the image tokens: their keys and values for cross-attention, and decoding. The peak of memory is that
of a process with one side alone. Prints Markdown tables. Results: RESULTS.md.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
SIDES = ("ours", "transformers")
TINY = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Captions of ours beside those of transformers' BLIP; Markdown tables."
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of both (default: %(default)s)")
    add("--batches", type=int, nargs="+", default=[1, 8, 64], metavar="N", help="images at a time (default: 1 8 64)")
    add("--beams", type=int, nargs="+", default=[1, 3], metavar="N", help="1 is greedy (default: 1 3)")
    add("--tokens", type=int, default=16, metavar="N", help="of each caption (default: %(default)s)")
    add("--runs", type=int, default=5, metavar="N", help="of each side (default: %(default)s)")
    add("--max-images", type=int, default=0, metavar="N", help="leave out larger batches (default: 0, none)")
    add("--compared", type=int, default=4, metavar="N", help="images compared in fp64 (default: %(default)s)")
    add("--compile", action="store_true", help="ours with its step compiled")
    add("--tiny", action="store_true", help="a model of no use but to try the benchmark itself")
    add("--part", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    for name in ("batches", "beams", "tokens", "runs", "compared"):
        values = getattr(given, name)
        for value in values if isinstance(values, list) else [values]:
            if value < 1:
                parser.error(f"--{name} {value}: give at least 1")
    given.batches = [batch for batch in given.batches if not given.max_images or batch <= given.max_images]
    if given.part is not None:
        print(json.dumps(memory(given)))
        return 0
    return run(given)


class Side(Protocol):
    """One of the two, on the same weights."""

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), normalised, to the image tokens (B, P, D)."""
        ...

    def decode(self, tokens: Tensor, beams: int) -> list[list[int]]:
        """The captions' tokens."""
        ...


def run(given: argparse.Namespace) -> int:
    """Compares, measures and prints; the exit status."""
    with torch.no_grad():
        pair = build(given, torch.float64)
        for beams in given.beams:
            texts = [said(side, draw(given, given.compared, torch.float64), beams) for side in pair.values()]
            same = sum(a == b for a, b in zip(*texts, strict=True))
            distinct = len({tuple(text) for text in texts[0]})
            print(
                f"beams {beams}, fp64: {same} of {given.compared} captions are equal, {distinct} are distinct  ",
                flush=True,
            )
            if same < given.compared or (given.compared > 1 and distinct == 1):
                print("captioning: nothing is timed", file=sys.stderr)
                return 1
        del pair
        for line in report(given, build(given, DTYPES[given.precision])):
            print(line, flush=True)
    return 0


def report(given: argparse.Namespace, pair: dict[str, Side]) -> Iterator[str]:
    """Lines of the tables."""
    place = torch.cuda.get_device_name() if given.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    yield ""
    yield f"{given.precision}, {place}, captions of {given.tokens} tokens, medians of {given.runs} runs."
    yield ""
    yield "| beams, batch | | images/s | latency, ms | after the encoder, ms | processor, ms | of it after the encoder, ms | equal captions |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for beams in given.beams:
        for batch in given.batches:
            images = draw(given, batch, DTYPES[given.precision])
            found: dict[str, list[Times]] = {name: [] for name in pair}
            texts: dict[str, list[list[int]]] = {}
            for number in range(given.runs + 1):
                for name, side in pair.items():
                    texts[name], times = timed(side, images, beams)
                    if number:  # the first warms up
                        found[name].append(times)
            same = sum(a == b for a, b in zip(*texts.values(), strict=True))
            yield from rows(f"{beams}, {batch}", batch, {n: Times.median(runs) for n, runs in found.items()}, same)
    yield ""
    yield from peaks(given)


@dataclass(frozen=True)
class Times:
    """Milliseconds of a batch by the clock, and of the processor (as this process used it): all, and of it after the encoder."""

    whole: float
    after: float
    whole_used: float
    after_used: float

    @staticmethod
    def median(runs: "list[Times]") -> "Times":
        """Of each value."""
        return Times(*(statistics.median(getattr(run, name) for run in runs) for name in Times.__annotations__))


def rows(setting: str, batch: int, times: dict[str, Times], same: int) -> Iterator[str]:
    """One for each side, and one of their ratios."""
    for name, own in times.items():
        figures = f"{1000 * batch / own.whole:.2f} | {own.whole:.0f} | {own.after:.0f} | {own.whole_used:.0f} | {own.after_used:.0f}"
        yield f"| {setting} | {name} | {figures} | {same} of {batch} |"
    ours, theirs = times.values()
    ratios = [f"{getattr(theirs, name) / getattr(ours, name):.2f} x" for name in Times.__annotations__]
    yield f"| {setting} | ratio | {ratios[0]} | {' | '.join(ratios)} | |"


def timed(side: Side, images: Tensor, beams: int) -> tuple[list[list[int]], Times]:
    """One batch's captions, and how long they took."""
    marks = [clocks(images.device)]
    tokens = side.encode(images)
    marks.append(clocks(images.device))
    texts = side.decode(tokens, beams)
    marks.append(clocks(images.device))
    (start, used), (encoded, encoded_used), (end, end_used) = marks
    return texts, Times(
        *(1000 * value for value in (end - start, end - encoded, end_used - used, end_used - encoded_used))
    )


def clocks(device: torch.device) -> tuple[float, float]:
    """Seconds by the clock and of the processor, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def said(side: Side, images: Tensor, beams: int) -> list[list[int]]:
    """Captions of a few images at a time, which fp64 has room for."""
    return [text for part in images.split(2) for text in side.decode(side.encode(part), beams)]


def peaks(given: argparse.Namespace) -> Iterator[str]:
    """The largest batch of the most beams, each side in a process of its own."""
    found = {}
    for side in SIDES:
        done = subprocess.run([sys.executable, *sys.argv, "--part", side], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"captioning: the memory of {side} ended with status {done.returncode}", file=sys.stderr)
            return
        found[side] = json.loads(done.stdout.splitlines()[-1])
    shown = ", ".join(
        f"{name} {values['gib']:.2f} GiB (loaded: {values['loaded']:.2f})" for name, values in found.items()
    )
    yield f"Peak of memory with {max(given.beams)} beams and {max(given.batches)} images: {shown}."


def memory(given: argparse.Namespace) -> dict[str, float]:
    """GiB of this process (on a GPU: allocated there) with one side, loaded and at most."""
    gpu, dtype = given.device == "cuda", DTYPES[given.precision]
    side = build(given, dtype)[given.part]
    gc.collect()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is counted from here

    def gib() -> float:
        status = Path("/proc/self/status").read_text()
        return torch.cuda.max_memory_allocated() / 2**30 if gpu else int(status.split("VmHWM:")[1].split()[0]) / 2**20

    loaded = gib()
    with torch.no_grad():
        side.decode(side.encode(draw(given, max(given.batches), dtype)), max(given.beams))
    return {"loaded": loaded, "gib": gib()}


def draw(given: argparse.Namespace, count: int, dtype: torch.dtype) -> Tensor:
    """(count, 3, H, W): patches of colour, normalised."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 3, 6, 6, generator=g)
    size = 32 if given.tiny else 384
    return torch.nn.functional.interpolate(coarse, size=(size, size)).to(given.device, dtype)


def build(given: argparse.Namespace, dtype: torch.dtype) -> dict[str, Side]:
    """Both, which share their weights."""
    reference = reference_model(given.tiny).to(given.device, dtype)
    return {"ours": Ours(reference, given), "transformers": Theirs(reference, given)}


def reference_model(tiny: bool) -> Any:
    """transformers' BLIP; as it starts weights, what is said hardly depends on the image."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    text = {"num_attention_heads": 12, "hidden_size": 768, "intermediate_size": 3072}
    vision = {"image_size": 384}
    if tiny:
        text = {**TINY, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60, "bos_token_id": 57}
        text |= {"sep_token_id": 58}
        vision = {**TINY, "num_attention_heads": 2, "image_size": 32}
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.4 * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


class Ours:
    """Converted as `vlm convert blip` does it."""

    def __init__(self, reference: Any, given: argparse.Namespace) -> None:
        from vlm.model.compiled_step import CompiledDecoder
        from vlm.model.convert.blip import CAPTIONING, from_blip_state_dict
        from vlm.model.convert.blip_config import from_blip_config
        from vlm.model.generation import Rules
        from vlm.model.vision_language import VisionLanguageModel

        foreign = {**reference.config.to_dict(), "architectures": [CAPTIONING.name]}
        config = from_blip_config(foreign, "the reference")
        state = from_blip_state_dict(reference.state_dict(), CAPTIONING, config, "the reference")
        with torch.device("meta"):
            self.model = VisionLanguageModel(config, load=False).eval()
        absent = {
            name: torch.zeros_like(t, device=given.device)
            for name, t in self.model.state_dict().items()
            if name not in state
        }
        self.model.load_state_dict(state | absent, assign=True)  # images come normalised: mean and std are not read
        device = torch.device(given.device)
        self.decoder = CompiledDecoder(self.model, device) if given.compile else self.model
        text = reference.config.text_config
        self.first, self.rules = (
            text.bos_token_id,
            Rules(end_id=text.sep_token_id, max_length=given.tokens, min_length=given.tokens - 1),
        )

    def encode(self, images: Tensor) -> Tensor:
        return self.model.encode_image(images).tokens

    def decode(self, tokens: Tensor, beams: int) -> list[list[int]]:
        from vlm.model.beam_search import beam_search

        memory = self.model.memory(tokens, None, "decoder")
        start = torch.full((len(tokens), 1), self.first, device=tokens.device)
        return [text.ids for text in beam_search(self.decoder, memory, start, None, self.rules, beams)]


class Theirs:
    """What `BlipForConditionalGeneration.generate` does, in its two parts."""

    def __init__(self, reference: Any, given: argparse.Namespace) -> None:
        self.model, self.tokens, self.text = reference, given.tokens, reference.config.text_config

    def encode(self, images: Tensor) -> Tensor:
        states: Tensor = self.model.vision_model(pixel_values=images)[0]
        return states

    def decode(self, tokens: Tensor, beams: int) -> list[list[int]]:
        start = torch.full((len(tokens), 1), self.text.bos_token_id, device=tokens.device)
        produced = self.model.text_decoder.generate(
            input_ids=start,
            eos_token_id=self.text.sep_token_id,
            pad_token_id=self.text.pad_token_id,
            encoder_hidden_states=tokens,
            encoder_attention_mask=torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device),
            num_beams=beams,
            do_sample=False,
            max_new_tokens=self.tokens,
            min_new_tokens=self.tokens - 1,
        )
        texts = [row[1:] for row in produced.tolist()]
        end = self.text.sep_token_id
        return [row[: row.index(end)] if end in row else row for row in texts]


if __name__ == "__main__":
    sys.exit(main())
