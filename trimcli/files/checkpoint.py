"""A model directory, tensor by tensor, never whole: safetensors, `pytorch_model*.bin` or packed; local or a hub id."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from trimcli.errors import HubError, InputError
from trimcli.files.atomic import MARK
from trimcli.files.documents import read_json, read_mark, refuse_later
from trimcli.files.manifest import PACKED
from trimcli.files.packed import PackedReader
from trimcli.files.quantized import as_plain, without_quantization
from trimcli.files.shards import BinShards, SafeShards, Shards, refuse_outside, shard_names
from trimcli.files.tensors import TensorSpec, specs_of

CONFIG, TEMPLATES = "config.json", "additional_chat_templates"
SAFE_INDEX, SAFE_SINGLE = "model.safetensors.index.json", "model.safetensors"
BIN_INDEX, BIN_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
# Where ModelOpt says what is quantized, which nothing is that trim writes.
QUANTIZED = "hf_quant_config.json"
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt"}


class Checkpoint:
    """One model directory, a hub snapshot's for a hub `id`, opened for reading.

    Quantized weights that can be read are plain ones here. config_document: its config.json, without a word on that.
    names_quantization: whether that had one.
    """

    def __init__(self, directory: Path, id: str, *, weights: bool | None = True) -> None:
        self.directory = directory
        self.id = id
        if weights is None:
            files = (SAFE_INDEX, SAFE_SINGLE, BIN_INDEX, BIN_SINGLE, MARK)
            weights = any((directory / name).is_file() for name in files)
        if not (directory / CONFIG).is_file():
            raise InputError(f"{directory} has no config.json, so it is not a model directory; check the path.")
        config = read_json(directory / CONFIG)
        self.config_document: dict[str, Any] = without_quantization(config)
        self.names_quantization = self.config_document != config
        self._shards: Shards | None = None
        if weights:
            for path in self.small_files():  # they go along into what is written
                refuse_outside(path, directory)
            self._shards = as_plain(_open_shards(directory), config, directory)

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

    def specs(self) -> dict[str, TensorSpec]:
        """Dtypes and shapes of all tensors but those whose dtype torch lacks."""
        return specs_of(self.keys(), self.spec)

    def load(self, key: str) -> Tensor:
        """A tensor on the CPU in its stored dtype, memory-mapped where the storage allows: do not write to it."""
        return self._tensors.load(key)

    def keep_bits(self, key: str) -> Tensor | None:
        """Which weights a packed matrix keeps, bool, of its stored shape; None for what is not stored packed."""
        return self._tensors.keep_bits(key) if isinstance(self._tensors, PackedReader) else None

    @property
    def is_packed(self) -> bool:
        """Whether the directory is a packed one."""
        return isinstance(self._shards, PackedReader)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.specs().values())

    def shards(self) -> dict[str, list[str]]:
        """Shard file name -> the names of the tensors in it."""
        return self._tensors.files

    def small_files(self) -> list[Path]:
        """The directory's files that are not weights: config, tokenizer, chat templates, generation config, code."""
        found = [*sorted(self.directory.iterdir()), *sorted((self.directory / TEMPLATES).glob("*.jinja"))]
        files = [path for path in found if path.is_file() and path.name[0] != "."]
        others = {SAFE_INDEX, BIN_INDEX, MARK, QUANTIZED}
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
            return Path(fetch(allow_patterns=[CONFIG, "*.py"]))
        directory = Path(fetch(allow_patterns=[*patterns, "*.safetensors"]))
        if not any(directory.glob("*.safetensors")):
            directory = Path(fetch(allow_patterns=[*patterns, "pytorch_model*.bin"]))
        fetch(allow_patterns=[f"{TEMPLATES}/*.jinja"], ignore_patterns=None)
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
    mark = read_mark(directory)
    refuse_later(mark, [PACKED], directory / MARK)
    if mark.get("schema") == PACKED:
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
    if gguf := sorted(directory.glob("*.gguf")):
        way_out = "load it with transformers' `from_pretrained(..., gguf_file=...)` and save that"
        raise InputError(f"{directory} holds GGUF weights ({gguf[0].name}), which are not read; {way_out}.")
    raise InputError(f"{directory} has a config.json but no weights ({SAFE_SINGLE} or {BIN_SINGLE}); fetch them.")
