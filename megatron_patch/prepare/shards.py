"""One shard: the usable samples of a range of the json, written and recorded, or kept from an earlier run."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from megatron_patch.data.image_headers import Rejected
from megatron_patch.prepare.images import Images
from megatron_patch.prepare.output import LocalOutput, NoOutput, ObjectOutput, ShardRecord
from megatron_patch.prepare.samples import Sample, Samples
from megatron_patch.prepare.tar import TarWriter
from megatron_patch.prepare.workers import Tell

MIN_SHARDS = 10
"""Energon splits by shard, 9 to 1 here: with fewer, the val split would be larger, or the train split empty."""
SAMPLES_PER_SHARD = 10_000
TELL_EVERY = 500


class TooManyRejected(ValueError):
    """More samples than may be; `args[0]`: those of this shard, as in `ShardRecord`."""


@dataclass(frozen=True)
class Job:
    """Everything that the shards of one conversion have in common."""

    samples: Samples
    images: Images
    output: LocalOutput | ObjectOutput | NoOutput
    max_rejected: int

    @property
    def num_shards(self) -> int:
        """How many there are."""
        return max(MIN_SHARDS, math.ceil(len(self.samples) / SAMPLES_PER_SHARD))

    def positions(self, shard: int) -> range:
        """A shard's part of the json: by position, so that a rejected sample moves no other one."""
        return range(*((shard + more) * len(self.samples) // self.num_shards for more in (0, 1)))

    def write(self, shard: int, tell: Tell) -> ShardRecord:
        """Write a shard, unless it is there as an earlier run of the same conversion recorded it."""
        name, positions = f"{shard:05d}.tar", self.positions(shard)
        record = self.output.read_record(name)
        # A sample that was rejected may have been mended since.
        if record is not None and all(self._why_rejected(position) for position, *_ in record.rejected):
            tell(len(positions))
            return record
        record = ShardRecord(shard=name, given=len(positions))
        with self.output.new_shard(name, record) as descriptor:
            tar = TarWriter(descriptor)
            for position in positions:
                if (position - positions.start) % TELL_EVERY == TELL_EVERY - 1:
                    tell(TELL_EVERY)
                try:
                    sample, images = self._read(position)
                except Rejected as why:
                    self._reject(record, position, why)
                    continue
                _add(tar, sample, images)
                _count(record, images)
            tar.close()
            record.size, record.crc32 = tar.size, tar.crc32
        tell(len(positions) % TELL_EVERY)
        return record

    def _read(self, position: int) -> tuple[Sample, list[bytes]]:
        sample = self.samples.get(position)
        return sample, [self.images.read(image) for image in sample.images]

    def _why_rejected(self, position: int) -> Rejected | None:
        try:
            self._read(position)
        except Rejected as why:
            return why
        return None

    def _reject(self, record: ShardRecord, position: int, why: Rejected) -> None:
        record.rejected.append((position, self.samples.name(position), str(why)))
        if len(record.rejected) > self.max_rejected:
            raise TooManyRejected(record.rejected)


def _add(tar: TarWriter, sample: Sample, images: list[bytes]) -> None:
    """The first image as `jpg`, whatever its format is, further ones as `1.jpg`, `2.jpg`, and the turns as `json`."""
    for number, image in enumerate(images):
        tar.add(f"{sample.key}.{number}.jpg" if number else f"{sample.key}.jpg", image)
    turns: list[dict[str, str]] = []
    for question, answer in sample.turns:
        turns += ({"from": "human", "value": question}, {"from": "gpt", "value": answer})
    tar.add(f"{sample.key}.json", json.dumps(turns).encode())


def _count(record: ShardRecord, images: list[bytes]) -> None:
    record.written += 1
    record.pictures += len(images)
    for image in images:
        record.picture_bytes += len(image)
        record.largest_picture = max(record.largest_picture, len(image))
