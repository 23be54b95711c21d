"""apply-masks: a model and its masks give a pruned model directory, dense or packed."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from trimcli.console import NO_PROGRESS, Progress
from trimcli.errors import MismatchError
from trimcli.files.atomic import refuse_existing
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.directory import PrunedLinear, commands_so_far, masked, parse_size, write_model
from trimcli.files.manifest import PACKED, PRUNED, check_model, manifest
from trimcli.files.masks import MaskFile
from trimcli.files.packing import write_packed
from trimcli.model.skeleton import Skeleton
from trimcli.options import one_of

Format = Literal["dense", "packed"]


@dataclass(frozen=True, kw_only=True)
class ApplyOptions:
    """How masks are applied.

    format: an ordinary directory ("dense") or a packed one. max_shard_size: "5GB", to shard anew; None keeps
    the model's shards. other_weights: accept other weights of the same structure (a fine-tuned model).
    """

    format: Format = "dense"
    max_shard_size: str | None = None
    other_weights: bool = False
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class AppliedMasks:
    """What apply-masks wrote.

    dense_bytes: the tensors' size as a dense model. nbytes: size of the shards written. linears: matrices.
    zeros: weights in them that are zero. sparsity: that as a fraction.
    """

    output: str
    format: Format
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

    Streamed shard by shard with one tensor in memory. Masks of a prune that changed the kept weights too
    (SparseGPT, retained reconstruction) apply only to the directory that prune wrote, to pack it. Raises
    MismatchError (masks of another model, masks alone where weights changed), InputError, OutputExists,
    OptionError (a format or size that is none), HubError.
    """
    options = options or ApplyOptions()
    one_of("--format", options.format, get_args(Format))
    max_shard_size = parse_size(options.max_shard_size) if options.max_shard_size else None
    refuse_existing(output, force=force)
    found = MaskFile.open(masks)
    checkpoint = Checkpoint.open(model, revision=options.revision)
    skeleton = Skeleton(checkpoint, trust_remote_code=options.trust_remote_code)
    changed = bool(found.manifest.get("changes_weights"))
    structure_only = options.other_weights or changed
    check_model(found.manifest, skeleton.fingerprint, masks, structure_only=structure_only)
    linears = pruned_linears(found, skeleton)
    weights = MaskedWeights(skeleton, found, already_zero=changed)
    if changed and linears:
        weights(next(iter(linears.values())).key)  # fails before anything is written
    document = manifest(
        PACKED if options.format == "packed" else PRUNED,
        "apply-masks",
        asdict(options),
        skeleton.fingerprint,
        {"masks": masks},
        pruning={key: value for key, value in found.manifest.items() if key != "linears"},
        commands=commands_so_far(found.manifest),
    )
    write: Callable[..., Any] = write_model
    if options.format == "packed":
        write = partial(write_packed, keep_of=found.keep)
    written = write(
        checkpoint,
        output,
        weight_of=weights,
        document=document,
        linears=linears,
        force=force,
        max_shard_size=max_shard_size,
        progress=progress,
    )
    return AppliedMasks(
        output=str(output),
        format=options.format,
        dense_bytes=written.dense_bytes,
        nbytes=written.nbytes,
        linears=len(linears),
        zeros=sum(entry["zeros"] for entry in written.document["linears"].values()),
        sparsity=written.document["sparsity"],
    )


def pruned_linears(found: MaskFile, skeleton: Skeleton) -> dict[str, PrunedLinear]:
    """The masked linears as a directory records them. Raises MismatchError for one the model lacks."""
    linears = {}
    for name in found.names:
        linear = skeleton.linears.get(name)
        if linear is None or linear.key is None or linear.shape != found.shape(name):
            raise MismatchError(
                f"{found.path} has a mask of shape {list(found.shape(name))} for {name}, which "
                f"{skeleton.checkpoint.id} does not have; give the model it was made for."
            )
        entry = found.entry(name)
        pattern = tuple(entry["pattern"]) if entry.get("pattern") else None
        linears[name] = PrunedLinear(
            linear.key, linear.shape, linear.transposed, entry["zeros"], entry.get("target"), pattern
        )
    return linears


class MaskedWeights:
    """Checkpoint key -> the tensor with its mask applied, or None where there is no mask.

    already_zero: the tensor must be zero outside its mask; MismatchError otherwise.
    """

    def __init__(self, skeleton: Skeleton, found: MaskFile, *, already_zero: bool = False) -> None:
        self._skeleton, self._found, self._already_zero = skeleton, found, already_zero
        self._names = {skeleton.linears[name].key: name for name in found.names}

    def __call__(self, key: str) -> Tensor | None:
        """The masked tensor as stored, pruned weights +0.0. Raises InputError on NaN or infinity."""
        name = self._names.get(key)
        if name is None:
            return None
        linear = self._skeleton.linears[name]
        weight = linear.read(self._skeleton.checkpoint)
        keep = self._found.keep(name)
        if self._already_zero and bool(((weight != 0) & ~keep).any()):
            raise MismatchError(
                f"{self._found.path} comes from a prune that changed the kept weights too, which the masks "
                f"alone do not carry to {self._skeleton.checkpoint.id}; use what prune --save-model wrote."
            )
        return linear.replaced(self._skeleton.checkpoint.load(key), masked(weight, keep))
