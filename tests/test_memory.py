"""Peak memory of runs that follow each other and lie within each other."""

import gc
import platform
import subprocess
import sys

import pytest
import torch

from trimcli.memory import PeakMemory, collect_as_usual, collect_rarely


class Cards:
    """Two CUDA devices, as far as their memory is concerned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.peaks = [0, 0]
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peaks[device])
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: self.hold(device, 0))

    def hold(self, device: int, peak: int) -> None:
        self.peaks[device] = peak


def test_a_run_counts_from_its_start_on_whichever_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = Cards(monkeypatch)
    cards.hold(0, 100)
    with PeakMemory() as first:
        cards.hold(1, 30)
    with PeakMemory() as second:
        cards.hold(0, 20)
    assert first.document()["cuda"] == 30
    assert second.document()["cuda"] == 20
    assert second.document()["anonymous"] > 0


@pytest.mark.parametrize(("before", "inside", "after", "outer"), [(50, 40, 10, 50), (10, 40, 20, 40), (1, 2, 3, 3)])
def test_a_run_within_a_run_is_a_part_of_it(
    before: int, inside: int, after: int, outer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = Cards(monkeypatch)
    with PeakMemory() as whole:
        cards.hold(0, before)
        with PeakMemory() as part:
            cards.hold(1, inside)
        cards.hold(0, after)
    assert part.document()["cuda"] == inside
    assert whole.document()["cuda"] == outer


def test_without_cuda_there_is_no_figure_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with PeakMemory() as memory:
        pass
    assert set(memory.document()) == {"anonymous"}


def test_a_run_that_fails_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = Cards(monkeypatch)
    failed = PeakMemory()
    with pytest.raises(IndexError), failed:
        cards.hold(2, 5)
    cards.hold(0, 7)
    with PeakMemory():
        cards.hold(0, 90)
    assert "cuda" not in failed.document()


def test_garbage_is_looked_for_rarely_only_until_everything_is_imported() -> None:
    usual, frozen = gc.get_threshold(), gc.get_freeze_count()
    collect_as_usual()
    assert gc.get_freeze_count() == frozen
    try:
        collect_rarely()
        assert gc.get_threshold()[0] > usual[0]
        assert gc.isenabled()
        collect_as_usual()
        assert gc.get_threshold() == usual
        assert gc.get_freeze_count() > frozen
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()


KEPT = """
import ctypes
from trimcli.memory import anonymous_bytes, return_what_is_freed, return_what_was_kept
{first}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.free(libc.malloc(24 << 20))  # from now on glibc keeps what is smaller
before, blocks = anonymous_bytes(), []
for _ in range(8):
    large = libc.malloc(16 << 20)
    ctypes.memset(large, 1, 16 << 20)
    blocks += [large, libc.malloc(1 << 18)]  # what lies between keeps them apart
for large in blocks[::2]:
    libc.free(large)
{last}
print((anonymous_bytes() - before) >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries do as they please")
@pytest.mark.parametrize(
    ("first", "last", "returns"),
    [("", "", False), ("return_what_is_freed()", "", True), ("", "return_what_was_kept()", True)],
)
def test_large_blocks_go_back_to_the_system_when_asked_to(first: str, last: str, returns: bool) -> None:
    program = KEPT.format(first=first, last=last)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 8) == returns
