"""How many records a tar in a folder holds: by its headers, or by what img2dataset wrote beside it."""

import json
import logging
from pathlib import Path

from vlm.data.records import scan_shard
from vlm.errors import UserError

log = logging.getLogger(__name__)


def stated_count(tar: Path) -> int | None:
    """What img2dataset's NAME_stats.json says, which is true of a tar that nobody changed; None where there is none that can be used."""
    stats = tar.with_name(f"{tar.stem}_stats.json")
    try:
        count = int(json.loads(stats.read_text())["successes"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        count = -1
    if count < 0:
        log.warning("%s cannot be used; counting the records of %s instead", stats, tar.name)
        return None
    return count


def count_records(tar: Path) -> int:
    """The whole records by the headers; of a damaged tar those before the damage, which is said in the log.

    Raises:
        UserError: it cannot be read.
    """
    try:
        offsets, damage = scan_shard(tar)
    except OSError as error:
        raise UserError(f"{tar} cannot be read: {error.strerror or error}.") from None
    if damage:
        log.warning("%s is damaged (%s): its %d whole records are used", tar, damage, len(offsets) - 1)
    return len(offsets) - 1
