"""Time TRIM's row search on one matrix against its direct form and against one product W V.

    python benchmarks/trim_rows.py --threads 2
    python benchmarks/trim_rows.py --device cuda

The direct form is the search as one writes it down: sort once, then scatter a mask, multiply and compare in
every iteration. Weights are Gaussian with uneven rows, inputs correlated with uneven channels. Time and
memory are measured in processes of their own.
"""

import argparse
import multiprocessing
import os
import pathlib
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from trimcli.methods.rows.base import RowResult
from trimcli.methods.rows.options import TrimOptions
from trimcli.methods.rows.search import search_rows

_STEPS = ((0.01, 0.02, 0.04, 0.08, 0.12, 0.16), (-0.01, -0.02, -0.04))
_ITERATIONS = 10

T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """What is run: one matrix [d_out, d_in], its samples and target, where and how often."""

    d_out: int
    d_in: int
    samples: int
    target: float
    device: str
    threads: int
    repeat: int


@dataclass(frozen=True)
class Figures:
    """Seconds of W V, direct form and search; searches run, winning step, rows of equal count."""

    product: float
    direct: float
    search: float
    searches: int
    step: float
    equal_rows: int


def make_matrix(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, wanda scores and last-token inputs of the case, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight = normal(case.d_out, case.d_in) * (0.7 * normal(case.d_in)).exp() ** normal(case.d_out, 1)
    latent = normal(case.d_in, 64) @ normal(64, case.samples) / 8
    inputs = (latent + normal(case.d_in, case.samples)) * (0.7 * normal(case.d_in, 1)).exp()
    scores = weight.abs() * inputs.square().mean(dim=1).sqrt()
    return weight.to(case.device), scores.to(case.device), inputs.to(case.device)


def direct_search(weight: Tensor, scores: Tensor, inputs: Tensor, target: float) -> tuple[Tensor, float, int]:
    """The search written down directly, reference numerics: row counts, winning step, number of searches."""
    d_out, d_in = weight.shape
    order = scores.argsort(dim=1, stable=True)
    places = torch.arange(d_in, device=weight.device)
    dense = weight @ inputs

    def pruned(sparsity: Tensor) -> Tensor:
        keep = torch.empty(d_out, d_in, dtype=torch.bool, device=weight.device)
        keep.scatter_(1, order, places >= (d_in * sparsity).long().unsqueeze(1))
        return (weight * keep) @ inputs

    def cosine(a: Tensor, b: Tensor, dim: int) -> Tensor:
        a, b = a.double(), b.double()
        return ((a * b).sum(dim) / ((a.norm(dim=dim) + 1e-8) * (b.norm(dim=dim) + 1e-8))).clamp(-1, 1)

    def recentre(sparsity: Tensor) -> Tensor:
        sparsity = sparsity.float().clamp(0, 0.95)
        return sparsity - sparsity.mean() + target

    def search(step: float) -> tuple[float, Tensor]:
        sparsity = uniform
        outputs = pruned(sparsity)
        best, best_sparsity = float(cosine(dense.flatten(), outputs.flatten(), 0)), sparsity
        for _ in range(_ITERATIONS):
            rows = cosine(dense, outputs, 1)
            change = (rows - rows.min()) / (rows.max() - rows.min() + 1e-6) * 2 * step
            sparsity = recentre(sparsity + (change - change.mean()))
            outputs = pruned(sparsity)
            quality = float(cosine(dense.flatten(), outputs.flatten(), 0))
            if quality > best:
                best, best_sparsity = quality, sparsity
        return best, best_sparsity

    uniform = torch.full((d_out,), target, device=weight.device)
    best, best_sparsity, best_step = -float("inf"), uniform, 0.0
    searches = 0
    for steps in _STEPS:
        previous = -float("inf")
        for step in steps:
            quality, sparsity = search(step)
            searches += 1
            if quality > best:
                best, best_sparsity, best_step = quality, sparsity, 0.0 if sparsity is uniform else step
            if quality <= previous:
                break
            previous = quality
        if best_step:
            break
    counts = (d_in * recentre(best_sparsity)).long().clamp(0, d_in)
    return counts.cpu(), best_step, searches


def seconds(call: Callable[[], object], device: str) -> float:
    """Wall time of one `call`."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: str) -> None:
    """Wait for what an accelerator still has to do."""
    if device != "cpu":
        torch.accelerator.synchronize()


def peak_memory(case: Case) -> float | None:
    """What a search holds at its peak beyond its arguments, in float32 matrices; None if unknown."""
    torch.set_num_threads(case.threads)
    search = partial(search_rows, options=TrimOptions(iterations=_ITERATIONS), numerics="reference")
    # A small matrix first, so that what libraries allocate once is not counted.
    search(*make_matrix(replace(case, d_out=64, d_in=64)), case.target)
    arguments = make_matrix(case)
    if case.device != "cpu":
        torch.accelerator.memory.reset_peak_memory_stats()
        before = torch.accelerator.memory.memory_allocated()
        search(*arguments, case.target)
        extra = torch.accelerator.memory.max_memory_allocated() - before
    else:
        status, clear = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")
        if not clear.exists():
            return None
        clear.write_text("5")  # resets the peak, VmHWM
        held = _kilobytes(status.read_text(), "VmRSS")
        search(*arguments, case.target)
        extra = (_kilobytes(status.read_text(), "VmHWM") - held) * 1024
    return extra / (case.d_out * case.d_in * 4)


def _kilobytes(status: str, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}.")
    return int(found[1])


def measure(case: Case) -> Figures:
    """Time the case; raises RuntimeError where search and direct form end with different steps."""
    torch.set_num_threads(case.threads)
    search = partial(search_rows, options=TrimOptions(iterations=_ITERATIONS), numerics="reference")
    weight, scores, inputs = make_matrix(case)
    found: list[RowResult] = []
    expected: list[tuple[Tensor, float, int]] = []
    calls = (
        lambda: weight @ inputs,
        lambda: expected.append(direct_search(weight, scores, inputs, case.target)),
        lambda: found.append(search(weight, scores, inputs, case.target)),
    )
    with torch.inference_mode():
        # By turns, so that what else the machine does falls on all of them; the quickest of each counts.
        rounds = [[seconds(call, case.device) for call in calls] for _ in range(case.repeat)]
    product, direct, fast = map(min, zip(*rounds, strict=True))
    counts, step, searches = expected[0]
    if step != found[0].step:
        raise RuntimeError(f"{case}: the direct form ends with step {step}, the search with {found[0].step}.")
    return Figures(product, direct, fast, searches, step, int((counts == found[0].counts).sum()))


def alone(function: Callable[[Case], T], case: Case) -> T:
    """What `function` returns for `case` in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, case).result()


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", default=["1024x1024", "2048x2048", "4096x4096", "4096x11008"])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--target", type=float, default=0.7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=1, help="repetitions, of which the quickest counts")
    given = parser.parse_args()
    # Threads that spin long while they wait stall whatever shares their cores; the measured processes inherit this.
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")
    heads = ("matrix", "W V, s", "direct, s", "search, s", "ratio", "searches", "step", "equal rows", "memory")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for size in given.sizes:
        d_out, d_in = map(int, size.split("x"))
        case = Case(d_out, d_in, given.samples, given.target, given.device, given.threads, given.repeat)
        found = alone(measure, case)
        # Larger blocks then come from and go back to the system, so the resident size shows what is held.
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)
        extra = alone(peak_memory, case)
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
        row = (
            f"{d_out} x {d_in}",
            f"{found.product:.3f}",
            f"{found.direct:.2f}",
            f"{found.search:.2f}",
            f"{found.direct / found.search:.1f}",
            f"{found.searches}",
            f"{found.step}",
            f"{found.equal_rows} of {d_out}",
            "-" if extra is None else f"{extra:.2f} x",
        )
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
