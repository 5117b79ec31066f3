"""How fast the converter is, and how much memory it takes: a synthetic 7B LLaVA, in turn with `cp -r` and fsync.

    python benchmarks/converter.py [--depth 32] [--size 7B] [--repeat 3] [--folder DIR]

It makes a Mistral and a CLIP-L/14-336 of random bytes (14.5 and 0.6 GB for 7B), converts them to TP4, TP1 and TP2 x PP2
and back, each time right after or right before a copy of the same files, and compares the weights that came back with
the originals by sha256. It needs about three times the model's size on the disk. The naive way, which holds the model
in memory, is measured at a quarter of the depth.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONVERT = ROOT / "toolkits" / "model_checkpoints_convertor" / "convert.py"
NAIVE = Path(__file__).with_name("naive_converter.py")
SHARD = 5 * 1000**3  # bytes of a source file, as on the hub
PIECE = 32 * 1024**2

# Hidden size, feed-forward, layers, heads, query groups, vocabulary.
SIZES = {
    "7B": (4096, 14336, 32, 32, 8, 32768),
    "13B": (5120, 13824, 40, 40, 40, 32000),
    "tiny": (512, 1024, 4, 8, 4, 1000),
}


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7B")
    parser.add_argument("--depth", type=int, help="layers; default: the model's own")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cuts", default="4x1,1x1,2x2", help="TP x PP, separated by commas")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--skip-naive", action="store_true")
    options = parser.parse_args()
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.folder) as name:
        table = Table()
        depth = options.depth or SIZES[options.size][2]
        measure(Path(name), options, depth, table)
        if not options.skip_naive:
            measure_naive(Path(name), options.size, max(1, depth // 4), table)
        print(table.text())
    return 0


@dataclass
class Run:
    """One command's figures."""

    seconds: float
    peak_mb: int

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s"


@dataclass
class Table:
    """What was measured, row by row."""

    rows: list[tuple[str, str]] = field(default_factory=list)

    def add(self, what: str, size: int, runs: list[Run], copies: list[float]) -> None:
        seconds, copied = statistics.median(run.seconds for run in runs), statistics.median(copies)
        times = " ".join(f"{run.seconds:.1f}" for run in runs)
        row = (
            f"{what:34} {size / 1e9:6.2f} {seconds:8.1f} {copied:8.1f} {seconds / copied:6.2f} "
            f"{size / 1e9 / seconds:6.2f} {max(run.peak_mb for run in runs):6d}   {times} | "
            + " ".join(f"{copy:.1f}" for copy in copies)
        )
        self.rows.append((what, row))
        print(row, flush=True)

    def text(self) -> str:
        """The whole table."""
        head = (
            f"{'':34} {'GB':>6} {'s':>8} {'cp+fsync':>8} {'ratio':>6} {'GB/s':>6} {'RSS MB':>6}   each run | each copy"
        )
        end = f"at the end {load()}; {os.cpu_count()} cores, {platform.machine()}"
        return "\n".join([head, *(row for _, row in self.rows), end])


def measure(folder: Path, options: argparse.Namespace, depth: int, table: Table) -> None:
    """Every cut, there and back."""
    language, tower = make_models(folder, options.size, depth)
    before = digests(language)
    for cut in options.cuts.split(","):
        tp, pp = cut.split("x")
        there, back, copies = [], [], []
        for number in range(options.repeat):
            shards, exported = folder / "shards", folder / "exported"
            sources = [language, tower]
            if number % 2:
                copies.append(copied(sources, folder / "copy"))
            there.append(run([sys.executable, CONVERT, *flags(language, tower, shards, tp, pp)], language, tower))
            back.append(run([sys.executable, CONVERT, *flags(shards, None, exported, "1", "1")], shards))
            if number == 0:
                compare(before, digests(exported))
            shutil.rmtree(shards)
            shutil.rmtree(exported)
            if not number % 2:
                copies.append(copied(sources, folder / "copy"))
            print(f"TP{tp} PP{pp}: {there[-1]}, back {back[-1]}, copy {copies[-1]:.1f} s, {load()}", flush=True)
        size = folder_size(language) + folder_size(tower)
        table.add(f"{options.size} to TP{tp} PP{pp}", size, there, copies)
        table.add(f"{options.size} from TP{tp} PP{pp} back", size, back, copies)


def measure_naive(folder: Path, size: str, depth: int, table: Table) -> None:
    """The way of other converters, and ours, at a depth where that one fits."""
    shutil.rmtree(folder / "mistral", ignore_errors=True)
    shutil.rmtree(folder / "clip", ignore_errors=True)
    language, tower = make_models(folder, size, depth)
    total = folder_size(language) + folder_size(tower)
    copies = [copied([language, tower], folder / "copy")]
    for what, command in (
        ("naive", [sys.executable, NAIVE, language, folder / "shards", "4"]),
        ("ours", [sys.executable, CONVERT, *flags(language, tower, folder / "shards", "4", "1")]),
    ):
        runs = [run(command, language, tower)]
        shutil.rmtree(folder / "shards")
        table.add(f"{what}, {size} of {depth} layers to TP4", total, runs, copies)


