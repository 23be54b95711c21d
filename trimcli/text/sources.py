"""Where text comes from: c4, wikitext2, ptb, local files, hub data sets.

A data set is one of these three names, FILE.txt, one text; FILE.jsonl[.gz] or FILE.json[.gz], an object with a `text` a
line, as in C4; FILE.parquet, a row a document, in a column `text` (or `sentence`); or hf:NAME[:CONFIG[:SPLIT]], with
such a column, SPLIT `train` to calibrate and `test` to measure unless given. Local files are read directly.
"""

import contextlib
import difflib
import errno
import gzip
import json
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from trimcli.console import quiet_libraries
from trimcli.errors import HubError, InputError, OptionError, first_line

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
TEXT_FIELDS = ("text", "sentence")


class Documents(Protocol):
    """Texts that need not all be in memory."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int, /) -> str:
        """One of them."""


@dataclass(frozen=True)
class _HubSource:
    """On the hub: one file a split where not all are wanted, and which split's (`first`) documents are measured."""

    name: str
    config: str | None = None
    revision: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    measured: str = "test"
    first: int | None = None
    joint: str = " "
    local_form: str = ""


STANDARD = {
    "c4": _HubSource(
        "allenai/c4",
        files={"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
        measured="validation",
        first=1100,
        local_form="a c4-train.*.json.gz (c4-validation.*.json.gz to measure), ",
    ),
    "wikitext2": _HubSource(
        "Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        joint="\n\n",
        local_form="its raw lines in a .txt (joined by spaces to calibrate, by two newlines to measure), ",
    ),
    "ptb": _HubSource(
        "ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        files={"train": "penn_treebank/train/0000.parquet", "test": "penn_treebank/test/0000.parquet"},
        local_form="its sentences in a .txt (joined by spaces), ",
    ),
}


@contextlib.contextmanager
def calibration_source(dataset: str) -> Iterator[str | Documents]:
    """One text, or documents, while this lasts. Raises OptionError (unknown name), InputError (bad file), HubError."""
    if dataset in STANDARD or dataset.startswith("hf:"):
        source, split = _hub_source(dataset)
        documents = _from_hub(source, split or "train")
        yield " ".join(documents) if dataset in ("wikitext2", "ptb") else documents
    elif (path := _local_file(dataset)).suffix == ".txt":
        yield _read_text(path)
    else:
        with tempfile.TemporaryFile() as spool:
            yield _Spooled(_read_documents(path), spool)


def evaluation_text(dataset: str) -> str:
    """The one text to measure on. Raises what `calibration_source` raises."""
    if dataset in STANDARD or dataset.startswith("hf:"):
        source, split = _hub_source(dataset)
        return source.joint.join(_from_hub(source, split or source.measured)[: source.first])
    path = _local_file(dataset)
    return _read_text(path) if path.suffix == ".txt" else " ".join(_read_documents(path))


def _local_file(dataset: str) -> Path:
    path = Path(dataset).expanduser()
    if not dataset.endswith(SUFFIXES):
        near = difflib.get_close_matches(dataset, STANDARD, n=1)
        hint = f"did you mean {near[0]}?" if near else "give one of these."
        known = f"{', '.join(STANDARD)}, hf:NAME, or a file ending in {', '.join(SUFFIXES)}"
        raise OptionError(f"{dataset!r} is no data set that trim knows ({known}); {hint}")
    if not path.is_file():
        raise InputError(f"there is no file {path}; check the path.")
    return path


def _read_text(path: Path) -> str:
    try:
        # Line ends are translated: a copy with CRLF must give the perplexity of the original.
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"{path} cannot be read as UTF-8 text ({problem}); convert it.") from None


def _read_documents(path: Path) -> Iterator[str]:
    """The documents of a JSON-lines or parquet file, in order. Raises InputError naming the place."""
    document = None
    for document in _read_parquet(path) if path.suffix == ".parquet" else _read_json_lines(path):
        yield document
    if document is None:
        raise InputError(f"{path} holds no document; give one JSON object or row with a `text` for each.")


