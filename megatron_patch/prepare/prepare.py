"""What `energon prepare` does, without questions."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from megatron_patch.prepare.workers import Tell, run

# One question and one answer about one image.
PAIRS_YAML = """\
sample_type:
  __module__: megatron.energon
  __class__: VQASample
field_map:
  image: jpg
  context: json[0][value]
  answers: json[1][value]
"""
# Conversations of any length with any number of images: the task encoder reads the fields themselves.
CONVERSATIONS_YAML = """\
__module__: megatron.energon
__class__: CrudeWebdataset
"""
SPLIT = (("train", 9.0), ("val", 1.0), ("test", 0.0))


def prepare_energon(place: str, counts: dict[str, int], *, is_pairs: bool) -> None:
    """Index, split 9 to 1 by shard, dataset.yaml for VQASample, or for crude samples unless `is_pairs`.

    `place`: folder, or URL as energon takes it; `counts`: shard name -> samples in it. Raises ValueError when energon
    finds other ones, OSError that names a file when it cannot be written.
    """
    from megatron.energon.epathlib import EPath

    folder = EPath(place)
    meta = folder / ".nv-meta"
    if folder.is_local():
        shutil.rmtree(meta.local_path(), ignore_errors=True)  # of a run that was killed here
    try:
        _index(folder, sorted(counts))
        found = json.loads((meta / ".info.json").read_text())["shard_counts"]
        (meta / "dataset.yaml").write_text(PAIRS_YAML if is_pairs else CONVERSATIONS_YAML)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(meta)) from None
        raise
    except sqlite3.Error as error:
        raise ValueError(f"{meta}/index.sqlite: cannot be written: {error}; the same command goes on") from None
    if found != counts:
        differing = sorted(name for name in counts if found.get(name) != counts[name])
        raise ValueError(f"{place}: energon counts other samples than were written in {', '.join(differing)}")


def _index(folder: Any, names: list[str]) -> None:
    """What energon's prepare_dataset does, with processes whose end is noticed."""
    from megatron.energon.flavors import BaseWebdatasetFactory
    from megatron.energon.flavors.webdataset import prepare

    pool: Any = _Pool
    original, prepare.AggregatorPool = prepare.AggregatorPool, pool
    try:
        # Its remarks name the folder that is renamed afterwards.
        with contextlib.redirect_stdout(io.StringIO()):
            BaseWebdatasetFactory.prepare_dataset(
                folder,
                names,
                split_parts_ratio=list(SPLIT),
                shuffle_seed=None,
                workers=min(len(names), os.cpu_count() or 1),
            )
    finally:
        prepare.AggregatorPool = original


class _Pool:
    """In the place of energon's AggregatorPool, which waits for ever for a process that was killed."""

    def __init__(
        self,
        num_workers: int,
        user_produce_data: Callable[[str], Iterable[Any]],
        aggregator: Any,
        *,
        batch_size: int = 1,
    ) -> None:
        self._num_workers, self._produce = num_workers, user_produce_data
        self._aggregator, self._batch_size = aggregator, batch_size
        self._tasks: list[str] = []

    def submit_task(self, task: str) -> None:
        """As energon's."""
        self._tasks.append(task)

    def process(self) -> Any:
        """As energon's, in the order in which shards are ready."""
        self._aggregator.on_start(self)
        for answer in run(self._items, range(len(self._tasks)), self._num_workers):
            if not isinstance(answer, int):
                for begin in range(0, len(answer), self._batch_size):
                    self._aggregator.on_item(answer[begin : begin + self._batch_size], self)
        self._aggregator.on_finish(self)
        return self._aggregator.get_final_result_data()

    def _items(self, number: int, tell: Tell) -> list[Any]:
        """Of one shard. Raises what energon logs and goes on without."""
        name = self._tasks[number]
        with _logged_errors() as errors:
            items = list(self._produce(name))
        for error in errors:
            if isinstance(error, OSError) and error.filename is None:
                raise OSError(error.errno, error.strerror, f"{name}.idx") from None
            if not isinstance(error, Exception) or isinstance(error, OSError):
                raise error
            raise ValueError(f"{name}: energon cannot read it: {' '.join(str(error).split())}; start again")
        return items


@contextlib.contextmanager
def _logged_errors() -> Iterator[list[BaseException]]:
    """The exceptions that energon's preparation logs, which are not shown."""
    logger, errors = logging.getLogger("megatron.energon.flavors.webdataset.prepare"), []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info and record.exc_info[1] is not None:
                errors.append(record.exc_info[1])

    handler, propagates = Handler(), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield errors
    finally:
        logger.propagate = propagates
        logger.removeHandler(handler)
