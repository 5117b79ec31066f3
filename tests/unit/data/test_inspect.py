"""The page of samples says what the batch holds."""

import base64
import io
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_patch.data.inspect import write_page
from megatron_patch.data.loader import train_loader
from megatron_patch.data.tokenize import load_tokenizer
from tests.unit.data.samples import describe, settings
from toolkits.multimodal_data_preprocessing.inspect_samples import main


@pytest.mark.parametrize("packing", [0, 9])
def test_page_shows_every_token_label_and_picture(packing, tmp_path):
    llava = describe(tmp_path)
    config = settings(tmp_path, Path("mock"), packing_buffer_size=packing, micro_batch_size=1 if packing else 3)
    batches = list(islice(train_loader(config, llava, rank=0, world_size=1), 2))
    batches[0].keys[0] = "<0001>"
    page = write_page(batches, load_tokenizer(tmp_path), llava.image_token_id)
    assert "<h2>&lt;0001&gt;: " in page
    assert page.count("<h2>") == sum(len(batch.keys) for batch in batches)
    legend, page = page.split("</p>", 1)
    assert page.count('class="learned"') == sum(int((batch.labels != -100).sum()) for batch in batches)
    assert page.count('class="picture">picture 1: 3 to 18<') == sum(len(batch.pixels) for batch in batches)
    assert page.count('class="given"') == page.count("<h2>") * 14
    shown = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    pixels = [picture for batch in batches for picture in batch.pixels]
    for data, expected in zip(shown, pixels, strict=True):
        assert torch.equal(torch.from_numpy(np.array(Image.open(io.BytesIO(data)))), expected.permute(1, 2, 0))
    # Nothing is fetched.
    assert not re.search(r"https?:|<link|<script|url\(", legend + page)


def test_the_command_writes_a_page_or_says_why_not(mcore, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main([str(mcore), "nowhere", str(page)]) == 1
    assert capsys.readouterr().err.startswith("error: nowhere: missing; expected an energon dataset")
    assert main([str(mcore), "mock", str(page), "--num-batches", "none"]) == 2
    assert not page.exists()
    assert main([str(mcore), "mock", str(page), "--num-batches", "2", "--packing-buffer-size", "9"]) == 0
    assert page.read_text().count("<h2>mock ") > 4
