"""Products straight from keep bits and kept values against torch's dense ones, and a whole model's tokens per second.

    python -m benchmarks.bitmap -o benchmarks/results-bitmap.md
    python -m benchmarks.bitmap --no-products -o benchmarks/results-bitmap-models.md
    python -m benchmarks.bitmap --shapes 1.5B --repeat 5 --no-models
    python -m benchmarks.bitmap --device cuda -o benchmarks/results-bitmap-cuda.md

One input row, on a CUDA device also 4 and 16, times random matrices of the shapes of Qwen2.5-1.5B and 7B, at 50, 60, 70
and 80% zeros. Every form is run in turn, other memory written in between; figures are minima over the rounds. The floor
is the time in which this device copies as many bytes as the form has, read and written ones counted. A CUDA device's
time is its own, without that of handing it the work, which whole models show.
"""

import argparse
import copy
import shutil
import sys
import tempfile
import timeit
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.smollm2 import write as write_smollm2
from benchmarks.support.provenance import head, publish, table
from trimcli import ApplyOptions, PruneOptions, Recipe, apply_masks, prune
from trimcli.kernels.bench import bench, measure
from trimcli.kernels.bitmap import build
from trimcli.kernels.bitmap.linear import SparseLinear
from trimcli.kernels.bitmap.model import model_bytes
from trimcli.kernels.bitmap.operator import bitmap_linear
from trimcli.kernels.options import BenchOptions
from trimcli.kernels.shapes import TRIED, break_even, random_matrix
from trimcli.kernels.timing import COPIED_BYTES, rounds

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


