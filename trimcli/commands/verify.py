"""verify: zeros read back from saved files, tensor by tensor, and held against what these claim, if trim wrote them."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from trimcli.commands.options import VerifyOptions
from trimcli.console import NO_PROGRESS, Progress
from trimcli.errors import CheckFailed, InputError, MismatchError
from trimcli.files import forms
from trimcli.files.atomic import MARK
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.directory import matrix_in
from trimcli.files.documents import read_json, refuse_later
from trimcli.files.forms import Each, Must, check_form
from trimcli.files.manifest import MASKS, PACKED, PRUNED, ModelFingerprint, check_masks, is_intact
from trimcli.files.masks import MaskFile, keep_digest, keep_spec
from trimcli.files.names import grouped, layer_of
from trimcli.files.tensors import open_tensors, read_manifest, spec_of
from trimcli.methods import masks
from trimcli.model.skeleton import Skeleton

BINS = 20
# What the claims have to be to be held against anything; an edited manifest is read, too.
MANIFEST = {**forms.PRUNING, "pruning": forms.PRUNING}
OF_MASKS = {**MANIFEST, "linears": Must(Each(Must(forms.MASKED_LINEAR)))}
OF_MODEL = {**MANIFEST, "linears": Must(Each(Must(forms.PRUNED_LINEAR))), "model": Must(forms.WHOLE_MODEL)}


@dataclass(frozen=True)
class LinearReport:
    """One matrix as saved. kept_zeros: that its mask keeps, if known. rows: how many by sparsity, in `BINS` bins."""

    name: str
    shape: tuple[int, int]
    zeros: int
    target: float | None
    pattern: tuple[int, int] | None
    row_min: float
    row_median: float
    row_max: float
    kept_zeros: int | None
    rows: tuple[int, ...]

    @property
    def layer(self) -> str:
        """The decoder layer it is in."""
        return layer_of(self.name)

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that is zero."""
        return _sparsity([self])

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "shape": list(self.shape),
            "zeros": self.zeros,
            "sparsity": self.sparsity,
            "target": self.target,
            "pattern": list(self.pattern) if self.pattern else None,
            "rows": {"min": self.row_min, "median": self.row_median, "max": self.row_max},
            "kept_zeros": self.kept_zeros,
        }


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found: a sentence for each of `failures`. schema: None where nothing was claimed."""

    path: str
    schema: str | None
    linears: list[LinearReport]
    failures: list[str] = field(default_factory=list)

    @property
    def zeros(self) -> int:
        """Zeros of all matrices."""
        return sum(linear.zeros for linear in self.linears)

    @property
    def sparsity(self) -> float:
        """Fraction of all matrices' weights that is zero."""
        return _sparsity(self.linears)

    @property
    def layers(self) -> dict[str, float]:
        """Sparsity of each decoder layer."""
        members = grouped(self.linears, lambda linear: linear.layer)
        return {layer: _sparsity(linears) for layer, linears in members.items()}

    @property
    def row_histogram(self) -> list[int]:
        """Rows of all matrices by their sparsity: `BINS` equal bins of [0, 1], the last one closed."""
        columns = zip(*(linear.rows for linear in self.linears), strict=True)
        return [sum(column) for column in columns] or [0] * BINS

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "path": self.path,
            "schema": self.schema,
            "holds": None if self.schema is None else not self.failures,
            "sparsity": self.sparsity,
            "layers": self.layers,
            "linears": {linear.name: linear.document() for linear in self.linears},
            "row_histogram": self.row_histogram,
            "failures": self.failures,
        }

    def check(self) -> None:
        """Raise CheckFailed, naming the first failures, unless everything holds."""
        if self.failures:
            more = f"; and {len(self.failures) - 3} more" if len(self.failures) > 3 else ""
            raise CheckFailed(f"{self.path} does not hold: {'; '.join(self.failures[:3])}{more}.")


