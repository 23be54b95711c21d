"""What a report is made of: files recognised by schema, and the few numbers taken from them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trimcli.errors import InputError, MismatchError
from trimcli.files.atomic import MARK
from trimcli.files.documents import read_json, refuse_later
from trimcli.files.manifest import LAYER_SPARSITY, MASKS, PACKED, PRUNED, RESULTS, ROWS, SEAL, is_intact
from trimcli.files.names import grouped, layer_of
from trimcli.report.compare import Table, distinct, table_of
from trimcli.report.forms import KINDS, check_document

# The schemas whose `linears` give shapes and counts of zeros.
PRUNINGS = (MASKS, PRUNED, PACKED)
NEEDED_OF_ROWS = {"quality_uniform", "quality_best", "step"}
# A matrix has thousands of rows; its sparsities are drawn at so many quantiles.
QUANTILES = 64


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

    @property
    def structure(self) -> str:
        """The model's structure fingerprint, empty where the file has none."""
        return str((self.document.get("model") or {}).get("structure") or "")

    @property
    def total(self) -> float | None:
        """Fraction zero of everything, or the target of a layer ratios file, where the file says."""
        found = self.document.get("target" if self.schema == LAYER_SPARSITY else "sparsity")
        return found if isinstance(found, int | float) else None

    def sparsities(self) -> dict[str, float]:
        """Linear -> fraction zero, or the target of a layer ratios file; empty for files that know none."""
        if self.schema == LAYER_SPARSITY:
            return dict(self.document["sparsity"])
        if self.schema == RESULTS:
            return dict((self.document.get("sparsity") or {}).get("linears") or {})
        if self.schema not in PRUNINGS:
            return {}
        linears = self.document["linears"].items()
        return {name: entry["zeros"] / max(math.prod(entry["shape"]), 1) for name, entry in linears}

    def row_sparsities(self) -> dict[str, np.ndarray[Any, Any]]:
        """Linear -> quantiles of its rows' sparsities, float [QUANTILES], ascending; empty without rows."""
        from trimcli.files.masks import MaskFile
        from trimcli.files.tensors import open_tensors

        rows: dict[str, np.ndarray[Any, Any]] = {}
        vectors = self.path.with_suffix(".safetensors")
        if self.schema == MASKS:
            masks = MaskFile.open(self.path)
            rows = {name: 1 - masks.keep(name).numpy().mean(axis=1) for name in masks.names}
        elif self.schema == ROWS and vectors.is_file():
            with open_tensors(vectors) as handle:
                stored = {name: f"{name}.row_sparsity" for name in self.document["linears"]}
                there = set(handle.keys())
                rows = {name: handle.get_tensor(key).numpy() for name, key in stored.items() if key in there}
        return {name: np.quantile(values, np.linspace(0, 1, QUANTILES)) for name, values in rows.items()}

    def qualities(self) -> dict[str, tuple[float, float]]:
        """Linear -> its quality with even rows and with TRIM's, where the file tells both."""
        entries = self.document["linears"] if self.schema == ROWS else {}
        pairs = {name: (entry["quality_uniform"], entry["quality_best"]) for name, entry in entries.items()}
        return {name: pair for name, pair in pairs.items() if None not in pair}


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
    def _weights(self) -> dict[tuple[str, str], int]:
        """(model structure, linear) -> number of weights, as far as a given file tells."""
        return {
            (source.structure, name): math.prod(entry["shape"])
            for source in self.of(*PRUNINGS)
            for name, entry in source.document["linears"].items()
        }

    def layers(self, source: Source) -> dict[str, float]:
        """Layer -> sparsity or target; linears count by their size, alike where no given file tells it."""
        values, found = source.sparsities(), {}
        for layer, names in grouped(values, layer_of).items():
            weights = [self._weights.get((source.structure, name), 1) for name in names]
            found[layer] = float(np.average([values[name] for name in names], weights=weights))
        return found


def gather(files: Sequence[Path]) -> Gathered:
    """Read `files`. Raises InputError (missing, damaged, altered) or MismatchError (not a schema of trim)."""
    documents = {path: _document(path) for path in dict.fromkeys(files)}
    for path in [path for path, document in documents.items() if document["schema"] == ROWS]:
        if path.suffix == ".json":  # the row vectors beside it are read with it
            documents.pop(path.with_suffix(".safetensors"), None)
    names = [path.resolve().name if path.is_dir() else path.stem for path in documents]
    labels = [str(found.get("label") or name) for found, name in zip(documents.values(), names, strict=True)]
    names = distinct(labels, list(documents))
    return Gathered(tuple(Source(*pair, name) for pair, name in zip(documents.items(), names, strict=True)))


def _document(path: Path) -> Mapping[str, Any]:
    if path.is_dir() and not (path / MARK).is_file():
        raise InputError(f"{path} has no {MARK}, so trim did not write it; give a pruned directory.")
    if path.suffix == ".safetensors" and not path.is_dir():
        from trimcli.files.tensors import read_manifest

        document = read_manifest(path)
    else:
        document = read_json(path / MARK if path.is_dir() else path)
    schema = document.get("schema")
    refuse_later(document, KINDS, path)
    if not isinstance(schema, str) or schema not in KINDS:
        raise MismatchError(f"{path} is of schema {schema!r}; a report is made of {', '.join(KINDS)}.")
    if (schema in PRUNINGS or SEAL in document) and not is_intact(document):
        raise InputError(f"the manifest of {path} was changed after trim wrote it; make the file anew.")
    check_document(document, schema, path)
    rows = document["linears"].values() if schema == ROWS else ()
    if missing := {field for entry in rows for field in NEEDED_OF_ROWS - entry.keys()}:
        raise InputError(f"{path} lacks {', '.join(sorted(missing))}, so it is not whole; make it anew.")
    return document
