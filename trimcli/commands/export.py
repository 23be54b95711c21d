"""`trim export`: a pruned model with its matrices in the forms that sparse kernels read (`trim.export/1`).

A matrix whose checkpoint name is `K` lies there as `K.crow_indices`, `K.col_indices` (int32) and `K.values`, or as
`K.packed` and, where the backend keeps it apart, `K.meta`, always of [D_out, D_in].
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trimcli.console import NO_PROGRESS, Advance, Progress
from trimcli.errors import InputError
from trimcli.files.atomic import atomic_directory
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.directory import add_small_files, commands_so_far, nbytes_of, numbered, plan_shards
from trimcli.files.documents import finite_or_none, read_mark
from trimcli.files.manifest import manifest, sealed
from trimcli.files.outputs import check_outputs, check_space, inputs_of
from trimcli.files.tensors import TensorSpec, dtype_name, write_tensors
from trimcli.kernels.exported import EXPORT, device_for
from trimcli.kernels.forms import SemiStructured, is_two_of_four, parts_of, pruned_names, race, to_csr, was_pruned
from trimcli.kernels.options import ExportOptions, Form
from trimcli.model.device import compute_dtype
from trimcli.model.matrix import Matrix
from trimcli.model.skeleton import Skeleton, refuse_other_kind

NOT_PRUNED, NOT_PATTERN = "not pruned", "not 2:4"


@dataclass(frozen=True)
class ExportedLinear:
    """One matrix of an export. key: in the checkpoint. reason: why it stays dense. *_seconds: of a product."""

    key: str
    shape: tuple[int, int]
    transposed: bool
    dtype: str
    zeros: int
    form: Literal["dense", "csr", "semi-structured"]
    reason: str | None = None
    dense_seconds: float | None = None
    sparse_seconds: float | None = None
    specs: dict[str, TensorSpec] = field(default_factory=dict, compare=False)

    def stored_as(self, form: Form, sparse: Tensor) -> "ExportedLinear":
        """The same in a sparse form."""
        return replace(self, form=form, specs={kind: TensorSpec.of(part) for kind, part in parts_of(sparse).items()})

    def document(self) -> dict[str, Any]:
        """The entry in `trim.json`."""
        return {key: value for key, value in asdict(replace(self, specs={})).items() if key != "specs"}


@dataclass(frozen=True)
class ExportSummary:
    """What was exported: linears by name; in bytes the dense model's tensors and the shards on disk."""

    output: Path
    to: Form
    linears: Mapping[str, ExportedLinear]
    dense_bytes: int
    nbytes: int

    @property
    def sparse(self) -> int:
        """How many matrices are stored sparse."""
        return sum(linear.form != "dense" for linear in self.linears.values())


def export(
    model: str, output: Path, options: ExportOptions, *, force: bool = False, progress: Progress = NO_PROGRESS
) -> ExportSummary:
    """Write a pruned model (dense or packed directory, or a hub id) in a form that sparse kernels read.

    csr: matrices that a product with one input row shows to be faster so, on this machine, the others dense.
    semi-structured: every pruned matrix. Raises OptionError (no such device), InputError (none pruned, not 2:4).
    """
    options.check()
    check_outputs(inputs_of(options, model), directories=[output], force=force)
    device = device_for(options.to, options.device)
    checkpoint = Checkpoint.open(model, revision=options.revision)
    refuse_other_kind(checkpoint, images=False)
    dtype = compute_dtype(options.dtype, checkpoint, device)
    packer = SemiStructured(device, dtype) if options.to == "semi-structured" else None
    skeleton = Skeleton(checkpoint, trust_remote_code=options.trust_remote_code)
    recorded = pruned_names(checkpoint)
    linears, matrices = {}, skeleton.matrices(recorded or ())
    with progress.task(f"trying {options.to}", len(matrices)) as step:
        for name, linear in matrices.items():
            if not linear.replaceable:
                step()
                continue
            linears[name] = _decide(linear, linear.read(checkpoint), dtype, packer, recorded)
            step()
    _refuse(linears, checkpoint.directory, recorded, packer)
    document = manifest(
        EXPORT,
        "export",
        options.document(),
        skeleton.fingerprint,
        to=options.to,
        compute_dtype=dtype_name(dtype),
        threads=torch.get_num_threads(),
        semi_structured=packer.document() if packer else None,
        commands=commands_so_far(read_mark(checkpoint.directory)),
    )
    shards = plan_shards(checkpoint)
    total = sum(map(len, shards.values()))
    check_space({output: _nbytes(checkpoint, shards, linears)})
    with atomic_directory(output, force=force) as directory, progress.task("writing", total) as step:
        nbytes = _write(skeleton, directory, document, linears, packer, list(shards.values()), step)
    return ExportSummary(output, options.to, linears, nbytes_of(checkpoint, shards), nbytes)


