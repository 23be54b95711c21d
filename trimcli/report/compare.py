"""One table over several runs, dense first. No number stands in a column with one measured another way."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from trimcli.errors import InputError
from trimcli.files.documents import read_json
from trimcli.files.manifest import RESULTS
from trimcli.methods.layers.base import ALLOCATIONS
from trimcli.methods.named import methods
from trimcli.methods.rows.base import ROWS
from trimcli.registry import title_of
from trimcli.report.forms import check_document

MISSING = "\u2013"


@dataclass(frozen=True)
class Column:
    """What was measured, of which group (data set or task), and in words how. main: shown where room is short."""

    kind: Literal["perplexity", "accuracy", "task", "mean"]
    group: str
    metric: str
    setting: str
    main: bool = True


@dataclass(frozen=True)
class Measure:
    """A measured value with its standard error where there is one; `value` None: it was not finite."""

    value: float | None
    stderr: float | None = None


@dataclass(frozen=True)
class Row:
    """One run. sparsity: fraction zero over the linears, None where the file does not say."""

    label: str
    model: str
    method: str
    sparsity: float | None
    file: Path
    measures: dict[Column, Measure]


@dataclass(frozen=True)
class Table:
    """Runs by sparsity, dense first. notes: what a reader must know before comparing columns."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @cached_property
    def titles(self) -> dict[Column, str]:
        """A heading a column: data set or task, the metric if it is not the usual one, a number if needed."""
        usual = {"perplexity": "perplexity", "accuracy": "", "task": "acc", "mean": "acc"}
        titles = [f"{one.group} {one.metric}".removesuffix(f" {usual[one.kind]}") for one in self.columns]
        names = dict(zip(self.columns, titles, strict=True))
        often, seen = Counter(names.values()), Counter[str]()
        for column, name in names.items():
            seen[name] += 1
            names[column] = f"{name} [{seen[name]}]" if often[name] > 1 else name
        return names

    def measured(self, column: Column) -> list[tuple[Row, float]]:
        """The rows that have a finite value in this column, with it."""
        measures = [(row, row.measures.get(column)) for row in self.rows]
        return [(row, measure.value) for row, measure in measures if measure and measure.value is not None]

    def dense(self, column: Column) -> float | None:
        """The first dense row's value in this column, where there is one."""
        return next((value for row, value in self.measured(column) if row.method == "dense"), None)

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        rows = []
        for row in self.rows:
            there = [column for column in self.columns if column in row.measures]
            heads = [{"of": column.group, "metric": column.metric, "setting": column.setting} for column in there]
            measures = [{**head, **vars(row.measures[column])} for head, column in zip(heads, there, strict=True)]
            rows.append({**vars(row), "file": str(row.file), "measures": measures})
        return {"rows": rows, "notes": list(self.notes)}


def compare(files: Sequence[Path]) -> Table:
    """The table of results files. Raises InputError or MismatchError for a file that is none."""
    found = [(path, read_json(path, RESULTS)) for path in dict.fromkeys(files)]
    for path, document in found:
        check_document(document, RESULTS, path)
    return table_of(found)


def table_of(results: Sequence[tuple[Path, Mapping[str, Any]]]) -> Table:
    """The table of results documents, each with its file. Raises InputError for one that is not whole."""
    rows = []
    for path, document in results:
        try:
            label, sparsity = str(document.get("label") or path.stem), (document.get("sparsity") or {}).get("total")
            dense = "dense" if sparsity is not None and sparsity < 0.01 else ""
            method = method_of(document.get("pruning")) or dense
            rows.append(Row(label, model_of(document), method, sparsity, path, _measures(document)))
        except (KeyError, TypeError, AttributeError, ValueError) as problem:
            reason = f"{type(problem).__name__}: {problem}"
            raise InputError(f"{path} is not a whole results file ({reason}); measure anew.") from None
    labels = distinct([row.label for row in rows], [row.file for row in rows])
    rows = [replace(row, label=label) for row, label in zip(rows, labels, strict=True)]
    rows.sort(key=lambda row: (row.sparsity is None, round(row.sparsity or 0, 4), row.label))
    # Perplexities, accuracies, the tasks' main metrics, their mean, and then what else was measured.
    kinds = ("perplexity", "accuracy", "task", "mean")
    found = dict.fromkeys(column for row in rows for column in row.measures)
    columns = sorted(found, key=lambda column: kinds.index(column.kind) if column.main else len(kinds))
    return Table(tuple(columns), tuple(rows), tuple(_notes(columns, [document for _, document in results])))


