"""Time to the first caption from a cold start, beside `import torch, timm`: python benchmarks/startup.py --model DIR --image IMG [--runs 5]

Both in turn, so that a change of the machine's speed meets both; medians.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description="Time to the first caption from a cold start.")
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--image", required=True, metavar="IMG")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.runs < 1:
        parser.error(f"--runs {arguments.runs}: give at least 1")
    commands = {
        "import torch, timm": [sys.executable, "-c", "import torch, timm"],
        "demos/caption.py": [
            sys.executable,
            str(ROOT / "demos/caption.py"),
            arguments.image,
            "--model",
            arguments.model,
        ],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for run in range(arguments.runs + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"startup: {name} ended with status {done.returncode}: {done.stderr.strip()}", file=sys.stderr)
                return 1
            if run:  # the first pair fills the disk cache
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(
            f"{name:<20} median {medians[name]:.2f} s (from {min(values):.2f} to {max(values):.2f}, {len(values)} runs)"
        )
    print(f"difference {medians['demos/caption.py'] - medians['import torch, timm']:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
