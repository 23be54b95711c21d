"""The report as Markdown, for a model card: tables of what was measured, and how."""

from collections.abc import Iterable, Sequence

from trimcli.files.manifest import LAYER_SPARSITY, MASKS, PACKED, PRUNED, ROWS
from trimcli.report.compare import Table, percent, settings, shown, titles
from trimcli.report.gather import Gathered, sparsity_by_linear
from trimcli.report.origin import WHAT, commands_of, versions_of

SPECIAL = str.maketrans(
    {character: f"\\{character}" for character in "\\`*_{}[]|#~"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
)


def page(gathered: Gathered) -> str:
    """The whole text. What the files' authors wrote is escaped."""
    parts = [
        *_results(gathered.table),
        *_sparsity(gathered),
        *_rows(gathered),
        *_commands(gathered),
    ]
    versions = ", ".join(versions_of(gathered))
    return "\n".join([*parts, f"Measured with {escaped(versions)}.", ""])


def escaped(text: str) -> str:
    """`text` as plain Markdown text on one line."""
    return " ".join(text.split()).translate(SPECIAL)


def _grid(headings: Sequence[str], texts: int, rows: Iterable[Sequence[str]]) -> list[str]:
    """A table whose first `texts` columns are text and the others numbers."""
    rule = ["---" if index < texts else "---:" for index in range(len(headings))]
    return [f"| {' | '.join(cells)} |" for cells in [headings, rule, *rows]]


def _results(table: Table) -> list[str]:
    if not table.rows:
        return []
    named = titles(table.columns)
    several = len({row.model for row in table.rows}) > 1
    texts = ["run", "model", "method"] if several else ["run", "method"]
    headings = [*texts, "sparsity", *(escaped(named[column]) for column in table.columns)]
    rows = [
        [
            *(escaped(text) for text in (row.label, *([row.model] if several else []), row.method)),
            percent(row.sparsity),
            *(shown(column, row.measures.get(column)) for column in table.columns),
        ]
        for row in table.rows
    ]
    notes = [f"- {escaped(line)}" for line in (*settings(named), *table.notes)]
    return ["### Results", "", *_grid(headings, len(texts), rows), "", *notes, ""]


def _sparsity(gathered: Gathered) -> list[str]:
    rows = []
    for source in gathered.of(MASKS, PRUNED, PACKED, LAYER_SPARSITY):
        layers = gathered.layers(source).values()
        ratios = source.schema == LAYER_SPARSITY
        total = percent(source.document.get("target" if ratios else "sparsity"))
        name = f"{source.label}, {source.document['method']}" if ratios else source.label
        span = f"{percent(min(layers))} to {percent(max(layers))}" if layers else ""
        rows.append([escaped(name), WHAT[source.schema], str(len(sparsity_by_linear(source))), total, span])
    if not rows:
        return []
    headings = ["file", "kind", "matrices", "sparsity", "layers, least to most"]
    return ["### Sparsity", "", *_grid(headings, 2, rows), ""]


def _rows(gathered: Gathered) -> list[str]:
    rows = []
    for source in gathered.of(ROWS):
        pairs = [
            (entry["quality_uniform"], entry["quality_best"])
            for entry in source.document["linears"].values()
            if entry["quality_uniform"] is not None and entry["quality_best"] is not None
        ]
        if pairs:
            before, after = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
            better = sum(best > uniform for uniform, best in pairs)
            rows.append([escaped(source.label), f"{better} of {len(pairs)}", f"{before:.6f}", f"{after:.6f}"])
    if not rows:
        return []
    headings = ["file", "matrices improved", "mean quality, even rows", "mean quality, TRIM"]
    return ["### Rows", "", *_grid(headings, 1, rows), ""]


def _commands(gathered: Gathered) -> list[str]:
    commands = commands_of(gathered)
    fence = "```"
    while any(fence in command for command in commands):
        fence += "`"
    return ["### Commands", "", f"{fence}sh", *commands, fence, ""] if commands else []
