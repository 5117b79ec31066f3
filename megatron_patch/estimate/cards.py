"""What GPUs attain, and what the layers ask of them beside matrix products: every constant of the predicted time.

Each says where it is from. "Assumed" is an estimate that no run of this package has tested.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE = 128
"""Rows and columns of a matrix product that one streaming multiprocessor (SM) computes at a time."""
NODE = 8
"""GPUs that NVLink connects."""
NETWORK = 45e9
"""Bytes/s of a collective between nodes, per GPU. Assumed: 90% of a 400 Gbit/s adapter for each."""
PCIE = 50e9
"""Bytes/s between CPU and GPU, pinned. Assumed: 80% of PCIe 5.0 x16, 64 GB/s."""
HOST = 100e9
"""Bytes/s that the CPU's Adam reads and writes, per rank. Assumed."""
COPY_SHARE = 0.9
"""Part of a copy's rate that elementwise kernels attain. Assumed."""
ATTENTION_SHARE = 0.28
"""Part of the peak that fused attention attains at 600 tokens, forward and backward. Assumed."""
FP8_GAIN = 1.7
"""Times as fast as in bf16 are matrix products in fp8, casts included. Assumed; the peak's ratio is 2."""
LAUNCH = 12.5e-6
"""Seconds of Python, megatron.core and torch for each kernel on the CPU. Assumed."""
COLLECTIVE = 23e-6
"""The same for each collective. Assumed."""
LATENCY = 12e-6
"""Seconds of a small collective on the GPU, within a node. Assumed."""
SYNC = 0.15e-3
"""Seconds that a GPU stands idle after the CPU waited for it. Assumed."""
VISION_ROWS = 38
"""Rows of h that a vision layer's norms, biases, residuals and quick GELU read and write per token."""
SCORE_BYTES = 60
"""Bytes that unfused attention reads and writes per score: cast, mask, softmax, and their gradients."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A kind of GPU."""

    peak: float
    """FLOP/s of dense bf16 matrix products (data sheet)."""
    peak_fp32: float
    """FLOP/s without tensor cores (data sheet)."""
    matmul: float
    """FLOP/s that bf16 matrix products of a layer's sizes attain while every SM is at work."""
    num_sms: int
    copy: float
    """Bytes/s read and written by a copy."""
    link: float
    """Bytes/s of a large collective within a node, per GPU (NCCL's bus bandwidth). Assumed: 80% of one way."""
    memory: int
    """Bytes, as torch counts them to a GiB."""


FULL = 0.82
"""Part of an 8192 x 8192 x 8192 product's rate that a layer's products attain in full waves. Assumed: with the waves
of 5,000 tokens it gives 630 TFLOP/s on an H100, with those of 620 tokens 460."""
CARDS = {
    # 8192^3 in bf16 at 798 TFLOP/s, copies at 3.0 TB/s: seen on such cards, not with this package. NVLink 4: 450 GB/s
    # one way.
    "H100": Card(
        peak=989e12, peak_fp32=67e12, matmul=FULL * 798e12, num_sms=132, copy=3.0e12, link=360e9, memory=80 * 2**30
    ),
    # 8192^3 in bf16 at 769 to 798 TFLOP/s, copies at 4.3 TB/s: the same.
    "H200": Card(
        peak=989e12, peak_fp32=67e12, matmul=FULL * 784e12, num_sms=132, copy=4.3e12, link=360e9, memory=140 * 2**30
    ),
    # Assumed: the H100's parts of the data sheet's 312 TFLOP/s and 2.04 TB/s. NVLink 3: 300 GB/s one way.
    "A100": Card(
        peak=312e12, peak_fp32=19.5e12, matmul=FULL * 252e12, num_sms=108, copy=1.83e12, link=240e9, memory=80 * 2**30
    ),
}


def find_card(name: str) -> Card | None:
    """The card that torch calls `name` ("NVIDIA H100 80GB HBM3"); None for one that is not known."""
    return next((card for known, card in CARDS.items() if known in name), None)


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What the layers' code does beside matrix products and attention. Pairs are of forward and backward pass."""

    rope: tuple[float, float]
    """Times that queries and keys are read or written by the rotary embedding."""
    swiglu: tuple[float, float]
    """Times that f channels of a token are read or written between fc1 and fc2."""
    launches: tuple[int, int]
    """Kernels of a language layer."""
    syncs: int
    """Times that the CPU waits for the GPU in a micro batch."""
    handover: float
    """Seconds in which a micro batch gets from one tensor- or context-parallel rank to the others."""
    gradient_bytes: int
    """Per trained weight and micro batch, to add up its gradient: the fp32 one read and written; and, where products do
    not add to it themselves, a 16-bit one written and read."""


KERNELS = Kernels(rope=(5, 5), swiglu=(3, 5), launches=(24, 24), syncs=0, handover=0.0, gradient_bytes=8)
"""Fused SwiGLU (one kernel forward, one backward), three kernels to rotate queries and three to rotate keys.
A thread hands micro batches over."""
VISION_LAUNCHES = (16, 24)
"""Kernels of a vision layer, forward and backward."""
ATTENTION_LAUNCHES = 3
"""Kernels of a language layer's core attention, forward."""
OTHER_LAUNCHES = 60
"""Kernels of embedding, projector, vocabulary and loss."""
