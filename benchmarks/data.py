"""How fast pictures become tar shards: whole processes, in turn with the tutorial's script and with `tar cf`.

    python benchmarks/data.py [--count 100000] [--repeat 3] [--folder /dev/shm] [--disk FOLDER]

It draws JPEGs of about 28 kB and measures, in rounds: the tutorial's script, `tar cf` of the same files, the converter
with 2 processes and --no-prepare. Then, once, the converter on images.zip, with one process, with --validate
full, with the energon step; and at a fifth of the samples, for memory. --disk: also from cold files on that disk.
The folder needs three times the pictures' room (8.5 GB for 100,000).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageFilter

ROOT = Path(__file__).parents[1]
CONVERT = ROOT / "toolkits" / "multimodal_data_preprocessing" / "convert_llava_pretrain_to_wds.py"
TUTORIAL = Path(__file__).with_name("tutorial_wds.py")
ANNOTATIONS = "blip_laion_cc_sbu_558k.json"
PER_FOLDER = 1000
DRAWN = 64
# What the converter does before it writes: its modules, the json as bytes and parsed.
IMPORT = "import json, sys, time, megatron_patch.prepare; time.sleep(0.3); "
PARSE = IMPORT + "entries = json.loads(open(sys.argv[1], 'rb').read()); time.sleep(0.3)"


@dataclass
class Row:
    """Seconds of each run of one way, of the clock and of all its processes' work, and its largest process."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_mb: float = 0

    def text(self, what: str, count: int) -> str:
        median = statistics.median(self.seconds)
        runs = " ".join(f"{seconds:.1f}" for seconds in self.seconds)
        cpu = statistics.median(self.cpu_seconds)
        return f"{what:30} {median:7.1f} {count / median:10,.0f} {cpu:6.1f} {self.peak_mb:8.0f}   {runs}"


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--disk", type=Path)
    options = parser.parse_args()
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.folder) as name:
        folder = Path(name)
        size = draw(folder / "pictures", options.count)
        print(f"{options.count} pictures, {size / options.count / 1e3:.1f} kB each", flush=True)
        for number in range(options.repeat):
            contest(folder, rows)
            print(f"round {number + 1}: {load()}", flush=True)
        ours = "converter, 2 processes"
        memory = measure_memory(folder, options.count, rows[ours].peak_mb)
        variants(folder, rows, options.disk)
    print(f"{'':30} {'seconds':>7} {'samples/s':>10} {'CPU s':>6} {'peak MB':>8}   each run")
    for what, row in rows.items():
        print(row.text(what, options.count))
    medians = {what: statistics.median(row.seconds) for what, row in rows.items()}
    print(f"converter: {medians['tutorial script'] / medians[ours]:.1f} x the tutorial's script, ", end="")
    print(f"{medians['tar cf'] / medians[ours]:.2f} x tar cf; {memory}")
    print(f"{load()}; {os.cpu_count()} cores, {platform.machine()}")
    return 0


def contest(folder: Path, rows: dict[str, Row]) -> None:
    """One round of what is compared."""
    pictures, output = folder / "pictures", folder / "output"
    ways = {
        "tutorial script": [sys.executable, TUTORIAL, pictures, output],
        "tar cf": ["tar", "cf", output, "-C", pictures, "."],
        "converter, 2 processes": [*convert(pictures, output), "--no-prepare"],
    }
    for what, command in ways.items():
        run(what, command, output, rows)


def variants(folder: Path, rows: dict[str, Row], disk: Path | None) -> None:
    """Other sources and settings of the converter."""
    pictures, output, zipped = folder / "pictures", folder / "output", folder / "images.zip"
    run("converter, 1 process", [*convert(pictures, output), "--no-prepare", "--workers", "1"], output, rows)
    run("converter, --validate none", [*convert(pictures, output), "--no-prepare", "--validate", "none"], output, rows)
    run("converter, --validate full", [*convert(pictures, output), "--no-prepare", "--validate", "full"], output, rows)
    run("converter and energon's step", convert(pictures, output), output, rows)
    pack(pictures, zipped)
    run("converter, images.zip", [*convert(pictures, output), "--no-prepare", "--images", zipped], output, rows)
    zipped.unlink()
    if disk is not None:
        disk.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="bench-", dir=disk) as name:
            cold = Path(name) / "pictures"
            shutil.copytree(pictures, cold)
            os.sync()
            ways = {
                "cold files: tar cf": ["tar", "cf", Path(name) / "output", "-C", cold, "."],
                "cold files: converter": [*convert(cold, Path(name) / "output"), "--no-prepare"],
            }
            for what, command in ways.items():
                drop_pages(cold)
                run(what, command, Path(name) / "output", rows)


