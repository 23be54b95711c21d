"""Packed directories back to ordinary ones: on disk, or straight into a transformers model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trimcli.console import NO_PROGRESS, Progress
from trimcli.errors import InputError
from trimcli.files.atomic import MARK
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.directory import PrunedLinear, PrunedTensors, WrittenModel, commands_so_far, write_model
from trimcli.files.documents import read_json
from trimcli.files.held import mask_in
from trimcli.files.manifest import PACKED, PRUNED, ModelFingerprint, manifest
from trimcli.files.outputs import check_outputs
from trimcli.model.empty import build_empty

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def unpack(packed: Path, output: Path, *, force: bool = False, progress: Progress = NO_PROGRESS) -> WrittenModel:
    """Write the ordinary directory of a packed one, one tensor in memory. Raises InputError and OutputExists."""
    check_outputs([packed], directories=[output], force=force)
    checkpoint, found = _open_packed(packed)
    more: dict[str, Any] = {name: found[name] for name in ("pruning", "training") if name in found}
    more["commands"] = commands_so_far(found)
    document = manifest(PRUNED, "unpack", {}, ModelFingerprint(**found["model"]), {"packed": packed / MARK}, **more)
    linears = {name: PrunedLinear.from_entry(entry) for name, entry in found["linears"].items()}

    def keep_of(name: str) -> torch.Tensor | None:
        return mask_in(checkpoint, found["linears"][name])

    tensors = PrunedTensors(checkpoint, lambda _: None, linears, keep_of)
    return write_model(tensors, output, document, force=force, progress=progress)


def load_packed(
    directory: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    **options: Any,
) -> "PreTrainedModel":
    """A packed directory as transformers' model; `options`: more arguments of `from_pretrained`. Raises InputError."""
    from transformers import GenerationConfig

    path = Path(directory)
    checkpoint, _ = _open_packed(path)
    empty = build_empty(checkpoint, torch.float32, trust_remote_code=trust_remote_code)
    # The class itself, since the Auto classes insist on a path; the config anew, since building changes it.
    model: PreTrainedModel = type(empty).from_pretrained(
        None,
        config=type(empty.config).from_pretrained(path),
        state_dict={key: checkpoint.load(key) for key in checkpoint.keys()},  # noqa: SIM118 - no mapping
        dtype=dtype or "auto",
        **options,
    )
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.to(device)  # type: ignore[arg-type]


def _open_packed(directory: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint and its `trim.json`."""
    if not (directory / MARK).is_file():
        raise InputError(f"{directory} is not a packed directory: it has no {MARK}; check the path.")
    document = read_json(directory / MARK, PACKED)
    return Checkpoint.open(directory), document
