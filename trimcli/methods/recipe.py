"""What to do with one matrix: score, rows, pattern and update, chosen independently and composed here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from trimcli.errors import OptionError
from trimcli.methods.blocks.options import BarberOptions
from trimcli.methods.choice import Choice, Target
from trimcli.methods.heldout import Judged
from trimcli.methods.named import Method, method_called, methods
from trimcli.methods.refine.swaps import WORKING, swapped
from trimcli.methods.rows.base import ROWS, RowAllocation, Rows
from trimcli.methods.scores import SCORES, Score
from trimcli.methods.stats import AIMING, FITTING, HELDOUT, SQNORM, STATISTICS, LinearStats
from trimcli.methods.updates.base import UPDATES, Update, Updated
from trimcli.methods.updates.obs import ObsOptions
from trimcli.options import Numerics, check_fields, option, positive, share
from trimcli.registry import Entry, misplaced

if TYPE_CHECKING:
    from torch import Tensor

    from trimcli.methods.rows.base import RowResult


REFINEMENT = "Refinement"
# Tokens that a step of learning masks sees, and one of reconstruction, unless it is said how many samples: on every
# device the same. Reconstruction makes more of as many tokens in smaller steps.
LEARNING_TOKENS, RECONSTRUCTION_TOKENS = 2048, 512
RECONSTRUCTION = "Reconstruction"


def _rate(flag: str, value: float) -> None:
    if not 0 < value < 1:
        raise OptionError(f"{flag} {value:g} is no learning rate; give a part of what moves, such as 0.01.")


@dataclass(frozen=True)
class Outcome(Updated):
    """What became of one matrix. rows: what a search tells of them.

    tokens: how many reached an expert. fewer: what it made of the recipe that these are too few for it.
    """

    rows: RowResult | None = None
    tokens: int | None = None
    fewer: str | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Independent choices that make a pruning method, by name; options: instances of their option classes."""

    method: str = option("wanda", "What picks the weights that go.", choices=methods)
    numerics: Numerics = option(
        "exact",
        "exact: counts hold to the weight. reference: the published code's arithmetic, to reproduce its results.",
    )
    rows: str = option("even", "How a matrix's rows share what goes (--use-trim: trim).", choices=lambda: ROWS)
    compare: Literal["row", "layer"] | None = option(
        None,
        "Which weights compete: row, those of one output, so that every row loses alike; layer, all of the matrix "
        "(default: wanda row, others layer).",
    )
    update: str | None = option(
        None, "What the kept weights do about those that go; the method's own if not given.", choices=lambda: UPDATES
    )
    propagate: bool = option(
        True, "Use the dense model's statistics: no forward pass, one matrix in memory.", "--no-propagate", off=True
    )
    input_recalc: bool = option(
        False, "Collect last-token inputs anew once the linears before are pruned.", panel="TRIM rows"
    )
    refine: Literal["none", "swaps", "learned"] = option(
        "none",
        "How a mask is bettered. swaps: inside each row, weights go and return in pairs as long as the outputs come "
        "nearer to the dense ones. learned: once a decoder layer is pruned, which of its weights stay is learned by "
        "gradient, layer by layer, towards the dense layer's outputs; the weights keep their values.",
        panel=REFINEMENT,
    )
    refine_steps: int = option(128, "Steps of learning a layer.", panel=REFINEMENT, check=positive)
    refine_lr: float = option(0.1, "Their first rate, as a part of a score.", panel=REFINEMENT, check=_rate)
    refine_rows: Literal["free", "held"] = option(
        "free",
        "free: a matrix keeps its count, and its rows may trade. held: every row keeps its count.",
        panel=REFINEMENT,
    )
    target: Literal["pruned", "dense"] = option(
        "pruned",
        "What cg and admm aim at: dense weights' outputs on the pruned model's inputs, or on the dense model's, as far "
        "as held-out samples speak for it.",
        panel="Conjugate gradients and ADMM",
    )
    reconstruct: Literal["none", "layer", "halves"] = option(
        "none",
        "layer: once a decoder layer is pruned, its surviving weights, norms and biases are trained, layer by layer, "
        "towards the dense layer's outputs (Guo et al. 2024). halves: its attention first, towards what the dense one "
        "hands to the MLP, then its MLP.",
        panel=RECONSTRUCTION,
    )
    reconstruct_steps: int = option(256, "Steps of Adam, for each layer or half.", panel=RECONSTRUCTION, check=positive)
    reconstruct_lr: float = option(
        0.007, "Their first learning rate, as a part of each parameter's size.", panel=RECONSTRUCTION, check=_rate
    )
    reconstruct_batch: int | None = option(
        None,
        f"Samples a step (default: about {RECONSTRUCTION_TOKENS:,} tokens; of --refine learned, which it holds for, "
        f"too, {LEARNING_TOKENS:,}).",
        panel=RECONSTRUCTION,
        check=positive,
    )
    reconstruct_blend: float = option(
        0.5,
        "What the dense layer is given to make its outputs of: 0, the dense model's hidden states; 1, the pruned "
        "model's; between, so much of these. The last layer follows the dense model's predictions all the same.",
        panel=RECONSTRUCTION,
        check=share,
    )
    min_expert_tokens: int = option(
        1, "Experts that fewer tokens reached are pruned by magnitude.", panel="Mixtures of experts", check=positive
    )
    barber: BarberOptions | None = None
    options: tuple[Any, ...] = ()

    @cached_property
    def named(self) -> Method:
        """What --method names. Raises OptionError for an unknown name, as the other choices do."""
        return method_called(self.method)

    @cached_property
    def updating(self) -> Update:
        """The update."""
        return UPDATES[self.update or self.named.update]

    @cached_property
    def scoring(self) -> Score:
        """The score: the method's, or the one that --mask-score names for the update obs."""
        chosen = self.obs.mask_score if self.updating.options is ObsOptions else None
        return SCORES[chosen or self.named.score]

    @cached_property
    def allocating(self) -> RowAllocation:
        """The row allocation."""
        return ROWS[self.rows]

    @property
    def obs(self) -> ObsOptions:
        """The options of the update obs, given or not."""
        return next((given for given in self.options if isinstance(given, ObsOptions)), ObsOptions())

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """Everything chosen, and the statistics that it reads."""
        read = (STATISTICS[name] for name in sorted(self.needs))
        return (self.scoring, self.allocating, self.updating, *read)

    def options_of(self, entry: Entry) -> Any:
        """The options that an entry is given: an instance of its class, None where it has none."""
        if entry.options is None:
            return None
        return next((given for given in self.options if type(given) is entry.options), entry.options())

    @cached_property
    def needs(self) -> frozenset[str]:
        """Names of the statistics that choosing reads."""
        refining = {"swaps": {FITTING.name, HELDOUT.name}, "learned": {SQNORM.name}}.get(self.refine, set())
        aiming = AIMING if self.target == "dense" else frozenset()
        return self.scoring.needs | self.allocating.needs | self.updating.needs | refining | aiming

    @property
    def group(self) -> Literal["row", "matrix"] | None:
        """The comparison group that --compare names, None where that is the score's or the rows' affair."""
        if self.compare is None:
            return None
        return "row" if self.compare == "row" else "matrix"

    @property
    def changes_weights(self) -> bool:
        """Whether kept weights end with other values than the dense ones: then masks alone do not carry the result."""
        if self.reconstructs:
            return True
        return self.updating.changes and (self.barber is None or self.barber.retain_reconstruction)

    @property
    def needs_dense_walk(self) -> bool:
        """Whether the dense model's hidden states go along with the pruned model's."""
        return self.follows_dense or self.target == "dense"

    @property
    def reconstructs(self) -> bool:
        """Whether whole layers are fitted once they are pruned."""
        return self.reconstruct != "none"

    @property
    def follows_dense(self) -> bool:
        """Whether whole layers are worked on towards the dense model's hidden states."""
        return self.reconstructs or self.refine == "learned"

    @property
    def blends(self) -> bool:
        """Whether what layers are fitted to is made of a mixture of both models' hidden states."""
        return self.reconstructs and self.reconstruct_blend > 0

    def learning_samples(self, seqlen: int) -> int:
        """Samples of `seqlen` tokens that a step of learning masks sees."""
        return self.reconstruct_batch or max(1, LEARNING_TOKENS // seqlen)

    def reconstruction_samples(self, seqlen: int) -> int:
        """Samples of `seqlen` tokens that a step of reconstruction sees."""
        return self.reconstruct_batch or max(1, RECONSTRUCTION_TOKENS // seqlen)

    def document(self) -> dict[str, Any]:
        """The choices as a manifest records them, each with the options that it was given."""
        return {
            "method": self.method,
            "numerics": self.numerics,
            "score": self.scoring.name,
            "rows": self.rows,
            "compare": self.compare,
            "update": self.updating.name,
            "propagate": self.propagate,
            "input_recalc": self.input_recalc,
            "barber": asdict(self.barber) if self.barber else None,
            "refine": self._refinement(),
            "target": None if self.target == "pruned" else self.target,
            "reconstruct": self._reconstruction(),
            "min_expert_tokens": self.min_expert_tokens,
            "options": {entry.name: asdict(self.options_of(entry)) for entry in self.entries if entry.options},
        }

    def _refinement(self) -> dict[str, Any] | None:
        if self.refine != "learned":
            return None if self.refine == "none" else {"by": self.refine}
        steps = {"steps": self.refine_steps, "lr": self.refine_lr, "batch": self.reconstruct_batch}
        return {"by": self.refine, **steps, "rows": self.refine_rows}

    def _reconstruction(self) -> dict[str, Any] | None:
        if not self.reconstructs:
            return None
        steps = {"steps": self.reconstruct_steps, "lr": self.reconstruct_lr, "batch": self.reconstruct_batch}
        return {"unit": self.reconstruct, **steps, "blend": self.reconstruct_blend}

    def check(self, *, pattern: bool = False) -> None:
        """Raise OptionError for choices that do not go together. pattern: whether an N:M pattern is asked for."""

        def refuse(wrong: object, what: str) -> None:
            if wrong:
                raise OptionError(f"these options do not go together: {what}; drop one of the two.")

        check_fields(self)
        uneven, on_dense, again, only = self.rows != "even", not self.propagate, self.input_recalc, self.allocating.only
        rows = {"trim": "--use-trim", "variant": "--use-variant"}.get(self.rows, f"--rows {self.rows}")
        named = f"--method {self.method}"
        needy = [name for name in sorted(self.needs) if STATISTICS[name].stored is None]
        refuse(uneven and pattern, f"{rows} with an N:M pattern: the pattern fixes every row's count")
        compare = f"--compare {self.compare}"
        refuse(self.compare and uneven, f"{compare} with {rows}: it says how rows share, too")
        refuse(self.compare and pattern, f"{compare} with an N:M pattern: the pattern fixes every row's count")
        chosen = self.compare and self.updating.chooses
        refuse(chosen, f"{compare} with --update {self.updating.name}: it chooses which weights stay by itself")
        refuse(only not in (None, self.scoring.name), f"{rows} with {named}: it is made for {only}")
        idle = again and "inputs" not in self.allocating.needs
        refuse(idle, "--input-recalc without --use-trim: only TRIM reads the inputs again")
        refining = f"--refine {self.refine}"
        refuse(on_dense and self.refine == "swaps", f"--no-propagate with {refining}: it works on pruned inputs")
        chooses = self.refine == "swaps" and self.updating.chooses
        refuse(chooses, f"{refining} with --update {self.updating.name}: it chooses which weights stay by itself")
        dense_target = self.target == "dense"
        refuse(on_dense and dense_target, "--no-propagate with --target dense: it needs the dense and pruned inputs")
        refuse(self.barber and dense_target, "--prune-barber with --target dense: it rebuilds on sparse inputs")
        aimless = dense_target and not self.updating.aims
        refuse(aimless, f"--target dense with --update {self.updating.name}: only cg and admm aim at outputs")
        refuse(on_dense and needy, f"--no-propagate with {named}: its {' and '.join(needy)} comes from a forward pass")
        refuse(on_dense and self.barber, "--no-propagate with --prune-barber: it rebuilds on sparse inputs")
        refuse(on_dense and again, "--no-propagate with --input-recalc: it needs forward passes while pruning")
        refuse(on_dense and self.reconstructs, "--no-propagate with --reconstruct: it works on hidden states")
        learned = "--refine learned"
        refuse(on_dense and self.refine == "learned", f"--no-propagate with {learned}: it works on hidden states")
        refuse(self.barber and self.refine == "learned", f"--prune-barber with {learned}: each makes the masks anew")
        updated = self.updating.changes and self.refine == "learned"
        by_update = named if self.update is None else f"--update {self.updating.name}"
        refuse(updated, f"{by_update} with {learned}: it learns which dense values stay, not new ones")
        refuse(
            self.barber and self.reconstructs, "--prune-barber with --reconstruct: each rebuilds what the other made"
        )
        for flag, value, owner in misplaced(self.options, self.entries):
            refuse(True, f"{flag} {value} with {named}: it belongs to {owner}, as in sparsegpt")
        quantized = f"--wbits {self.obs.wbits}"
        not_obs = self.obs.wbits and self.updating.options is not ObsOptions
        refuse(not_obs, f"{quantized} with --update {self.updating.name}: only the update obs rounds what stays")
        for flag, value in (("--mask-score", self.obs.mask_score), ("--mask-update", self.obs.mask_update)):
            unread = value and self.updating.options is not ObsOptions
            refuse(unread, f"{flag} {value} with --update {self.updating.name}: only the update obs reads it")
        other = "it gives what was rounded other values"
        refuse(self.obs.wbits and self.barber, f"{quantized} with --prune-barber: {other}")
        refuse(self.obs.wbits and self.reconstructs, f"{quantized} with --reconstruct: {other}")
        by_block = uneven and self.obs.mask_update == "block"
        refuse(by_block, f"{rows} with --mask-update block: it fixes every row's count for the whole matrix")

    def for_tokens(self, stats: LinearStats) -> Recipe:
        """The recipe itself, or what is left of it where too few tokens reached an expert for statistics it reads.

        Below `min_expert_tokens` that is magnitude.
        """
        if stats.tokens is None or not self.needs:
            return self
        if stats.tokens < self.min_expert_tokens:
            return replace(self, method="magnitude", rows="even", update="none", refine="none")
        missing = {name for name in self.needs if name not in stats.tensors}
        rows = "even" if self.allocating.needs & missing else self.rows
        if not missing:
            return self
        update = "none" if self.updating.needs & missing else self.update
        refine = "none" if self.refine == "swaps" and HELDOUT.name in missing else self.refine
        return replace(self, rows=rows, update=update, refine=refine)

    @property
    def working(self) -> int:
        """Bytes a weight of the matrix that is worked on, beside the float32 weight and its statistics."""
        swaps = WORKING if self.refine == "swaps" else 0
        return max(self.allocating.working, self.updating.working, swaps)

    def choose(self, weight: Tensor, stats: LinearStats, target: Target, *, keep_zeros: bool = False) -> Outcome:
        """The mask and, where the update changes them, the new weights of one matrix [D_out, D_in], any float dtype.

        keep_zeros: where kept weights change, those that are zero are not kept; they count in the target.
        """
        import torch

        fewer = self.for_tokens(stats)
        if fewer is not self:
            made = fewer.choose(weight, LinearStats(**stats.tensors), target, keep_zeros=keep_zeros)
            reached = f"{stats.tokens:,} tokens" if stats.tokens else "no token"
            return replace(made, fewer=f"{reached} reached it, so it is pruned {_without(self, fewer)}")
        weight = weight.float()
        free = weight != 0 if keep_zeros and (self.updating.changes or self.reconstructs) else None
        if target.pattern and target.pattern[0] == target.pattern[1]:
            # A mixed N:M allocation may leave a layer whole.
            return Outcome(torch.ones_like(weight, dtype=torch.bool) if free is None else free)
        choice = Choice(self.scoring, stats, target, self.numerics, self.options_of(self.scoring))
        rows: Rows = self.allocating(weight, choice, options=self.options_of(self.allocating))
        choice = replace(choice, keep=rows.keep, free=free, compare=self.group or rows.compare)
        refined: tuple[Judged, ...] = ()
        if self.refine == "swaps":
            choice, judged = swapped(weight, choice)
            refined = (judged,)
        made = self.updating(weight, choice, options=self.options_of(self.updating))
        return Outcome(made.keep, made.weight, made.remarks, (*refined, *made.judged), made.grid, rows.found)


def _without(recipe: Recipe, fewer: Recipe) -> str:
    """What is left of a recipe, in words."""
    if recipe.method != fewer.method:
        return f"by {fewer.method}"
    gone = [recipe.rows] if recipe.rows != fewer.rows else []
    gone += [recipe.updating.name] if recipe.updating is not fewer.updating else []
    gone += [recipe.refine] if recipe.refine != fewer.refine else []
    return f"without {' and '.join(gone)}"


def check_patterns(targets: Mapping[str, Target], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise OptionError naming the first linear whose inputs do not fall into whole groups."""
    for name, target in targets.items():
        if target.pattern and shapes[name][1] % target.pattern[1]:
            what = f"{name} has {shapes[name][1]} inputs, which do not divide into groups of {target.pattern[1]}"
            raise OptionError(f"{what}; leave it dense with --skip '{name}' or choose another pattern.")


def expected_zeros(shape: tuple[int, int], target: Target, recipe: Recipe) -> int:
    """How many weights a matrix will lose: to the weight in exact numerics, nearly so in reference numerics."""
    from trimcli.methods import masks

    d_out, d_in = shape
    if target.pattern:
        kept, group = target.pattern
        return d_out * (d_in // group) * (group - kept)
    by_row = (recipe.group or recipe.scoring.compare) == "row"
    if recipe.numerics == "reference" and by_row and recipe.updating.name == "none":
        return int(masks.even_row_counts(d_out, d_in, target.sparsity, "reference").sum())
    return masks.matrix_budget(d_out, d_in, target.sparsity)
