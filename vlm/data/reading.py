"""Reads and encodes the samples of streams, and fills the slots of bad ones."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from vlm.data.collate import EncodedSample, EncodedText, SampleEncoder, silenced
from vlm.data.order import EpochOrder, Place
from vlm.data.records import BadRecord, Record, ShardReader
from vlm.data.resampled import ResampledOrder
from vlm.errors import BadImage, ConfigError, UserError

Order = EpochOrder | ResampledOrder
# Samples tried for a filler where nothing good precedes; more bad ones in a row mean wrong data or settings.
LOOK_AHEAD = 200
# Records that are read, and their texts tokenized, before their images are decoded: between two decodings a text was measured to take several times
# as long as among other texts, probably for what decoding leaves of the processor's caches. More would hold more encoded images at one time.
TOGETHER = 32


@dataclass
class Slot:
    """One place of a global batch: its sample, or none in an evaluation, and what was wrong with its own."""

    place: int
    sample: EncodedSample | None
    cause: str | None = None
    message: str = ""


@dataclass
class _Begun:
    """A record, which pass over its set it is read in, and its texts: what comes before its image is decoded."""

    record: Record
    turn: int
    texts: list[EncodedText]


class SampleSource:
    """Reads and encodes the samples of some streams, and finds fillers."""

    def __init__(self, order: Order, encode: SampleEncoder, training: bool) -> None:
        self.order, self.encode, self.training = order, encode, training
        self.reader = order.reader if isinstance(order, ResampledOrder) else ShardReader()
        self._ahead: dict[int, int] = {}  # by stream: the last block whose shards were asked for
        self._fillers: dict[int, EncodedSample] = {}  # by stream: its last good sample

    def look_ahead(self, places: Sequence[int]) -> None:
        """Has the remote shards fetched that the streams of these places read from now on: those of the present block, then those of the next."""
        for more in (0, 1):
            for place in places:
                j, stream = divmod(place, self.order.streams)
                block = j // self.order.block + more
                if self._ahead.get(stream, -1) < block:
                    self._ahead[stream] = block
                    for shards, shard in self.order.shards_of(stream, block):
                        self.reader.fetch_ahead(shards.locate(shard))

    def slots(self, places: Sequence[int]) -> Iterator[Slot]:
        """The slots of these places, in their order."""
        for first in range(0, len(places), TOGETHER):
            part = places[first : first + TOGETHER]
            for place, begun in zip(part, [self._begun(place) for place in part], strict=True):
                yield self._slot(place, begun)

    def _begun(self, place: int) -> _Begun | UserError:
        """The record of a place with its texts, or why it cannot be used."""
        j, stream = divmod(place, self.order.streams)
        try:
            return self._read(self.order.place(stream, j))
        except ConfigError:
            raise
        except UserError as error:
            return error

    def _slot(self, place: int, begun: _Begun | UserError) -> Slot:
        j, stream = divmod(place, self.order.streams)
        try:
            if isinstance(begun, UserError):
                raise begun
            sample = self._sample(begun)
        except ConfigError:
            raise
        except UserError as error:
            record = self.order.place(stream, j)
            if not self.training:
                return Slot(place, None, _cause(error), _message(record, error))
            if stream not in self._fillers:
                self._fillers[stream] = self._find(stream, j, error)
            return Slot(place, silenced(self._fillers[stream]), _cause(error), _message(record, error))
        if self.training:
            self._fillers[stream] = sample
        return Slot(place, sample)

    def _read(self, place: Place) -> _Begun:
        record = self.reader.read(place.shards.locate(place.shard), place.shards.source, place.number)
        turn = place.turn  # a second pass in one epoch draws anew
        return _Begun(record, turn, self.encode.texts(record, turn))

    def _sample(self, begun: _Begun) -> EncodedSample:
        record = begun.record
        sample = self.encode.sample(record, begun.turn, begun.texts)
        if not sample.texts:
            raise BadRecord("no text", f"{record.source}/{record.key} has no text of the kind that is asked for.")
        return sample

    def _find(self, stream: int, j: int, error: UserError) -> EncodedSample:
        """The good sample before place j of a stream, else the next one, in this stream or those after it: wherever reading began, the same."""
        streams = self.order.streams
        before = ((stream, i) for i in range(j - 1, -1, -1))
        after = ((stream, i) for i in range(j + 1, self.order.length(stream)))
        others = (
            (s % streams, i) for s in range(stream + 1, stream + streams) for i in range(self.order.length(s % streams))
        )
        causes = Counter([_cause(error)])
        for where in chain(before, islice(chain(after, others), LOOK_AHEAD)):
            try:
                return self._sample(self._read(self.order.place(*where)))
            except ConfigError:
                raise
            except UserError as another:
                causes[_cause(another)] += 1
        found = ", ".join(f"{count} x {cause}" for cause, count in causes.most_common())
        message = _message(self.order.place(stream, j), error)
        raise UserError(
            f"{causes.total()} samples were tried and none can be used ({found}). For example: {message} Check the data and the settings."
        )


def _cause(error: UserError) -> str:
    if isinstance(error, BadRecord):
        return error.cause
    return "undecodable image" if isinstance(error, BadImage) else "refused by the encoder"


def _message(place: Place, error: UserError) -> str:
    return f"record {place.number} of {place.shard.name}: {error}"
