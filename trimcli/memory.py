"""Peak memory of a run: anonymous memory of this process, and of the CUDA device where one is used.

And Python's own collection of garbage, which takes a fifth of the time that importing torch and transformers takes.
"""

import contextlib
import ctypes
import gc
import threading
from pathlib import Path
from typing import NamedTuple

STATUS, MACHINE, GROUP = Path("/proc/self/status"), Path("/proc/meminfo"), Path("/sys/fs/cgroup")
INTERVAL = 0.02
# Objects between two looks for garbage, and looks between two at the older generations, while modules are imported.
RARELY = (100_000, 50, 100)
_USUAL = gc.get_threshold()
_MMAP_THRESHOLD = -3  # as glibc's malloc.h numbers it


class Limits(NamedTuple):
    """Bytes that a run may take of the host's memory and of the compute device's; None where nothing was said."""

    host: int | None = None
    device: int | None = None


def return_what_is_freed() -> None:
    """Let the C library give blocks of a MiB and more back as they are freed: of smaller than 32 MiB it keeps many.

    Where it is not glibc nothing happens. Without limits it may keep them, which saves time.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)


def return_what_was_kept() -> None:
    """Let the C library give back what it kept of freed blocks until now, which comes to hundreds of MiB in pieces.

    Before a pass and before a matrix it takes milliseconds. Where it is not glibc nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """Samples this process's anonymous memory while it is entered: mapped shard pages are the kernel's to drop."""

    def __init__(self) -> None:
        self.peak = self.cuda = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.peak = max(self.peak, anonymous_bytes())

    def __enter__(self) -> "PeakMemory":
        _note_cuda()
        _running.append(self)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes())
        _note_cuda()
        _running.remove(self)

    def document(self) -> dict[str, int]:
        """Bytes: `anonymous` of the process, `cuda` of the CUDA device that held most, where any was used."""
        return {"anonymous": self.peak, **({"cuda": self.cuda} if self.cuda else {})}


def collect_rarely() -> None:
    """Look for garbage rarely, for a program that has everything to import yet: next to nothing of that is garbage."""
    gc.set_threshold(*RARELY)


def collect_as_usual() -> None:
    """Undo `collect_rarely`, and look no more through what was imported; without it nothing happens."""
    if gc.get_threshold() == RARELY:
        gc.freeze()
        gc.set_threshold(*_USUAL)


_running: list[PeakMemory] = []


def _note_cuda() -> None:
    """Tell every run going on (a prune, and a calibration in it) what CUDA devices held at most since the last call."""
    from torch import cuda

    for device in range(cuda.device_count() if cuda.is_initialized() else 0):
        for run in _running:
            run.cuda = max(run.cuda, cuda.max_memory_allocated(device))
        cuda.reset_peak_memory_stats(device)


def available_bytes() -> int | None:
    """What this process may still take of the machine's memory and of its control group's; None where none is told."""
    found = []
    with contextlib.suppress(OSError, StopIteration):
        line = next(line for line in MACHINE.read_text().splitlines() if line.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # where there is no limit, there is no number
        limit, used = (int((GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        kept = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
        found.append(limit - used + int(kept.get("inactive_file", 0)))
    return min(found, default=None)


def anonymous_bytes() -> int:
    """Anonymous memory of this process in bytes, or its largest resident size where that is not told."""
    try:
        for line in STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
