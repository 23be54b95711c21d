"""`trim bench`: tokens per second, seconds of products and bytes, dense and sparse, on the machine at hand."""

import inspect
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimcli.console import NO_PROGRESS, Progress
from trimcli.errors import OptionError
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.documents import read_mark
from trimcli.files.manifest import manifest
from trimcli.kernels import forms
from trimcli.kernels.bitmap.model import held, sparsify
from trimcli.kernels.exported import EXPORT, ExportedCheckpoint, exported_skeleton
from trimcli.kernels.options import BenchOptions
from trimcli.kernels.shapes import ShapeRace, break_even, race_shape
from trimcli.kernels.timing import copy_bandwidth
from trimcli.model.device import compute_device, compute_dtype
from trimcli.model.empty import empty
from trimcli.model.matrix import Matrix
from trimcli.model.skeleton import Skeleton, refuse_other_kind
from trimcli.pipeline.walk import max_positions

BENCH = "trim.bench/1"


@dataclass(frozen=True)
class Rate:
    """Tokens per second over the rounds. phase: prefill (the prompt at once) or decode (token by token)."""

    phase: str
    batch: int
    median: float
    slowest: float
    fastest: float


@dataclass(frozen=True)
class Measured:
    """One form (dense, csr, semi-structured or bitmap) of one model, made in memory or exported.

    sparse: of `linears` matrices, how many are in that form. zeros: fraction of the linears' weights. disk: bytes of
    the weight files, None for a form in memory alone. memory: bytes of parameters and buffers.
    """

    model: str
    form: str
    exported: bool
    sparse: int
    linears: int
    zeros: float
    disk: int | None
    memory: int
    rates: tuple[Rate, ...]


@dataclass(frozen=True)
class Products:
    """One input row times the pruned matrices of a model on its device, a matrix for each shape.

    bandwidth: bytes a second that the device copies, read and written. break_even: the least fraction of zeros, of
    those tried, from which on a matrix of the largest shape is faster as keep bits; None for none.
    """

    model: str
    shapes: tuple[ShapeRace, ...]
    bandwidth: float
    break_even: float | None


@dataclass(frozen=True)
class BenchResult:
    """What was measured, and what it means, in sentences. document: `trim.bench/1`."""

    measured: tuple[Measured, ...]
    products: tuple[Products, ...]
    verdicts: tuple[str, ...]
    document: Mapping[str, Any]


def bench(models: Sequence[str], options: BenchOptions, *, progress: Progress = NO_PROGRESS) -> BenchResult:
    """Measure models and exports, one form in memory at a time. Raises UsageError and HubError.

    Of a model: dense, and what its zeros allow (csr on a CPU, semi-structured for 2:4 on a CUDA device; bitmap).
    """
    options.check()
    measured: list[Measured] = []
    products: list[Products] = []
    verdicts: list[str] = []
    machines: dict[str, str] = {}
    for model in models:
        marked = read_mark(Path(model)).get("schema") == EXPORT
        export = ExportedCheckpoint(Path(model), options.device) if marked else None
        device = export.device if export else compute_device(options.device)
        threads = torch.get_num_threads()
        machines[model] = f"this CPU ({threads} thread{'s' * (threads > 1)})"
        if device.type == "cuda":
            machines[model] = torch.cuda.get_device_name(device)
        dense, *others = _forms(model, export, device, options, progress)
        measured += [dense, *others]
        verdicts += [verdict(dense, form, machines[model]) for form in others]
        if any(form.form == "bitmap" for form in others):
            products.append(_products(model, device, options, progress))
            verdicts.append(products_verdict(products[-1], machines[model]))
        if not others:
            why = (
                "no sparse products are to be had here" if dense.zeros > forms.FEW else "none of its matrices is pruned"
            )
            verdicts.append(f"{model} was measured dense alone: {why}.")
    found: dict[str, Any] = {
        "measured": [asdict(one) for one in measured],
        "products": [asdict(one) for one in products],
    }
    document = manifest(BENCH, "bench", options.document(), None, None, **found, verdicts=verdicts, machines=machines)
    return BenchResult(tuple(measured), tuple(products), tuple(verdicts), document)


