"""The page of samples says what the batch holds, and a browser shows it."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_patch.data.inspect_samples import main
from megatron_patch.data.loader import train_loader
from megatron_patch.data.preview import write_page
from megatron_patch.data.tokenize import load_tokenizer
from tests.unit.data.samples import describe, settings

CHROMIUM = shutil.which("chromium")

# Looks at the page beside it from a frame, and leaves what it saw as text.
LOOK = """\
<!DOCTYPE html><meta charset="utf-8"><iframe src="page.html" width="1200" height="900"></iframe><pre></pre><script>
onload = () => {
  const {document: page, performance} = frames[0], spans = kind => [...page.querySelectorAll("span." + kind)]
  const seen = {
    pictures: [...page.images].map(image => [image.complete, image.naturalWidth, image.naturalHeight, image.width > 0]),
    colours: ["given", "learned", "image"].map(kind => frames[0].getComputedStyle(spans(kind)[0]).backgroundColor),
    learned: spans("learned").slice(1).map(span => span.textContent).join(""),
    titles: spans("given").slice(1).map(span => span.title),
    visible: spans("learned").every(span => span.getBoundingClientRect().width > 0),
    fetched: performance.getEntriesByType("resource").map(entry => entry.name.slice(0, 5)),
    headings: [...page.querySelectorAll("h2")].map(heading => heading.textContent),
  }
  document.querySelector("pre").textContent = JSON.stringify(seen)
}
</script>
"""


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
    assert page.count('class="image">image 1: 3 to 18<') == sum(len(batch.pixels) for batch in batches)
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
    for flags, why in [
        (["--num-batches", "none"], "--num-batches none: expected 1 or more"),
        (["--packing-buffer-size", "9", "--num-batches"], "--num-batches without a number: expected 1 or more"),
        (["--seq-length", "999"], "--seq-length 999: an image of"),
        (["--decoder-seq-length", "4"], "--decoder-seq-length 4: an image alone takes"),
    ]:
        assert main([str(mcore), "mock", str(page), *flags]) > 0
        assert capsys.readouterr().err.startswith(f"error: {why}")
    assert not page.exists()
    assert main([str(mcore), "mock", str(page), "--num-batches", "2", "--packing-buffer-size", "9"]) == 0
    assert page.read_text().count("<h2>mock ") > 4


def test_a_name_is_shown_without_control_characters(mcore, tmp_path, capsys):
    assert main([str(mcore), str(tmp_path / "no\x1b[2Jdata"), str(tmp_path / "page.html")]) == 1
    assert r"no\x1b[2Jdata: missing" in (said := capsys.readouterr().err)
    assert said.strip().isprintable()


@pytest.mark.parametrize("kind", ["a text", "another page", "a folder", "a link", "a link to nothing"])
def test_a_page_replaces_nothing_but_a_page(kind, mcore, tmp_path, capsys):
    page, other = tmp_path / "page.html", tmp_path / "other"
    other.write_text("theirs")
    if kind == "a folder":
        page.mkdir()
    elif "link" in kind:
        page.symlink_to(other if kind == "a link" else tmp_path / "nowhere")
    else:
        page.write_text("theirs" if kind == "a text" else "<!DOCTYPE html>\n<html><title>Others</title>")
    before = page.read_bytes() if page.is_file() else None
    assert main([str(mcore), "mock", str(page)]) == 1
    assert "page.html: is" in (said := capsys.readouterr().err)
    assert "give the name of a new file" in said
    assert (page.read_bytes() if page.is_file() else None) == before
    assert other.read_text() == "theirs"
    assert not (tmp_path / "nowhere").exists()


def test_a_page_is_replaced_by_a_newer_one(mcore, tmp_path):
    page = tmp_path / "page.html"
    for count in ("1", "2"):
        assert main([str(mcore), "mock", str(page), "--num-batches", count, "--micro-batch-size", "1"]) == 0
        assert page.read_text().count("<h2>mock ") == int(count)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_what_the_page_says(tmp_path):
    llava = describe(tmp_path)
    loader = train_loader(settings(tmp_path, Path("mock"), micro_batch_size=3), llava, rank=0, world_size=1)
    batches = list(islice(loader, 2))
    batches[0].keys[0] = "<b>0001</b>"
    tokenizer = load_tokenizer(tmp_path)
    (tmp_path / "page.html").write_text(write_page(batches, tokenizer, llava.image_token_id), encoding="utf-8")
    (tmp_path / "look.html").write_text(LOOK)
    seen = look(tmp_path / "look.html")
    size = llava.vision.img_size
    assert seen["pictures"] == [[True, size, size, True]] * sum(len(batch.pixels) for batch in batches)
    assert len(set(seen["colours"])) == 3
    assert seen["visible"]
    ids = [int(label) for batch in batches for row in batch.labels for label in row if label != -100]
    assert seen["learned"].replace("↵\n", "\n") == "".join(tokenizer.decode([id]) for id in ids)
    assert seen["titles"][0] == f"position 0, id {batches[0].input_ids[0, 0]}"
    assert seen["headings"][0].startswith("<b>0001</b>: ")
    assert set(seen["fetched"]) <= {"data:"}


def look(page: Path) -> dict:
    """What the page's script left in its only <pre>, run by the browser without a window."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    flags += [f"--user-data-dir={page.parent / 'browser'}", "--virtual-time-budget=10000", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r"<pre>(.+?)</pre>", done.stdout, re.DOTALL)
    assert found, done.stderr
    return json.loads(html.unescape(found[1]))
