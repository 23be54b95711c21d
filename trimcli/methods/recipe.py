"""What to do with one matrix: score, rows, pattern and weight update, chosen independently and composed here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from trimcli.errors import OptionError
from trimcli.methods import masks
from trimcli.methods.blocks.barber import BarberOptions
from trimcli.methods.masks import Numerics
from trimcli.methods.rows.search import RowOptions, RowResult, search_rows
from trimcli.methods.rows.variant import variant_keep
from trimcli.methods.scores import LinearStats, Statistic, score_function
from trimcli.methods.updates.obs import Factor, UpdateOptions, factorise, obs_scores, sparsegpt
from trimcli.options import check_positive, check_sparsity, one_of

Method = Literal["wanda", "magnitude", "sparsegpt"]


class Target(NamedTuple):
    """What one matrix is to lose: a fraction, or N kept of M by `pattern` (whose sparsity then is 1 - N/M)."""

    sparsity: float
    pattern: tuple[int, int] | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of one matrix. keep: bool [D_out, D_in]. weight: float32, None where the dense values stay."""

    keep: Tensor
    weight: Tensor | None = None
    rows: RowResult | None = None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Independent choices that together are a pruning method.

    method: the score, and for sparsegpt the weight update. rows: TRIM's row search, None for even rows.
    variant: the Wanda paper's variant. barber: LLM-Barber's second pass. update: SparseGPT's options.
    propagate: later layers see what pruned earlier layers produce. input_recalc: last-token inputs collected
    anew within a layer.
    """

    method: Method = "wanda"
    numerics: Numerics = "exact"
    rows: RowOptions | None = None
    variant: bool = False
    barber: BarberOptions | None = None
    update: UpdateOptions = field(default_factory=UpdateOptions)
    propagate: bool = True
    input_recalc: bool = False

    def check(self, *, pattern: bool = False) -> None:
        """Raise OptionError for choices that do not go together. pattern: whether an N:M pattern is asked for."""
        one_of("--method", self.method, get_args(Method))
        one_of("--numerics", self.numerics, get_args(Numerics))
        refused = [
            (self.rows and pattern, "--use-trim with an N:M pattern: the pattern fixes every row's count"),
            (
                self.variant and pattern,
                "--use-variant with an N:M pattern: the variant chooses rows' counts itself",
            ),
            (self.variant and self.rows, "--use-variant with --use-trim: both choose the rows' counts"),
            (
                self.variant and self.method != "wanda",
                f"--use-variant with --method {self.method}: it is a variant of wanda",
            ),
            (
                self.input_recalc and not self.rows,
                "--input-recalc without --use-trim: only TRIM reads the inputs again",
            ),
            (
                not self.propagate and self.method == "sparsegpt",
                "--no-propagate with --method sparsegpt: its Gram comes from a forward pass",
            ),
            (
                not self.propagate and self.barber,
                "--no-propagate with --prune-barber: it rebuilds on sparse inputs",
            ),
            (
                not self.propagate and self.input_recalc,
                "--no-propagate with --input-recalc: it needs forward passes while pruning",
            ),
            (
                self.method != "sparsegpt" and self.update.mask_score != "obs",
                f"--mask-score {self.update.mask_score} with --method {self.method}: it belongs to sparsegpt",
            ),
            (
                self.method != "sparsegpt" and self.update.mask_update is not None,
                f"--mask-update {self.update.mask_update} with --method {self.method}: it belongs to sparsegpt",
            ),
            (
                self.rows and self.update.mask_update == "block",
                "--use-trim with --mask-update block: TRIM fixes every row's count for the whole matrix",
            ),
        ]
        for wrong, what in refused:
            if wrong:
                raise OptionError(f"these options do not go together: {what}; drop one of the two.")
        if self.rows:
            check_positive("--iterations", self.rows.iterations)

    @cached_property
    def needs(self) -> frozenset[Statistic]:
        """The statistics that choosing reads."""
        if self.method == "sparsegpt":
            found = {Statistic.GRAM}
            if self.update.mask_score == "wanda":
                found.add(Statistic.SQNORM)
        else:
            found = set(score_function(self.method).needs)
        if self.rows:
            found.add(Statistic.INPUTS)
        return frozenset(found)

    @property
    def changes_weights(self) -> bool:
        """Whether kept weights end with other values than the dense ones: then masks alone do not carry the result."""
        return self.method == "sparsegpt" and (self.barber is None or self.barber.retain_reconstruction)

    def document(self) -> dict[str, Any]:
        """The choices as a manifest records them."""
        return asdict(self)

    def choose(
        self, weight: Tensor, stats: LinearStats, target: Target, factors: dict[int, Factor] | None = None
    ) -> Outcome:
        """Masks, and for SparseGPT the new weights, of one matrix.

        weight: [D_out, D_in], any float dtype. stats: what `needs` asks for, on the weight's device. factors:
        factorised Grams by identity, shared among linears that share an input.
        """
        weight = weight.float()
        if target.pattern and target.pattern[0] == target.pattern[1]:
            # A mixed N:M allocation may leave a layer whole.
            return Outcome(torch.ones_like(weight, dtype=torch.bool))
        if self.method == "sparsegpt":
            return self._sparsegpt(weight, stats, target, {} if factors is None else factors)
        scores = score_function(self.method)(weight, stats)
        if target.pattern:
            return Outcome(masks.n_of_m(scores, *target.pattern))
        if self.rows:
            found = search_rows(weight, scores, stats[Statistic.INPUTS], target.sparsity, self.rows)
            return Outcome(found.keep, rows=found)
        if self.variant:
            return Outcome(variant_keep(scores, target.sparsity, self.numerics))
        if self.method == "magnitude":
            return Outcome(masks.lowest_overall(scores, target.sparsity, self.numerics))
        counts = masks.even_row_counts(weight.shape[0], weight.shape[1], target.sparsity, self.numerics)
        return Outcome(masks.lowest_per_row(scores, counts))

    def _sparsegpt(self, weight: Tensor, stats: LinearStats, target: Target, factors: dict[int, Factor]) -> Outcome:
        gram = stats[Statistic.GRAM]
        if id(gram) not in factors:
            factors[id(gram)] = factorise(gram, self.update.damping)
        factor = factors[id(gram)]
        rows = None
        if self.rows:
            if self.update.mask_score == "obs":
                scores = obs_scores(weight, factor)
            else:
                scores = score_function(self.update.mask_score)(weight, stats)
            rows = search_rows(weight, scores, stats[Statistic.INPUTS], target.sparsity, self.rows)
        made = sparsegpt(
            weight,
            factor,
            sparsity=None if target.pattern or rows else target.sparsity,
            pattern=target.pattern,
            row_counts=rows.counts if rows else None,
            sqnorm=stats.sqnorm,
            options=self.update,
        )
        return Outcome(made.keep, made.weight, rows, made.report.remarks)


def uniform_target(sparsity: float | None, sparsity_type: str) -> Target:
    """The one target of --sparsity and --sparsity-type. Raises OptionError for none or contradictory ones."""
    pattern = masks.parse_pattern(sparsity_type)
    if pattern:
        implied = 1 - pattern[0] / pattern[1]
        if sparsity is not None and abs(sparsity - implied) > 1e-9:
            raise OptionError(
                f"--sparsity {sparsity} with --sparsity-type {sparsity_type}: {pattern[0]} kept of {pattern[1]} "
                f"implies {implied:g}; drop --sparsity."
            )
        return Target(implied, pattern)
    if sparsity is None:
        raise OptionError("no target was given; give --sparsity T, --sparsity-type N:M or --ratios FILE.")
    return Target(check_sparsity(sparsity))


def check_patterns(targets: Mapping[str, Target], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise OptionError naming the first linear whose inputs do not fall into whole groups."""
    for name, target in targets.items():
        if target.pattern and shapes[name][1] % target.pattern[1]:
            raise OptionError(
                f"{name} has {shapes[name][1]} inputs, which do not divide into groups of {target.pattern[1]}; "
                f"leave it dense with --skip '{name}' or choose another pattern."
            )


def expected_zeros(shape: tuple[int, int], target: Target, recipe: Recipe) -> int:
    """How many weights a matrix will lose: to the weight in exact numerics, nearly so in reference numerics."""
    d_out, d_in = shape
    if target.pattern:
        kept, group = target.pattern
        return d_out * (d_in // group) * (group - kept)
    if recipe.numerics == "reference" and recipe.method == "wanda":
        return int(masks.even_row_counts(d_out, d_in, target.sparsity, "reference").sum())
    return masks.matrix_budget(d_out, d_in, target.sparsity)
