"""Captions in fp32, with int8 weights and by ONNX graphs, side by side: python benchmarks/inference.py [--images N] [--ways fp32 int8 onnx]

Each way captions the same photographs one at a time, in a process of its own: CIDEr-D, how many captions are those of fp32, seconds and processor
seconds a photograph after the first, and the process's memory: what loading the model added, and the most it ever had. Prints a Markdown table.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WAYS = ("fp32", "int8", "onnx")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Captions in fp32, with int8 weights and by ONNX graphs; a Markdown table."
    )
    parser.add_argument("--model", default=str(ROOT / "demos/model"), metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--shards", default=str(ROOT / "data/shards/flickr8k/val"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--onnx", metavar="DIR", help="graphs that are there already (default: they are made)")
    parser.add_argument("--images", type=int, default=300, metavar="N", help="default: %(default)s")
    parser.add_argument("--beams", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="default: all")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    for name in ("images", "beams", "threads"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} {getattr(given, name)}: give at least 1")
    if given.way is not None:
        print(json.dumps(measure(given)))
        return 0
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if "onnx" in given.ways and given.onnx is None:
            from vlm.onnx.export import export_onnx

            given.onnx = f"{folder}/graphs"
            export_onnx(Path(given.model), Path(given.onnx))
        for way in given.ways:
            command = [sys.executable, *sys.argv, "--way", way, *(["--onnx", given.onnx] if given.onnx else [])]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"inference: {way} ended with status {done.returncode}", file=sys.stderr)
                return 1
            found[way] = json.loads(done.stdout.splitlines()[-1])
    print(table(found))
    return 0


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown, of what `measure` found by way."""
    lines = [
        "| | CIDEr | captions as the first row's | s a photograph | processor s a photograph | loading adds | at most |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    base = next(iter(found.values()))["captions"]
    for way, values in found.items():
        same = sum(one == other for one, other in zip(values["captions"], base, strict=True))
        times = f"{values['seconds']:.3f} | {values['processor_seconds']:.3f}"
        memory = f"{values['added'] / 2**20:.0f} MiB | {values['peak'] / 2**20:.0f} MiB"
        lines.append(f"| {way} | {values['cider']:.2f} | {same} of {len(base)} | {times} | {memory} |")
    return "\n".join(lines)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """One way, in this process."""
    from vlm.data.index import load_index
    from vlm.data.scan import scan
    from vlm.metrics.captions import caption_scores

    if given.way != "onnx":
        import torch

        torch.set_num_threads(given.threads)
        import vlm.predictor
    else:
        import vlm.onnx.runner

    records = list(islice(scan([load_index(given.shards)]), given.images))
    if given.way == "int8":  # a library's size is not the weights'
        import torchao.quantization  # noqa: F401
    before = resident()
    if given.way == "onnx":
        runner = vlm.onnx.runner.OnnxRunner(given.onnx, given.threads)

        def say(image: bytes) -> str:
            return runner.caption([image], given.beams)[0]
    else:
        predictor = vlm.predictor.Predictor.load(given.model, "cpu", quantize="int8" if given.way == "int8" else None)

        def say(image: bytes) -> str:
            return predictor.caption([image], given.beams)[0].text

    captions = [say(records[0].image)]
    added = resident() - before
    start, processor = time.perf_counter(), time.process_time()
    captions += [say(record.image) for record in records[1:]]
    spent = time.perf_counter() - start, time.process_time() - processor
    keys = [record.key for record in records]
    scores = caption_scores(
        dict(zip(keys, (record.captions for record in records), strict=True)), dict(zip(keys, captions, strict=True))
    )
    count = max(len(records) - 1, 1)
    return {
        "captions": captions,
        "cider": 100 * scores.CIDEr,
        "seconds": spent[0] / count,
        "processor_seconds": spent[1] / count,
        "added": added,
        "peak": resident("VmHWM"),
    }


def resident(field: str = "VmRSS") -> float:
    """Bytes of this process's memory, now or (VmHWM) at its largest."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(status[field].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(main())
