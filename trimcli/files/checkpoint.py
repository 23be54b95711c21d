"""A model directory, tensor by tensor: never the whole model.

Reads the config and single tensors, memory-mapped, from sharded or single safetensors, from
`pytorch_model*.bin` (restricted unpickling, mapped where torch can) or from a packed directory; local or from the hub.
"""

import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from trimcli.errors import HubError, InputError
from trimcli.files.atomic import MARK
from trimcli.files.documents import read_json
from trimcli.files.manifest import PACKED
from trimcli.files.tensors import TensorSpec, natural, open_tensors, spec_of

if TYPE_CHECKING:
    from trimcli.files.packed import PackedReader

SAFE_INDEX, SAFE_SINGLE = "model.safetensors.index.json", "model.safetensors"
BIN_INDEX, BIN_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt"}


class Shards(Protocol):
    """Where tensors come from: one of the storage forms below."""

    files: dict[str, list[str]]

    def keys(self) -> list[str]:
        """Names of all tensors, in natural order."""

    def spec(self, key: str) -> TensorSpec:
        """Dtype and shape, without reading the tensor."""

    def load(self, key: str) -> Tensor:
        """The tensor, in its stored dtype."""


class Checkpoint:
    """One model directory opened for reading.

    directory: the local directory (a hub snapshot's, for a hub id). id: what the user called it.
    config_document: the raw config.json.
    """

    def __init__(self, directory: Path, id: str, *, weights: bool | None = True) -> None:
        self.directory = directory
        self.id = id
        if weights is None:
            weights = any(
                (directory / name).is_file() for name in (SAFE_INDEX, SAFE_SINGLE, BIN_INDEX, BIN_SINGLE, MARK)
            )
        if not (directory / "config.json").is_file():
            raise InputError(f"{directory} has no config.json, so it is not a model directory; check the path.")
        self.config_document: dict[str, Any] = read_json(directory / "config.json")
        if self.config_document.get("quantization_config"):
            raise InputError(f"{directory} holds quantized weights; give the model's original checkpoint.")
        self._shards: Shards | PackedReader | None = _open_shards(directory) if weights else None

    @classmethod
    def open(cls, model: str | Path, *, revision: str | None = None, weights: bool | None = True) -> "Checkpoint":
        """Open a local directory or a hub id.

        weights: whether tensors are needed; without, a directory with only a config.json will do, and of a hub model
        only that is fetched. None: whatever is there. Raises
        InputError (no such directory, not a model directory, truncated or missing shards) and HubError.
        """
        local = Path(model).expanduser()
        if local.is_dir():
            return cls(local, str(model), weights=weights)
        if local.exists():
            raise InputError(f"{model} is a file, not a model directory; give the directory that holds it.")
        return cls(_from_hub(str(model), revision, weights=bool(weights)), str(model), weights=weights)

    @property
    def has_weights(self) -> bool:
        """Whether tensors were opened."""
        return self._shards is not None

    @property
    def _tensors(self) -> "Shards | PackedReader":
        if self._shards is None:
            raise InputError(f"{self.directory} was opened without its weights; give a directory that has them.")
        return self._shards

    def keys(self) -> list[str]:
        """Names of all tensors, as the checkpoint spells them."""
        return self._tensors.keys()

    def spec(self, key: str) -> TensorSpec:
        """Dtype and shape of a tensor, without reading it."""
        return self._tensors.spec(key)

    def load(self, key: str) -> Tensor:
        """A tensor on the CPU in its stored dtype, memory-mapped where the storage allows: do not write to it."""
        return self._tensors.load(key)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self._tensors.spec(key).nbytes for key in self._tensors.keys())  # noqa: SIM118 - no mapping

    def shards(self) -> dict[str, list[str]]:
        """Shard file name -> the names of the tensors in it."""
        return self._tensors.files

    def small_files(self) -> list[Path]:
        """The directory's files that are not weights: config, tokenizer, generation config, code."""
        return [
            path
            for path in sorted(self.directory.iterdir())
            if path.is_file()
            and path.suffix not in WEIGHT_SUFFIXES
            and path.name not in {SAFE_INDEX, BIN_INDEX, MARK}
            and not path.name.startswith(".")
        ]


