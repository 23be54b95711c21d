"""apply-masks: a model and its masks give a pruned model directory, dense or packed."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimcli.commands.options import ApplyOptions
from trimcli.console import NO_PROGRESS, Progress
from trimcli.errors import MismatchError
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.directory import PrunedLinear, PrunedTensors, commands_so_far, masked, write_model
from trimcli.files.manifest import PACKED, PRUNED, check_masks, manifest
from trimcli.files.masks import MaskFile
from trimcli.files.names import grouped
from trimcli.files.outputs import check_outputs, inputs_of
from trimcli.files.packing import PackedTensors
from trimcli.model.matrix import Matrix, finite
from trimcli.model.skeleton import Skeleton
from trimcli.options import check_fields, parse_size

WeightOf = Callable[[str], Tensor | None]


@dataclass(frozen=True)
class AppliedMasks:
    """What apply-masks wrote: bytes as a dense model and of the shards written, matrices, and zeros in them."""

    output: str
    format: str
    dense_bytes: int
    nbytes: int
    linears: int
    zeros: int
    sparsity: float


def apply_masks(
    model: str,
    masks: Path,
    output: Path,
    options: ApplyOptions | None = None,
    *,
    force: bool = False,
    progress: Progress = NO_PROGRESS,
) -> AppliedMasks:
    """Write `model`, a local directory or a hub id, with the weights that `masks` takes set to zero.

    One tensor in memory. The model must have matrices of the masks' names and shapes, and the weights that these were
    made from, or any under `other_weights`; its config may have been saved anew. Masks of a prune that changed the
    kept weights too apply only to the directory that it wrote, to pack it. Raises MismatchError (another model, or
    masks alone where weights changed), UsageError and HubError.
    """
    options = options or ApplyOptions()
    check_fields(options)
    max_shard_size = parse_size("--max-shard-size", options.max_shard_size) if options.max_shard_size else None
    check_outputs(inputs_of(options, model, masks), directories=[output], force=force)
    found = MaskFile.open(masks)
    checkpoint = Checkpoint.open(model, revision=options.revision)
    skeleton = Skeleton(checkpoint, trust_remote_code=options.trust_remote_code)
    changed = bool(found.manifest.get("changes_weights"))
    if not (options.other_weights or changed):
        check_masks(found.manifest, skeleton.fingerprint, masks)
    linears = _pruned_linears(found, skeleton)
    matrices = skeleton.matrices(found.names)
    weights = masked_weights(checkpoint, (matrices[name] for name in found.names), found.keep)
    if changed and linears:
        weights = _unchanged(weights, checkpoint, masks)
        weights(next(iter(linears.values())).key)  # fails before anything is written
    packed = options.format == "packed"
    document = manifest(
        PACKED if packed else PRUNED,
        "apply-masks",
        asdict(options),
        skeleton.fingerprint,
        {"masks": masks},
        pruning={key: value for key, value in found.manifest.items() if key != "linears"},
        commands=commands_so_far(found.manifest),
    )
    if packed:
        tensors: PrunedTensors = PackedTensors(checkpoint, weights, linears, found.keep, found.grid)
    else:
        tensors = PrunedTensors(checkpoint, weights, linears, found.keep)
    written = write_model(tensors, output, document, force=force, max_shard_size=max_shard_size, progress=progress)
    zeros, sparsity = sum(one["zeros"] for one in written.document["linears"].values()), written.document["sparsity"]
    nbytes = written.dense_bytes, written.nbytes
    return AppliedMasks(str(output), options.format, *nbytes, linears=len(linears), zeros=zeros, sparsity=sparsity)


def _pruned_linears(found: MaskFile, skeleton: Skeleton) -> dict[str, PrunedLinear]:
    linears, matrices = {}, skeleton.matrices(found.names)
    for name in found.names:
        linear = matrices.get(name)
        if linear is None or linear.key is None or linear.shape != found.shape(name):
            what = f"{found.path} has a mask of shape {list(found.shape(name))} for {name}"
            raise MismatchError(f"{what}, which {skeleton.checkpoint.id} does not have; give its own model.")
        linears[name] = pruned_linear(linear, found.entry(name))
    return linears


def pruned_linear(linear: Matrix, entry: Mapping[str, Any]) -> PrunedLinear:
    """A matrix as a directory records it. entry: of its masks' manifest."""
    assert linear.key is not None
    pattern = tuple(entry["pattern"]) if entry.get("pattern") else None
    where = linear.key, linear.shape, linear.transposed
    return PrunedLinear(*where, entry["zeros"], entry.get("target"), pattern, linear.place)


def masked_weights(
    checkpoint: Checkpoint,
    linears: Iterable[Matrix],
    keep_of: Callable[[str], Tensor],
    new_of: Callable[[str], Tensor | None] = lambda _: None,
) -> WeightOf:
    """What replaces a checkpoint's tensors: key -> the tensor pruned, None where it is no matrix of `linears`.

    keep_of(name): bool [D_out, D_in]. new_of(name): the pruned weights [D_out, D_in] where the kept ones changed too.
    What is returned raises InputError on NaN or infinity.
    """
    by_key = grouped(linears, lambda linear: linear.key)

    def weight_of(key: str) -> Tensor | None:
        if key not in by_key:
            return None
        stored = finite(checkpoint.load(key), key, checkpoint)
        copy: Tensor | None = None
        for linear in by_key[key]:
            weight = new_of(linear.name)
            if weight is None:
                weight = masked(linear.within(stored), keep_of(linear.name))
            if (weight.shape, weight.dtype, linear.transposed) == (stored.shape, stored.dtype, False):
                return weight
            copy = stored.clone() if copy is None else copy
            linear.within(copy).copy_(weight)
        return copy

    return weight_of


def _unchanged(weight_of: WeightOf, checkpoint: Checkpoint, path: Path) -> WeightOf:
    """`weight_of`, raising MismatchError unless what it prunes is zero already. path: of the masks."""

    def checked(key: str) -> Tensor | None:
        weight = weight_of(key)
        if weight is not None and not torch.equal(weight, checkpoint.load(key)):
            why = "comes from a prune that changed the kept weights too, which the masks alone do not carry to"
            raise MismatchError(f"{path} {why} {checkpoint.id}; use what prune --save-model wrote.")
        return weight

    return checked
