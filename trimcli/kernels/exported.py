"""Exports of `trim export` read back: as a checkpoint of the dense model, and as a model that runs on them."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimcli.errors import InputError, OptionError
from trimcli.files.atomic import MARK
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.documents import read_json
from trimcli.files.forms import FLAG, OBJECT, SIZE, TEXT, Each, Must, Scalar, check_form
from trimcli.files.manifest import is_intact
from trimcli.files.shards import SafeShards, shard_names
from trimcli.files.tensors import DTYPE, NAMED, TensorSpec, natural
from trimcli.kernels.forms import PARTS, SemiStructured, computed, csr_from_parts, replace_linear
from trimcli.kernels.options import Form
from trimcli.model.device import compute_device, compute_dtype
from trimcli.model.matrix import finite
from trimcli.model.skeleton import Skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPORT = "trim.export/1"
# cuSPARSELt keeps both parts of a semi-structured matrix in one tensor.
NEEDED = {**PARTS, "semi-structured": ("packed",)}
FORM = {
    "to": Must(Scalar(f"one of {', '.join(PARTS)}", lambda value: isinstance(value, str) and value in PARTS)),
    "compute_dtype": Must(DTYPE),
    "semi_structured": OBJECT,
    "shards": Must([Must(TEXT)]),
    "linears": Must(
        Each(
            Must(
                {
                    "key": Must(TEXT),
                    "shape": Must((Must(SIZE), Must(SIZE))),
                    "transposed": Must(FLAG),
                    "dtype": Must(DTYPE),
                    "form": Must(TEXT),
                }
            )
        )
    ),
}


def device_for(form: Form, name: str) -> torch.device:
    """The device that a form is for; `name` as --device gives it. Raises OptionError for another one."""
    if form == "csr":
        if name not in ("auto", "cpu"):
            raise OptionError(f"csr matrices are for CPUs, so --device {name} is of no use; leave it out.")
        return torch.device("cpu")
    return compute_device(name)


class ExportedCheckpoint(Checkpoint):
    """An export read as a checkpoint, its sparse tensors decoded, if semi-structured on `device`.

    Raises InputError (no whole export, edited), MismatchError (packed for another GPU), OptionError (no GPU).
    """

    def __init__(self, directory: Path, device: str = "auto") -> None:
        super().__init__(directory, str(directory), weights=False)
        mark = directory / MARK
        document = read_json(mark, EXPORT)
        if not is_intact(document):
            raise InputError(f"{mark} was changed after trim wrote it; export the model anew.")
        check_form(document, FORM, mark, "manifest")
        self.to: Form = document["to"]
        self.device = device_for(self.to, device)
        self._packer = None
        if self.to == "semi-structured":
            self._packer = SemiStructured(self.device, NAMED[document["compute_dtype"]])
            self._packer.check(document["semi_structured"], directory)
        self._shards = self._stored = SafeShards(directory, shard_names(document["shards"], mark))
        self.sparse = {name: entry for name, entry in document["linears"].items() if entry["form"] != "dense"}
        self._names = {entry["key"]: name for name, entry in self.sparse.items()}
        for key in self._names:
            if any(f"{key}.{part}" not in self._stored.home for part in NEEDED[self.to]):
                raise InputError(f"the shards of {directory} lack {key}; export the model anew.")

    def compute_dtype(self, name: str) -> torch.dtype:
        """The computation's dtype for --dtype: what is packed for a GPU stays in the dtype it was packed in."""
        return self._packer.dtype if self._packer else compute_dtype(name, self, self.device)

    def keys(self) -> list[str]:
        """Names of all tensors of the dense model."""
        parts = {f"{key}.{kind}" for key in self._names for kind in PARTS[self.to]}
        return sorted({*(name for name in self._stored.home if name not in parts), *self._names}, key=natural)

    def spec(self, key: str) -> TensorSpec:
        """Dtype and shape of a tensor of the dense model."""
        if key in self._names:
            entry = self.sparse[self._names[key]]
            shape = entry["shape"][::-1] if entry["transposed"] else entry["shape"]
            return TensorSpec(NAMED[entry["dtype"]], tuple(shape))
        return self._stored.spec(key)

    def load(self, key: str) -> Tensor:
        """A tensor of the dense model on the CPU, decoded where it is sparse."""
        if key not in self._names:
            return self._stored.load(key)
        dense = self.matrix(self._names[key]).to_dense().cpu()
        return dense.T if self.sparse[self._names[key]]["transposed"] else dense

    def matrix(self, name: str) -> Tensor:
        """The sparse [D_out, D_in] of a linear of `sparse`. Raises InputError where it is damaged."""
        key, (d_out, d_in) = self.sparse[name]["key"], self.sparse[name]["shape"]
        names = {kind: f"{key}.{kind}" for kind in PARTS[self.to]}
        parts = {kind: self._stored.load(name) for kind, name in names.items() if name in self._stored.home}
        if self._packer:
            return self._packer.from_parts(parts, (d_out, d_in))
        try:
            finite(parts["values"], key, self)
            return csr_from_parts(parts, (d_out, d_in))
        except (KeyError, ValueError):
            raise InputError(f"{key} in {self.directory} is no csr matrix; export the model anew.") from None


def exported_skeleton(checkpoint: ExportedCheckpoint, dtype: str, *, trust_remote_code: bool) -> Skeleton:
    """The skeleton of an export, loaded, with its sparse matrices in place."""
    computed_in, device = checkpoint.compute_dtype(dtype), checkpoint.device
    skeleton = Skeleton(checkpoint, dtype=computed_in, device=device, trust_remote_code=trust_remote_code)
    matrices = skeleton.matrices(checkpoint.sparse)
    for name, entry in checkpoint.sparse.items():
        linear = matrices.get(name)
        if linear is None or (linear.key, list(linear.shape)) != (entry["key"], entry["shape"]):
            raise InputError(f"{checkpoint.directory / MARK} lists {name}, which the model has not; export it anew.")
        replace_linear(skeleton, linear, computed(checkpoint.matrix(name)))
    skeleton.load_everything()
    return skeleton


def load_exported(
    directory: str | Path, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> "PreTrainedModel":
    """An export as a transformers model that runs on its sparse matrices. Raises what ExportedCheckpoint raises.

    device: `auto` is the CPU for csr, the first CUDA device for semi-structured, whose dtype is as packed.
    """
    from transformers import GenerationConfig

    path = Path(directory)
    if not (path / MARK).is_file():
        raise InputError(f"{path} is not an export: it has no {MARK}; check the path.")
    skeleton = exported_skeleton(ExportedCheckpoint(path, device), dtype, trust_remote_code=trust_remote_code)
    model: PreTrainedModel = skeleton.model
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model