def _from_hub(model: str, revision: str | None, *, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    missing = f"there is no model directory {model}"
    try:
        validate_repo_id(model)
    except HFValidationError:
        raise InputError(f"{missing}, and that is no hub id either; check the path.") from None
    if model.startswith((".", "~")):
        raise InputError(f"{missing}; check the path.")
    # Folders hold other formats of the same weights, and so do Mistral's consolidated files.
    fetch = partial(snapshot_download, model, revision=revision, ignore_patterns=["*/*", "consolidated*"])
    patterns = ["*.json", "*.txt", "*.model", "*.py", "*.jinja", "*.md", "LICENSE*"]
    try:
        if not weights:
            return Path(fetch(allow_patterns=["config.json", "*.py"]))
        directory = Path(fetch(allow_patterns=[*patterns, "*.safetensors"]))
        if not any(directory.glob("*.safetensors")):
            directory = Path(fetch(allow_patterns=[*patterns, "pytorch_model*.bin"]))
        return directory
    except GatedRepoError:
        raise InputError(f"the hub model {model} is gated; accept its licence and set HF_TOKEN.") from None
    except RevisionNotFoundError:
        raise InputError(f"the hub model {model} has no revision {revision!r}; check --revision.") from None
    except RepositoryNotFoundError:
        raise InputError(f"{missing}, and the hub has no such model; check the spelling or set HF_TOKEN.") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as problem:
        cause = type(problem).__name__
        if "/" not in model:
            raise InputError(
                f"{missing}, and the hub cannot be asked for a model of that name ({cause}); check the path."
            ) from None
        raise HubError(
            f"{missing}, and the model hub cannot be reached for it ({cause}); give a local directory or go online."
        ) from None


def _open_shards(directory: Path) -> "Shards | PackedReader":
    mark = directory / MARK
    if mark.is_file() and read_json(mark).get("schema") == PACKED:
        from trimcli.files.packed import PackedReader

        return PackedReader(directory)
    for index, single, form in ((SAFE_INDEX, SAFE_SINGLE, SafeShards), (BIN_INDEX, BIN_SINGLE, BinShards)):
        # Where both lie there, transformers reads the single file.
        if (directory / single).is_file():
            files = [single]
        elif (directory / index).is_file():
            files = sorted(set(_weight_map(directory / index).values()))
        else:
            continue
        for name in files:
            if not (directory / name).is_file():
                raise InputError(f"the shard {directory / name} is missing; fetch the model anew.")
        return form(directory, files)
    raise InputError(f"{directory} has a config.json but no weights ({SAFE_SINGLE} or {BIN_SINGLE}); fetch them.")


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found.values()) or not found:
        raise InputError(f"{index} has no weight_map; fetch the model anew.")
    for name in found.values():
        if Path(name).name != name:
            raise InputError(f"{index} names the shard {name!r} outside the model directory; fetch the model anew.")
    return dict(found)


class SafeShards:
    """Tensors in safetensors shards."""

    def __init__(self, directory: Path, files: list[str]) -> None:
        self._handles = {name: open_tensors(directory / name) for name in files}
        self.files = {name: list(handle.keys()) for name, handle in self._handles.items()}
        self._home = {key: name for name, keys in self.files.items() for key in keys}
        self._directory = directory

    def keys(self) -> list[str]:
        """Names of all tensors, in natural order."""
        return sorted(self._home, key=natural)

    def spec(self, key: str) -> TensorSpec:
        """Dtype and shape, from the header alone. Raises InputError for a dtype that cannot be pruned."""
        home = self._home[key]
        return spec_of(self._handles[home], key, self._directory / home)

    def load(self, key: str) -> Tensor:
        """The tensor, mapped."""
        found: Tensor = self._handles[self._home[key]].get_tensor(key)
        return found


class BinShards:
    """Tensors in `pytorch_model*.bin`, unpickled by the restricted reader and mapped."""

    def __init__(self, directory: Path, files: list[str]) -> None:
        self._shards: dict[str, dict[str, Tensor]] = {}
        for name in files:
            path = directory / name
            try:
                # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
                found = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
            except Exception as problem:  # torch raises anything from RuntimeError to UnpicklingError here
                reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
                raise InputError(
                    f"{path} cannot be read as a plain weights file ({reason}); give a safetensors one."
                ) from None
            self._shards[name] = {key: value for key, value in found.items() if isinstance(value, Tensor)}
        self.files = {name: list(tensors) for name, tensors in self._shards.items()}
        self._home = {key: name for name, keys in self.files.items() for key in keys}

    def keys(self) -> list[str]:
        """Names of all tensors, in natural order."""
        return sorted(self._home, key=natural)

    def spec(self, key: str) -> TensorSpec:
        """Dtype and shape."""
        tensor = self._shards[self._home[key]][key]
        return TensorSpec(tensor.dtype, tuple(tensor.shape))

    def load(self, key: str) -> Tensor:
        """The tensor, mapped."""
        return self._shards[self._home[key]][key]
