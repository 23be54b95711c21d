"""Seconds of work as it is when its inputs come from memory, and how fast that memory is."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

CPU = torch.device("cpu")
# Written between two timings, so that a matrix comes from memory as it does when all others were read before it.
FLUSH_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
COPIED_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
REPEATS = 7


def timed(
    runs: Mapping[str, Callable[[], object]], repeats: int = REPEATS, device: torch.device = CPU
) -> dict[str, float]:
    """Median seconds of each run on a CPU or CUDA device, taken in turns; a first turn warms up."""
    return {name: statistics.median(seconds) for name, seconds in rounds(runs, repeats, device).items()}


def rounds(
    runs: Mapping[str, Callable[[], object]], repeats: int = REPEATS, device: torch.device = CPU
) -> dict[str, list[float]]:
    """Seconds of each run, as many as `repeats`: `timed` without its median."""
    flush = torch.zeros(FLUSH_BYTES[device.type], dtype=torch.uint8, device=device)
    seconds = _on_cpu if device.type == "cpu" else _on_cuda
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            flush.add_(1)
            found[name].append(seconds(run))
    return {name: taken[1:] for name, taken in found.items()}


def copy_bandwidth(repeats: int = REPEATS, device: torch.device = CPU) -> float:
    """Bytes a second, those read and those written, at which a device, a CPU with torch's threads, copies memory."""
    size = COPIED_BYTES[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / timed({"copy": lambda: target.copy_(source)}, repeats, device)["copy"]


def _on_cpu(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _on_cuda(run: Callable[[], object]) -> float:
    """Of the device alone: the work is handed over while the flush still goes on."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