def verdict(dense: Measured, sparse: Measured, where: str) -> str:
    """What the figures say of a sparse form against dense: medians within dense's rounds are within the noise."""
    name = f"{sparse.model}: {sparse.form}{' as exported' if sparse.exported else ''}"
    if not sparse.sparse:
        return f"{name} has no sparse matrix, so nothing is gained."
    names = [f"{rate.phase} at batch {rate.batch}" for rate in sparse.rates]
    cases = list(zip(names, dense.rates, sparse.rates, strict=True))
    figures = [f"{after.median / before.median:.2f}x in {case}" for case, before, after in cases]
    pays = [case for case, before, after in cases if after.median > before.fastest]
    even = any(after.median >= before.slowest for _, before, after in cases)
    found = "pays here" + (f" for {' and '.join(pays)} alone" if len(pays) < len(figures) else "")
    if not pays:
        found = "does not pay here" + (": nothing is faster beyond the noise" if even else "")
    return (
        f"{name} at {sparse.zeros:.1%} zeros runs at these multiples of dense's speed on {where}: "
        f"{', '.join(figures)}, with {sparse.memory / dense.memory:.2f}x the memory; sparsity {found}."
    )


def products_verdict(products: Products, where: str) -> str:
    """What the products say: their speed over the model's matrices together, and from which sparsity on they pay."""

    def whole(name: str, form: str) -> float:
        return sum(one.count * getattr(one, name)[form] for one in products.shapes)

    dense = whole("seconds", "dense")
    forms = [form for form in ("bitmap", "csr") if form in products.shapes[0].seconds]
    figures = [f"{dense / whole('seconds', form):.2f}x as {form}" for form in forms]
    share = whole("floor", "bitmap") / whole("seconds", "bitmap")
    at = f"at {products.shapes[0].shape[0]} x {products.shapes[0].shape[1]}"
    pays = f"keep bits pay from {products.break_even:.0%} zeros on" if products.break_even else "keep bits never pay"
    return (
        f"{products.model}: one input row times its pruned matrices runs at {' and '.join(figures)} of dense's speed "
        f"on {where}, as bitmap at {share:.0%} of the speed at which as many bytes are copied; {at}, {pays}."
    )


def _products(model: str, device: torch.device, options: BenchOptions, progress: Progress) -> Products:
    """Race a matrix of every shape, the largest first."""
    checkpoint = Checkpoint.open(model, revision=options.revision)
    refuse_other_kind(checkpoint, images=False)
    dtype = compute_dtype(options.dtype, checkpoint, device)
    skeleton = Skeleton(checkpoint, dtype=dtype, trust_remote_code=options.trust_remote_code)
    recorded = forms.pruned_names(checkpoint)
    shapes: dict[tuple[int, int], list[Matrix]] = {}
    alone = [linear for linear in skeleton.matrices(recorded or ()).values() if linear.replaceable]
    pruned = [linear for linear in alone if recorded is None or linear.name in recorded]
    for linear in sorted(pruned or alone, key=lambda linear: -linear.numel):  # where experts alone were pruned
        shapes.setdefault(linear.shape, []).append(linear)
    bandwidth, races = copy_bandwidth(options.repeat, device), []
    with progress.task("racing products", len(shapes) + 1) as step:
        for linears in shapes.values():
            weight = held(linears[0].read(checkpoint), dtype).contiguous()
            csr = device.type == "cpu"
            races.append(race_shape(weight, dtype, len(linears), bandwidth, options.repeat, csr=csr, device=device))
            step()
        even = break_even(races[0].shape, weight.dtype, dtype, options.repeat, device)
        step()
    return Products(model, tuple(races), bandwidth, even)


