"""Perplexity under exact numerics against reference numerics at an equal number of zeros, as a Markdown file.

    python -m benchmarks.numerics --case MODEL TOKENS --case MODEL TOKENS --measure TEST.txt \
        --windows 300 --seqlen 256 --runs runs.jsonl --out benchmarks/results-numerics.md

Reference numerics floor their counts and so prune less than asked for. Exact numerics are therefore given,
per matrix, the very number of zeros that the reference left there.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.support.ledger import Ledger
from benchmarks.support.provenance import head, publish, table
from benchmarks.support.study import Study, add_arguments, make_study
from trimcli import PruneOptions, Recipe, RowOptions, prune
from trimcli.allocation import LayerSparsity
from trimcli.artifacts import ModelFingerprint, write_json
from trimcli.maskfile import MaskFile
from trimcli.masks import Numerics
from trimcli.recipe import Method

TOLERANCE = 0.01


@dataclass(frozen=True)
class Combination:
    """What is compared: a score, with or without TRIM's rows, uniform layers or OWL's."""

    name: str
    method: Method
    rows: bool = False
    owl: bool = False

    def recipe(self, numerics: Numerics) -> Recipe:
        """The pruning method under one numerics mode."""
        rows = RowOptions(numerics=numerics) if self.rows else None
        return Recipe(method=self.method, numerics=numerics, rows=rows)


COMBINATIONS = (
    Combination("magnitude", "magnitude"),
    Combination("wanda", "wanda"),
    Combination("wanda + TRIM", "wanda", rows=True),
    Combination("OWL + TRIM", "wanda", rows=True, owl=True),
)


@dataclass(frozen=True)
class Comparison:
    """Both numerics at one target. zeros: of all masked weights; sparsity: that as a fraction of them."""

    zeros: int
    sparsity: float
    reference: dict[str, float]
    exact: dict[str, float]

    def change(self, text: str) -> float:
        """How much higher the exact numerics' perplexity is, as a fraction of the reference's."""
        return self.exact[text] / self.reference[text] - 1


def same_zeros(masks: Path, target: Path) -> None:
    """Write layer ratios that ask every linear for as many zeros as the masks file has there."""
    found = MaskFile.open(masks)
    sparsity = {}
    for name in found.names:
        d_out, d_in = found.shape(name)
        sparsity[name] = found.entry(name)["zeros"] / (d_out * d_in)
    ratios = LayerSparsity(
        method="uniform",
        parameters={},
        target=found.manifest["sparsity"],
        numerics="exact",
        sparsity=sparsity,
        metric=dict.fromkeys(sparsity),
        pattern=None,
        model=ModelFingerprint(**found.manifest["model"]),
    )
    write_json(target, ratios.document({}, {"masks": masks}))


def compare(study: Study, combination: Combination, sparsity: float) -> Comparison:
    """Prune under reference numerics, then exact ones with the same zeros in every matrix; measure both.

    Raises RuntimeError where the zeros are not the same after all.
    """
    with tempfile.TemporaryDirectory(dir=study.folder) as folder:
        reference, exact, ratios = (
            Path(folder) / name for name in ("reference.safetensors", "exact.safetensors", "ratios.json")
        )
        allocated = study.ratios("owl", sparsity, "reference") if combination.owl else None
        _prune(study, reference, combination.recipe("reference"), allocated, sparsity)
        same_zeros(reference, ratios)
        _prune(study, exact, combination.recipe("exact"), ratios, sparsity)
        zeros = _zeros(reference)
        if _zeros(exact) != zeros:
            raise RuntimeError(f"{combination.name} at {sparsity}: exact numerics left another number of zeros.")
        values = {path: study.measure(study.model, path)[0] for path in (reference, exact)}
        achieved = MaskFile.open(reference).manifest["sparsity"]
    return Comparison(sum(zeros.values()), achieved, values[reference], values[exact])


def _prune(study: Study, output: Path, recipe: Recipe, ratios: Path | None, sparsity: float) -> None:
    options = PruneOptions(
        recipe=recipe,
        sparsity=None if ratios else sparsity,
        ratios=ratios,
        calibration=study.calibration() if recipe.needs else None,
        cache_dir=output.parent / "cache",
    )
    prune(str(study.model), output, options)


def _zeros(masks: Path) -> dict[str, int]:
    found = MaskFile.open(masks)
    return {name: found.entry(name)["zeros"] for name in found.names}


def rows(study: Study, sparsity: float, name: str, found: Comparison) -> Iterable[list[str]]:
    """A line of the table for each text."""
    for text, reference in found.reference.items():
        change = found.change(text)
        yield [
            study.name,
            name,
            f"{sparsity:.0%}",
            text,
            f"{found.zeros:,} ({found.sparsity:.3%})",
            f"{reference:.3f}",
            f"{found.exact[text]:.3f}",
            f"{change:+.2%}",
            "**worse**" if change > TOLERANCE else "",
        ]


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--case",
        nargs=2,
        action="append",
        type=Path,
        metavar=("MODEL", "CALIBRATION"),
        help="a model directory, and a text or a safetensors file of `tokens` to calibrate it on; repeatable "
        "(default: the embedded model on the demo's text)",
    )
    parser.add_argument("--sparsities", nargs="*", type=float, default=[0.6, 0.7, 0.8])
    add_arguments(parser)
    given = parser.parse_args()
    cases: list[tuple[Path | None, Path | None]] = given.case or [(None, None)]
    studies = [make_study(given, model, source) for model, source in cases]
    ledger = Ledger(given.runs or studies[0].work / "numerics.jsonl")
    lines: list[list[str]] = []
    for study in studies:
        for sparsity in given.sparsities:
            for combination in COMBINATIONS:
                key: dict[str, Any] = {**study.key, "combination": combination.name, "sparsity": sparsity}
                facts = ledger.find(key)
                if facts is None:
                    facts = vars(compare(study, combination, sparsity))
                    ledger.add(key, facts)
                found = Comparison(**facts)
                lines += rows(study, sparsity, combination.name, found)
                changes = ", ".join(f"{found.change(text):+.2%}" for text in found.exact)
                print(f"{study.name} {combination.name} {sparsity:.0%}: {changes}", file=sys.stderr, flush=True)
    worse = sum(bool(line[-1]) for line in lines)
    facts_of_head = {
        **studies[0].facts(),
        "calibrated on": "; ".join(f"{study.name}: {study.source.name}" for study in studies),
        "computed in": f"{studies[0].dtype}, pruned weights propagate",
        "verdict": f"{worse} of {len(lines)} more than {TOLERANCE:.0%} worse under exact numerics",
    }
    columns = ("model", "method", "asked for", "text", "zeros", "reference", "exact", "difference", "")
    publish(
        [
            *head("Exact against reference numerics at an equal number of zeros", "numerics", facts_of_head),
            *table(columns, lines),
        ],
        given.out,
    )


if __name__ == "__main__":
    main()