def _read_json_lines(path: Path) -> Iterator[str]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    wanted = "one JSON object with a `text` a line is needed, as in C4's files."
    try:
        with opener(path, "rt", encoding="utf-8-sig") as handle:
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    record = json.loads(line)
                    fields = record if isinstance(record, dict) else {}
                    text = next((fields[name] for name in TEXT_FIELDS if name in fields), None)
                    if not isinstance(text, str):
                        raise InputError(f"line {number} of {path} is no JSON object with a `text`; {wanted}")
                    yield text
    except json.JSONDecodeError as problem:
        raise InputError(f"line {number} of {path} is not JSON ({problem}); {wanted}") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as problem:
        raise InputError(f"{path} is damaged ({problem}); fetch or make it anew.") from None


def _read_parquet(path: Path) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            column = _text_column(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(columns=[column]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        raise InputError(f"the column `{column}` of {path} holds {text!r} where text is needed.")
                    yield text
    except (pa.ArrowException, OSError) as problem:
        raise InputError(f"{path} is no whole parquet file ({first_line(problem)}); fetch it anew.") from None


def _text_column(names: list[str], where: str) -> str:
    if found := [name for name in TEXT_FIELDS if name in names]:
        return found[0]
    raise InputError(f"{where} has no column `text`, only {', '.join(names) or 'none'}; give text to read.")


class _Spooled:
    """Documents in a temporary file: random access without a C4 shard in memory."""

    def __init__(self, documents: Iterable[str], file: IO[bytes]) -> None:
        self._file, self._ends = file, [0]
        for document in documents:
            self._file.write(document.encode("utf-8", "surrogatepass"))
            self._ends.append(self._file.tell())

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        start, end = self._ends[index : index + 2]
        self._file.seek(start)
        return self._file.read(end - start).decode("utf-8", "surrogatepass")


def _hub_source(dataset: str) -> tuple[_HubSource, str]:
    """A standard text, or hf:NAME[:CONFIG[:SPLIT]] and its split, which may hold colons, as in train[:1%]."""
    if dataset in STANDARD:
        return STANDARD[dataset], ""
    name, config, split = [*dataset.removeprefix("hf:").split(":", 2), "", ""][:3]
    if not name:
        raise OptionError(f"{dataset!r} names no data set; the form is hf:NAME[:CONFIG[:SPLIT]].")
    return _HubSource(name, config or None), split


def _from_hub(source: _HubSource, split: str) -> Any:
    """The documents of one split as a column of a data set, memory-mapped, from the hub or its local cache."""
    import datasets
    from huggingface_hub.errors import LocalEntryNotFoundError

    unusable = (datasets.exceptions.DatasetsError, ValueError, RuntimeError)
    files = {split: source.files[split]} if source.files else None
    # One file of a data set has fewer rows than its card announces.
    how = {"data_files": files, "revision": source.revision, "split": split, "verification_mode": "no_checks"}
    try:
        with quiet_libraries():
            found = datasets.load_dataset(source.name, source.config, **how)
    except Exception as problem:
        # Whichever HTTP library carries the request, its errors come through as they are.
        for cause in (problem, problem.__cause__):
            if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
                raise cause from None
        if isinstance(problem, unusable) and not isinstance(problem, LocalEntryNotFoundError):
            what = f"the data set {source.name} has no usable split {split!r} ({first_line(problem)})"
            raise InputError(f"{what}; check the name, or give a local file.") from None
        what = f"the data set {source.name} could not be fetched ({first_line(problem)})"
        form = f"a local file: {source.local_form}any .txt, .jsonl(.gz) or .parquet"
        raise HubError(f"{what}; give {form}; or, to calibrate, samples with --tokens.") from None
    return found[_text_column(found.column_names, f"the data set {source.name}")]
