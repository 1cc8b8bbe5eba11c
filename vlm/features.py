"""A frozen image encoder's work, done once: its tokens of every training image, in a few augmentations, into files that training then reads.

Frozen, it gives the same tokens for the same pixels at each epoch; without it and its images a step is faster (benchmarks/cpu_training.py).

Letters: B images, V views (augmentations), P image tokens, D their width.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from vlm.config import Config
from vlm.data.collate import EncodedSample, EncodedText, SampleEncoder
from vlm.data.features import StoredFeatures, features_key
from vlm.data.images import TrainingTransform
from vlm.data.jpeg import decode_pixels
from vlm.data.loader import Loader
from vlm.data.records import Record
from vlm.data.samples import augmented
from vlm.data.shards import ShardInfo, ShardSet
from vlm.errors import ConfigError, UserError
from vlm.files import replacing
from vlm.model.image_encoder import ImageEncoder
from vlm.model.pretrained import save_tensors
from vlm.train.distributed import Ranks
from vlm.train.precision import DTYPES, autocast
from vlm.train.report import say

VERSION = 1  # of what the files hold
IMAGES = 16  # encoded together, each in all its views
RECORDS = 64 * IMAGES  # of a file, which is held in memory while it is made


def stored_features(
    config: Config, encoder: ImageEncoder, transform: TrainingTransform, sets: Sequence[ShardSet], ranks: Ranks
) -> StoredFeatures | None:
    """The features in the folder `data.features`, where the settings name one; what is missing is made first, a file at a time.

    Made from other weights, sizes or augmentations, they lie in a folder of their own beside. Every rank must ask, and makes its share.

    Raises:
        ConfigError: the encoder is trained. UserError: the folder has no room for them, or cannot be written.
    """
    data = config.data
    if data.features is None:
        return None
    trained = [name for name, p in encoder.backbone.named_parameters() if p.requires_grad]
    if trained:
        raise ConfigError(
            f"data.features={data.features} keeps what a frozen image encoder gives, but {len(trained)} of its tensors are trained "
            f"(backbone.{trained[0]}, ...); set model.image.frozen to true, or data.features to null."
        )
    assert data.views is not None
    folder = Path(data.features) / _fingerprint(config, encoder)
    # A set that is listed twice, to be seen twice as often, has its features once.
    parts = list(
        {
            part.file: part for shards in sets for shard in shards.shards for part in _parts(folder, shards, shard)
        }.values()
    )
    missing = {part.file for part in parts if not _whole(part.file)}
    # Ranks that look at different moments see different files missing, so what each makes is divided by all.
    mine = [part for part in parts[ranks.rank :: ranks.world] if part.file in missing]
    if ranks.main and missing:
        images = sum(part.records for part in parts if part.file in missing)
        _check_room(Path(data.features), encoder, images, data.views)
    if mine:
        encoder.to(ranks.device)
        _make(config, encoder, transform, data.views, mine, ranks)
    ranks.barrier()
    return StoredFeatures([part.file for part in parts], data.views)


@dataclass(frozen=True)
class _Part:
    """Records of one shard whose features share a file. shards: a set of that shard alone."""

    shards: ShardSet
    first: int
    records: int
    file: Path


def _parts(folder: Path, shards: ShardSet, shard: ShardInfo) -> Iterator[_Part]:
    digest = hashlib.sha256(f"{shards.root} {shards.source} {shard.samples} {shard.bytes}".encode()).hexdigest()[:8]
    for first in range(0, shard.samples, RECORDS):
        file = folder / f"{Path(shard.name).stem}-{digest}-{first:06}.safetensors"
        yield _Part(replace(shards, shards=(shard,)), first, min(RECORDS, shard.samples - first), file)


def _make(
    config: Config,
    encoder: ImageEncoder,
    transform: TrainingTransform,
    views: int,
    missing: Sequence[_Part],
    ranks: Ranks,
) -> None:
    """The files of these parts, with progress of this rank's."""
    encoder.train()  # as training runs it, with batch norms folded
    with tqdm(
        total=sum(part.records for part in missing),
        desc=f"image features, {views} views",
        unit=" images",
        disable=not ranks.main,
        mininterval=0.5,
    ) as bar:
        for part in missing:
            loader = Loader(
                [part.shards],
                _Views(transform, views, config.seed),
                IMAGES,
                workers=min(config.data.workers, 1),
                training=False,
                max_bad_fraction=1.0,  # training counts them, and decides
            )
            keys: list[int] = []
            tokens: list[Tensor] = []
            first = part.first // IMAGES
            for batch in loader.iterate(0, first, first - (-part.records // IMAGES)):
                tokens.append(_encode(config, encoder, batch.images.to(ranks.device)))
                keys += [source["features"] for source in batch.sources]
                bar.update(len(batch))
            bar.update(sum(loader.bad.values()))
            held = torch.cat(tokens) if tokens else torch.zeros(0, views, 1, 1)
            _write(part.file, {"tokens": held, "keys": torch.tensor(keys, dtype=torch.long)})


def _whole(file: Path) -> bool:
    """Whether it is there and can be read; another one is made anew."""
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    with replacing(file) as new:
        try:
            save_tensors(tensors, new)
        except SafetensorError as error:  # its own form of a full disk
            raise UserError(f"{file}: cannot be written ({error}); free space, or choose another folder.") from None


def _encode(config: Config, encoder: ImageEncoder, images: Tensor) -> Tensor:
    """(B, V, 3, S, S) -> (B, V, P, D) in half precision, that of the run where it has one."""
    precision = config.train.precision
    with torch.no_grad(), autocast(precision, images.device):
        tokens = encoder.frozen_tokens(images.flatten(0, 1))
    half = tokens.to(torch.float16 if precision == "fp32" else DTYPES[precision])
    return half.reshape(*images.shape[:2], *half.shape[1:]).cpu()


class _Views(SampleEncoder):
    """A record's image as (V, 3, S, S) uint8: as training draws it in its first V turns."""

    pad_id = 0

    def __init__(self, transform: TrainingTransform, views: int, seed: int) -> None:
        self.transform, self.views, self.seed = transform, views, seed

    def texts(self, record: Record, epoch: int) -> list[EncodedText]:  # noqa: ARG002
        """One that says whose features they are."""
        return [EncodedText([0], source={"features": features_key(record)})]

    def sample(self, record: Record, epoch: int, texts: list[EncodedText]) -> EncodedSample:  # noqa: ARG002
        """The image in all views. Raises BadImage."""
        pixels = decode_pixels(record.image, f"{record.source}/{record.key}", self.transform.at_least)
        drawn = [augmented(pixels, self.transform, self.seed, record, turn) for turn in range(self.views)]
        return EncodedSample(record.key, record.image_id, torch.stack(drawn), texts)


def _fingerprint(config: Config, encoder: ImageEncoder) -> str:
    """Of all that the features depend on but the images."""
    data, image = config.data, encoder.config
    settings = [VERSION, config.seed, data.views, data.crop_scale, data.flip, data.randaugment, config.train.precision]
    digest = hashlib.sha256(json.dumps([*settings, image.name, image.stages, encoder.image_size]).encode())
    for name, tensor in encoder.state_dict().items():
        if name.startswith(("backbone.", "mean", "std")):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            values = tensor.detach().cpu().contiguous() + 0  # averaged weights have 0 where others have -0
            digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_room(folder: Path, encoder: ImageEncoder, images: int, views: int) -> None:
    """Says what will be made, and refuses what the disk cannot hold."""
    size = 2 * images * views * encoder.tokens() * encoder.frozen_dim
    say(f"image features into {folder}: {images:,} images in {views} views, {size / 1e9:.3g} GB")
    existing = next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if size > free:
        raise UserError(
            f"data.features={folder}: the features need {size / 1e9:.3g} GB, {free / 1e9:.3g} GB are free; lower data.views, or choose "
            "another folder."
        )
