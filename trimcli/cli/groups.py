"""The option groups that are made of several classes: a command's own, and those of all methods that there are."""

import inspect
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from trimcli.cli.options import Values, chosen_options, fields_of, parameters, several, switch
from trimcli.commands.options import AllocateOptions, CalibrateOptions, PruneOptions
from trimcli.errors import OptionError
from trimcli.methods.blocks.options import PANEL as BARBER
from trimcli.methods.blocks.options import BarberOptions
from trimcli.methods.layers.base import ALLOCATIONS
from trimcli.methods.recipe import Recipe
from trimcli.methods.rows.base import ROWS
from trimcli.methods.rows.options import PANEL as TRIM
from trimcli.methods.scores import SCORES
from trimcli.methods.stats import STATISTICS
from trimcli.methods.updates.base import UPDATES
from trimcli.options import RunOptions, declared, option
from trimcli.registry import option_types
from trimcli.sweep.grid import GRID, SweepOptions, axes

ONE_GO = "In one go (no --calibration)"
DRAWN = ("dataset", "nsamples", "seqlen", "tokens")


def _method_options() -> list[type[Any]]:
    return option_types(*(entry for registry in (SCORES, ROWS, UPDATES, STATISTICS) for entry in registry.values()))


def _allocation_options() -> list[type[Any]]:
    return option_types(*ALLOCATIONS.values())


def _switch(name: str, flag: str, text: str, panel: str | None = None) -> inspect.Parameter:
    said = switch(flag, text, panel)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, said])


def _all(kinds: list[type[Any]], **how: Any) -> list[inspect.Parameter]:
    return [one for kind in kinds for one in parameters(kind, **how)]


class AllocateGroup:
    """The options of `alloc-layers`: its own, and those of every allocation."""

    def parameters(self) -> list[inspect.Parameter]:
        """Its own first."""
        return _all([AllocateOptions, *_allocation_options()])

    def build(self, values: Values, given: Collection[str]) -> AllocateOptions:
        """AllocateOptions with the options of its method."""
        return AllocateOptions(
            **fields_of(AllocateOptions, values), options=chosen_options(_allocation_options(), values)
        )


@dataclass(frozen=True)
class _Alloc:
    """What `prune` takes of `alloc-layers` beside the allocations' own options."""

    alloc: str | None = option(
        None, "Layer allocation in one go; --sparsity is the target.", choices=lambda: ALLOCATIONS
    )
    metrics_cache: Path | None = option(None, "Alpha's metrics file.")


class PruneGroup:
    """The options of `prune` and `plan`: the recipe's, those of every method, and of the stages before in one go."""

    def parameters(self) -> list[inspect.Parameter]:
        """Grouped by panels."""
        return [
            *parameters(Recipe),
            *parameters(PruneOptions),
            _switch("use_variant", "--use-variant", "The Wanda paper's variant: rows' counts by running score sums."),
            _switch("use_trim", "--use-trim", "Search row-wise sparsities (Beck et al. 2025).", TRIM),
            *_all(_method_options()),
            _switch("prune_barber", "--prune-barber", "Rebuild the masks in a second pass (Su et al. 2024).", BARBER),
            *parameters(BarberOptions),
            *parameters(CalibrateOptions, fields=DRAWN, unset=True, panel=ONE_GO),
            *parameters(_Alloc, panel=ONE_GO),
            *_all(_allocation_options(), panel=ONE_GO),
        ]

    def build(self, values: Values, given: Collection[str]) -> PruneOptions:
        """PruneOptions with its recipe, and how the stages before it are run."""
        run = fields_of(RunOptions, values)
        calibration = values["calibration"]
        drawn = {name: values[name] for name in DRAWN if values[name] is not None}
        if drawn and calibration is not None:
            named = ", ".join(f"--{name}" for name in drawn)
            raise OptionError(f"--calibration with {named}: the calibration file holds its samples; drop {named}.")
        calibrate = None
        if calibration is None:
            calibrate = CalibrateOptions(**run, **drawn, batch_size=values["batch_size"])
        return PruneOptions(
            **fields_of(PruneOptions, values),
            recipe=self._recipe(values),
            calibrate=calibrate,
            allocate=self._allocation(values, run),
        )

    def _recipe(self, values: Values) -> Recipe:
        chosen = fields_of(Recipe, values)
        asked = [rows for rows in ("trim", "variant") if values[f"use_{rows}"]]
        if len({*asked, *({chosen["rows"]} - {"even"})}) > 1:
            raise OptionError(
                "these options do not go together: --use-variant with --use-trim or other --rows: each chooses the "
                "rows' counts; drop one of the two."
            )
        if asked:
            chosen["rows"] = asked[0]
        barber = BarberOptions(**fields_of(BarberOptions, values)) if values["prune_barber"] else None
        return Recipe(**chosen, barber=barber, options=chosen_options(_method_options(), values))

    def _allocation(self, values: Values, run: dict[str, Any]) -> AllocateOptions | None:
        if values["alloc"] is None:
            return None
        return AllocateOptions(
            **run,
            method=values["alloc"],
            sparsity=values["sparsity"],
            metrics_cache=values["metrics_cache"],
            numerics=values["numerics"],
            options=chosen_options(_allocation_options(), values),
        )


class SweepGroup:
    """The options of `sweep`: its own, and an axis for every option of the methods and allocations."""

    def parameters(self) -> list[inspect.Parameter]:
        """Its own first."""
        own = parameters(SweepOptions)
        return [*own, *(one for kind in axes() for one in parameters(kind, axis=True, panel=GRID))]

    def build(self, values: Values, given: Collection[str]) -> SweepOptions:
        """SweepOptions with the values of each axis that was given."""
        settings: dict[str, tuple[Any, ...]] = {}
        for kind in axes():
            for one in declared(kind):
                value = values[one.field]
                if one.type is bool:
                    settings |= {one.field: (True,)} if value else {}
                elif value is not None:
                    settings[one.field] = several(one, value)
        return SweepOptions(**fields_of(SweepOptions, values), settings=settings)


ALLOCATE, PRUNE, SWEEP = AllocateGroup(), PruneGroup(), SweepGroup()