def flags(source: Path, tower: Path | None, target: Path, tp: str, pp: str) -> list[str]:
    """The converter's; without a tower it is the way back."""
    given = {
        "source-llm-ckpt-path": source,
        "source-clip-ckpt-path": tower or "none",
        "target-ckpt-path": target,
        "tensor-model-parallel-size": tp,
        "pipeline-model-parallel-size": pp,
        "mg2hf": "false" if tower else "true",
    }
    return [f"--{name}={value}" for name, value in given.items()]


def run(command: list[object], *sources: Path) -> Run:
    """Run a command with cold sources. Time is the whole process's, imports included; memory its VmHWM."""
    forget(*sources)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    process = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    peak = 0
    while True:
        peak = max(peak, high_water_mark(process.pid))
        try:
            process.wait(timeout=0.05)
            break
        except subprocess.TimeoutExpired:
            continue
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(process.stderr.read().decode())
    return Run(seconds, peak)


def high_water_mark(pid: int) -> int:
    """The largest resident size so far of a process, in MB; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) // 1000 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def copied(sources: list[Path], target: Path) -> float:
    """Seconds of `cp -r` and fsync of all files that it made, with cold files."""
    forget(*sources)
    started = time.perf_counter()
    target.mkdir()
    subprocess.run(["cp", "-r", *map(str, sources), str(target)], check=True)
    for path in target.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def load() -> str:
    """How much else the machine had to do in the last minute."""
    return f"load average {os.getloadavg()[0]:.1f}"


def forget(*folders: Path) -> None:
    """Have nothing of these files in the page cache. Programs and libraries stay there."""
    os.sync()
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def folder_size(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def make_models(folder: Path, size: str, depth: int) -> tuple[Path, Path]:
    """A Mistral and a CLIP of random bytes, in bf16."""
    hidden, ffn, _, heads, groups, vocabulary = SIZES[size]
    config = {
        "model_type": "mistral",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
    }
    key_value = hidden // heads * groups
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(depth):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "mlp.down_proj": (hidden, ffn),
                "mlp.gate_proj": (ffn, hidden),
                "mlp.up_proj": (ffn, hidden),
                "post_attention_layernorm": (hidden,),
                "self_attn.k_proj": (key_value, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.v_proj": (key_value, hidden),
            }.items()
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    language = folder / "mistral"
    write_model(language, config, shapes)
    write_tokenizer(language, vocabulary)
    return language, make_clip(folder / "clip")


def make_clip(folder: Path) -> Path:
    """openai/clip-vit-large-patch14-336's vision half."""
    hidden, ffn, layers, patch, image = 1024, 4096, 24, 14, 336
    config = {
        "model_type": "clip_vision_model",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "image_size": image,
        "patch_size": patch,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
    linears = {"mlp.fc1": (ffn, hidden), "mlp.fc2": (hidden, ffn)}
    linears |= {f"self_attn.{name}_proj": (hidden, hidden) for name in ("k", "out", "q", "v")}
    shapes = {
        "embeddings.class_embedding": (hidden,),
        "embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
        "embeddings.position_embedding.weight": ((image // patch) ** 2 + 1, hidden),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{norm}.weight": (hidden,), f"{norm}.bias": (hidden,)}
    for layer in range(layers):
        start = f"encoder.layers.{layer}."
        for name, shape in linears.items():
            shapes |= {f"{start}{name}.weight": shape, f"{start}{name}.bias": shape[:1]}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{start}{norm}.weight": (hidden,), f"{start}{norm}.bias": (hidden,)}
    write_model(folder, config, {f"vision_model.{name}": shape for name, shape in shapes.items()})
    return folder


def write_model(folder: Path, config: dict, shapes: dict[str, tuple[int, ...]]) -> None:
    """Safetensors files of random bytes with an index, as on the hub."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size + num_bytes(shape) > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += num_bytes(shape)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file_name)
        header, end = {}, 0
        for name, shape in shard.items():
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + num_bytes(shape)]}
            end += num_bytes(shape)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file_name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, end, PIECE):
                file.write(os.urandom(min(PIECE, end - start)))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def num_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of a bf16 tensor."""
    count = 2
    for length in shape:
        count *= length
    return count


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A tokenizer of words that are numbers."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *map(str, range(vocabulary - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def digests(folder: Path) -> dict[str, Callable[[int], str]]:
    """Per tensor of a folder: what hashes its first bytes. Nothing is read yet."""
    found = {}
    for path, name, offset, size in tensors(folder):
        found[name] = (path, offset, size)
    return found


def tensors(folder: Path) -> Iterator[tuple[Path, str, int, int]]:
    """File, name, offset and bytes of every tensor, read from the headers themselves and not by the code measured."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            yield path, name, 8 + length + start, end - start


def compare(before: dict, after: dict) -> None:
    """Every tensor of the language model came back, by sha256. (Its vocabulary may have got rows at the end.)"""
    for name, (path, offset, size) in before.items():
        back, back_offset, _ = after["language_model." + name]
        if digest(path, offset, size) != digest(back, back_offset, size):
            raise SystemExit(f"{name}: came back otherwise")
    print(f"{len(before)} tensors of the language model came back with the same sha256", flush=True)


def digest(path: Path, offset: int, size: int) -> str:
    """sha256 of some bytes of a file."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        while size:
            data = file.read(min(size, PIECE))
            hasher.update(data)
            size -= len(data)
    return hasher.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
