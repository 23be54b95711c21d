"""What a report is made of: files recognised by schema, and the few numbers taken from them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from trimcli.errors import InputError, MismatchError
from trimcli.files.atomic import MARK
from trimcli.files.documents import read_json
from trimcli.files.manifest import CALIBRATION, LAYER_SPARSITY, MASKS, PACKED, PRUNED, RESULTS, ROWS, is_intact
from trimcli.report.compare import Table, distinct, model_of, table_of

DIRECTORIES = (PRUNED, PACKED)
KNOWN = (RESULTS, LAYER_SPARSITY, MASKS, ROWS, CALIBRATION, *DIRECTORIES)
# A matrix has thousands of rows; its sparsities are drawn at so many quantiles.
QUANTILES = 64
NEEDED = {
    LAYER_SPARSITY: {"method", "target", "sparsity"},
    MASKS: {"linears", "sparsity"},
    PACKED: {"linears", "sparsity"},
    PRUNED: {"linears", "sparsity"},
    ROWS: {"linears"},
}
NEEDED_OF_ROWS = {"quality_uniform", "quality_best", "step"}
POPCOUNT = np.array([value.bit_count() for value in range(256)], np.uint8)

Array = np.ndarray[Any, Any]


class Place(NamedTuple):
    """Where a linear is: decoder layer (0 where its name has no number) and kind, such as `mlp.up_proj`."""

    layer: int
    kind: str


@dataclass(frozen=True)
class Source:
    """One file or directory. label: what it is called in the report, unlike every other's."""

    path: Path
    document: Mapping[str, Any]
    label: str

    @property
    def schema(self) -> str:
        """Its schema, name and version."""
        return str(self.document["schema"])

    def row_sparsities(self) -> dict[str, Array]:
        """Linear -> quantiles of its rows' sparsities, float [QUANTILES], ascending; empty without rows."""
        if self.schema == MASKS:
            return dict(_rows_of_masks(self.path, self.document["linears"]))
        if self.schema == ROWS:
            return dict(_rows_of_stats(self.path.with_suffix(".safetensors"), self.document["linears"]))
        return {}


@dataclass(frozen=True)
class Gathered:
    """Everything given, in the order it was given."""

    sources: tuple[Source, ...]

    def of(self, *schemas: str) -> list[Source]:
        """The sources of these schemas."""
        return [source for source in self.sources if source.schema in schemas]

    @cached_property
    def table(self) -> Table:
        """The comparison of all results."""
        return table_of([(source.path, source.document) for source in self.of(RESULTS)])

    @cached_property
    def weights(self) -> dict[tuple[str, str], int]:
        """(model structure, linear) -> number of weights, as far as a given file tells."""
        return {
            (structure_of(source), name): entry["shape"][0] * entry["shape"][1]
            for source in self.of(MASKS, *DIRECTORIES)
            for name, entry in source.document["linears"].items()
        }

    def layers(self, source: Source) -> dict[int, float]:
        """Layer -> its sparsity, or its target in a layer ratios file; empty for files that know none.

        Linears count by their size as far as a given file tells it, alike where none does.
        """
        values = sparsity_by_linear(source)
        structure = structure_of(source)
        return by_layer(values, {name: self.weights.get((structure, name), 1) for name in values})

    @cached_property
    def models(self) -> list[str]:
        """Names of the dense models behind the files, each once."""
        return list(dict.fromkeys(model_of(source.document) for source in self.sources if source.document.get("model")))


def gather(files: Sequence[Path]) -> Gathered:
    """Read `files`. Raises InputError (missing, damaged, altered) or MismatchError (not a schema of trim)."""
    paths = list(dict.fromkeys(files))
    documents = [_document(path) for path in paths]
    pairs = [
        (path, document)
        for path, document in zip(paths, documents, strict=True)
        # The row vectors beside a statistics file are read with it.
        if not (document["schema"] == ROWS and path.suffix == ".safetensors" and path.with_suffix(".json") in paths)
    ]
    names = distinct([_name(path, document) for path, document in pairs], [path for path, _ in pairs])
    return Gathered(tuple(Source(path, document, name) for (path, document), name in zip(pairs, names, strict=True)))


def place_of(name: str) -> Place:
    """The layer and kind that a linear's full module name tells; experts share their kind."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return Place(0, name)
    first = numbers[0]
    kind = ".".join(part for part in parts[first + 1 :] if not part.isdigit())
    return Place(int(parts[first]), kind)


def kinds_of(names: Iterable[str]) -> dict[str, str]:
    """Kind -> a short name, in order of appearance: `q_proj`, but `attn.c_proj` beside `mlp.c_proj`."""
    kinds = list(dict.fromkeys(place_of(name).kind for name in names))
    last = [kind.rpartition(".")[2] for kind in kinds]
    return {kind: end if last.count(end) == 1 else kind for kind, end in zip(kinds, last, strict=True)}


def structure_of(source: Source) -> str:
    """The model's structure fingerprint, empty where the file has none."""
    return str((source.document.get("model") or {}).get("structure") or "")