def _forms(
    model: str, exported: ExportedCheckpoint | None, device: torch.device, options: BenchOptions, progress: Progress
) -> Iterator[Measured]:
    """Measure dense, decoded from an export, and then the export as it is, or what the zeros allow in memory."""
    checkpoint = exported or Checkpoint.open(model, revision=options.revision)
    refuse_other_kind(checkpoint, images=False)
    dtype = exported.compute_dtype(options.dtype) if exported else compute_dtype(options.dtype, checkpoint, device)
    trust = options.trust_remote_code
    skeleton = Skeleton(checkpoint, dtype=dtype, device=device, trust_remote_code=trust)
    positions = max_positions(skeleton.config)
    if positions is not None and 2 * options.tokens > positions:
        what = f"--tokens {options.tokens}, prompt and as many decoded, is beyond the {positions} positions"
        raise OptionError(f"{what} of {checkpoint.id}; give {positions // 2} or fewer.")
    skeleton.load_everything()
    recorded = forms.pruned_names(checkpoint)
    matrices = skeleton.matrices(recorded or ())
    kept = {name: int(linear.weight.count_nonzero()) for name, linear in matrices.items()}
    zeros_of = {name: 1 - kept[name] / linear.numel for name, linear in matrices.items()}
    zeros = 1 - sum(kept.values()) / max(sum(linear.numel for linear in matrices.values()), 1)

    def measured(form: str, sparse: int, disk: int | None) -> Measured:
        memory = sum(map(forms.stored_bytes, chain(skeleton.model.parameters(), skeleton.model.buffers())))
        rates = tuple(measure(skeleton.model, options, device, f"{Path(model).name} {form}", progress))
        as_exported = exported is not None and form != "dense"
        return Measured(model, form, as_exported, sparse, len(matrices), zeros, disk, memory, rates)

    yield measured("dense", 0, None if exported else _bytes_on_disk(checkpoint))
    if exported:
        empty(skeleton.model)
        skeleton = exported_skeleton(exported, options.dtype, trust_remote_code=trust)
        yield measured(exported.to, len(exported.sparse), _bytes_on_disk(exported))
        return
    alone = {name: share for name, share in zeros_of.items() if matrices[name].replaceable}
    pruned = [name for name, share in alone.items() if forms.was_pruned(name, share, recorded)]
    if pruned and (sparse := _make_sparse(skeleton, pruned)):
        yield measured("csr" if device.type == "cpu" else "semi-structured", sparse, None)
    if pruned:
        empty(skeleton.model)
        skeleton = Skeleton(checkpoint, dtype=dtype, device=device, trust_remote_code=trust)
        if made := sparsify(skeleton, None, options.cache_dir, progress, bitmap_alone=True).names:
            skeleton.load_everything()
            yield measured("bitmap", len(made), None)


def _make_sparse(skeleton: Skeleton, pruned: Sequence[str]) -> int:
    """Replace the pruned matrices of a loaded model, one by one, by the form for its device; returns how many."""
    device, dtype = skeleton.device, skeleton.dtype
    try:
        packer = None if device.type == "cpu" else forms.SemiStructured(device, dtype)
    except OptionError:
        return 0
    count, matrices = 0, skeleton.matrices(pruned)
    for name in pruned:
        linear = matrices[name]
        weight = linear.weight
        if packer is None or (packer.fits(linear.shape) and forms.is_two_of_four(weight)):
            sparse = packer.pack(weight) if packer else forms.computed(forms.to_csr(weight))
            forms.replace_linear(skeleton, linear, sparse)
            count += 1
    return count


def _bytes_on_disk(checkpoint: Checkpoint) -> int:
    """Bytes of the weight files; a packed directory's are called otherwise than the shards they stand for."""
    files = [checkpoint.directory / name for name in checkpoint.shards()]
    if not all(path.is_file() for path in files):
        files = list(checkpoint.directory.glob("*.safetensors"))
    return sum(path.stat().st_size for path in files)


def measure(
    model: Any, options: BenchOptions, device: torch.device, title: str, progress: Progress = NO_PROGRESS
) -> Iterator[Rate]:
    """Time a prompt of random tokens at once, then as many decoded greedily; yields both for every batch size."""
    # Prefill ends with the next token: where the model can, only that one's logits are computed.
    known = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    vocabulary = model.get_input_embeddings().num_embeddings
    with progress.task(title, len(options.batch) * (options.repeat + 1)) as step:
        for size in options.batch:
            generator = torch.Generator().manual_seed(options.seed)
            prompt = torch.randint(vocabulary, (size, options.tokens), generator=generator).to(device)
            rounds = []
            for _ in range(options.repeat + 1):
                rounds.append(_round(model, prompt, last, device))
                step()
            # The first round warms up.
            for phase, seconds in zip(("prefill", "decode"), zip(*rounds[1:], strict=True), strict=True):
                rates = [prompt.numel() / spent for spent in seconds]
                yield Rate(phase, size, statistics.median(rates), min(rates), max(rates))


@torch.no_grad()
def _round(model: Any, prompt: Tensor, last: Mapping[str, int], device: torch.device) -> tuple[float, float]:
    """Seconds of prefill and of decoding as many tokens as `prompt` [b, L] has."""
    started = _now(device)
    found = model(input_ids=prompt, use_cache=True, **last)
    prefilled = _now(device)
    for _ in range(prompt.shape[1]):
        token = found.logits[:, -1:].argmax(dim=-1)
        found = model(input_ids=token, past_key_values=found.past_key_values, use_cache=True)
    return prefilled - started, _now(device) - prefilled


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
