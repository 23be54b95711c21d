"""Products straight from keep bits and kept values against torch's dense ones, and a whole model's tokens per second.

    python -m benchmarks.bitmap -o benchmarks/results-bitmap.md
    python -m benchmarks.bitmap --shapes 1.5B --repeat 5 --no-models

One input row times random matrices of the shapes of Qwen2.5-1.5B and 7B, at 50, 60, 70 and 80% zeros. Every form is run
in turn, other memory written in between; figures are minima over the rounds. The floor is the time in which this
machine copies as many bytes as the form has, read and written ones counted.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.smollm2 import write as write_smollm2
from benchmarks.support.provenance import head, publish, table
from trimcli import ApplyOptions, PruneOptions, Recipe, apply_masks, prune
from trimcli.kernels.bitmap import build
from trimcli.kernels.bitmap.linear import SparseLinear
from trimcli.kernels.shapes import random_matrix
from trimcli.kernels.timing import COPIED_BYTES, FLUSH_BYTES

SHAPES = {
    "1.5B": [(1536, 1536), (256, 1536), (8960, 1536), (1536, 8960)],
    "7B": [(3584, 3584), (512, 3584), (18944, 3584), (3584, 18944)],
}
ZEROS = (0.5, 0.6, 0.7, 0.8)
# Qwen2.5-1.5B's, with fewer positions: nothing here is long.
QWEN = Qwen2Config(
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    vocab_size=151936,
    tie_word_embeddings=True,
    max_position_embeddings=4096,
)


def fastest(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Least seconds of each run, taken in turns."""
    flush = torch.zeros(FLUSH_BYTES, dtype=torch.uint8)
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats + 1):
        for name, run in runs.items():
            flush.add_(1)
            started = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def bandwidth(repeats: int) -> float:
    """Bytes a second, read and written, of the fastest copy."""
    source, target = torch.ones(COPIED_BYTES, dtype=torch.uint8), torch.zeros(COPIED_BYTES, dtype=torch.uint8)
    return 2 * COPIED_BYTES / fastest({"copy": lambda: target.copy_(source)}, repeats)["copy"]


@torch.no_grad()
def products(shape: tuple[int, int], dtype: torch.dtype, repeats: int) -> Iterator[tuple[float, float, float, int]]:
    """For every fraction of zeros: it, seconds dense and sparse, bytes sparse. Inputs and values are of `dtype`."""
    inputs = torch.randn(1, shape[1]).to(dtype)
    for zeros in ZEROS:
        weight = random_matrix(shape, zeros, dtype)
        sparse = SparseLinear.of(weight)
        runs: dict[str, Callable[[], object]] = {
            "dense": partial(nn.functional.linear, inputs, weight),
            "sparse": partial(sparse, inputs),
        }
        best = fastest(runs, repeats)
        yield zeros, best["dense"], best["sparse"], sparse.nbytes


def product_rows(names: list[str], repeats: int, copied: float) -> Iterator[list[str]]:
    """The table's rows, and those of a model's matrices of one layer together."""
    for name in names:
        for dtype in (torch.bfloat16, torch.float32):
            label = str(dtype).removeprefix("torch.")
            whole = {zeros: [0.0, 0.0, 0.0] for zeros in ZEROS}
            for shape, count in zip(SHAPES[name], (2, 2, 2, 1), strict=True):
                for zeros, dense, sparse, nbytes in products(shape, dtype, repeats):
                    floor = nbytes / copied
                    yield row(f"{name}, {shape[0]} x {shape[1]}", label, zeros, dense, sparse, floor)
                    for place, seconds in enumerate((dense, sparse, floor)):
                        whole[zeros][place] += count * seconds
            for zeros, figures in whole.items():
                yield row(f"**{name}, a layer**", label, zeros, *figures)


def row(matrix: str, dtype: str, zeros: float, dense: float, sparse: float, floor: float) -> list[str]:
    """Milliseconds, and how many times faster than dense and how near to the floor that is."""
    times = [f"{1e3 * seconds:.3f}" for seconds in (dense, sparse, floor)]
    return [matrix, dtype, f"{zeros:.0%}", *times, f"{dense / sparse:.2f}x", f"{floor / sparse:.0%}"]


def models(folder: Path) -> Iterator[tuple[str, Path]]:
    """SmolLM2-135M and a random model of Qwen2.5-1.5B's shape, in their 16 bits."""
    yield "SmolLM2-135M", write_smollm2(folder / "smollm2")
    torch.manual_seed(0)
    path = folder / "qwen"
    AutoModelForCausalLM.from_config(QWEN, dtype=torch.bfloat16).save_pretrained(path)
    yield "random 1.5B", path


def model_rows(folder: Path, repeats: int) -> Iterator[list[str]]:
    """Tokens per second and bytes of each model at 70%, dense and sparse."""
    from trimcli.kernels.bench import bench
    from trimcli.kernels.options import BenchOptions

    for name, path in models(folder):
        recipe = Recipe(method="magnitude")
        prune(str(path), folder / "masks", PruneOptions(sparsity=0.7, recipe=recipe, device="cpu"), force=True)
        apply_masks(str(path), folder / "masks", folder / "packed", ApplyOptions(format="packed"), force=True)
        for dtype in ("float32", "bfloat16"):
            options: Any = {"dtype": dtype, "device": "cpu", "tokens": 32, "repeat": repeats}
            found = bench([str(folder / "packed")], BenchOptions(**options))
            for one in found.measured:
                rates = [f"{rate.fastest:,.1f}" for rate in one.rates]
                yield [f"{name}, {dtype}", one.form, f"{one.memory / 2**20:,.0f}", *rates]
        shutil.rmtree(path)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="the Markdown file; stdout if not given")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--repeat", type=int, default=30, help="rounds of each product")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-models", action="store_true", help="products alone")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    build.load()
    copied = bandwidth(given.repeat)
    facts = {"copying": f"{copied / 1e9:.1f} GB/s, read and written", "rounds": f"{given.repeat}, of which the fastest"}
    lines = head("Products from keep bits and kept values", "bitmap", facts)
    lines += [
        "Milliseconds of one input row times a matrix; inputs, dense matrix and kept values are of the dtype.",
        "",
    ]
    columns = ["matrix", "dtype", "zeros", "dense", "sparse", "floor", "speed", "of the floor"]
    lines += table(columns, product_rows(given.shapes, given.repeat, copied))
    if not given.no_models:
        lines += ["", "Tokens per second at 70% zeros, prompts of 32 tokens and as many decoded; MiB of tensors.", ""]
        phases = [f"{phase} b{batch}" for batch in (1, 4, 16) for phase in ("prefill", "decode")]
        with tempfile.TemporaryDirectory() as folder:
            lines += table(["model", "form", "MiB", *phases], model_rows(Path(folder), 3))
    publish(lines, given.output)


if __name__ == "__main__":
    main()