def _nbytes(checkpoint: Checkpoint, shards: Mapping[str, list[str]], linears: Mapping[str, ExportedLinear]) -> int:
    """Bytes of the tensors that the directory will hold."""
    sparse = [one for one in linears.values() if one.form != "dense"]
    replaced = sum(checkpoint.spec(one.key).nbytes for one in sparse)
    return nbytes_of(checkpoint, shards) - replaced + sum(spec.nbytes for one in sparse for spec in one.specs.values())


def _decide(
    linear: Matrix, weight: Tensor, dtype: torch.dtype, packer: SemiStructured | None, recorded: set[str] | None
) -> ExportedLinear:
    """The form of one matrix. weight: [D_out, D_in]. recorded: of `pruned_names`."""
    assert linear.key is not None
    zeros = linear.numel - int(weight.count_nonzero())
    dense = ExportedLinear(linear.key, linear.shape, linear.transposed, dtype_name(weight.dtype), zeros, "dense")
    if not was_pruned(linear.name, zeros / linear.numel, recorded):
        return replace(dense, reason=NOT_PRUNED)
    if packer is None:
        timed = race(weight, sparse := to_csr(weight), dtype)
        dense = replace(dense, dense_seconds=timed.dense, sparse_seconds=timed.sparse)
        if timed.sparse >= timed.dense:
            return replace(dense, reason="not faster as csr")
        return dense.stored_as("csr", sparse)
    if not is_two_of_four(weight):
        return replace(dense, reason=NOT_PATTERN)
    if not packer.fits(linear.shape):
        return replace(dense, reason="a shape that the kernels do not take")
    return replace(dense, dtype=dtype_name(dtype)).stored_as("semi-structured", packer.pack(weight))


def _refuse(
    linears: Mapping[str, ExportedLinear], where: Path, recorded: set[str] | None, packer: SemiStructured | None
) -> None:
    if all(linear.reason == NOT_PRUNED for linear in linears.values()):
        raise InputError(f"no matrix of {where} is pruned, so there is nothing to export; prune the model first.")
    # Where nothing tells which matrices were pruned, those that are not 2:4 stay dense.
    if wrong := [name for name, linear in linears.items() if linear.reason == NOT_PATTERN and recorded is not None]:
        names = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        what = f"not 2:4 (at most 2 of every 4 consecutive inputs) in {where}: {names}"
        raise InputError(f"{what}; prune with --sparsity-type 2:4, or export --to csr.")
    if packer and all(linear.form == "dense" for linear in linears.values()):
        raise InputError(f"no matrix of {where} is 2:4 and of a shape that the kernels take; export --to csr.")


def _write(
    skeleton: Skeleton,
    directory: Path,
    document: Mapping[str, Any],
    linears: Mapping[str, ExportedLinear],
    packer: SemiStructured | None,
    shards: list[list[str]],
    step: Advance,
) -> int:
    """Write the directory, one tensor in memory at a time; returns the bytes of its shards."""
    checkpoint, files = skeleton.checkpoint, numbered("export", len(shards))
    names = {linear.key: name for name, linear in linears.items() if linear.form != "dense"}
    matrices = skeleton.matrices(names.values())
    homes = {f"{key}.{kind}": (key, kind) for key, name in names.items() for kind in linears[name].specs}
    metadata = {"format": "pt", "manifest": json.dumps(finite_or_none(document), ensure_ascii=False)}
    latest: dict[str, dict[str, Tensor]] = {}

    def tensor(part: str) -> Tensor:
        if part not in homes:
            return checkpoint.load(part)
        key, kind = homes[part]
        if key not in latest:
            # The parts of a matrix lie apart where their dtypes differ: made again rather than kept.
            latest.clear()
            weight = matrices[names[key]].read(checkpoint)
            latest[key] = parts_of(to_csr(weight) if packer is None else packer.pack(weight))
        return latest[key][kind]

    for file, keys in zip(files, shards, strict=True):
        specs = {key: checkpoint.spec(key) for key in keys if key not in names}
        specs.update({part: linears[names[key]].specs[kind] for part, (key, kind) in homes.items() if key in keys})
        write_tensors(directory / file, specs, tensor, metadata)
        step(len(keys))
    readme = (
        f"# Export of `{document['model']['id']}`\n\n{len(names)} of {len(linears)} matrices are stored as "
        f"`{document['to']}`, for torch's sparse kernels. transformers alone does not load this directory:\n\n"
        "```python\nfrom trimcli import load_exported\n\nmodel = load_exported(DIRECTORY)\n```\n"
    )
    entries = {name: linear.document() for name, linear in linears.items()}
    add_small_files(directory, checkpoint, readme, sealed({**document, "shards": files, "linears": entries}))
    return sum((directory / file).stat().st_size for file in files)
