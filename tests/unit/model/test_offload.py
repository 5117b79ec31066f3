"""What autograd saves is copied, and weights are not."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

from megatron_patch.model import offload
from megatron_patch.model.offload import ActivationOffload, Offload


def gradients(monkeypatch, smallest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of weight and input, both of which are 10 times as large in the backward pass as in the forward."""
    monkeypatch.setattr(offload, "SMALLEST", smallest)
    layer = torch.nn.Linear(4, 4, bias=False)
    torch.nn.init.ones_(layer.weight)
    given = torch.ones(2, 4, requires_grad=True)
    with ActivationOffload(layer):
        loss = layer(given).sum()
    with torch.no_grad():
        given.data.mul_(10)
        layer.weight.data.mul_(10)
    loss.backward()
    return layer.weight.grad, given.grad


def test_activations_are_copied_and_weights_are_used_as_they_are(monkeypatch):
    of_weight, of_input = gradients(monkeypatch, smallest=0)
    assert (of_weight == 2).all()  # the input as it was in the forward pass
    assert (of_input == 40).all()  # the weight as it is


def test_small_tensors_stay(monkeypatch):
    of_weight, _ = gradients(monkeypatch, smallest=9)
    assert (of_weight == 20).all()


class MockCuda:
    """Streams that note what they are told; all is computed at once, on the CPU."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.count = itertools.count()
        self.names = iter(["out", "back"])
        self.compute = MockStream(self, "compute")
        self.Stream = lambda device: MockStream(self, next(self.names))
        self.current_stream = lambda device: self.compute

    @contextlib.contextmanager
    def stream(self, stream):
        self.log.append(f"{stream.name} copies")
        yield


class MockStream:
    def __init__(self, cuda: MockCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, stream) -> None:
        self.cuda.log.append(f"{self.name} waits for {stream.name}")

    def wait_event(self, event: str) -> None:
        self.cuda.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        return f"{self.name} {next(self.cuda.count)}"


@pytest.fixture
def mock_cuda(monkeypatch):
    """A mock of CUDA's streams, on which two copies are in flight at a time."""
    cuda = MockCuda()
    monkeypatch.setattr(offload, "cuda", cuda)
    monkeypatch.setattr(offload, "uses_streams", lambda device: True)
    monkeypatch.setattr(offload, "IN_FLIGHT", 2)
    offload.streams.cache_clear()
    yield cuda
    offload.streams.cache_clear()


def test_copies_run_beside_and_come_back_before_they_are_asked_for(mock_cuda):
    copies, tensors = Offload(), [torch.full((2,), float(number)) for number in range(5)]
    saved = [copies.save(tensor) for tensor in tensors]
    out = ["out waits for compute", "out copies"]
    assert mock_cuda.log == [
        *out,
        *out,
        *[line for gone in range(3) for line in (*out, f"compute waits for out {gone}")],
    ]

    def load(number: int) -> list[str]:
        mock_cuda.log.clear()
        assert torch.equal(copies.load(saved.pop()), tensors[number])
        return list(mock_cuda.log)

    def fetch(number: int) -> list[str]:
        return ["back waits for compute", f"back waits for out {number}", "back copies"]

    assert load(4) == []  # this one and the one before have not gone yet
    assert load(3) == fetch(2)
    assert load(2) == [*fetch(1), "compute waits for back 5"]
    assert load(1) == [*fetch(0), "compute waits for back 6"]
    assert load(0) == ["compute waits for back 7"]


def test_memory_of_what_nobody_asks_for_is_not_reused_early(mock_cuda):
    copies = Offload()
    saved = [copies.save(torch.ones(2)) for _ in range(4)]
    copies.load(saved.pop(1))  # and 0 is fetched along with it
    mock_cuda.log.clear()
    del saved[0]
    assert mock_cuda.log == ["compute waits for back 5"]


def test_gradients_are_those_without(mock_cuda, monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST", 0)
    layers = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()) for _ in range(6)])
    given, found = torch.randn(3, 4), []
    for context in (contextlib.nullcontext(), ActivationOffload(layers)):
        with context:
            loss = layers(given).square().sum()
        found.append(torch.autograd.grad(loss, list(layers.parameters())))
    assert mock_cuda.log.count("back copies") > 4
    for plain, offloaded in zip(*found, strict=True):
        assert torch.equal(plain, offloaded)