def verify(path: Path, options: VerifyOptions | None = None, *, progress: Progress = NO_PROGRESS) -> VerifyReport:
    """Read a model directory or a masks file back, one matrix in memory. Raises InputError and MismatchError."""
    options = options or VerifyOptions()
    if path.is_dir():
        return (_verify_written if (path / MARK).is_file() else _verify_plain)(path, options, progress)
    if options.masks is not None:
        raise InputError(f"{path} is a file, which cannot be held against masks; give a model directory.")
    return _verify_masks(path, progress)


def _verify_written(path: Path, options: VerifyOptions, progress: Progress) -> VerifyReport:
    document = read_json(path / MARK)
    schema = document.get("schema")
    refuse_later(document, (PRUNED, PACKED), path / MARK)
    if schema not in (PRUNED, PACKED):
        raise MismatchError(f"{path / MARK} is of schema {schema!r}, neither {PRUNED!r} nor {PACKED!r}.")
    report = VerifyReport(str(path), schema, [])
    if not is_intact(document):
        report.failures.append(f"{MARK} is not what trim wrote: its manifest was edited")
        if schema == PACKED:  # what the tensors are is in there, so nothing can be read by it
            return report
    check_form(document, OF_MODEL, path / MARK, "manifest")
    found = MaskFile.open(options.masks) if options.masks else None
    if found is not None:
        said = document["model"]
        theirs = ModelFingerprint(said["id"], said["structure"], said.get("content"))
        other_weights = (document.get("options") or {}).get("other_weights") or found.manifest.get("changes_weights")
        if not other_weights:
            check_masks(found.manifest, theirs, found.path)
        missing = [name for name in found.names if name not in document["linears"]]
        report.failures.extend(f"{name} has a mask but was not pruned" for name in missing)
    checkpoint = Checkpoint.open(path)
    stored = set(checkpoint.keys())

    def read(name: str) -> Tensor:
        entry = document["linears"][name]
        if entry["key"] not in stored:
            raise InputError(f"{path} holds no tensor {entry['key']}")
        return matrix_in(checkpoint.load(entry["key"]), entry) != 0

    return _read_back(report, document, read, progress, found)


def _verify_plain(path: Path, options: VerifyOptions, progress: Progress) -> VerifyReport:
    skeleton = Skeleton(Checkpoint.open(path), trust_remote_code=options.trust_remote_code)
    found = MaskFile.open(options.masks) if options.masks else None
    linears, checkpoint = skeleton.matrices(found.names if found else ()), skeleton.checkpoint
    report = VerifyReport(str(path), MASKS if found else None, [])
    if found is not None and (missing := [name for name in found.names if name not in linears]):
        what = f"{found.path} was made for the model {(found.manifest.get('model') or {}).get('id')!r}"
        raise MismatchError(f"{what} and has a mask for {missing[0]}, which {path} has not; give its own masks.")
    nothing: dict[str, Any] = {"linears": {name: {} for name in linears}}
    return _read_back(report, nothing, lambda name: linears[name].read(checkpoint) != 0, progress, found)


def _verify_masks(path: Path, progress: Progress) -> VerifyReport:
    document = read_manifest(path, MASKS)
    check_form(document, OF_MASKS, path, "masks")
    handle = open_tensors(path)
    stored = set(handle.keys())

    def read(name: str) -> Tensor:
        shape = document["linears"][name]["shape"]
        key = f"{name}.keep"
        if key not in stored or spec_of(handle, key, path) != keep_spec(shape):
            raise InputError(f"{name}: the file holds no mask of shape {shape}")
        return masks.unpack(handle.get_tensor(key), shape[1])

    edited = [] if is_intact(document) else ["its manifest is not what trim wrote: it was edited"]
    report = VerifyReport(str(path), MASKS, [], edited)
    return _read_back(report, document, read, progress)