def fastest(runs: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Least seconds of each run, taken in turns."""
    return {name: min(seconds) for name, seconds in rounds(runs, repeats, device).items()}


def bandwidth(repeats: int, device: torch.device) -> float:
    """Bytes a second, read and written, of the fastest copy."""
    size = COPIED_BYTES[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / fastest({"copy": lambda: target.copy_(source)}, repeats, device)["copy"]


@torch.no_grad()
def in_cache(repeats: int) -> str:
    """What 8 weights take one thread where a matrix, at 70% zeros, need not come from memory."""
    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for dtype in (torch.bfloat16, torch.float32):
        sparse, inputs = SparseLinear.of(random_matrix((1536, 1536), 0.7, dtype)), torch.randn(1, 1536).to(dtype)
        seconds = min(timeit.repeat(lambda: sparse(inputs), number=20, repeat=repeats)) / 20  # noqa: B023 - run at once
        found.append(f"{1e9 * seconds / (1536 * 1536 / 8):.2f} ns in {str(dtype).removeprefix('torch.')}")
    torch.set_num_threads(threads)
    return ", ".join(found)


@torch.no_grad()
def products(
    shape: tuple[int, int], dtype: torch.dtype, rows: Sequence[int], repeats: int, device: torch.device
) -> Iterator[tuple[int, float, float, float, int]]:
    """For every number of input rows and fraction of zeros: both, seconds dense and sparse, bytes sparse."""
    for zeros in ZEROS:
        weight = random_matrix(shape, zeros, dtype)
        sparse, dense = SparseLinear.of(weight).to(device), weight.to(device)
        for n in rows:
            inputs = torch.randn(n, shape[1]).to(device, dtype)
            runs: dict[str, Callable[[], object]] = {
                "dense": partial(nn.functional.linear, inputs, dense),
                "sparse": partial(bitmap_linear, inputs, sparse.keep, sparse.offsets, sparse.values),
            }
            best = fastest(runs, repeats, device)
            yield n, zeros, best["dense"], best["sparse"], sparse.nbytes


def product_rows(names: list[str], repeats: int, copied: float, device: torch.device) -> Iterator[list[str]]:
    """The table's rows, and those of a model's matrices of one layer together."""
    rows = (1,) if device.type == "cpu" else (1, 4, 16)
    for name in names:
        for dtype in (torch.bfloat16, torch.float32):
            label = str(dtype).removeprefix("torch.")
            whole = {(n, zeros): [0.0, 0.0, 0.0] for n in rows for zeros in ZEROS}
            for shape, count in zip(SHAPES[name], (2, 2, 2, 1), strict=True):
                for n, zeros, dense, sparse, nbytes in products(shape, dtype, rows, repeats, device):
                    floor = nbytes / copied
                    yield row(f"{name}, {shape[0]} x {shape[1]}", label, n, zeros, dense, sparse, floor)
                    for place, seconds in enumerate((dense, sparse, floor)):
                        whole[n, zeros][place] += count * seconds
            for (n, zeros), figures in whole.items():
                yield row(f"**{name}, a layer**", label, n, zeros, *figures)


def even_rows(names: list[str], device: torch.device) -> Iterator[list[str]]:
    """Of every shape the fraction of zeros from which on one input row is faster times keep bits than times dense."""
    for name in names:
        for shape in SHAPES[name]:
            found = [break_even(shape, dtype, dtype, device=device) for dtype in (torch.bfloat16, torch.float32)]
            yield [f"{name}, {shape[0]} x {shape[1]}", *("never" if one is None else f"{one:.0%}" for one in found)]


def row(matrix: str, dtype: str, n: int, zeros: float, dense: float, sparse: float, floor: float) -> list[str]:
    """Milliseconds, and how many times faster than dense and how near to the floor that is."""
    times = [f"{1e3 * seconds:.3f}" for seconds in (dense, sparse, floor)]
    return [matrix, dtype, str(n), f"{zeros:.0%}", *times, f"{dense / sparse:.2f}x", f"{floor / sparse:.0%}"]


def models(folder: Path) -> Iterator[tuple[str, Path]]:
    """SmolLM2-135M and a random model of Qwen2.5-1.5B's shape, in their 16 bits."""
    yield "SmolLM2-135M", write_smollm2(folder / "smollm2")
    torch.manual_seed(0)
    path = folder / "qwen"
    AutoModelForCausalLM.from_config(QWEN, dtype=torch.bfloat16).save_pretrained(path)
    yield "random 1.5B", path


def model_rows(folder: Path, repeats: int, tokens: int) -> Iterator[list[str]]:
    """Tokens per second and bytes of each model at 70%, dense and sparse, on the CPU."""
    for name, path in models(folder):
        recipe = Recipe(method="magnitude")
        prune(str(path), folder / "masks", PruneOptions(sparsity=0.7, recipe=recipe, device="cpu"), force=True)
        apply_masks(str(path), folder / "masks", folder / "packed", ApplyOptions(format="packed"), force=True)
        for dtype in ("float32", "bfloat16"):
            yield from directory_rows(f"{name}, {dtype}", folder / "packed", dtype, "cpu", repeats, tokens)
            print(f"measured: {name}, {dtype}", file=sys.stderr)
        shutil.rmtree(path)


def directory_rows(name: str, path: Path, dtype: str, device: str, repeats: int, tokens: int) -> Iterator[list[str]]:
    """The same of a pruned directory."""
    options: Any = {"dtype": dtype, "device": device, "tokens": tokens, "repeat": repeats}
    for one in bench([str(path)], BenchOptions(**options)).measured:
        yield [name, one.form, f"{one.memory / 2**20:,.0f}", *(f"{rate.fastest:,.1f}" for rate in one.rates)]


def random_rows(repeats: int, tokens: int, device: torch.device) -> Iterator[list[str]]:
    """The same of a random model of Qwen2.5-1.5B's shape that is made on the device, which takes seconds."""
    with device:
        model = AutoModelForCausalLM.from_config(QWEN, dtype=torch.bfloat16).eval().requires_grad_(False)
    options = BenchOptions(tokens=tokens, repeat=repeats)

    def measured(form: str) -> list[str]:
        rates = [f"{rate.fastest:,.1f}" for rate in measure(model, options, device, form)]
        return ["random 1.5B, bfloat16", form, f"{model_bytes(model) / 2**20:,.0f}", *rates]

    yield measured("dense")
    made: dict[tuple[int, int], SparseLinear] = {}
    for layer in model.model.layers:
        for name, linear in list(layer.named_modules()):
            if isinstance(linear, nn.Linear):
                shape = (linear.out_features, linear.in_features)
                if shape not in made:
                    made[shape] = SparseLinear.of(random_matrix(shape, 0.7, torch.bfloat16)).to(device)
                sparse = copy.deepcopy(made[shape])
                sparse.register_parameter("bias", linear.bias)
                parent, _, leaf = name.rpartition(".")
                setattr(layer.get_submodule(parent), leaf, sparse)
    yield measured("bitmap")


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="the Markdown file; stdout if not given")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--repeat", type=int, default=30, help="rounds of each product")
    parser.add_argument("--tokens", type=int, default=8, help="of a model's prompt, and as many decoded")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--no-models", action="store_true", help="products alone")
    parser.add_argument("--no-products", action="store_true", help="models alone")
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="pruned directories to run, too")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    if device.type == "cpu":
        build.load()
    copied = bandwidth(given.repeat, device)
    facts = {
        "copying": f"{copied / 1e9:,.1f} GB/s, read and written",
        **({"8 weights from cache, one thread": in_cache(given.repeat)} if device.type == "cpu" else {}),
        "rounds": f"{given.repeat}, of which the fastest",
    }
    what = "Whole models" if given.no_products else "Products"
    lines = head(f"{what} from keep bits and kept values", "bitmap", facts)
    if not given.no_products:
        about = "Milliseconds of input rows times a matrix; inputs, dense matrix and kept values are of the dtype."
        columns = ["matrix", "dtype", "rows", "zeros", "dense", "sparse", "floor", "speed", "of the floor"]
        lines += [about, "", *table(columns, product_rows(given.shapes, given.repeat, copied, device)), ""]
        about = f"One input row is faster times keep bits, of {', '.join(f'{zeros:.0%}' for zeros in TRIED)}, from"
        lines += [about, "", *table(["matrix", "bfloat16", "float32"], even_rows(given.shapes, device)), ""]
        if device.type == "cpu":
            lines += (Path(__file__).parent / "bitmap-notes.md").read_text(encoding="utf-8").splitlines()
        lines += [] if given.no_models else [""]
    if not given.no_models:
        about = f"Tokens per second at 70% zeros, prompts of {given.tokens} tokens and as many decoded; MiB of tensors."
        lines += [about, ""]
        phases = [f"{phase} b{batch}" for batch in (1, 4, 16) for phase in ("prefill", "decode")]
        with tempfile.TemporaryDirectory() as folder:
            cpu, tokens = device.type == "cpu", given.tokens
            rows = list(model_rows(Path(folder), 2, tokens) if cpu else random_rows(3, tokens, device))
            for path in given.models:
                rows += directory_rows(path.name, path, "auto", given.device, 3, tokens)
            lines += table(["model", "form", "MiB", *phases], rows)
    publish(lines, given.output)


if __name__ == "__main__":
    main()
