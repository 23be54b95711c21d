"""Perplexity under exact numerics against reference numerics at an equal number of zeros, as a Markdown file.

    python -m benchmarks.numerics --case MODEL TRAIN.json.gz --case MODEL TRAIN.json.gz --measure TEST.txt \
        --draws 4 --windows 300 --seqlen 256 --runs runs.jsonl --out benchmarks/results-numerics.md

Reference numerics floor their counts and so prune less than asked for. Exact numerics are therefore given,
per matrix, the very number of zeros that the reference left there. A count that differs by one sends the search of
TRIM down another path, for better or worse; so perplexities are geometric means over --draws of the calibration
samples, beside the range of the single draws.
"""

import argparse
import math
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.support.ledger import Ledger
from benchmarks.support.provenance import head, publish, table
from benchmarks.support.study import Study, add_arguments, make_study
from trimcli import PruneOptions, Recipe, prune
from trimcli.files.documents import write_json
from trimcli.files.manifest import ModelFingerprint
from trimcli.files.masks import MaskFile
from trimcli.files.ratios import LayerSparsity
from trimcli.options import Numerics

TOLERANCE = 0.01
LEGEND = (
    "Asked for: the target of the reference, which floors its counts; zeros: what it left, and what exact numerics "
    "were given. Perplexities and their difference are geometric means over the draws, single draws their range. A "
    "count that differs by one sends the search of TRIM down another path, so single draws scatter to either side."
)


@dataclass(frozen=True)
class Combination:
    """What is compared: a score, with or without TRIM's rows, uniform layers or OWL's."""

    name: str
    method: str
    rows: bool = False
    owl: bool = False

    def recipe(self, numerics: Numerics) -> Recipe:
        """The pruning method under one numerics mode."""
        return Recipe(method=self.method, numerics=numerics, rows="trim" if self.rows else "even")


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


@dataclass(frozen=True)
class Line:
    """A line of the table: a combination at one target on one text, over the draws of the samples."""

    model: str
    combination: str
    sparsity: float
    text: str
    draws: tuple[Comparison, ...]

    def mean(self, numerics: Numerics) -> float:
        """Geometric mean over the draws of the perplexity under `numerics`."""
        values = [draw.exact if numerics == "exact" else draw.reference for draw in self.draws]
        return math.exp(sum(math.log(value[self.text]) for value in values) / len(values))

    @property
    def change(self) -> float:
        """How much higher the mean under exact numerics is, as a fraction of the reference's."""
        return self.mean("exact") / self.mean("reference") - 1

    @property
    def worse(self) -> bool:
        """Whether that is more than the tolerance."""
        return self.change > TOLERANCE

    def cells(self) -> list[str]:
        """The line as the table shows it."""
        single = [draw.exact[self.text] / draw.reference[self.text] - 1 for draw in self.draws]
        achieved = sum(draw.sparsity for draw in self.draws) / len(self.draws)
        return [
            f"{self.model}, {self.combination}",
            self.text,
            f"{self.sparsity:.0%}",
            f"{achieved:.3%}",
            f"{self.mean('reference'):.3f}",
            f"{self.mean('exact'):.3f}",
            f"{self.change:+.2%}",
            f"{min(single):+.2%} to {max(single):+.2%}" if len(single) > 1 else "",
            "**worse**" if self.worse else "",
        ]


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
        values = {path: study.measure(study.model, path)["perplexity"] for path in (reference, exact)}
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


def lines_of(study: Study, combination: Combination, sparsity: float, draws: int, ledger: Ledger) -> list[Line]:
    """The lines of one combination, a text each; what the ledger lacks is run."""
    # Given samples do not change with the seed, and without a search one draw shows that both take the same weights.
    several = draws if combination.rows and not study.fixed else 1
    found = []
    for seed in range(several):
        drawn = replace(study, seed=seed)
        key: dict[str, Any] = {**drawn.key, "combination": combination.name, "sparsity": sparsity}
        facts = ledger.find(key)
        if facts is None:
            facts = vars(compare(drawn, combination, sparsity))
            ledger.add(key, facts)
        found.append(Comparison(**facts))
    texts = [path.name for path in study.texts]
    lines = [Line(study.name, combination.name, sparsity, text, tuple(found)) for text in texts]
    changes = ", ".join(f"{line.change:+.2%}" for line in lines)
    print(f"{study.name} {combination.name} {sparsity:.0%}: {changes}", file=sys.stderr, flush=True)
    return lines


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
    parser.add_argument("--draws", type=int, default=1, help="draws of the samples from a text (default 1)")
    add_arguments(parser)
    given = parser.parse_args()
    cases: list[tuple[Path | None, Path | None]] = given.case or [(None, None)]
    studies = [make_study(given, model, source) for model, source in cases]
    ledger = Ledger(given.runs or studies[0].work / "numerics.jsonl")
    lines = [
        line
        for study in studies
        for combination in COMBINATIONS
        for sparsity in given.sparsities
        for line in lines_of(study, combination, sparsity, given.draws, ledger)
    ]
    worse = sum(line.worse for line in lines)
    facts = {
        **studies[0].facts(),
        "calibrated on": "; ".join(f"{study.name}: {study.source.name}" for study in studies)
        + f"; draws of a text's samples: {given.draws}",
        "computed in": f"{studies[0].dtype}, pruned weights propagate",
        "verdict": f"{worse} of {len(lines)} more than {TOLERANCE:.0%} worse under exact numerics",
    }
    columns = ("", "text", "asked for", "zeros", "reference", "exact", "difference", "single draws", "")
    publish(
        [
            *head("Exact against reference numerics at an equal number of zeros", "numerics", facts),
            LEGEND,
            "",
            *table(columns, [line.cells() for line in lines]),
        ],
        given.out,
    )


if __name__ == "__main__":
    main()
