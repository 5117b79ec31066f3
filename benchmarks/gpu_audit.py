"""Phases of the check that look into a step: where the host waits, which kernels run, what a save takes in memory."""

from __future__ import annotations

import contextlib
import os
import re
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from contestants import Ours
from gpu_training import padded_batches, resize
from inputs import SIZES, Batch, make_config
from timing import allocated_bytes, release, warm_up

from megatron_patch.model import groups
from megatron_patch.training.resume import Progress
from megatron_patch.training.saving import Saver

if TYPE_CHECKING:
    from gpu import Run

LARGEST = 10
"""Kernels that are listed."""
KERNEL_OF_ATTENTION = re.compile(r"aten::_scaled_dot_product_\w+(?<!_backward)")


def audit(run: Run) -> None:
    """Of a step of stage 1: waits of the host by line, kernels, how busy the GPU is; no `bmm` may be among them.

    A matrix product of hidden states with a weight becomes a `bmm` where the states are not contiguous, and reads the
    weight once for each position.
    """
    run.start()
    sizes = sorted({1, run.micro_batch_sizes[0]})
    batches = {size: padded_batches(run, size) for size in sizes}
    config = make_config(run.description("whole"), True, run.precision, batches[1], transformer_impl="local")
    ours = Ours(config)
    for size in sizes:
        ours.take(resize(config, size).data)
        warm_up(ours, [[batch] for batch in batches[size]])
        if size == 1:
            add_syncs(run, ours, batches[size][0])
        add_profile(run, ours, batches[size][0], f"kernels, {size}")


def add_syncs(run: Run, ours: Ours, batch: Batch) -> None:
    """A row of the lines at which the host waits for the GPU in one step."""
    if not run.has_gpu:
        run.rows.add("syncs, 1", problem="not run: needs a GPU")
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            ours.step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = Counter(place(w.filename, w.lineno) for w in caught if "synchroniz" in str(w.message))
    run.rows.add("syncs, 1", syncs=sum(lines.values()), lines=dict(lines.most_common()))


def place(filename: str, line: int) -> str:
    """A line of a source, without the folders that are this machine's."""
    return f"{'/'.join(Path(filename).parts[-3:])}:{line}"


def add_profile(run: Run, ours: Ours, batch: Batch, row: str) -> None:
    """A row of what one step calls. More than no `bmm` fails the phase."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if run.has_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        start = time.perf_counter()
        ours.step(batch)
        wall = time.perf_counter() - start
    events = profile.events()
    bmm = sum(event.name == "aten::bmm" for event in events)
    attention = sorted({event.name for event in events if KERNEL_OF_ATTENTION.fullmatch(event.name)})
    found: dict = {"bmm": bmm, "operators": len(events), "attention": attention}
    kernels = [
        event
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    if kernels:
        micros: Counter = Counter()
        for kernel in kernels:
            micros[short(kernel.name)] += kernel.time_range.elapsed_us()
        found |= {
            "kernels": len(kernels),
            "kernel_ms": sum(micros.values()) / 1000,
            "busy": sum(micros.values()) / 1e6 / wall,
            "largest": {name: round(us / 1000, 2) for name, us in micros.most_common(LARGEST)},
        }
    problem = f"{bmm} x aten::bmm: a weight is read once for each position" if bmm else ""
    run.rows.add(row, problem, failed=bool(bmm), **found)


def short(name: str) -> str:
    """A kernel's name without its template's arguments."""
    return re.sub(r"^(void )?|[<(].*", "", name)[:60] or name[:60]


def memory(run: Run) -> None:
    """What a GPU has free with the optimizer built, before and after the cache is let go; the peaks of a save."""
    run.start()
    layers = max(1, SIZES[run.size].language[2] // 16)
    batches = padded_batches(run, 1)
    folder = run.description("few", layers)
    config = make_config(folder, False, run.precision, batches, freeze_vit=True, transformer_impl="local")
    ours = Ours(config, keep_start=False)
    if run.has_gpu:
        kept = torch.cuda.mem_get_info()[0]  # where torch keeps the memory of tensors that are gone
        told = groups.free_memory()
        release()
        run.rows.add(
            "free memory", free_gb=kept / 1e9, told_gb=told / 1e9, emptied_gb=torch.cuda.mem_get_info()[0] / 1e9
        )
    else:
        run.rows.add("free memory", problem="not run: needs a GPU")
    ours.step(batches[0])
    saver = Saver(config, ours.chunks, ours.optimizer)
    reset_host_peak()
    resident, allocated = host_bytes("VmRSS"), allocated_bytes()
    if run.has_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    saver.save(Progress(1, 1), None)
    seconds = time.perf_counter() - start
    written = sum(path.stat().st_size for path in config.checkpoint.folder.rglob("*") if path.is_file())
    found = {"save_s": seconds, "written_gb": written / 1e9, "host_gb": (host_bytes("VmHWM") - resident) / 1e9}
    if run.has_gpu:
        found["gpu_gb"] = (torch.cuda.max_memory_allocated() - allocated) / 1e9
    run.rows.add(f"save, {layers} of {SIZES[run.size].language[2]} layers", **found)


def reset_host_peak() -> None:
    """Let VmHWM begin again, where the kernel allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def host_bytes(name: str) -> int:
    """A line of this process's /proc status, in bytes; 0 where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if os.path.exists(status) else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)
