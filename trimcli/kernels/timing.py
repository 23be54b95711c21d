"""Seconds of work on the CPU as it is when its inputs come from memory, and how fast that memory is."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

# Written between two timings, so that a matrix comes from memory as it does when all others were read before it.
FLUSH_BYTES = 64 << 20
COPIED_BYTES = 128 << 20
REPEATS = 7


def timed(runs: Mapping[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, float]:
    """Median seconds of each run, taken in turns; a first turn warms up."""
    flush = torch.zeros(FLUSH_BYTES, dtype=torch.uint8)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            flush.add_(1)
            started = time.perf_counter()
            run()
            found[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


def copy_bandwidth(repeats: int = REPEATS) -> float:
    """Bytes a second, those read and those written, at which this CPU copies memory with torch's threads."""
    source, target = torch.ones(COPIED_BYTES, dtype=torch.uint8), torch.zeros(COPIED_BYTES, dtype=torch.uint8)
    return 2 * COPIED_BYTES / timed({"copy": lambda: target.copy_(source)}, repeats)["copy"]