def distinct(labels: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """`labels`, each that is not the only one of its kind with its file's name, or path, behind it."""
    for name in (lambda path: path.stem, str):
        often = Counter(labels)
        pairs = zip(labels, paths, strict=True)
        labels = [f"{label} ({name(path)})" if often[label] > 1 else label for label, path in pairs]
    return list(labels)


# How a pruned model was trained, in a few words.
TRAINED = {"lora": "LoRA", "full": "fine-tuning", "admm": "ADMM training"}


def method_of(pruning: Mapping[str, Any] | None) -> str:
    """A pruning in a few words, such as "Wanda + OWL + TRIM", from the manifest of its masks or directory."""
    trained = str(((pruning or {}).get("training") or {}).get("mode") or "")
    while pruning and pruning.get("pruning"):
        pruning = pruning["pruning"]
    pruned = _recipe_of(pruning)
    return " + ".join(part for part in (pruned, TRAINED.get(trained, trained)) if part)


def _recipe_of(pruning: Mapping[str, Any] | None) -> str:
    """The recipe of a prune in a few words, empty where there is none."""
    options = (pruning or {}).get("options") or {}
    recipe = options.get("recipe") or {}
    if not pruning or "method" not in recipe:
        return ""
    # Early manifests give TRIM's options as rows, the variant apart, and an update's options where there is no update.
    rows = "trim" if isinstance(recipe.get("rows"), Mapping) else str(recipe.get("rows") or "even")
    rows = "variant" if recipe.get("variant") else rows
    update = recipe.get("update")
    name = title_of(methods(), str(recipe["method"]))
    if rows == "variant":
        name += " variant"
    if options.get("sparsity_type", "unstructured") != "unstructured":
        name += f" {options['sparsity_type']}"
    allocation = (pruning.get("allocation") or {}).get("method") or ""
    shared = "" if rows in ("even", "variant") else ROWS[rows].title if rows in ROWS else f"{rows} rows"
    parts = [name, title_of(ALLOCATIONS, allocation), shared]
    known = methods().get(str(recipe["method"]))
    if isinstance(update, str) and update not in ("none", known.update if known else None):
        parts.append(f"{update} update")
    if recipe.get("compare"):
        parts[0] += f" by {recipe['compare']}"
    if recipe.get("refine"):
        parts.append({"learned": "learned masks"}.get(recipe["refine"]["by"], recipe["refine"]["by"]))
    if recipe.get("reconstruct"):
        parts.append("reconstruction")
    if recipe.get("barber"):
        parts.append("Barber")
    return " + ".join(part for part in parts if part)


def model_of(document: Mapping[str, Any]) -> str:
    """The name of the dense model behind a manifest: what was pruned, where it was, not the directory written."""
    name = MISSING
    behind: Mapping[str, Any] | None = document
    while behind:
        name = str((behind.get("model") or {}).get("id") or name)
        behind = behind.get("pruning")
    return Path(name).name


def _measures(document: Mapping[str, Any]) -> dict[Column, Measure]:
    found = {}
    for entry in document.get("perplexity") or []:
        windows = f"{entry['windows']:,} \u00d7 {entry['seqlen']:,}"
        # Files of earlier versions do not say: theirs are of the published protocol, `once`.
        bos = {"each": ", BOS in each", "none": ", no BOS"}.get(entry.get("bos"), "")
        setting = f"{windows} of {entry['tokens']:,} tokens, {entry['dtype']}{bos}"
        column = Column("perplexity", Path(entry["dataset"]).name, "perplexity", setting)
        found[column] = Measure(entry["value"])
    for entry in document.get("images") or []:
        setting = f"{entry['images']:,} pictures, {entry['dtype']}"
        for name, metric in (("top1", "top-1"), ("top5", "top-5")):
            found[Column("accuracy", Path(entry["dataset"]).name, metric, setting)] = Measure(entry[name])
    for name, entry in (document.get("tasks") or {}).items():
        metrics = sorted((key for key in entry if f"{key}_stderr" in entry), key=lambda key: key != "acc")
        shots = "shots differ" if entry["n_shot"] is None else f"{entry['n_shot']}-shot"
        part = f"{entry['samples']:,} of " if entry["samples"] != entry["documents"] else ""
        setting = f"{shots}, {part}{entry['documents']:,} docs, v{entry['version']}"
        for metric in metrics:
            main = metric == "acc" or "acc" not in metrics
            found[Column("task", name, metric, setting, main)] = Measure(entry[metric], entry[f"{metric}_stderr"])
    if (mean := document.get("mean_acc_seven")) is not None:
        limited = any(entry["limit"] is not None for entry in document["tasks"].values())
        found[Column("mean", "mean", "acc", "seven tasks, limited" if limited else "seven tasks")] = Measure(mean)
    return found


def _notes(columns: Sequence[Column], documents: Sequence[Mapping[str, Any]]) -> list[str]:
    ways = Counter((column.kind, column.group, column.metric) for column in columns)
    groups = dict.fromkeys(group for (_, group, _), number in ways.items() if number > 1)
    notes = [f"{group} was measured in more than one way: compare within a column only." for group in groups]
    if len({(document.get("model") or {}).get("structure") for document in documents}) > 1:
        notes.append("The runs are of different models.")
    tasks = [entry for document in documents for entry in (document.get("tasks") or {}).items()]
    if parts := sorted({name for name, entry in tasks if entry["samples"] != entry["documents"]}):
        notes.append(f"Measured on a part of their documents: {', '.join(parts)}.")
    return notes
