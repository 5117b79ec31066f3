"""From LLaVA's json and images to tar shards that energon reads. Imports nothing heavy before it has to."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

from megatron_patch.config.dataset import Settings
from megatron_patch.files.meter import Meter
from megatron_patch.files.text import printable
from megatron_patch.prepare.images import Images, open_roots
from megatron_patch.prepare.lengths import Lengths, Measure
from megatron_patch.prepare.objects import is_url
from megatron_patch.prepare.output import LocalOutput, NoOutput, ObjectOutput, ShardRecord, make_manifest, open_output
from megatron_patch.prepare.own import check_apart
from megatron_patch.prepare.prepare import prepare_energon
from megatron_patch.prepare.samples import read_samples
from megatron_patch.prepare.shards import Job, TooManyRejected
from megatron_patch.prepare.workers import Tell, run


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of the samples: given = written + rejected."""

    records: list[ShardRecord]
    """The shards', in their order."""
    num_shards: int
    """Of the whole output; `records` are fewer with --part."""
    is_pairs: bool
    """VQASample, else conversations."""
    quarantine: str
    """File or object with one line per rejected sample: position in the json, id, why."""
    lengths: Lengths | None
    """Of the written samples, with --tokenizer."""

    @property
    def given(self) -> int:
        """Samples in the json, those of other parts apart."""
        return sum(record.given for record in self.records)

    @property
    def written(self) -> int:
        """Samples in the shards."""
        return sum(record.written for record in self.records)

    @property
    def rejected(self) -> list[tuple[int, str, str]]:
        """Position in the json, id, why."""
        return [line for record in self.records for line in record.rejected]


def convert(settings: Settings) -> Report:
    """Write the shards that `settings` describe, or those of one part.

    Their bytes depend on nothing but the input and `validate`: not on the number of processes or parts. A shard is
    there when it is whole, and is recorded; a run that was ended goes on after the last one. The folder appears under
    its name when all shards are there. Raises ValueError or OSError in one line: missing input, an existing output
    (unless `overwrite`), more rejected samples than allowed.
    """
    measure = Measure(settings.tokenizer) if settings.tokenizer else None
    samples = read_samples(settings.dir, settings.annotations)
    images = Images(open_roots(_roots(settings)), settings.validate)
    place = settings.output or f"{settings.dir.rstrip('/') or '/'}/wds"
    output = open_output(place, dry_run=settings.dry_run)
    if isinstance(output, LocalOutput):
        check_apart(place, settings.dir, [samples.place, *_roots(settings)])
    index, count = settings.share_of_shards
    job = Job(samples, images, output, int(settings.max_rejected_share * len(samples)))
    plan = {
        "annotations": samples.place.rpartition("/")[2],
        "sha256 of the annotations": samples.digest,
        "samples": len(samples),
        "sample type": "VQASample" if samples.is_pairs else "conversations",
        "keys": "id" if samples.has_id_keys else "position",
        "images": _plan_of_images(settings),
        "validate": settings.validate,
    }
    try:
        output.begin(plan, settings.overwrite, shared=settings.part is not None)
        shards = range(index, job.num_shards, count)
        records = _write_shards(job, shards, settings)
        report = Report(
            records=records,
            num_shards=job.num_shards,
            is_pairs=samples.is_pairs,
            quarantine=output.quarantine,
            lengths=_measure(measure, job, records, settings) if measure else None,
        )
        if not isinstance(output, NoOutput) and settings.part is None:
            _finish(output, report, plan, prepare=not settings.no_prepare)
        return report
    finally:
        output.end()


def _roots(settings: Settings) -> list[str]:
    if settings.images is not None:
        return [place.strip() for place in settings.images.split(",") if place.strip()]
    if is_url(settings.dir):
        return [settings.dir]
    usual = (settings.dir, os.path.join(settings.dir, "images"), os.path.join(settings.dir, "images.zip"))
    return [place for place in usual if os.path.exists(place)]


def _plan_of_images(settings: Settings) -> list[str] | None:
    """--images as seen from DIR, so that both may be moved together; None: those of DIR."""
    if settings.images is None:
        return None
    start = "/" if is_url(settings.dir) else settings.dir
    return [
        place if is_url(place) else os.path.relpath(os.path.realpath(place), os.path.realpath(start))
        for place in _roots(settings)
    ]


def _write_shards(job: Job, shards: range, settings: Settings) -> list[ShardRecord]:
    records: list[ShardRecord] = []
    num_samples = sum(len(job.positions(shard)) for shard in shards)
    answers = run(job.write, shards, settings.num_workers)
    try:
        with Meter(num_samples, "samples") as meter, contextlib.closing(answers):
            for answer in answers:
                if isinstance(answer, int):
                    meter.add(answer)
                    continue
                records.append(answer)
                if sum(len(record.rejected) for record in records) > job.max_rejected:
                    raise TooManyRejected([])
    except TooManyRejected as error:
        _stop(job, [*error.args[0], *(line for record in records for line in record.rejected)], settings)
    return sorted(records, key=lambda record: record.shard)


def _measure(measure: Measure, job: Job, records: list[ShardRecord], settings: Settings) -> Lengths | None:
    rejected = {position for record in records for position, *_ in record.rejected}

    def count(shard: int, tell: Tell) -> Counter[int]:
        usable = (position for position in job.positions(shard) if position not in rejected)
        return measure.count((job.samples.get(position).turns for position in usable), tell)

    shards = [int(record.shard.partition(".")[0]) for record in records]
    results = [answer for answer in run(count, shards, settings.num_workers) if not isinstance(answer, int)]
    counts = sum(results, Counter())
    if not counts:  # of a part without shards
        return None
    return Lengths(counts=counts, prompt_format=measure.prompt_format, num_image_tokens=measure.num_image_tokens)


def _stop(job: Job, rejected: list[tuple[int, str, str]], settings: Settings) -> None:
    rejected.sort()
    where = "" if settings.dry_run else f"{job.output.quarantine}: "
    job.output.list_rejected(_lines(rejected))
    raise ValueError(
        f"{where}{len(rejected)} samples rejected, more than --max-rejected-share {settings.max_rejected_share} "
        f"allows; the last one: {printable(rejected[-1][2])}"
    ) from None


def _finish(output: LocalOutput | ObjectOutput, report: Report, plan: dict[str, Any], *, prepare: bool) -> None:
    counts = {record.shard: record.written for record in report.records if record.written}
    output.list_rejected(_lines(report.rejected))
    if len(counts) < 2:
        rejected = report.rejected
        why = (
            f"; {output.quarantine} says why of {len(rejected)}, the last: {printable(rejected[-1][2])}"
            if rejected
            else ""
        )
        raise ValueError(
            f"{output.building}: {report.written} usable samples; a train and a val split need at least 2{why}"
        )
    if prepare:
        prepare_energon(output.building, counts, is_pairs=report.is_pairs)
    output.show(make_manifest(plan, report.records))


def _lines(rejected: list[tuple[int, str, str]]) -> list[str]:
    return [f"{position}\t{printable(name)}\t{printable(why)}\n" for position, name, why in rejected]
