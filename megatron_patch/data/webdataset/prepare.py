"""What `energon prepare` does, without questions."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil

# One question and one answer about one picture.
PAIRS_YAML = """\
sample_type:
  __module__: megatron.energon
  __class__: VQASample
field_map:
  image: jpg
  context: json[0][value]
  answers: json[1][value]
"""
# Conversations of any length with any number of pictures: the task encoder reads the fields themselves.
CONVERSATIONS_YAML = """\
__module__: megatron.energon
__class__: CrudeWebdataset
"""
SPLIT = (("train", 9.0), ("val", 1.0), ("test", 0.0))


def prepare_energon(place: str, counts: dict[str, int], *, is_pairs: bool) -> None:
    """Index, split 9 to 1 by shard, dataset.yaml for VQASample, or for crude samples unless `is_pairs`.

    `place`: folder, or URL as energon takes it; `counts`: shard name -> samples in it. Raises ValueError when energon
    finds other ones.
    """
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors import BaseWebdatasetFactory

    folder = EPath(place)
    meta = folder / ".nv-meta"
    if folder.is_local():
        shutil.rmtree(meta.local_path(), ignore_errors=True)  # of a run that was killed here
    # Its remarks name the folder that is renamed afterwards.
    with contextlib.redirect_stdout(io.StringIO()):
        BaseWebdatasetFactory.prepare_dataset(
            folder,
            sorted(counts),
            split_parts_ratio=list(SPLIT),
            shuffle_seed=None,
            workers=min(len(counts), os.cpu_count() or 1),
        )
    found = json.loads((meta / ".info.json").read_text())["shard_counts"]
    if found != counts:
        # Energon logs a shard that it cannot read, and goes on without it.
        differing = sorted(name for name in counts if found.get(name) != counts[name])
        raise ValueError(f"{place}: energon counts other samples than were written in {', '.join(differing)}")
    (meta / "dataset.yaml").write_text(PAIRS_YAML if is_pairs else CONVERSATIONS_YAML)
