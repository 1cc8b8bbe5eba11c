"""Samples a second of one core, from shards to batches, beside open_clip's pipeline and a bare loop: python benchmarks/loader.py [--photos 100]

Every contender makes 256 px crops, flipped half the time, and token ids of the same photographs, in one process with one thread; each run in a
process of its own, forked after the imports, all in turn. Timed is a second pass over all photographs, after one that warms the process up; a
pass begins as an epoch does, ours with drawing the order and scanning the shard's headers, open_clip's with opening it.
Shown first is how far the pixels of ours are from open_clip's for equal crops.

ours                    vlm.data.loader.Loader: uint8 batches, normalised on the device
ours, Pillow alone      the same where simplejpeg (the extra `fast`) is not installed
open_clip               the steps of open_clip_train.data.get_wds_dataset, from webdataset, as that function itself fails with webdataset 1.0 at
                        the end of a shard; its transform with a flip put in: float32 batches
bare loop               decode, crop and resize as ours does, of bytes in memory, without shards, texts and batches
bare loop, Pillow       the same as open_clip decodes, crops and resizes
"""

import argparse
import io
import multiprocessing
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
SIDE = 256
SCALE = (0.5, 1.0)


def main() -> int:
    parser = argparse.ArgumentParser(description="Samples a second of one core, beside open_clip's and a bare loop's.")
    parser.add_argument("--source", type=Path, default=ROOT / "data/shards/flickr8k/train", help="shards (%(default)s)")
    parser.add_argument(
        "--sizes", nargs="+", default=["640x480", "1600x1200"], metavar="WxH", help="of the photographs"
    )
    parser.add_argument("--photos", type=int, default=100, metavar="N", help="of each size (%(default)s)")
    parser.add_argument("--batch", type=int, default=20, metavar="B", help="(%(default)s)")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="of each contender (%(default)s)")
    given = parser.parse_args()
    if given.photos < given.batch or given.batch < 1 or given.runs < 1:
        parser.error("give at least one run, and as many photographs as a batch has")
    torch.set_num_threads(1)
    for text in given.sizes:
        width, height = map(int, text.split("x"))
        with tempfile.TemporaryDirectory() as folder:
            photos = write_photos(given.source, Path(folder), width, height, given.photos)
            print(
                f"{text}: {len(photos)} photographs of {sum(map(len, photos)) / len(photos) / 1000:.0f} kB, batches of {given.batch}"
            )
            print(
                f"mean absolute difference from open_clip's pixels, equal crops: {difference(photos[:20]):.3f} of 255"
            )
            show(measure(contenders(Path(folder), photos, given.batch), given.runs))
    return 0


