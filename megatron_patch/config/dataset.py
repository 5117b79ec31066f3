"""What a conversion to tar shards is told: its settings, each with its flag's help text beneath it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

Validation = Literal["none", "header", "full"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Turn LLaVA's json and images into an energon dataset: DIR/wds, tar shards, ready to train on.

    DIR holds a json of conversations (LLaVA-Pretrain's, LLaVA-CC3M-Pretrain-595K's, an instruction mix) and its
    images, unzipped or as images.zip. Samples that cannot be used are listed in DIR/wds.rejected.tsv, one line each:
    position in the json, id, why. Ended too early, the same command goes on where it was. All places may be URLs of an
    object store, such as s3://bucket/folder.
    """

    dir: str
    """Folder with the json and the images; a URL's json is LLaVA-Pretrain's, or --annotations."""

    annotations: str | None = None
    """The json (or JSON Lines); none: the one in DIR that holds conversations."""

    images: str | None = None
    """Where the json's image names begin: folders and zip archives, separated by commas, asked in this order; none:
    DIR, DIR/images, DIR/images.zip."""

    output: str | None = None
    """Folder for the shards; none: DIR/wds. It appears when it is whole."""

    overwrite: bool = False
    """Replace an existing output, and what another input or other settings left unfinished."""

    workers: int | None = None
    """Processes that write shards; none: as many as there are cores."""

    validate: Validation = "header"
    """How images are checked. none: there and not empty; header: also begin and end as their format does, and have
    no more pixels than training takes, resized to a shortest edge of 336 included; full: also decoded."""

    max_rejected_share: float = 0.01
    """Part of the samples, 0 to 1, that may be unusable before it is an error."""

    tokenizer: str | None = None
    """Folder of the model that will be trained (a language model's, or a LLaVA's): count tokens as training will, and
    suggest a DECODER_SEQ_LEN."""

    part: str | None = None
    """Such as 2/8: write the second eighth of the shards only, for one of 8 jobs. Without it, the same command joins
    the parts."""

    no_prepare: bool = False
    """Leave `energon prepare` to you."""

    dry_run: bool = False
    """Read and check everything, write nothing."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_rejected_share <= 1:
            raise ValueError(f"--max-rejected-share {self.max_rejected_share}: expected a share from 0 to 1")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers {self.workers}: expected 1 or more, or none")
        _ = self.share_of_shards
        for other in ("overwrite", "dry_run"):
            if self.part and getattr(self, other):
                raise ValueError(f"--part {self.part}: does not go with --{other.replace('_', '-')}; leave one out")

    @property
    def share_of_shards(self) -> tuple[int, int]:
        """`part` as (index from 0, count); (0, 1): all."""
        if self.part is None:
            return 0, 1
        found = re.fullmatch(r"([0-9]+)/([0-9]+)", self.part)
        index, count = map(int, found.groups()) if found else (0, 0)
        if not 1 <= index <= count:
            raise ValueError(f"--part {self.part}: expected i/n with 1 <= i <= n, such as 2/8")
        return index - 1, count

    @property
    def num_workers(self) -> int:
        """`workers`, or the cores that this process may use."""
        return self.workers or len(os.sched_getaffinity(0))
