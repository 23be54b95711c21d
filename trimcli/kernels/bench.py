"""`trim bench`: tokens per second and bytes of a model, dense and sparse, on the machine at hand.

A sentence says what the figures say; nothing here knows beforehand which form is faster.
"""

import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimcli.commands.export import pruned_names, was_pruned
from trimcli.console import NO_PROGRESS, Progress
from trimcli.errors import OptionError
from trimcli.files.atomic import MARK
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.documents import read_json
from trimcli.files.manifest import manifest
from trimcli.kernels.exported import EXPORT, ExportedCheckpoint, exported_skeleton
from trimcli.kernels.forms import SemiStructured, computed, is_two_of_four, replace_linear, stored_bytes, to_csr
from trimcli.model.device import compute_device, compute_dtype
from trimcli.model.empty import empty
from trimcli.model.skeleton import Skeleton
from trimcli.options import RunOptions, check_positive
from trimcli.pipeline.walk import max_positions

BENCH = "trim.bench/1"


@dataclass(frozen=True, kw_only=True)
class BenchOptions(RunOptions):
    """tokens: of the prompt, and decoded after it. batch: sequences at a time, each in turn. repeat: rounds."""

    tokens: int = 64
    batch: tuple[int, ...] = (1, 8)
    repeat: int = 5

    def check(self) -> None:
        """Raise OptionError for values that cannot be used."""
        check_positive("--tokens", self.tokens)
        check_positive("--repeat", self.repeat)
        if not self.batch:
            raise OptionError("--batch names no batch size; give at least one, such as 1,8.")
        for size in self.batch:
            check_positive("--batch", size)


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
    """One form of one model.

    form: dense, csr or semi-structured. exported: as an export has it rather than made in memory. sparse: of
    `linears` matrices, how many are in that form. zeros: fraction of the linears' weights. disk: bytes of the
    weight files, None where the form is in memory alone. memory: bytes of parameters and buffers.
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
class BenchResult:
    """What was measured, and what it means, in sentences. document: `trim.bench/1`."""

    measured: tuple[Measured, ...]
    verdicts: tuple[str, ...]
    document: Mapping[str, Any]


def bench(models: Sequence[str], options: BenchOptions, *, progress: Progress = NO_PROGRESS) -> BenchResult:
    """Measure models and exports.

    models: directories, hub ids or exports of `trim export`. Of a model: dense, and what its zeros allow in
    memory (csr on a CPU, semi-structured for 2:4 on a CUDA device); of an export: dense, and as exported. One
    form is in memory at a time. Raises OptionError, InputError, HubError, MismatchError.
    """
    options.check()
    measured: list[Measured] = []
    verdicts: list[str] = []
    machines: dict[str, str] = {}
    for model in models:
        subject = _subject(model, options)
        machines[model] = machine(subject.device)
        forms = list(subject.forms(progress))
        measured += forms
        verdicts += [verdict(forms[0], form, machines[model]) for form in forms[1:]]
        if len(forms) == 1:
            verdicts.append(f"{model} was measured dense alone: {subject.why_dense()}.")
    document = manifest(
        BENCH,
        "bench",
        options.document(),
        None,
        measured=[asdict(one) for one in measured],
        verdicts=verdicts,
        machines=machines,
    )
    return BenchResult(tuple(measured), tuple(verdicts), document)


def machine(device: torch.device) -> str:
    """What a device is called in a sentence."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    threads = torch.get_num_threads()
    return f"this CPU ({threads} thread{'s' * (threads > 1)})"


def verdict(dense: Measured, sparse: Measured, where: str) -> str:
    """What the figures say of a sparse form against dense, in a sentence.

    Faster is a median beyond dense's fastest round, slower one below its slowest: the rest is within the noise.
    """
    name = f"{sparse.model}: {sparse.form}{' as exported' if sparse.exported else ''}"
    if not sparse.sparse:
        return f"{name} has no sparse matrix, so nothing is gained."
    figures, pays, even = [], [], []
    for before, after in zip(dense.rates, sparse.rates, strict=True):
        case = f"{after.phase} at batch {after.batch}"
        figures.append(f"{after.median / before.median:.2f}x in {case}")
        if after.median > before.fastest:
            pays.append(case)
        elif after.median >= before.slowest:
            even.append(case)
    found = (
        f"{name} at {sparse.zeros:.1%} zeros runs at these multiples of dense's speed on {where}: "
        f"{', '.join(figures)}, with {sparse.memory / dense.memory:.2f}x the memory; sparsity"
    )
    if len(pays) == len(figures):
        return f"{found} pays here."
    if pays:
        return f"{found} pays here for {' and '.join(pays)} alone."
    return f"{found} does not pay here{': nothing is faster beyond the noise' if even else ''}."