def _read_back(
    report: VerifyReport,
    document: Mapping[str, Any],
    read: Callable[[str], Tensor],
    progress: Progress,
    found: MaskFile | None = None,
) -> VerifyReport:
    """`report` with every matrix, and what does not hold of what `document` claims. read(name): True where not zero."""
    pruning = document.get("pruning") or document
    exact = pruning.get("numerics") == "exact"
    # Earlier zeros that stay may be more than the target asks for.
    more = bool((pruning.get("options") or {}).get("keep_zeros"))
    with progress.task("verifying", len(document["linears"])) as advance:
        for name, claim in document["linears"].items():
            advance()
            try:
                keep = read(name)
            except InputError as problem:
                if not claim:
                    raise
                report.failures.append(str(problem).rstrip("."))
                continue
            wrong = list(_disagreements(keep, claim, exact=exact, more=more)) if claim else []
            mask = found.keep(name) if found and name in found.names else None
            if mask is None:
                wrong += ["the masks have none for it"] if found and claim else []
            elif mask.shape != keep.shape:
                wrong.append(f"its mask has the shape {list(mask.shape)}")
            elif revived := int((keep & ~mask).count_nonzero()):
                wrong.append(f"{revived:,} weights are not zero where the masks take them")
            report.failures.extend(f"{name}: {sentence}" for sentence in wrong)
            report.linears.append(_linear_report(name, keep, claim, mask))
    return report


def _disagreements(keep: Tensor, entry: Mapping[str, Any], *, exact: bool, more: bool) -> Iterator[str]:
    """What does not hold of a matrix. keep: bool [D_out, D_in], as read back. entry: what its file says."""
    if list(keep.shape) != entry["shape"]:
        yield f"it has the shape {list(keep.shape)} where {entry['shape']} is recorded"
        return
    zeros = keep.numel() - int(keep.count_nonzero())
    if zeros != entry["zeros"]:
        yield f"{zeros:,} weights are zero where {entry['zeros']:,} are recorded"
    elif keep_digest(masks.pack(keep)) != entry["keep_sha256"]:
        yield "as many weights are zero as recorded, but others"
    if entry.get("pattern"):
        yield from _broken_groups(keep, *entry["pattern"])
    if exact and (asked := entry.get("target")) is not None:
        pruned = entry.get("pruned", zeros)  # a weight that was zero before was not taken to reach the target
        over = pruned - (budget := asked * keep.numel())
        if over < -1 or (over > 1 and not more):
            yield f"{pruned:,} weights were pruned where the target {asked:g} asks for {round(budget):,}"


def _broken_groups(keep: Tensor, kept: int, group: int) -> Iterator[str]:
    if keep.shape[1] % group:
        yield f"rows of {keep.shape[1]} weights do not divide into groups of {group}"
        return
    members = keep.numpy().reshape(len(keep), -1, group)
    counts = np.zeros(members.shape[:2], np.int32)
    for place in range(group):  # a sum along so short an axis is several times slower
        counts += members[:, :, place]
    over = np.argwhere(counts > kept)
    if len(over):
        row, place = over[0].tolist()
        first = f"the first in row {row}, columns {place * group} to {place * group + group - 1}"
        yield f"{len(over):,} of {counts.size:,} groups break {kept}:{group}, {first}"


def _linear_report(name: str, keep: Tensor, entry: Mapping[str, Any], mask: Tensor | None) -> LinearReport:
    d_out, d_in = keep.shape
    zeros = d_in - np.count_nonzero(keep.numpy(), axis=1)
    total, rows = int(zeros.sum()), zeros / d_in
    kept_zeros = total - entry["pruned"] if "pruned" in entry else None
    if kept_zeros is None and mask is not None and mask.shape == keep.shape:
        kept_zeros = int((mask & ~keep).count_nonzero())
    return LinearReport(
        name=name,
        shape=(d_out, d_in),
        zeros=total,
        target=entry.get("target"),
        pattern=tuple(entry["pattern"]) if entry.get("pattern") else None,
        row_min=float(rows.min()),
        row_median=float(np.median(rows)),
        row_max=float(rows.max()),
        kept_zeros=kept_zeros,
        rows=tuple(np.bincount(np.minimum(zeros * BINS // d_in, BINS - 1), minlength=BINS).tolist()),
    )


def _sparsity(linears: Iterable[LinearReport]) -> float:
    """Fraction of all their weights that is zero."""
    counts = [(linear.zeros, math.prod(linear.shape)) for linear in linears]
    return sum(zeros for zeros, _ in counts) / max(sum(weights for _, weights in counts), 1)
