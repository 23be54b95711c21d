"""verify: sparsity read back from saved files, tensor by tensor, and held against what they claim.

Of a directory that trim wrote, every pruned matrix must have the zeros `trim.json` counts, where it says they
are, follow its N:M pattern in every group, and under exact numerics lie within one weight of its target; of a
masks file likewise. A directory trim did not write claims nothing: its sparsity is reported.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from trimcli.console import NO_PROGRESS, Progress
from trimcli.errors import CheckFailed, InputError, MismatchError
from trimcli.files.atomic import MARK
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.documents import read_json
from trimcli.files.manifest import MASKS, PACKED, PRUNED, ModelFingerprint, check_model, is_intact
from trimcli.files.masks import MaskFile, keep_digest
from trimcli.files.tensors import open_tensors, read_manifest
from trimcli.methods import masks
from trimcli.model.skeleton import Skeleton

BINS = 20


@dataclass(frozen=True)
class VerifyOptions:
    """masks: a file whose zeros a directory must have. trust_remote_code: where trim did not write it."""

    masks: Path | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class LinearReport:
    """One matrix as saved.

    zeros: of its D_out * D_in weights (a masks file: that go). target, pattern: what was asked for, if known.
    row_min, row_median, row_max: of the rows' sparsities. kept_zeros: weights that are zero though the mask
    keeps them, where that is known. rows: number of rows by sparsity, `BINS` equal bins of [0, 1].
    """

    name: str
    layer: str
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
    def sparsity(self) -> float:
        """Fraction of the weights that is zero."""
        return self.zeros / (self.shape[0] * self.shape[1])


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` read and found.

    schema: of the file; None for a directory that trim did not write, of which nothing is checked. failures:
    a sentence for each thing that does not hold.
    """

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
        return _fraction(self.linears)

    @property
    def layers(self) -> dict[str, float]:
        """Sparsity of each decoder layer."""
        members: dict[str, list[LinearReport]] = {}
        for linear in self.linears:
            members.setdefault(linear.layer, []).append(linear)
        return {layer: _fraction(linears) for layer, linears in members.items()}

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
            "linears": {
                linear.name: {
                    "shape": list(linear.shape),
                    "zeros": linear.zeros,
                    "sparsity": linear.sparsity,
                    "target": linear.target,
                    "pattern": list(linear.pattern) if linear.pattern else None,
                    "rows": {"min": linear.row_min, "median": linear.row_median, "max": linear.row_max},
                    "kept_zeros": linear.kept_zeros,
                }
                for linear in self.linears
            },
            "row_histogram": self.row_histogram,
            "failures": self.failures,
        }

    def check(self) -> None:
        """Raise CheckFailed, naming the first failures, unless everything holds."""
        if self.failures:
            more = f"; and {len(self.failures) - 3} more" if len(self.failures) > 3 else ""
            raise CheckFailed(f"{self.path} does not hold: {'; '.join(self.failures[:3])}{more}.")


def verify(path: Path, options: VerifyOptions | None = None, *, progress: Progress = NO_PROGRESS) -> VerifyReport:
    """Read a pruned, packed or plain model directory or a masks file back; one matrix in memory at a time.

    Returns the report, whose `check()` raises CheckFailed. Raises InputError (missing, truncated) and
    MismatchError (`options.masks` belongs to another model).
    """
    options = options or VerifyOptions()
    if path.is_dir():
        if (path / MARK).is_file():
            return _verify_written(path, options, progress)
        return _verify_plain(path, options, progress)
    if options.masks is not None:
        raise InputError(f"{path} is a file, which cannot be held against masks; give a model directory.")
    return _verify_masks(path, progress)


def _verify_written(path: Path, options: VerifyOptions, progress: Progress) -> VerifyReport:
    document = read_json(path / MARK)
    schema = document.get("schema")
    if schema not in (PRUNED, PACKED):
        raise MismatchError(f"{path / MARK} is of schema {schema!r}, neither {PRUNED!r} nor {PACKED!r}.")
    failures = []
    if not is_intact(document):
        failures.append(f"{MARK} is not what trim wrote: its manifest was edited")
        if schema == PACKED:  # what the tensors are is in there, so nothing can be read by it
            return VerifyReport(str(path), schema, [], failures)
    found = MaskFile.open(options.masks) if options.masks else None
    if found is not None:
        theirs = ModelFingerprint(**document["model"])
        other_weights = document["options"].get("other_weights") or found.manifest.get("changes_weights")
        check_model(found.manifest, theirs, found.path, structure_only=bool(other_weights))
        missing = [name for name in found.names if name not in document["linears"]]
        failures += [f"{name} has a mask but was not pruned" for name in missing]
    checkpoint = Checkpoint.open(path)
    exact = _is_exact(document)
    linears = []
    with progress.task("verifying", len(document["linears"])) as advance:
        for name, entry in document["linears"].items():
            advance()
            try:
                keep = _read_back(checkpoint, entry)
            except InputError as problem:
                failures.append(str(problem).rstrip("."))
                continue
            wrong = list(_disagreements(keep, entry, exact=exact))
            wrong += _against(found, name, keep) if found else []
            failures += [f"{name}: {sentence}" for sentence in wrong]
            kept_zeros = keep.numel() - int(keep.count_nonzero()) - entry["pruned"]
            linears.append(_linear_report(name, keep, entry, kept_zeros))
    return VerifyReport(str(path), schema, linears, failures)