class _Subject:
    """A model directory or hub id: dense, then what its zeros allow, made in memory."""

    def __init__(self, model: str, options: BenchOptions, checkpoint: Checkpoint, device: torch.device) -> None:
        self.model, self.options, self.checkpoint, self.device = model, options, checkpoint, device
        self._zeros = 0.0

    def dtype(self) -> torch.dtype:
        """The computation's."""
        return compute_dtype(self.options.dtype, self.checkpoint, self.device)

    def forms(self, progress: Progress) -> Iterator[Measured]:
        """Measure dense first."""
        skeleton = Skeleton(
            self.checkpoint,
            dtype=self.dtype(),
            device=self.device,
            trust_remote_code=self.options.trust_remote_code,
        )
        _refuse_length(skeleton, self.options)
        skeleton.load_everything()
        weights = sum(linear.numel for linear in skeleton.linears.values())
        kept = sum(int(linear.weight.count_nonzero()) for linear in skeleton.linears.values())
        self._zeros = 1 - kept / weights if weights else 0.0
        yield self._measured(skeleton, "dense", 0, self._disk(), progress)
        yield from self._sparse(skeleton, progress)

    def _sparse(self, skeleton: Skeleton, progress: Progress) -> Iterator[Measured]:
        """The sparse form, made of the loaded dense model matrix by matrix."""
        form, make = self._maker(skeleton.dtype)
        count = 0
        pruned = pruned_names(self.checkpoint)
        for name, linear in skeleton.linears.items():
            weight = linear.weight
            zeros = linear.numel - int(weight.count_nonzero())
            found = make(weight) if was_pruned(name, zeros / linear.numel, pruned) else None
            if found is not None:
                replace_linear(skeleton, linear, found)
                count += 1
        if count:
            yield self._measured(skeleton, form, count, None, progress)

    def _maker(self, dtype: torch.dtype) -> tuple[str, Callable[[Tensor], Tensor | None]]:
        """The form for this device, and what makes a matrix of it: None where it is to stay dense."""
        if self.device.type == "cpu":
            return "csr", lambda weight: computed(to_csr(weight))
        if dtype == torch.float32:
            return "semi-structured", lambda weight: None
        packer = SemiStructured(self.device, dtype)

        def pack(weight: Tensor) -> Tensor | None:
            d_out, d_in = weight.shape
            return packer.pack(weight) if packer.fits((d_out, d_in)) and is_two_of_four(weight) else None

        return "semi-structured", pack

    def why_dense(self) -> str:
        """Why there was no sparse form."""
        if self.device.type == "cpu":
            return "none of its matrices is pruned"
        return "on a CUDA device, only 2:4 matrices computed in 16 bits have sparse kernels"

    def _disk(self) -> int | None:
        """Bytes of the weight files; a packed directory's are called otherwise than the shards they stand for."""
        directory = self.checkpoint.directory
        files = [directory / name for name in self.checkpoint.shards()]
        if not all(path.is_file() for path in files):
            files = list(directory.glob("*.safetensors"))
        return sum(path.stat().st_size for path in files)

    def _measured(
        self,
        skeleton: Skeleton,
        form: str,
        sparse: int,
        disk: int | None,
        progress: Progress,
        *,
        exported: bool = False,
    ) -> Measured:
        model = skeleton.model
        memory = sum(stored_bytes(tensor) for tensor in chain(model.parameters(), model.buffers()))
        rates = tuple(measure(model, self.options, self.device, f"{Path(self.model).name} {form}", progress))
        return Measured(self.model, form, exported, sparse, len(skeleton.linears), self._zeros, disk, memory, rates)


class _ExportSubject(_Subject):
    """An export: dense, decoded from it, then as it is."""

    checkpoint: ExportedCheckpoint

    def dtype(self) -> torch.dtype:
        """The computation's."""
        return self.checkpoint.compute_dtype(self.options.dtype)

    def _disk(self) -> int | None:
        return None

    def _sparse(self, skeleton: Skeleton, progress: Progress) -> Iterator[Measured]:
        empty(skeleton.model)
        checkpoint = self.checkpoint
        again = exported_skeleton(checkpoint, self.options.dtype, trust_remote_code=self.options.trust_remote_code)
        again.load_everything()
        disk = sum((checkpoint.directory / name).stat().st_size for name in checkpoint.shards())
        yield self._measured(again, checkpoint.to, len(checkpoint.sparse), disk, progress, exported=True)


def _subject(model: str, options: BenchOptions) -> _Subject:
    mark = Path(model) / MARK
    if mark.is_file() and read_json(mark).get("schema") == EXPORT:
        exported = ExportedCheckpoint(Path(model), options.device)
        return _ExportSubject(model, options, exported, exported.device)
    device = compute_device(options.device)
    return _Subject(model, options, Checkpoint.open(model, revision=options.revision), device)


def _refuse_length(skeleton: Skeleton, options: BenchOptions) -> None:
    positions = max_positions(skeleton.config)
    if positions is not None and 2 * options.tokens > positions:
        raise OptionError(
            f"--tokens {options.tokens}, prompt and as many decoded, is beyond the {positions} positions of "
            f"{skeleton.checkpoint.id}; give {positions // 2} or fewer."
        )


def measure(
    model: Any, options: BenchOptions, device: torch.device, title: str, progress: Progress = NO_PROGRESS
) -> Iterator[Rate]:
    """Time a transformers model: a prompt of random tokens at once, then as many tokens decoded greedily.

    One round warms up. Yields prefill and decode for every batch size, in tokens per second.
    """
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
