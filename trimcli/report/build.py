"""A report of one or several runs: an HTML page with figures, or Markdown for a model card."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimcli.errors import OptionError
from trimcli.files.documents import write_text
from trimcli.files.outputs import check_outputs
from trimcli.options import one_of
from trimcli.report import html, markdown
from trimcli.report.gather import Gathered, gather

PAGES = {"html": html.page, "md": markdown.page}


@dataclass(frozen=True)
class Report:
    """A report as written. gathered: what the files held. text: of the page."""

    gathered: Gathered
    text: str


def build_report(files: Sequence[Path], format: str, output: Path | None, *, force: bool = False) -> Report:
    """Write a report of `files`: results, layer ratios, masks, row statistics, calibrations, model directories.

    Files are recognised by their schema, in any number and order; what they have no numbers for is left out.
    format: `html`, one page with everything in it, or `md`. output: None writes no file, which HTML needs. Raises
    OptionError (no files, unknown format), InputError, MismatchError (a file that is none of these), OutputExists.
    """
    one_of("--format", format, PAGES)
    if not files:
        raise OptionError("a report needs files; give results, masks, layer ratios, statistics or model directories.")
    if output is None and format == "html":
        raise OptionError("--format html needs --output; give --output report.html, or --format md.")
    beside = [path.with_suffix(".safetensors") for path in files if path.suffix == ".json"]
    check_outputs([*files, *beside], texts=[output], force=force)
    gathered = gather(files)
    report = Report(gathered, PAGES[format](gathered))
    if output is not None:
        write_text(output, report.text, force=force)
    return report
