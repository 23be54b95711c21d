"""The option groups that are made of several classes: a command's own, and those of all methods that there are."""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

from trimcli.cli.options import Group, Values, chosen_options, fields_of, flag, parameters, several
from trimcli.commands.options import AllocateOptions, CalibrateOptions, PruneOptions
from trimcli.errors import OptionError
from trimcli.files.ratios import LayerSparsity
from trimcli.methods.blocks.options import PANEL as BARBER
from trimcli.methods.blocks.options import BarberOptions
from trimcli.methods.choice import parse_pattern
from trimcli.methods.layers.base import ALLOCATIONS
from trimcli.methods.presets import PRESETS, Preset
from trimcli.methods.recipe import Recipe
from trimcli.methods.rows.base import ROWS
from trimcli.methods.rows.options import PANEL as TRIM
from trimcli.methods.scores import SCORES
from trimcli.methods.stats import STATISTICS
from trimcli.methods.updates.base import UPDATES
from trimcli.options import WalkOptions, declared, option
from trimcli.registry import misplaced, option_types
from trimcli.sweep.grid import GRID, SweepOptions, axes

ONE_GO = "In one go (no --calibration)"
DRAWN = ("dataset", "nsamples", "seqlen", "tokens", "bos", "self_share", "pack", "chat", "images", "augment")


def _method_options() -> list[type[Any]]:
    return option_types(*(entry for registry in (SCORES, ROWS, UPDATES, STATISTICS) for entry in registry.values()))


def _allocation_options() -> list[type[Any]]:
    return option_types(*ALLOCATIONS.values())


def _all(kinds: list[type[Any]], **how: Any) -> list[inspect.Parameter]:
    return [one for kind in kinds for one in parameters(kind, **how)]


def _alloc_layers(values: Values) -> AllocateOptions:
    return AllocateOptions(**fields_of(AllocateOptions, values), options=chosen_options(_allocation_options(), values))


@dataclass(frozen=True)
class _Alloc:
    """What `prune` takes of `alloc-layers` beside the allocations' own options."""

    alloc: str | None = option(
        None, "Layer allocation in one go; --sparsity is the target.", choices=lambda: ALLOCATIONS
    )
    metrics_cache: Path | None = option(None, "Alpha's metrics file.")


@dataclass(frozen=True)
class _Preset:
    """A recipe by one word."""

    preset: str | None = option(
        None, "A whole recipe by one word, of which every option given here replaces its part.", choices=lambda: PRESETS
    )


def _prune_parameters() -> list[inspect.Parameter]:
    return [
        *parameters(_Preset),
        *parameters(Recipe, unset=True),
        *parameters(PruneOptions),
        flag("use_variant", "--use-variant", "The Wanda paper's variant: rows' counts by running score sums."),
        flag("use_trim", "--use-trim", "Search row-wise sparsities (Beck et al. 2025).", TRIM),
        *_all(_method_options(), unset=True),
        flag("prune_barber", "--prune-barber", "Rebuild the masks in a second pass (Su et al. 2024).", BARBER),
        *parameters(BarberOptions),
        *parameters(CalibrateOptions, fields=DRAWN, unset=True, panel=ONE_GO),
        *parameters(_Alloc, panel=ONE_GO),
        *_all(_allocation_options(), panel=ONE_GO),
    ]


def _prune(values: Values) -> PruneOptions:
    """PruneOptions with its recipe, and how the stages before it are run."""
    run, calibrate, allocate = fields_of(WalkOptions, values), None, None
    drawn = {name: values[name] for name in DRAWN if values[name] is not None and values[name] is not False}
    if values["calibration"] is None:
        calibrate = CalibrateOptions(**run, **drawn, batch_size=values["batch_size"])
    elif drawn:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in drawn)
        raise OptionError(f"--calibration with {named}: the calibration file holds its samples; drop {named}.")
    preset, alloc, own = _preset(values), values["alloc"], chosen_options(_allocation_options(), values)
    pattern = parse_pattern(values["sparsity_type"]) is not None
    recipe = _recipe(values, preset, pattern=pattern or (preset is not None and _mixed(values, own)))
    if alloc is None and preset is not None and not pattern and values["ratios"] is None:
        alloc = preset.alloc
    if alloc is None:
        for spelled, value, owner in misplaced(own, ()):
            what = f"{spelled} {value} is an option of the allocation {owner}"
            raise OptionError(f"{what}; add --alloc {owner}, or leave it out.")
        if values["metrics_cache"] is not None:
            raise OptionError("--metrics-cache is an option of the allocation alpha; add --alloc alpha.")
    if preset is not None:
        _refuse_idle(values, recipe, alloc, own)
    if alloc is not None:
        shared = {name: values[name] for name in ("sparsity", "metrics_cache")}
        linears: dict[str, Any] = {name: tuple(values[name] or ()) for name in ("only", "skip")}
        shared |= {"numerics": recipe.numerics}
        allocate = AllocateOptions(**run, **shared, **linears, method=alloc, options=own)
    return PruneOptions(**fields_of(PruneOptions, values), recipe=recipe, calibrate=calibrate, allocate=allocate)