def sparsity_by_linear(source: Source) -> dict[str, float]:
    """Linear -> fraction zero, or the target of a layer ratios file; empty for files that know none."""
    document = source.document
    if source.schema == LAYER_SPARSITY:
        return dict(document["sparsity"])
    if source.schema == RESULTS:
        return dict((document.get("sparsity") or {}).get("linears") or {})
    if source.schema in (MASKS, *DIRECTORIES):
        return {
            name: entry["zeros"] / max(entry["shape"][0] * entry["shape"][1], 1)
            for name, entry in document["linears"].items()
        }
    return {}


def by_layer(values: Mapping[str, float], weights: Mapping[str, int]) -> dict[int, float]:
    """Layer -> mean of its linears' `values`, weighted by `weights` (1 where a linear has none)."""
    total: dict[int, float] = {}
    share: dict[int, float] = {}
    for name, value in values.items():
        layer, weight = place_of(name).layer, weights.get(name, 1)
        total[layer] = total.get(layer, 0.0) + value * weight
        share[layer] = share.get(layer, 0.0) + weight
    return {layer: total[layer] / share[layer] for layer in sorted(total)}


def by_place(values: Mapping[str, float]) -> dict[Place, float]:
    """Place -> mean of the `values` of the linears there (several where there are experts)."""
    found: dict[Place, list[float]] = {}
    for name, value in values.items():
        found.setdefault(place_of(name), []).append(value)
    return {place: float(np.mean(members)) for place, members in found.items()}


def _document(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        if not (path / MARK).is_file():
            raise InputError(f"{path} has no {MARK}, so trim did not write it; give a pruned directory.")
        document: Mapping[str, Any] = read_json(path / MARK)
    elif path.suffix == ".safetensors":
        document = _safetensors_manifest(path)
    else:
        document = read_json(path)
    schema = document.get("schema")
    if schema not in KNOWN:
        raise MismatchError(f"{path} is of schema {schema!r}; a report is made of {', '.join(KNOWN)}.")
    if schema in (MASKS, *DIRECTORIES) and not is_intact(document):
        raise InputError(f"the manifest of {path} was changed after trim wrote it; make the file anew.")
    missing = NEEDED.get(str(schema), set()) - document.keys()
    if schema == ROWS and not missing:
        missing = {field for entry in document["linears"].values() for field in NEEDED_OF_ROWS - entry.keys()}
    if missing:
        raise InputError(f"{path} lacks {', '.join(sorted(missing))}, so it is not whole; make it anew.")
    return document


def _safetensors_manifest(path: Path) -> Mapping[str, Any]:
    with _open(path) as handle:
        text = (handle.metadata() or {}).get("manifest")
    if text is None:
        raise MismatchError(f"{path} carries no trim manifest; give a file that trim made.")
    found: Mapping[str, Any] = json.loads(text)
    return found


def _open(path: Path) -> Any:
    """A safetensors file opened for numpy: a report needs no torch."""
    try:
        return safe_open(path, "np")
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; check the path.") from None
    except (SafetensorError, OSError) as problem:
        raise InputError(f"{path} is not a whole safetensors file ({problem}); make it anew.") from None


def _name(path: Path, document: Mapping[str, Any]) -> str:
    if document["schema"] == RESULTS and document.get("label"):
        return str(document["label"])
    return path.resolve().name if path.is_dir() else path.stem


def _rows_of_masks(path: Path, linears: Mapping[str, Any]) -> Iterable[tuple[str, Array]]:
    with _open(path) as handle:
        for name, entry in linears.items():
            width = entry["shape"][1]
            kept = POPCOUNT[handle.get_tensor(f"{name}.keep")].sum(axis=1, dtype=np.int64)
            yield name, _quantiles(1 - kept / width)


def _rows_of_stats(path: Path, linears: Mapping[str, Any]) -> Iterable[tuple[str, Array]]:
    if not path.is_file():
        return
    with _open(path) as handle:
        there = set(handle.keys())
        for name in linears:
            if f"{name}.row_sparsity" in there:
                yield name, _quantiles(handle.get_tensor(f"{name}.row_sparsity"))


def _quantiles(values: Array) -> Array:
    return np.quantile(values, np.linspace(0, 1, QUANTILES))
