"""A model directory, tensor by tensor, never whole: safetensors, `pytorch_model*.bin` or packed; local or a hub id."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from trimcli.errors import HubError, InputError
from trimcli.files.atomic import MARK
from trimcli.files.documents import read_json, read_mark
from trimcli.files.manifest import PACKED
from trimcli.files.packed import PackedReader
from trimcli.files.shards import BinShards, SafeShards, Shards, shard_names
from trimcli.files.tensors import TensorSpec

SAFE_INDEX, SAFE_SINGLE = "model.safetensors.index.json", "model.safetensors"
BIN_INDEX, BIN_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt"}


class Checkpoint:
    """One model directory, a hub snapshot's for a hub `id`, opened for reading. config_document: its config.json."""

    def __init__(self, directory: Path, id: str, *, weights: bool | None = True) -> None:
        self.directory = directory
        self.id = id
        if weights is None:
            files = (SAFE_INDEX, SAFE_SINGLE, BIN_INDEX, BIN_SINGLE, MARK)
            weights = any((directory / name).is_file() for name in files)
        if not (directory / "config.json").is_file():
            raise InputError(f"{directory} has no config.json, so it is not a model directory; check the path.")
        self.config_document: dict[str, Any] = read_json(directory / "config.json")
        if self.config_document.get("quantization_config"):
            raise InputError(f"{directory} holds quantized weights; give the model's original checkpoint.")
        self._shards: Shards | None = _open_shards(directory) if weights else None

    @classmethod
    def open(cls, model: str | Path, *, revision: str | None = None, weights: bool | None = True) -> "Checkpoint":
        """Open a local directory or a hub id. weights: None for what is there. Raises InputError and HubError."""
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
    def _tensors(self) -> Shards:
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
        return sum(self.spec(key).nbytes for key in self.keys())

    def shards(self) -> dict[str, list[str]]:
        """Shard file name -> the names of the tensors in it."""
        return self._tensors.files

    def small_files(self) -> list[Path]:
        """The directory's files that are not weights: config, tokenizer, generation config, code."""
        files = [path for path in sorted(self.directory.iterdir()) if path.is_file() and path.name[0] != "."]
        others = {SAFE_INDEX, BIN_INDEX, MARK}
        return [path for path in files if path.suffix not in WEIGHT_SUFFIXES and path.name not in others]


def _from_hub(model: str, revision: str | None, *, weights: bool) -> Path:
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    missing = f"there is no model directory {model}"
    try:
        validate_repo_id(model)
    except errors.HFValidationError:
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
    except errors.GatedRepoError:
        raise InputError(f"the hub model {model} is gated; accept its licence and set HF_TOKEN.") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"the hub model {model} has no revision {revision!r}; check --revision.") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{missing}, and the hub has no such model; check the spelling or set HF_TOKEN.") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as problem:
        what = f"{missing}, and the model hub cannot be reached for it ({type(problem).__name__})"
        if "/" not in model:
            raise InputError(f"{what}; check the path.") from None
        raise HubError(f"{what}; give a local directory or go online.") from None


def _open_shards(directory: Path) -> Shards:
    if read_mark(directory).get("schema") == PACKED:
        return PackedReader(directory)
    for name, single, form in ((SAFE_INDEX, SAFE_SINGLE, SafeShards), (BIN_INDEX, BIN_SINGLE, BinShards)):
        # Where both lie there, transformers reads the single file.
        if (directory / single).is_file():
            return form(directory, [single])
        index = directory / name
        if index.is_file():
            found = read_json(index).get("weight_map")
            if not isinstance(found, Mapping) or not found:
                raise InputError(f"{index} has no weight_map; fetch the model anew.")
            files = sorted(set(shard_names(found.values(), index)))
            if missing := [file for file in files if not (directory / file).is_file()]:
                raise InputError(f"the shard {directory / missing[0]} is missing; fetch the model anew.")
            return form(directory, files)
    raise InputError(f"{directory} has a config.json but no weights ({SAFE_SINGLE} or {BIN_SINGLE}); fetch them.")
