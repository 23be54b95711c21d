"""The report as Markdown, for a model card: tables of what was measured, and how."""

from collections.abc import Sequence

from trimcli.files.manifest import LAYER_SPARSITY, MASKS, PACKED, PRUNED
from trimcli.report.gather import Gathered
from trimcli.report.provenance import commands_of, versions_of
from trimcli.report.sheets import Sheet, qualities, results, sparsities, trainings

SPECIAL = str.maketrans(
    {character: f"\\{character}" for character in "\\`*_{}[]|#~"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
)


def page(gathered: Gathered) -> str:
    """The whole text. What the files' authors wrote is escaped."""
    sources, table = gathered.of(MASKS, PRUNED, PACKED, LAYER_SPARSITY), gathered.table
    versions = ", ".join(dict.fromkeys(text for source in gathered.sources for text in versions_of(source.document)))
    parts = [
        _section("Results", results(table, table.columns), table.notes),
        _section("Sparsity", sparsities(gathered, sources)),
        _section("Training", trainings(gathered)),
        _section("Rows", qualities(gathered)),
        _commands(gathered),
        f"Measured with {escaped(versions)}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(text: str) -> str:
    """`text` as plain Markdown text on one line."""
    return " ".join(text.split()).translate(SPECIAL)


def _section(title: str, sheet: Sheet, notes: Sequence[str] = ()) -> str:
    """A heading and a table with its notes; nothing where there are no rows."""
    if not sheet.rows:
        return ""
    headings, *rows = [[escaped(cell) for cell in row] for row in (sheet.headings, *sheet.rows)]
    rule = ["---" if place < sheet.words else "---:" for place in range(len(headings))]
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows)]
    said = [f"- {escaped(note)}" for note in (*sheet.notes, *notes)]
    return "\n".join([f"### {title}", "", *lines, *([""] if said else []), *said])


def _commands(gathered: Gathered) -> str:
    commands = list(dict.fromkeys(line for source in gathered.sources for line in commands_of(source.document)))
    fence = "```"
    while any(fence in command for command in commands):
        fence += "`"
    return "\n".join(["### Commands", "", f"{fence}sh", *commands, fence]) if commands else ""
