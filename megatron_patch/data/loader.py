"""Loaders of energon datasets whose position can be saved, and restored only where it means the same."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import struct
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from megatron.energon import WorkerConfig, load_dataset
from megatron.energon.epathlib import EPath
from megatron.energon.errors import FatalSampleError
from megatron.energon.metadataset.loader_interface import LoadedDatasetList

from megatron_patch.config.train import MOCK, Config
from megatron_patch.data import position, readers
from megatron_patch.data.dataset_code import DatasetCodeError, guarded
from megatron_patch.data.failures import Failures
from megatron_patch.data.mock import BatchLoader, MockLoader
from megatron_patch.data.private_api import StartedLoader
from megatron_patch.data.task_encoder import Batch, LlavaTaskEncoder
from megatron_patch.families.sizes import Llava
from megatron_patch.files.names import MANIFEST
from megatron_patch.files.text import printable

logger = logging.getLogger(__name__)

SAMPLES_PER_SLICE = 100
"""Neighbours in a shard that are read one after another; slices come in random order."""
SHARES = ("data-parallel size", "num_workers")
"""How many processes share the reading: these may differ on resume where a position can be redistributed."""
PREPARE = (
    "prepare one with: python toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py DIR, "
    "or energon prepare --non-interactive"
)


class Loader(StartedLoader[Batch]):
    """An endless energon loader that knows what its position means. Its workers live as long as its one iterator."""

    def __init__(
        self, dataset: Any, failures: Failures, fingerprint: dict[str, Any], ahead: int, seconds: float, size: int
    ) -> None:
        """`ahead`: batches that each of its workers reads before they are asked for; `seconds` that one may take.

        `size`: bytes of a batch's pixels, with an image in each sample.
        """
        super().__init__(dataset, checkpoint_every_sec=10, prefetch_factor=ahead)
        self.failures = failures
        self.fingerprint = fingerprint
        self.is_closed = False
        self.shared_memory = (ahead * self.num_workers + 1) * size if self.num_workers else 0
        """Bytes that what was read ahead, and the batch that is trained, take of it."""
        self._killed_by: int | None = None
        self._seconds = seconds
        if self.num_workers:
            assert self.worker_init_fn is not None, "energon's"
            self.worker_init_fn = functools.partial(readers.begin, self.worker_init_fn, failures.dataset)
        queues: list[Any] = [  # what energon asks of them
            readers.Answers(answers, self, failures.dataset, number, seconds)
            for number, answers in enumerate(self.result_queues)
        ]
        self.result_queues = queues
        # For its workers' seeds torch draws from this, not from the numbers that a model begins with.
        self.generator = torch.Generator()
        # Energon always pins, which without a device is only a warning.
        self.pin_memory = torch.cuda.is_available()

    def __iter__(self) -> Generator[Batch, None, None]:
        """The workers begin to read now, not when the first batch is asked for."""
        self.begin()
        return self._batches(super().__iter__())

    def begin(self) -> None:
        """Start the workers, which begin to read. Raises ValueError where that cannot be."""
        assert not self.is_closed, "its workers ended"
        try:
            self.start_workers()
        except OSError as error:
            raise ValueError(
                f"{self.failures.dataset}: a process to read it cannot be started ({error}); use fewer --num-workers"
            ) from error

    def _batches(self, batches: Iterator[Batch]) -> Generator[Batch, None, None]:
        try:
            while True:
                with readers.waiting(readers.Wait(self.failures.dataset, "no batch", self._seconds, self._awaited)):
                    batch = next(batches)
                yield batch
        except FatalSampleError as error:
            # From a worker it arrives with a traceback before its text.
            raise ValueError(str(error).splitlines()[-1].rpartition("FatalSampleError: ")[2]) from error
        except Exception as error:
            self.raise_if_killed(error)
            # Not one sample's: of a shard. From a worker, the last line says what it was.
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise ValueError(f"{self.failures.dataset}: reading failed ({reason}); convert the data again") from error
        finally:
            self.close()

    def raise_if_killed(self, error: Exception) -> None:
        """Raise ValueError where a signal ended a worker: then `error`, whatever it says, follows from that."""
        if not self.is_closed:
            self._note_killed(self.workers)
        if self._killed_by is not None:
            raise ValueError(readers.of_killed(self.failures.dataset, self._killed_by)) from error

    def _note_killed(self, workers: Iterable[BaseProcess]) -> None:
        for worker in workers:
            self._killed_by = self._killed_by or readers.was_killed(worker)

    def close(self) -> None:
        """End the workers."""
        if self.num_workers and self.has_started and not self.is_closed:
            # Seen before they end: what reads in a thread may close this while the main one looks for the reason.
            self._note_killed(worker for worker in self.workers if (worker.exitcode or 0) < 0)
            self.end_workers()
            self.is_closed = True

    def _awaited(self) -> tuple[int, int]:
        """Number and process id of the reader whose batch is next."""
        if not self.workers:
            return 0, os.getpid()
        number = self.next_worker
        pid = self.workers[number].pid
        assert pid is not None, "it was started"
        return number, pid


@contextlib.contextmanager
def reading(loader: BatchLoader | None) -> Iterator[Iterator[Batch]]:
    """`loader`'s batches, and nothing without one. What fails because a worker was killed says so.

    The workers end with it.
    """
    try:
        yield iter(()) if loader is None else iter(loader)
    except Exception as error:
        # Torch raises in the midst of anything when one ends, and something else may have made its own of that.
        if loader is not None:
            loader.raise_if_killed(error)
        raise
    finally:
        if loader is not None:
            loader.close()


def train_loader(config: Config, llava: Llava, *, rank: int, world_size: int) -> BatchLoader:
    """Endless shuffled micro batches of the train split for data-parallel `rank` of `world_size`.

    The same arguments give the same batches, in however many processes. Raises ValueError for a dataset that is not
    prepared or is too small, and while iterating when too many samples cannot be read.
    """
    return _loader(config, llava, config.data.data_path, "train", rank=rank, world_size=world_size)


def valid_loader(config: Config, llava: Llava, *, rank: int, world_size: int) -> BatchLoader:
    """Endless micro batches of the val split in its order, which starts over at its end; see `train_loader`."""
    if config.data.valid_data_path is None:
        raise ValueError("--valid-data-path none: nothing to validate on")
    return _loader(config, llava, config.data.valid_data_path, "val", rank=rank, world_size=world_size)


def resumed_loader(
    config: Config, llava: Llava, read_position: Callable[[int], dict[str, Any]], *, rank: int, world_size: int
) -> BatchLoader:
    """A `train_loader` that goes on exactly where the ranks of a run stopped, fewer or more than `world_size` of them.

    `read_position`: number of a rank -> what `position.load` gives of its `save_position`. What a process reads follows
    from its number among all ranks' processes (energon's Sharder), so that another number of ranks goes on with as many
    processes in all: `--num-workers` changes with it. Every iteration then has the samples that it would have had.

    Raises ValueError when the position is one in other data, or for other batches, or cannot be shared out so.
    """
    saved = read_position(0)
    ranks, workers = (saved["fingerprint"].get(name) for name in SHARES)
    if not (isinstance(ranks, int) and isinstance(workers, int) and ranks > 0 and workers >= 0):
        raise ValueError(f"position in the data: {', '.join(SHARES)} are {ranks!r}, {workers!r}; expected numbers")
    dealt_anew = ranks != world_size and config.data.data_path != MOCK
    num_workers = _workers_per_rank(ranks, workers, world_size, config) if dealt_anew else workers
    if dealt_anew:
        config = replace(config, data=replace(config.data, num_workers=num_workers))
        logger.info(
            f"{world_size} data-parallel ranks with {num_workers} reading processes each go on where {ranks} with "
            f"{workers} each stopped"
        )
    loader = train_loader(config, llava, rank=rank, world_size=world_size)
    for name, here in loader.fingerprint.items():
        there = saved["fingerprint"].get(name)
        if there != here and not (name in SHARES and ranks != world_size):
            raise ValueError(
                f"position in the data: {name} was {there} when it was saved and is {here} now; continue with the "
                f"same, or start a new run"
            )
    if dealt_anew:
        numbers = range(rank * num_workers, (rank + 1) * num_workers)
        states = {source: read_position(source)["state"] for source in {number // workers for number in numbers}}
        if any(state.next_worker_id for state in states.values()):
            raise ValueError(
                f"position in the data: it was saved in the middle of a round of the {ranks * workers} reading "
                f"processes, which only {ranks} data-parallel ranks can go on from exactly; use {ranks}"
            )
        shares = [states[number // workers].worker_states[number % workers] for number in numbers]
        state = replace(states[numbers[0] // workers], worker_states=shares)
    else:
        state = read_position(min(rank, ranks - 1))["state"]  # mock data: the same for all ranks
    try:
        loader.restore_state_rank(state)
    except Exception as error:  # of another kind than energon expects, which it asserts, or does not ask
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"position in the data: not one of this dataset ({why}); start a new run") from error
    return loader


def save_position(loader: BatchLoader | None) -> bytes:
    """Where the loader is: its next batch, and what it is a position in. Not after its iterator is gone."""
    assert loader is not None, "whose position is saved reads"
    assert not loader.is_closed, "its workers, who know the position, ended with its iterator"
    return position.dump({"fingerprint": loader.fingerprint, "state": loader.save_state_rank()})


def _workers_per_rank(ranks: int, workers: int, world_size: int, config: Config) -> int:
    """Reading processes of each of `world_size` ranks that go on from `ranks` with `workers` each.

    Raises ValueError when an iteration would get other samples than it would have had.
    """
    total, micro_batches = ranks * workers, config.data.global_batch_size // config.data.micro_batch_size
    if total == 0 or total % world_size or micro_batches % total:
        raise ValueError(
            f"position in the data: saved by {ranks} data-parallel ranks with {workers} reading processes each, and "
            f"there are {world_size} ranks now; this goes on exactly only when the number of these processes "
            f"({total}) is a multiple of the ranks, and the micro batches of an iteration ({micro_batches}) a multiple "
            f"of it; use {ranks} ranks, or begin a new run with the checkpoint as --pretrained-checkpoint"
        )
    return total // world_size


def _loader(config: Config, llava: Llava, path: Path, split: str, *, rank: int, world_size: int) -> BatchLoader:
    data = config.data
    encoder = LlavaTaskEncoder(config, llava)
    fingerprint = _fingerprint(config, encoder, split, world_size)
    if path == MOCK:
        seed = [config.training.seed, split == "train"]
        options = {"batch_size": data.micro_batch_size, "packs": data.packs, "seed": seed}
        return MockLoader(encoder, fingerprint, rank=rank, world_size=world_size, **options)
    num_samples, digest = _describe(path, split, allow_code=data.allow_dataset_code)
    if num_samples < world_size:
        raise ValueError(
            f"{path}: split {split} has {num_samples} samples for {world_size} data-parallel ranks; add more"
        )
    failures = Failures(path, num_samples // world_size)
    worker_config = WorkerConfig(
        rank=rank,
        world_size=world_size,
        # A worker without a single sample would never return.
        num_workers=min(data.num_workers, num_samples // world_size),
        seed_offset=config.training.seed,
        global_error_handler=failures,
    )
    # No sample twice in one buffer.
    packing_buffer_size = min(data.packing_buffer_size, num_samples // (world_size * max(1, worker_config.num_workers)))
    shuffles = split == "train" and data.shuffle_buffer_size > 1
    loaded = _open(
        path,
        split,
        allow_code=data.allow_dataset_code,
        worker_config=worker_config,
        decoder=encoder.decoder,
        max_samples_per_sequence=SAMPLES_PER_SLICE if shuffles else None,
        shuffle_over_epochs_multiplier=1 if shuffles else None,
        parallel_shard_iters=None if shuffles else 1,
    )
    dataset = encoder.build_train_datasets(
        datasets=loaded.datasets,
        worker_config=worker_config,
        batch_size=data.micro_batch_size,
        shuffle_buffer_size=data.shuffle_buffer_size if shuffles else None,
        packing_buffer_size=packing_buffer_size if data.packs else None,
        virtual_epoch_length=0,
        blend_mode=loaded.blend_mode,
        repeat=True,
    )
    fingerprint |= {"dataset": digest, "num_workers": worker_config.num_workers}
    images = config.model.decoder_seq_length // llava.vision.num_image_tokens if data.packs else data.micro_batch_size
    return Loader(
        dataset,
        failures,
        fingerprint,
        ahead=batches_ahead(config, world_size, worker_config.num_workers),
        seconds=60 * config.training.distributed_timeout_minutes * readers.SHARE_OF_TIMEOUT,
        size=images * 3 * math.prod(encoder.image_settings.crop_size),
    )


def _fingerprint(config: Config, encoder: LlavaTaskEncoder, split: str, world_size: int) -> dict[str, Any]:
    """What a position is one in, of mock data; a dataset's digest and its workers are not known yet."""
    return {
        "split": split,
        "dataset": str(MOCK),
        "seed": config.training.seed,
        "data-parallel size": world_size,
        "num_workers": 0,
        "micro_batch_size": config.data.micro_batch_size,
        "packing_buffer_size": config.data.packing_buffer_size,
        "decoder_seq_length": config.model.decoder_seq_length,
        "prompt_format": encoder.format_name,
        "use_im_start_end": config.data.use_im_start_end,
        "image_transform": encoder.image_settings.transform,
        "shuffle_buffer_size": config.data.shuffle_buffer_size,
    }