def write_photos(source: Path, folder: Path, width: int, height: int, count: int) -> list[bytes]:
    """Makes a shard (KEY.jpg, KEY.txt) of the first photographs of `source`, resized and saved at quality 90; their bytes."""
    from vlm.data.index import load_index
    from vlm.data.scan import scan

    photos = []
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number, record in zip(range(count), scan([load_index(source)]), strict=False):
            image = (
                Image.open(io.BytesIO(record.image)).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
            )
            file = io.BytesIO()
            image.save(file, "JPEG", quality=90)
            photos.append(file.getvalue())
            for name, data in ((f"{number:06d}.jpg", photos[-1]), (f"{number:06d}.txt", record.captions[0].encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return photos


def difference(photos: list[bytes]) -> float:
    """Between ours and Pillow's full decoding and resizing of the same crop, whose corners lie on every reduced grid."""
    from torchvision.transforms.v2.functional import resized_crop

    from vlm.data.images import TrainingTransform
    from vlm.data.jpeg import decode_pixels

    transform, found = TrainingTransform(SIDE, SCALE, flip=False), []
    for data in photos:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        box = {
            name: side * share // 64 * 8
            for name, side, share in (
                ("top", image.height, 1),
                ("left", image.width, 0.5),
                ("height", image.height, 6.5),
                ("width", image.width, 7),
            )
        }
        box = {name: int(value) for name, value in box.items()}
        theirs = np.asarray(resized_crop(image, **box, size=[SIDE, SIDE], interpolation=Image.Resampling.BICUBIC), int)
        pixels = decode_pixels(data, at_least=transform.at_least)
        reduced = round(image.height / len(pixels))
        transform.crop.make_params = lambda _, box=box, reduced=reduced: {k: v // reduced for k, v in box.items()}
        found.append(np.abs(transform(pixels).permute(1, 2, 0).numpy() - theirs).mean())
    return float(np.mean(found))


def contenders(folder: Path, photos: list[bytes], batch: int) -> dict[str, Callable[[], Iterator[int]]]:
    """Each gives the sizes of its batches until the photographs end."""
    from vlm.data import jpeg
    from vlm.data.images import TrainingTransform

    transform = TrainingTransform(SIDE, SCALE)
    loader = our_loader(folder, batch)

    def ours() -> Iterator[int]:
        yield from (len(b.keys) for b in loader.iterate(0))

    def without() -> Iterator[int]:
        jpeg._simplejpeg = lambda: None  # type: ignore[assignment]  # in this run's own process
        yield from ours()

    def bare() -> Iterator[int]:
        for data in photos:
            transform(jpeg.decode_pixels(data, at_least=transform.at_least))
            yield 1

    found = {"ours": ours, "ours, Pillow alone": without, "open_clip": theirs(folder, batch)}
    found |= {"bare loop": bare, "bare loop, Pillow": lambda: bare_pillow(photos)}
    return found


def our_loader(folder: Path, batch: int) -> Any:
    from vlm.data.images import TrainingTransform
    from vlm.data.index import load_index
    from vlm.data.loader import Loader
    from vlm.data.samples import CaptionEncoder
    from vlm.data.scan import texts
    from vlm.data.text import train_wordpiece

    shards = load_index(folder)
    tokenizer = train_wordpiece(list(texts([shards])), 2000)
    encode = CaptionEncoder(tokenizer, TrainingTransform(SIDE, SCALE), True)
    return Loader([shards], encode, batch, streams=batch)


def theirs(folder: Path, batch: int) -> Callable[[], Iterator[int]]:
    """What open_clip_train.data.get_wds_dataset of open_clip 3.3 puts together for training, in its order and with its buffer."""
    import open_clip
    import webdataset as wds
    from torchvision.transforms import RandomHorizontalFlip

    transform = open_clip.image_transform(SIDE, is_train=True, aug_cfg={"scale": SCALE})
    transform.transforms.insert(1, RandomHorizontalFlip())
    tokenizer = open_clip.SimpleTokenizer()

    def batches() -> Iterator[int]:
        pipeline = wds.DataPipeline(
            wds.SimpleShardList(str(folder / "00000.tar")),
            wds.split_by_node,
            wds.split_by_worker,
            wds.tarfile_to_samples(),
            wds.shuffle(bufsize=5000, initial=1000),
            wds.select(lambda sample: "txt" in sample and "jpg" in sample),
            wds.decode("pilrgb"),
            wds.rename(image="jpg;png;jpeg;webp", text="txt"),
            wds.map_dict(image=transform, text=lambda text: tokenizer(text)[0]),
            wds.to_tuple("image", "text"),
            wds.batched(batch, partial=False),
        )
        for images, _ in wds.WebLoader(pipeline, batch_size=None, shuffle=False, num_workers=0):
            yield len(images)

    return batches


def bare_pillow(photos: list[bytes]) -> Iterator[int]:
    from torchvision.transforms import InterpolationMode, RandomHorizontalFlip, RandomResizedCrop

    crop, flip = RandomResizedCrop(SIDE, SCALE, interpolation=InterpolationMode.BICUBIC), RandomHorizontalFlip()
    for data in photos:
        image = flip(crop(Image.open(io.BytesIO(data)).convert("RGB")))
        torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        yield 1


def measure(found: dict[str, Callable[[], Iterator[int]]], runs: int) -> dict[str, list[dict[str, float]]]:
    """`runs` of each, in turn, after one that nobody counts."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in found}
    for number in range(runs + 1):
        for name, work in found.items():
            one = alone(work)
            if number:
                results[name].append(one)
    return results


def alone(work: Callable[[], Iterator[int]]) -> dict[str, float]:
    """Samples a second of the clock and of the processor in a process of its own, and the MiB by which that grew."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(False)

    def run() -> None:
        before = memory("VmRSS")
        sum(work())
        wall, cpu = time.perf_counter(), time.process_time()
        samples = sum(work())
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        there.send({"samples": samples, "wall": samples / wall, "cpu": samples / cpu, "mib": memory("VmHWM") - before})

    process = context.Process(target=run)
    process.start()
    there.close()
    result: dict[str, float] = here.recv()
    process.join()
    return result


def memory(name: str) -> float:
    """MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def show(results: dict[str, list[dict[str, float]]]) -> None:
    """Medians, and ours over each in every round: that of the processor's time is the steadier one where others use the machine too."""
    for name, runs in results.items():
        middle = {key: median(run[key] for run in runs) for key in ("wall", "cpu", "mib")}
        ratios = {key: [a[key] / b[key] for a, b in zip(results["ours"], runs, strict=True)] for key in ("wall", "cpu")}
        text = ", ".join(
            f"{median(ratios[k]):.2f} by {w} ({min(ratios[k]):.2f} to {max(ratios[k]):.2f})"
            for k, w in (("cpu", "processor"), ("wall", "clock"))
        )
        print(
            f"{name:<20} {middle['cpu']:.0f} samples/s of the processor, {middle['wall']:.0f} of the clock, +{middle['mib']:.0f} MiB; ours is {text}"
        )


if __name__ == "__main__":
    sys.exit(main())