def _refuse_idle(values: Values, recipe: Recipe, alloc: str | None, own: Iterable[Any]) -> None:
    """Raise OptionError for what was given beside a preset and does nothing there."""
    name = f"--preset {values['preset']}"
    for prefix, does, remedy in (
        ("reconstruct_", recipe.follows_dense, "--reconstruct layer"),
        ("refine_", recipe.refine == "learned", "--refine learned"),
    ):
        for given in fields_of(Recipe, values):
            if given.startswith(prefix) and not does:
                spelled = f"--{given.replace('_', '-')} {values[given]}"
                raise OptionError(f"{spelled} does nothing beside {name}; add {remedy}, or leave it out.")
    kind = None if alloc is None else ALLOCATIONS[alloc].options
    for options in own:
        if type(options) is not kind:
            one = next(one for one in declared(type(options)) if getattr(options, one.field) != one.default)
            spelled = f"{one.spelled} {getattr(options, one.field)}"
            raise OptionError(
                f"{spelled} does nothing beside {name}; choose its allocation by --alloc, or leave it out."
            )


def _mixed(values: Values, own: Iterable[Any]) -> bool:
    """Whether every layer is to have an N:M pattern of its own, by the ratios or by an allocation's `own` options."""
    if values["ratios"] is not None:
        return LayerSparsity.load(values["ratios"]).pattern is not None
    return values["alloc"] is not None and any(getattr(one, "group", None) for one in own)


def _preset(values: Values) -> Preset | None:
    return None if values["preset"] is None else PRESETS[values["preset"]]


def _recipe(values: Values, preset: Preset | None, *, pattern: bool) -> Recipe:
    """The recipe that was asked for, over the preset's. pattern: whether the target is N:M."""
    given = fields_of(Recipe, values)
    chosen = {**(preset.chosen(pattern=pattern) if preset else {}), **given}
    options = chosen_options(_method_options(), values, chosen.pop("options", ()))
    asked = [rows for rows in ("trim", "variant") if values[f"use_{rows}"]]
    if len({*asked, *({given.get("rows", "even")} - {"even"})}) > 1:
        raise OptionError(
            "these options do not go together: --use-variant with --use-trim or other --rows: each chooses the "
            "rows' counts; drop one of the two."
        )
    if asked:
        chosen["rows"] = asked[0]
    barber = BarberOptions(**fields_of(BarberOptions, values)) if values["prune_barber"] else None
    return Recipe(**chosen, barber=barber, options=options)


def _sweep(values: Values) -> SweepOptions:
    """SweepOptions with the values of each axis that was given."""
    settings: dict[str, tuple[Any, ...]] = {}
    for one in (one for kind in axes() for one in declared(kind)):
        value = values[one.field]
        if one.type is bool:
            settings |= {one.field: (True,)} if value else {}
        elif value is not None:
            found = several(one, value)
            settings[one.field] = (found,) if get_origin(one.type) is tuple else found  # a tuple is one value
    return SweepOptions(**fields_of(SweepOptions, values), settings=settings)


ALLOCATE = Group(lambda: _all([AllocateOptions, *_allocation_options()]), _alloc_layers)
PRUNE = Group(_prune_parameters, _prune)
SWEEP = Group(lambda: [*parameters(SweepOptions), *_all(axes(), axis=True, panel=GRID)], _sweep)
