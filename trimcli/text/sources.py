"""Where text comes from: c4, wikitext2, ptb, local files, hub data sets, standard input.

A data set is one of these three names, FILE.txt, one text; FILE.jsonl[.gz] or FILE.json[.gz], an object with a `text` a
line, as in C4; FILE.parquet, a row a document, in a column `text` (or `sentence`); hf:NAME[:CONFIG[:SPLIT]], with
such a column, SPLIT `train` to calibrate and `test` to measure unless given; or `-`, a text or JSON lines. Local files
are read directly. In the place of a text there may be `messages`, which a Render makes one of.
"""

import codecs
import contextlib
import difflib
import errno
import gzip
import itertools
import json
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from trimcli.console import quiet_libraries
from trimcli.errors import HubError, InputError, OptionError, first_line
from trimcli.text.stdin import STDIN, STDIN_NAME, file_of

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
TEXT_FIELDS = ("text", "sentence")
MESSAGES = "messages"
Render = Callable[[Any, str], str]
"""A conversation and what errors call it -> its text."""


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


@dataclass(frozen=True)
class _File:
    """A local file, what messages call it, and how it is read."""

    path: Path
    name: str
    form: Literal["text", "lines", "parquet"]


@contextlib.contextmanager
def calibration_source(dataset: str, render: Render | None = None) -> Iterator[str | Documents]:
    """One text, or documents, while this lasts. render: documents are conversations.

    Raises OptionError (unknown name), InputError (bad file; `messages` without render, or none with it), HubError.
    """
    if _on_hub(dataset):
        _refuse_standard(dataset, render)
        source, split = _hub_source(dataset)
        documents = _from_hub(source, split or "train", render)
        yield " ".join(documents) if dataset in ("wikitext2", "ptb") else documents
    elif (file := _local_file(dataset)).form == "text":
        yield _read_text(file, render)
    else:
        with tempfile.TemporaryFile() as spool:
            yield _Spooled(_read_documents(file, render), spool)


def evaluation_text(dataset: str, render: Render | None = None) -> str:
    """The one text to measure on: documents are joined by spaces, conversations follow each other as they are.

    Raises what `calibration_source` raises.
    """
    if _on_hub(dataset):
        _refuse_standard(dataset, render)
        source, split = _hub_source(dataset)
        documents = _from_hub(source, split or source.measured, render)
        return "".join(documents) if render else source.joint.join(documents[: source.first])
    file = _local_file(dataset)
    if file.form == "text":
        return _read_text(file, render)
    return ("" if render else " ").join(_read_documents(file, render))


def name_of(dataset: str) -> str:
    """What messages call a data set."""
    return STDIN_NAME if dataset == STDIN else dataset


def _on_hub(dataset: str) -> bool:
    return dataset in STANDARD or dataset.startswith("hf:")


def _refuse_standard(dataset: str, render: Render | None) -> None:
    if render and dataset in STANDARD:
        raise OptionError(f"--chat renders `messages`, and {dataset} has none; leave --chat out.")


def _local_file(dataset: str) -> _File:
    if dataset == STDIN:
        path = file_of(dataset)
        return _File(path, STDIN_NAME, "lines" if _begins_with_object(path) else "text")
    path = Path(dataset).expanduser()
    if not dataset.endswith(SUFFIXES):
        near = difflib.get_close_matches(dataset, STANDARD, n=1)
        hint = f"did you mean {near[0]}?" if near else "give one of these."
        known = f"{', '.join(STANDARD)}, hf:NAME, -, or a file ending in {', '.join(SUFFIXES)}"
        raise OptionError(f"{dataset!r} is no data set that trim knows ({known}); {hint}")
    if not path.is_file():
        raise InputError(f"there is no file {path}; check the path.")
    form: Literal["text", "lines", "parquet"] = "lines"
    if path.suffix in (".txt", ".parquet"):
        form = "text" if path.suffix == ".txt" else "parquet"
    return _File(path, str(path), form)


