"""One table over several runs, dense first. No number stands in a column with one measured another way."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table as RichTable
from rich.text import Text

from trimcli.errors import InputError
from trimcli.files.documents import read_json
from trimcli.files.manifest import RESULTS

METHODS = {"wanda": "Wanda", "magnitude": "Magnitude", "sparsegpt": "SparseGPT"}
ALLOCATIONS = {"owl": "OWL", "alpha": "AlphaPruning", "uniform": "uniform layers"}
MISSING = "\u2013"


@dataclass(frozen=True)
class Column:
    """What was measured, and everything that makes it comparable.

    group: data set or task. metric: `perplexity`, `acc`, ... setting: how it was measured, in words. main:
    shown where room is short (a task's `acc`, or all its metrics where it has none).
    """

    kind: Literal["perplexity", "task", "mean"]
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

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {"rows": [self._row(row) for row in self.rows], "notes": list(self.notes)}

    def _row(self, row: Row) -> dict[str, Any]:
        measured = [(column, row.measures[column]) for column in self.columns if column in row.measures]
        return {
            "label": row.label,
            "model": row.model,
            "method": row.method,
            "sparsity": row.sparsity,
            "file": str(row.file),
            "measures": [
                {
                    "of": column.group,
                    "metric": column.metric,
                    "setting": column.setting,
                    "value": measure.value,
                    "stderr": measure.stderr,
                }
                for column, measure in measured
            ],
        }


def compare(files: Sequence[Path]) -> Table:
    """The table of results files. Raises InputError or MismatchError for a file that is none."""
    return table_of([(path, read_json(path, RESULTS)) for path in dict.fromkeys(files)])


def table_of(results: Sequence[tuple[Path, Mapping[str, Any]]]) -> Table:
    """The table of results documents, each with its file. Raises InputError for one that is not whole."""
    rows = []
    for path, document in results:
        try:
            rows.append(_row(path, document))
        except (KeyError, TypeError, AttributeError, ValueError) as problem:
            reason = f"{type(problem).__name__}: {problem}"
            raise InputError(f"{path} is not a whole results file ({reason}); measure anew.") from None
    labels = distinct([row.label for row in rows], [row.file for row in rows])
    rows = [Row(**{**vars(row), "label": label}) for row, label in zip(rows, labels, strict=True)]
    rows.sort(key=lambda row: (row.sparsity is None, round(row.sparsity or 0, 4), row.label))
    columns = sorted(dict.fromkeys(column for row in rows for column in row.measures), key=_rank)
    structures = {(document.get("model") or {}).get("structure") for _, document in results}
    return Table(tuple(columns), tuple(rows), tuple(_notes(columns, results, len(structures))))


def distinct(labels: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """`labels`, each that is not the only one of its kind with its file's name, or path, behind it."""
    for name in (lambda path: path.stem, str):
        often = Counter(labels)
        labels = [
            f"{label} ({name(path)})" if often[label] > 1 else label for label, path in zip(labels, paths, strict=True)
        ]
        if len(set(labels)) == len(labels):
            break
    return list(labels)


def method_of(pruning: Mapping[str, Any] | None) -> str:
    """A pruning in a few words, such as "Wanda + OWL + TRIM", from the manifest of its masks or directory."""
    while pruning and pruning.get("pruning"):
        pruning = pruning["pruning"]
    options = (pruning or {}).get("options") or {}
    recipe = options.get("recipe") or {}
    if not pruning or "method" not in recipe:
        return ""
    name = METHODS.get(recipe["method"], str(recipe["method"]))
    parts = [f"{name} variant" if recipe.get("variant") else name]
    if options.get("sparsity_type", "unstructured") != "unstructured":
        parts[0] += f" {options['sparsity_type']}"
    allocation = (pruning.get("allocation") or {}).get("method")
    if allocation:
        parts.append(ALLOCATIONS.get(allocation, str(allocation)))
    if recipe.get("rows"):
        parts.append("TRIM")
    if recipe.get("barber"):
        parts.append("Barber")
    return " + ".join(parts)


def model_of(document: Mapping[str, Any]) -> str:
    """The name of the dense model behind a manifest: what was pruned, where it was, not the directory written."""
    name = MISSING
    behind: Mapping[str, Any] | None = document
    while behind:
        name = str((behind.get("model") or {}).get("id") or name)
        behind = behind.get("pruning")
    return Path(name).name


def render(table: Table) -> RichTable:
    """The table for a terminal: the main columns, and below it how each was measured."""
    columns = [column for column in table.columns if column.main]
    several_models = len({row.model for row in table.rows}) > 1
    drawn = RichTable(box=None, pad_edge=False, header_style="bold", caption_justify="left")
    for title in ("run", "model", "method") if several_models else ("run", "method"):
        drawn.add_column(title, overflow="fold")
    drawn.add_column("sparsity", justify="right", no_wrap=True)
    named = titles(columns)
    for column in columns:
        drawn.add_column(Text(named[column]), justify="right", overflow="fold")
    for row in table.rows:
        texts = [row.label, *([row.model] if several_models else []), row.method]
        cells = [percent(row.sparsity), *(shown(column, row.measures.get(column)) for column in columns)]
        drawn.add_row(*(Text(text) for text in [*texts, *cells]))
    drawn.caption = Text("\n".join([*settings(named), *table.notes]), "dim not italic")
    return drawn


def titles(columns: Sequence[Column]) -> dict[Column, str]:
    """A heading a column: data set or task, the metric if it is not the usual one, a number if needed."""
    usual = {"perplexity": "perplexity", "task": "acc", "mean": "acc"}
    names = [
        column.group if column.metric == usual[column.kind] else f"{column.group} {column.metric}" for column in columns
    ]
    often, seen = Counter(names), Counter[str]()
    found = {}
    for column, name in zip(columns, names, strict=True):
        seen[name] += 1
        found[column] = f"{name} [{seen[name]}]" if often[name] > 1 else name
    return found


def settings(named: Mapping[Column, str]) -> list[str]:
    """How each titled column was measured, a line for all that were measured alike."""
    alike: dict[str, list[str]] = {}
    for column, title in named.items():
        alike.setdefault(f"{column.metric}, {column.setting}", []).append(title)
    return [f"{', '.join(names)}: {setting}" for setting, names in alike.items()]


def percent(fraction: float | None) -> str:
    """A sparsity as text."""
    return MISSING if fraction is None else f"{fraction:.2%}"


def shown(column: Column, measure: Measure | None) -> str:
    """A cell as text: four digits for scores, two decimals or whole numbers for perplexities."""
    if measure is None:
        return MISSING
    if measure.value is None:
        return "not finite"
    value = figure(measure.value, large="perplexity" in column.metric)
    if measure.stderr is None or "perplexity" in column.metric:
        return value
    return f"{value} ± {figure(measure.stderr)}"


def figure(value: float, *, large: bool = False) -> str:
    """A number as text. large: a perplexity, which may run into the thousands."""
    if not large:
        return f"{value:.4f}"
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"


def _row(path: Path, document: Mapping[str, Any]) -> Row:
    sparsity = (document.get("sparsity") or {}).get("total")
    method = method_of(document.get("pruning"))
    if not method and sparsity is not None and sparsity < 0.01:
        method = "dense"
    return Row(
        label=str(document.get("label") or path.stem),
        model=model_of(document),
        method=method,
        sparsity=sparsity,
        file=path,
        measures=dict([*_perplexities(document), *_tasks(document), *_means(document)]),
    )


def _rank(column: Column) -> int:
    """Perplexities, the tasks' main metrics, their mean, and then what else was measured."""
    return {"perplexity": 0, "task": 1, "mean": 2}[column.kind] if column.main else 3


def _perplexities(document: Mapping[str, Any]) -> list[tuple[Column, Measure]]:
    found = []
    for entry in document.get("perplexity") or []:
        windows = f"{entry['windows']:,} \u00d7 {entry['seqlen']:,}"
        setting = f"{windows} of {entry['tokens']:,} tokens, {entry['dtype']}"
        column = Column("perplexity", Path(entry["dataset"]).name, "perplexity", setting)
        found.append((column, Measure(entry["value"])))
    return found


def _tasks(document: Mapping[str, Any]) -> list[tuple[Column, Measure]]:
    found = []
    for name, entry in (document.get("tasks") or {}).items():
        metrics = sorted((key for key in entry if f"{key}_stderr" in entry), key=lambda key: key != "acc")
        shots = "shots differ" if entry["n_shot"] is None else f"{entry['n_shot']}-shot"
        measured, documents = entry["samples"], entry["documents"]
        part = f"{documents:,} docs" if measured == documents else f"{measured:,} of {documents:,} docs"
        for metric in metrics:
            main = metric == "acc" or "acc" not in metrics
            column = Column("task", name, metric, f"{shots}, {part}, v{entry['version']}", main)
            found.append((column, Measure(entry[metric], entry[f"{metric}_stderr"])))
    return found


def _means(document: Mapping[str, Any]) -> list[tuple[Column, Measure]]:
    mean = document.get("mean_acc_seven")
    if mean is None:
        return []
    from_parts = any(entry["limit"] is not None for entry in document["tasks"].values())
    setting = "seven tasks, limited" if from_parts else "seven tasks"
    return [(Column("mean", "mean", "acc", setting), Measure(mean))]


def _notes(columns: Sequence[Column], results: Sequence[tuple[Path, Mapping[str, Any]]], structures: int) -> list[str]:
    notes = []
    ways = Counter((column.kind, column.group, column.metric) for column in columns)
    for group in dict.fromkeys(group for (_, group, _), number in ways.items() if number > 1):
        notes.append(f"{group} was measured in more than one way: compare within a column only.")
    if structures > 1:
        notes.append("The runs are of different models.")
    parts = {
        name
        for _, document in results
        for name, entry in (document.get("tasks") or {}).items()
        if entry["samples"] != entry["documents"]
    }
    if parts:
        notes.append(f"Measured on a part of their documents: {', '.join(sorted(parts))}.")
    return notes
