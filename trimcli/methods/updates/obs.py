"""OBS: the weights that stay make up for those that go (Frantar & Alistarh 2023). With its score it is SparseGPT.

The loss of a pruned row w' against its dense w is (w - w') H (w - w')^T with H the Gram of the inputs. From left to
right, a weight that goes is set to zero and the weights to its right are moved to the optimum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trimcli.errors import OptionError
from trimcli.methods.named import method
from trimcli.methods.scores import SCORES, score
from trimcli.methods.stats import GRAM, LinearStats
from trimcli.methods.updates.base import Updated, update
from trimcli.options import above_zero, check_fields, option, positive

if TYPE_CHECKING:
    from torch import Tensor

    from trimcli.methods.choice import Choice
    from trimcli.methods.updates.obs_solver import Factor

PANEL = "SparseGPT"


def _bits(flag: str, value: int) -> None:
    if value not in (8, 4):
        raise OptionError(f"{flag} {value} is not usable; give 8 or 4.")


@dataclass(frozen=True)
class ObsOptions:
    """How OBS scores and updates. Raises OptionError for a value that no matrix could be pruned with."""

    mask_score: str | None = option(
        None, "What picks the mask; the method's own score if not given.", panel=PANEL, choices=lambda: SCORES
    )
    mask_update: Literal["once", "block"] | None = option(
        None,
        "once: fix the mask beforehand; block: choose it anew in every block of columns, from the weights as updated. "
        "As published if not given: block for the score obs, once for others.",
        panel=PANEL,
    )
    damping: float = option(0.01, "Damping, relative to the Gram's mean diagonal.", panel=PANEL, check=above_zero)
    block_size: int = option(128, "Columns updated together.", panel=PANEL, check=positive)
    wbits: int | None = option(
        None,
        "8 or 4: the weights that stay are rounded to so many bits, and those to their right make up for that, too.",
        panel=PANEL,
        check=_bits,
    )
    group_size: int = option(128, "Inputs that share a scale under --wbits.", panel=PANEL, check=positive)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.wbits and self.block_size % self.group_size and self.group_size % self.block_size:
            what = f"--group-size {self.group_size} and --block-size {self.block_size} cut through each other"
            raise OptionError(f"{what}; give one that divides the other, such as {self.block_size} for both.")


def factor_of(stats: LinearStats, damping: float) -> Factor:
    """The factorised Gram; linears that share an input share it."""
    from trimcli.methods.updates.obs_solver import factorise

    return stats.once(("factor", damping), lambda whole: factorise(whole.gram, damping))


@score(
    "obs", needs={GRAM}, compare="matrix", title="OBS", source="Frantar & Alistarh 2023, section 3", options=ObsOptions
)
def obs_scores(weight: Tensor, stats: LinearStats, options: ObsOptions) -> Tensor:
    """What the loss grows by when the weight goes and the others make up for it, w^2 / U_cc^2."""
    factor = factor_of(stats, options.damping)
    scores: Tensor = (weight.float() / factor.upper.diagonal()[stats.place]).square_()
    return scores.masked_fill_(factor.dead[stats.place], 0.0)


@update(
    "obs",
    needs={GRAM},
    title="OBS",
    working=10,
    source="Frantar & Alistarh 2023, section 3, algorithm 1",
    options=ObsOptions,
    chooses=True,
)
def obs(weight: Tensor, choice: Choice, options: ObsOptions) -> Updated:
    """Column by column, what stays to the right makes up for what goes, and under --wbits for what rounding changes.

    weight: float32 [D_out, D_in], left as it is. Columns that never fire become zero, also weights in them that a small
    budget leaves marked as kept. Raises OptionError, ValueError for NaN and other shapes, and what `factorise` raises.
    """
    import torch

    from trimcli.methods.masks import refuse_nan, slices
    from trimcli.methods.updates.grid import Grid
    from trimcli.methods.updates.obs_solver import prune_block

    once = _fixed_beforehand(choice, options)
    stride = choice.pattern[1] if choice.pattern else options.block_size
    if choice.keep is not None and choice.keep.shape != weight.shape:
        raise ValueError(f"a mask {list(choice.keep.shape)} does not fit a weight {list(weight.shape)}.")
    with torch.no_grad():
        factor, inputs = factor_of(choice.stats, options.damping), weight.shape[1]
        if len(factor.dead) != inputs:
            raise ValueError(f"a Gram of {len(factor.dead)} channels does not fit a weight of {inputs} inputs.")
        updated = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        updated[:, factor.dead] = 0.0
        largest = updated.max()  # NaN goes like a low score, so it may be gone by the end
        keep = choice.of_matrix(updated) if once else torch.ones_like(updated, dtype=torch.bool)
        grid = None
        if options.wbits:
            grid = Grid.empty(options.wbits, options.group_size, (len(weight), inputs), weight.device)
        for columns in slices(inputs, options.block_size):
            what = None if once else choice, stride, grid
            prune_block(updated, keep, factor.upper, columns.start, columns.stop, *what)
        refuse_nan(torch.stack([largest, updated.max()]))
    return Updated(keep, updated, factor.report.remarks, grid=grid)


def _fixed_beforehand(choice: Choice, options: ObsOptions) -> bool:
    """Whether the mask is chosen once, before any update. Raises OptionError for a choice that cannot be."""
    if choice.keep is not None:
        if options.mask_update == "block":
            why = "--mask-update block does not go with row sparsities, which say nothing of a block of columns"
            raise OptionError(f"{why}; use --mask-update once.")
        return True
    if (options.mask_update or ("block" if choice.score.name == "obs" else "once")) == "once":
        return True
    if choice.pattern and options.block_size % choice.pattern[1]:
        (kept, group), size = choice.pattern, options.block_size
        what = f"--block-size {size} cuts through the groups of --sparsity-type {kept}:{group}"
        raise OptionError(f"{what}; give a multiple of {group}, such as {group * max(1, size // group)}.")
    return False


method(
    "sparsegpt",
    score="obs",
    update="obs",
    title="SparseGPT",
    help="The score obs with the update obs, which changes the kept weights",
    source="Frantar & Alistarh 2023",
)