def _begins_with_object(path: Path) -> bool:
    with path.open("rb") as handle:
        first = next((found for line in handle if (found := line.removeprefix(codecs.BOM_UTF8).strip())), b"")
    return first.startswith(b"{")


def _read_text(file: _File, render: Render | None) -> str:
    if render:
        raise InputError(f"--chat renders `messages`, and {file.name} is plain text; leave --chat out.")
    try:
        # Line ends are translated: a copy with CRLF must give the perplexity of the original.
        return file.path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"{file.name} cannot be read as UTF-8 text ({problem}); convert it.") from None


def _read_documents(file: _File, render: Render | None) -> Iterator[str]:
    """The documents of a JSON-lines or parquet file, in order. Raises InputError naming the place."""
    document = None
    for document in (_read_parquet if file.form == "parquet" else _read_json_lines)(file, render):
        yield document
    if document is None:
        raise InputError(f"{file.name} holds no document; give one JSON object or row with a `text` for each.")


def _read_json_lines(file: _File, render: Render | None) -> Iterator[str]:
    opener: Any = gzip.open if file.path.suffix == ".gz" else open
    wanted = "one JSON object with a `text` a line is needed, as in C4's files."
    try:
        with opener(file.path, "rt", encoding="utf-8-sig") as handle:
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    where, record = f"line {number} of {file.name}", json.loads(line)
                    fields = record if isinstance(record, dict) else {}
                    column = _column(fields, where, render)
                    if render:
                        yield render(fields[column], where)
                    elif isinstance(text := fields.get(column), str):
                        yield text
                    else:
                        raise InputError(f"{where} is no JSON object with a `text`; {wanted}")
    except json.JSONDecodeError as problem:
        raise InputError(f"line {number} of {file.name} is not JSON ({problem}); {wanted}") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as problem:
        raise InputError(f"{file.name} is damaged ({problem}); fetch or make it anew.") from None


def _read_parquet(file: _File, render: Render | None) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file.path) as table:
            column = _column_of_table(table.schema_arrow.names, file.name, render)
            batches = (batch.column(0).to_pylist() for batch in table.iter_batches(columns=[column]))
            for row, value in enumerate(itertools.chain.from_iterable(batches), start=1):
                if render:
                    yield render(value, f"row {row} of {file.name}")
                elif isinstance(value, str):
                    yield value
                else:
                    raise InputError(f"the column `{column}` of {file.name} holds {value!r} where text is needed.")
    except (pa.ArrowException, OSError) as problem:
        raise InputError(f"{file.name} is no whole parquet file ({first_line(problem)}); fetch it anew.") from None


def _column(names: Iterable[str], where: str, render: Render | None) -> str:
    """Where a record's document stands, "" if nowhere. Raises InputError where --chat would, or would not, find it."""
    found = [name for name in ((MESSAGES,) if render else TEXT_FIELDS) if name in names]
    if not found and render:
        raise InputError(f"{where} has no `messages` that --chat could render; leave --chat out.")
    if not found and MESSAGES in names:
        raise InputError(f"{where} has `messages` and no `text`; give --chat to render them by the chat template.")
    return found[0] if found else ""


def _column_of_table(names: list[str], where: str, render: Render | None) -> str:
    if found := _column(names, where, render):
        return found
    raise InputError(f"{where} has no column `text`, only {', '.join(names) or 'none'}; give text to read.")


class _Rendered:
    """Conversations of a column, rendered when they are asked for."""

    def __init__(self, column: Any, render: Render, where: str) -> None:
        self._column, self._render, self._where = column, render, where

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: int) -> str:
        return self._render(self._column[index], f"row {index + 1} of {self._where}")


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


def _from_hub(source: _HubSource, split: str, render: Render | None) -> Any:
    """The documents of one split, a column of a data set, memory-mapped, from the hub or its local cache."""
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
    where = f"the data set {source.name}"
    column = found[_column_of_table(found.column_names, where, render)]
    return _Rendered(column, render, where) if render else column
