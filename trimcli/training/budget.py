"""What ADMM is to prune: the whole model's share, layers' by a file, or N:M; as a pruned model has it if not said."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimcli.errors import OptionError
from trimcli.files.held import Masks
from trimcli.files.ratios import LayerSparsity
from trimcli.methods.choice import Target, parse_pattern
from trimcli.methods.masks import matrix_budget
from trimcli.methods.recipe import check_patterns
from trimcli.model.matrix import Matrix
from trimcli.model.skeleton import Skeleton
from trimcli.training.admm import Budget
from trimcli.training.options import FinetuneOptions


@dataclass(frozen=True)
class Goal:
    """budget: for ADMM. targets: by linear, what a manifest says was asked for; None where no linear has one alone."""

    budget: Budget
    targets: dict[str, Target] | None

    def entry(self, linear: Matrix) -> dict[str, Any]:
        """`target` and `pattern` of a linear, as a manifest has them."""
        target = self.targets[linear.name] if self.targets else Target(0.0)
        return {"target": target.sparsity if self.targets else None, "pattern": target.pattern}


def goal_of(options: FinetuneOptions, skeleton: Skeleton, linears: Sequence[Matrix], known: Masks | None) -> Goal:
    """What the options ask for, or what the masks of a pruned model have.

    Raises OptionError for no target at all and for patterns that do not fit, MismatchError for ratios of another model.
    """
    pattern = parse_pattern(options.sparsity_type)
    targets: dict[str, Target] | None = None
    if options.ratios is not None:
        ratios = LayerSparsity.load(options.ratios)
        ratios.check(skeleton.shapes, skeleton.fingerprint, {linear.name for linear in linears})
        patterns = ratios.pattern or {}
        targets = {one.name: Target(ratios.sparsity[one.name], patterns.get(one.name)) for one in linears}
    elif pattern is not None:
        targets = {linear.name: Target(1 - pattern[0] / pattern[1], pattern) for linear in linears}
    elif options.sparsity is None and known is not None:
        entries = {linear.name: known.entry(linear.name) for linear in linears}
        if not all(entry.get("pattern") for entry in entries.values()):
            return Goal(Budget(total=sum(entry["zeros"] for entry in entries.values())), None)
        found = {name: tuple(entry["pattern"]) for name, entry in entries.items()}
        targets = {name: Target(1 - kept / group, (kept, group)) for name, (kept, group) in found.items()}
    elif options.sparsity is None:
        way = "give --sparsity T, --sparsity-type N:M or --ratios FILE"
        raise OptionError(f"{skeleton.checkpoint.id} is dense, so --mode admm needs a target; {way}.")
    if targets is None:
        assert options.sparsity is not None
        return Goal(Budget(total=round(options.sparsity * sum(linear.numel for linear in linears))), None)
    check_patterns(targets, {linear.name: linear.shape for linear in linears})
    counts = {
        linear.name: matrix_budget(*linear.shape, targets[linear.name].sparsity)
        for linear in linears
        if targets[linear.name].pattern is None
    }
    chosen = {name: one.pattern for name, one in targets.items() if one.pattern}
    return Goal(Budget(counts=counts, patterns=chosen), targets)