def _read_back(checkpoint: Checkpoint, entry: Mapping[str, Any]) -> Tensor:
    """Which weights of a pruned matrix are not zero as saved. Raises InputError (no such tensor, altered)."""
    key = entry["key"]
    if all(key not in keys for keys in checkpoint.shards().values()):
        raise InputError(f"{checkpoint.directory} holds no tensor {key}")
    stored = checkpoint.load(key)
    return (stored.T if entry["transposed"] else stored) != 0


def _verify_plain(path: Path, options: VerifyOptions, progress: Progress) -> VerifyReport:
    skeleton = Skeleton(Checkpoint.open(path), trust_remote_code=options.trust_remote_code)
    found = MaskFile.open(options.masks) if options.masks else None
    failures: list[str] = []
    if found is not None:
        check_model(found.manifest, skeleton.fingerprint, found.path, structure_only=True)
    linears = []
    with progress.task("verifying", len(skeleton.linears)) as advance:
        for name, linear in skeleton.linears.items():
            keep = linear.read(skeleton.checkpoint) != 0
            kept_zeros = None
            if found is not None and name in found.names:
                failures += [f"{name}: {sentence}" for sentence in _against(found, name, keep)]
                kept_zeros = int((found.keep(name) & ~keep).count_nonzero())
            linears.append(_linear_report(name, keep, {}, kept_zeros))
            advance()
    return VerifyReport(str(path), found.manifest["schema"] if found else None, linears, failures)


def _verify_masks(path: Path, progress: Progress) -> VerifyReport:
    document = read_manifest(path, MASKS)
    failures = [] if is_intact(document) else ["its manifest is not what trim wrote: it was edited"]
    exact = _is_exact(document)
    linears = []
    handle = open_tensors(path)
    stored = set(handle.keys())
    with progress.task("verifying", len(document["linears"])) as advance:
        for name, entry in document["linears"].items():
            advance()
            keep = None
            if f"{name}.keep" in stored:
                with suppress(ValueError):
                    keep = masks.unpack(handle.get_tensor(f"{name}.keep"), entry["shape"][1])
            if keep is None or list(keep.shape) != entry["shape"]:
                failures.append(f"{name}: the file holds no mask of shape {entry['shape']}")
                continue
            failures += [f"{name}: {sentence}" for sentence in _disagreements(keep, entry, exact=exact)]
            linears.append(_linear_report(name, keep, entry, None))
    return VerifyReport(str(path), MASKS, linears, failures)


def _disagreements(keep: Tensor, entry: Mapping[str, Any], *, exact: bool) -> Iterator[str]:
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
    asked = entry.get("target")
    if exact and asked is not None:
        pruned = entry.get("pruned", zeros)  # a weight that was zero before was not taken to reach the target
        if abs(pruned - asked * keep.numel()) > 1:
            budget = round(asked * keep.numel())
            yield f"{pruned:,} weights were pruned where the target {asked:g} asks for {budget:,}"


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
        columns = f"{place * group} to {place * group + group - 1}"
        groups = keep.numel() // group
        first = f"the first in row {row}, columns {columns}"
        yield f"{len(over):,} of {groups:,} groups break {kept}:{group}, {first}"


def _against(found: MaskFile, name: str, keep: Tensor) -> list[str]:
    """What of a saved matrix does not follow the masks file."""
    if name not in found.names:
        return [f"{found.path} has no mask for it"]
    if list(found.shape(name)) != list(keep.shape):
        return [f"the mask in {found.path} has the shape {list(found.shape(name))}"]
    revived = int((keep & ~found.keep(name)).count_nonzero())
    return [f"{revived:,} weights are not zero where the masks take them"] if revived else []


def _linear_report(name: str, keep: Tensor, entry: Mapping[str, Any], kept_zeros: int | None) -> LinearReport:
    d_out, d_in = keep.shape
    zeros = d_in - np.count_nonzero(keep.numpy(), axis=1)
    rows = zeros / d_in
    counts = np.bincount(np.minimum(zeros * BINS // d_in, BINS - 1), minlength=BINS)
    return LinearReport(
        name=name,
        layer=_layer(name),
        shape=(d_out, d_in),
        zeros=int(zeros.sum()),
        target=entry.get("target"),
        pattern=tuple(entry["pattern"]) if entry.get("pattern") else None,
        row_min=float(rows.min()),
        row_median=float(np.median(rows)),
        row_max=float(rows.max()),
        kept_zeros=kept_zeros,
        rows=tuple(counts.tolist()),
    )


def _layer(name: str) -> str:
    """The decoder layer of a linear: its name up to the first number."""
    parts = name.split(".")
    place = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: place + 1])


def _is_exact(document: Mapping[str, Any]) -> bool:
    """Whether the prune behind a manifest promised exact counts."""
    pruning = document.get("pruning") or document
    return bool(pruning.get("numerics") == "exact")


def _fraction(linears: list[LinearReport]) -> float:
    weights = sum(linear.shape[0] * linear.shape[1] for linear in linears)
    return sum(linear.zeros for linear in linears) / weights if weights else 0.0