def batches_ahead(config: Config, world_size: int, num_workers: int) -> int:
    """Batches that each process reads ahead: where an iteration begins with all of its own, as many as that takes.

    So it is with pipeline stages. Without a GPU they would wait in shared memory, which may be small.
    """
    if config.parallel.pipeline_model_parallel_size == 1 or num_workers == 0 or not torch.cuda.is_available():
        return 2
    return max(2, math.ceil(config.data.global_batch_size / (config.data.micro_batch_size * world_size * num_workers)))


def _describe(path: Path, split: str, *, allow_code: bool) -> tuple[int, str]:
    """How many samples a split has, and a digest of its shards: their names, counts, indices, and recorded CRC-32."""
    worker_config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    loaded = _open(path, split, allow_code=allow_code, worker_config=worker_config)
    for part in loaded.datasets:
        if part.weight is not None and not part.weight > 0:
            raise ValueError(f"{path}: split {split} has a weight of {part.weight}; expected one above 0")
    parts = [[_shards(part.dataset), part.weight, part.repetitions] for part in loaded.datasets]
    digest = hashlib.sha256(json.dumps([parts, loaded.blend_mode.value]).encode()).hexdigest()[:16]
    return sum(len(part.dataset) for part in loaded.datasets), digest


def _shards(dataset: Any) -> list[list[Any]]:
    """Of each shard: name, samples, what `_check_shard` gives; where a manifest has it, the CRC-32 of its bytes."""
    try:
        recorded = json.loads((EPath(dataset.path) / MANIFEST).read_bytes())["shards"]
        checksums = {name: shard["crc32"] for name, shard in recorded.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        checksums = {}  # another program's data
    return [[shard.name, shard.count, _check_shard(shard.path), checksums.get(shard.name)] for shard in dataset.shards]


def _check_shard(path: EPath) -> int:
    """The CRC-32 of a tar's index, which has 8 bytes per sample, the last its end.

    Raises ValueError for a tar that is not there, or shorter than that.
    """
    index = EPath(f"{path}.idx")
    for file in (path, index):
        if not file.is_file():
            raise ValueError(f"{file}: missing, though the dataset lists it; copy or convert the data again")
    places = index.read_bytes()
    if not places or len(places) % 8:
        raise ValueError(f"{index}: {len(places)} bytes, expected 8 for each place; copy or convert the data again")
    (end,) = struct.unpack("<Q", places[-8:])
    if path.size() < end:
        raise ValueError(f"{path}: {path.size()} bytes, expected {end} by its index; copy or convert the data again")
    return zlib.crc32(places)


def _open(path: Path, split: str, *, allow_code: bool, **options: Any) -> LoadedDatasetList:
    if path.is_dir() and not (path / ".nv-meta" / "dataset.yaml").is_file():
        raise ValueError(f"{path}: not an energon dataset (no .nv-meta/dataset.yaml in it); {PREPARE}")
    if not path.exists():
        raise ValueError(f"{path}: missing; expected an energon dataset; {PREPARE}")
    try:
        with guarded(allow_code=allow_code):
            return load_dataset(path).get_datasets(training=True, split_part=split, **options)
    except DatasetCodeError:
        raise
    except Exception as error:
        # Energon answers a missing file, split or shard with exceptions of many kinds, AssertionError included.
        # What is no yaml has an empty one, whose place energon's parser has printed.
        why = printable(error, 600) or "no yaml"
        advice = PREPARE if path.is_dir() else "expected a metadataset of energon, such as docs/formats.md shows"
        raise ValueError(f"{path}: split {split} cannot be read: {why}; {advice}") from error
