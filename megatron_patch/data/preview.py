"""Batches as one HTML page: images after the transform, every token with its label, where images are expanded."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from PIL import Image
from torch import Tensor

from megatron_patch.data.task_encoder import Batch
from megatron_patch.data.tokenize import IGNORE

HEAD = """\
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Samples as the model sees them</title><style>
body { font: 15px/1.9 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em }
h2 { font-size: 1em; margin: 2em 0 .3em; border-top: 1px solid #ccc; padding-top: 1em }
img { margin-right: .5em; vertical-align: top; max-width: 20em }
span { border-radius: 3px; padding: 1px 2px; margin-right: 1px; white-space: pre-wrap }
.given { background: #eee }
.learned { background: #b7e4b0 }
.image { background: #b9d7f5 }
.padding { color: #999; background: #f8f8f8 }
</style></head><body>
<p><span class="given">prompt</span> <span class="learned">label</span>
<span class="image">an image's positions</span> <span class="padding">padding</span>
&mdash; the title of a token is its position and its id. The last token of a sample is a label alone: the model
never sees it.</p>
"""


def write_page(batches: Iterable[Batch], tokenizer: Any, image_token_id: int) -> str:
    """The page, which refers to nothing outside of itself."""
    return (
        HEAD
        + "".join(part for batch in batches for part in _batch(batch, tokenizer, image_token_id))
        + "</body></html>"
    )


def _batch(batch: Batch, tokenizer: Any, image_token_id: int) -> Iterator[str]:
    """Sample by sample, whether each has a row of its own or they share one."""
    lengths = batch.segment_lengths or [batch.input_ids.shape[1]]
    rows = (
        (ids, labels)
        for row, row_labels in zip(batch.input_ids, batch.labels, strict=True)
        for ids, labels in zip(row.split(lengths), row_labels.split(lengths), strict=True)
    )
    images = iter(batch.pixels)
    patches = int((batch.input_ids == image_token_id).sum()) // max(1, len(batch.pixels))
    for key, (ids, labels) in zip(batch.keys, rows, strict=True):
        num_labels = int((labels != IGNORE).sum())
        yield f"<h2>{html.escape(key)}: {len(ids)} positions, {num_labels} labels</h2>\n<p>"
        for _ in range(int((ids == image_token_id).sum()) // max(1, patches)):
            yield _image(next(images))
        yield "</p>\n<p>" + "".join(_tokens(ids, labels, tokenizer, image_token_id, patches)) + "</p>\n"


def _image(pixels: Tensor) -> str:
    """uint8 [3, h, w] -> an img with its bytes in it."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
    height, width = pixels.shape[1:]
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{width} x {height} pixels" title="{width} x {height} pixels">'


def _tokens(ids: Tensor, labels: Tensor, tokenizer: Any, image_token_id: int, patches: int) -> Iterator[str]:
    """A span for each token, and for each image's run of placeholders."""
    targets = [IGNORE, *labels.tolist()]
    last = max((place for place, target in enumerate(targets) if target != IGNORE), default=0)
    tokens = [*ids.tolist(), None][: max(last + 1, len(ids))]
    number = 0
    for is_image, run in groupby(enumerate(tokens), key=lambda item: item[1] == image_token_id):
        places = list(run)
        if is_image:
            for first in range(places[0][0], places[-1][0] + 1, patches):
                number += 1
                yield f'<span class="image">image {number}: {first} to {first + patches - 1}</span>'
            continue
        for place, token in places:
            target = targets[place] if place < len(targets) else IGNORE
            kind = "learned" if target != IGNORE else "given" if place <= last else "padding"
            shown = target if token is None or target != IGNORE else token
            text = html.escape(tokenizer.decode([shown])).replace("\n", "&#8629;\n") or "&#8709;"
            yield f'<span class="{kind}" title="position {place}, id {shown}">{text}</span>'