def measure_memory(folder: Path, count: int, whole_peak: float) -> str:
    """The largest process at a fifth of the samples and at all of them, what the parsed json takes set apart."""
    pictures, fifth, output = folder / "pictures", folder / "fifth.json", folder / "output"
    entries = json.loads((pictures / ANNOTATIONS).read_bytes())
    fifth.write_text(json.dumps(entries[: count // 5]))
    del entries
    rows: dict[str, Row] = {}
    run("fifth", [*convert(pictures, output), "--no-prepare", "--annotations", fifth], output, rows)
    for what, path in (("parse", pictures / ANNOTATIONS), ("parse fifth", fifth)):
        run(what, [sys.executable, "-c", PARSE, path], output, rows)
    run("import", [sys.executable, "-c", IMPORT], output, rows)
    peaks = {what: row.peak_mb for what, row in rows.items()}
    whole = whole_peak - (peaks["parse"] - peaks["import"])
    part = peaks["fifth"] - (peaks["parse fifth"] - peaks["import"])
    return (
        f"largest process {peaks['fifth']:.0f} MB at {count // 5} samples and {whole_peak:.0f} MB at {count}, without "
        f"what the parsed json takes {part:.0f} and {whole:.0f} MB"
    )


def convert(pictures: Path, output: Path) -> list[object]:
    return [sys.executable, CONVERT, pictures, "--output", output, "--workers", "2"]


def run(what: str, command: list[object], output: Path, rows: dict[str, Row]) -> None:
    """Run it, note seconds and memory, remove what it wrote."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    row = rows.setdefault(what, Row())
    with tempfile.TemporaryFile() as errors:
        start, worked = time.monotonic(), cpu_seconds()
        process = subprocess.Popen(
            [str(word) for word in command], env=environment, stdout=subprocess.DEVNULL, stderr=errors
        )
        while True:
            try:
                status = process.wait(timeout=0.1)
                break
            except subprocess.TimeoutExpired:
                row.peak_mb = max(row.peak_mb, *map(peak_memory, [process.pid, *children(process.pid)]))
        seconds = time.monotonic() - start
        if status:
            errors.seek(0)
            raise SystemExit(f"{what}: {errors.read().decode()[-2000:]}")
    row.seconds.append(seconds)
    row.cpu_seconds.append(cpu_seconds() - worked)
    print(f"  {what}: {seconds:.1f} s", flush=True)
    if output.is_dir():
        shutil.rmtree(output)
    else:
        output.unlink(missing_ok=True)


def cpu_seconds() -> float:
    """Of all processes that were waited for."""
    times = os.times()
    return times.children_user + times.children_system


def peak_memory(pid: int) -> float:
    """The largest resident size so far, in MB, shared pages included; 0 when the process has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) / 1000 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def draw(folder: Path, count: int) -> int:
    """A LLaVA-Pretrain folder of so many pictures, a few different ones again and again; returns their bytes."""
    rng = random.Random(1)
    drawn = []
    for _ in range(DRAWN):
        noise = Image.effect_noise((336, rng.randint(224, 448)), 90).filter(ImageFilter.GaussianBlur(0.7))
        file = io.BytesIO()
        Image.merge("RGB", (noise, noise.rotate(180), noise)).save(file, "JPEG", quality=rng.randint(45, 60))
        drawn.append(file.getvalue())
    entries, size = [], 0
    for index in range(count):
        name = f"{index // PER_FOLDER:05d}/{index:09d}.jpg"
        path = folder / name
        if index % PER_FOLDER == 0:
            path.parent.mkdir(parents=True)
        path.write_bytes(drawn[index % DRAWN])
        size += len(drawn[index % DRAWN])
        question = {"from": "human", "value": "<image>\nRender a clear and concise summary of the photo."}
        answer = {"from": "gpt", "value": f"select luxury furniture {index} - inch gel memory foam mattress topper"}
        entries.append({"id": f"{index:09d}", "image": name, "conversations": [question, answer]})
    (folder / ANNOTATIONS).write_text(json.dumps(entries))
    return size


def pack(pictures: Path, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for picture in sorted(pictures.rglob("*.jpg")):
            archive.write(picture, picture.relative_to(pictures))


def drop_pages(folder: Path) -> None:
    """Out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def load() -> str:
    return f"load {os.getloadavg()[0]:.1f}"


if __name__ == "__main__":
    sys.exit(main())
