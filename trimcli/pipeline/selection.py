"""Which matrices --only and --skip choose: those of the layers, and, named by themselves, those outside of them."""

from collections.abc import Iterable, Iterator, Sequence

from trimcli.console import NO_PROGRESS, Progress
from trimcli.errors import InputError, OptionError
from trimcli.methods.recipe import Recipe
from trimcli.model.matrix import Matrix
from trimcli.model.skeleton import Skeleton
from trimcli.options import selected

Globs = tuple[str, ...]


def chosen_matrices(skeleton: Skeleton, only: Globs, skip: Globs, progress: Progress = NO_PROGRESS) -> list[Matrix]:
    """The matrices that --only and --skip leave: the layers', then those outside of them.

    A glob of --only that matches a linear of the layers means theirs alone. Warns of a glob without effect. Raises
    InputError where the layers have none, OptionError where none is left.
    """
    if not skeleton.linears:
        what = f"{skeleton.checkpoint.id} has no matrix in its layers to prune"
        raise InputError(f"{what}: neither linears nor convolutions of single places; give another model.")
    beyond = globs_outside(skeleton, only)
    within = tuple(glob for glob in only if glob not in beyond)
    inside = skeleton.linears if within or not only else {}
    outside = skeleton.outside if beyond else {}
    found = [one for name, one in inside.items() if selected(name, within, skip)]
    found += [one for name, one in outside.items() if selected(name, beyond, skip)]
    some, count = next(iter(skeleton.linears)), len(skeleton.linears)
    idle = {
        flag: [one for one in globs if not _match(one, [*skeleton.linears, *outside])]
        for flag, globs in (("--only", only), ("--skip", skip))
    }
    dense = {glob: name for glob in idle["--only"] if (name := next(_matched(glob, skeleton.outside_dense), None))}
    if not found:
        for name in dense.values():
            what = f"{name} stays dense, as {skeleton.outside_dense[name]}"
            raise OptionError(f"{what}; --only takes linears and 1x1 convolutions, such as {some}.")
        left = f"of {count} linears (such as {some}), --only {list(only)} and --skip {list(skip)}"
        raise OptionError(f"nothing matches: {left} leave none; globs are matched against full module names.")
    for flag, globs in idle.items():
        for glob in globs:
            why = f"such as {some}"
            if name := dense.get(glob) if flag == "--only" else None:
                why = f"and {name} stays dense, as {skeleton.outside_dense[name]}"
            progress.warn(f"{flag} {glob!r} matches none of the {count} linears, {why}.")
    return found


def chosen_linears(skeleton: Skeleton, only: Globs, skip: Globs, progress: Progress = NO_PROGRESS) -> list[Matrix]:
    """The same for what needs inputs, which are gathered in the layers alone. Raises OptionError for any others."""
    found = chosen_matrices(skeleton, only, skip, progress)
    for linear in found:
        if linear.name in skeleton.outside:
            some = next(iter(skeleton.linears))
            raise OptionError(f"{_outside(skeleton, linear)}; --only takes linears inside of them here, as {some}.")
    return found


def globs_outside(skeleton: Skeleton, only: Globs) -> Globs:
    """The globs of --only that match no linear of the layers, but matrices outside of them."""
    return tuple(glob for glob in only if not _match(glob, skeleton.linears) and _match(glob, skeleton.outside))


def refuse_outside(skeleton: Skeleton, linears: Sequence[Matrix], recipe: Recipe, allocation: str | None) -> None:
    """Raise OptionError where inputs of what lies outside of the layers would be read, or no layer is left to allocate.

    allocation: over the layers, if any.
    """
    outside = [linear for linear in linears if linear.name in skeleton.outside]
    if not outside:
        return
    reads = [
        (recipe.barber, "--prune-barber"),
        (recipe.reconstructs, f"--reconstruct {recipe.reconstruct}"),
        (recipe.refine != "none", f"--refine {recipe.refine}"),
        (recipe.scoring.needs, f"--method {recipe.method}"),
        (recipe.allocating.needs, "--use-trim" if recipe.rows == "trim" else f"--rows {recipe.rows}"),
        (recipe.needs, f"--update {recipe.updating.name}"),
    ]
    if flag := next((flag for given, flag in reads if given), None):
        way = "take --method magnitude" if flag == f"--method {recipe.method}" else "drop that"
        raise OptionError(
            f"{_outside(skeleton, outside[0])}, and {flag} reads inputs; {way}, or leave it out of --only."
        )
    if allocation and len(outside) == len(linears):
        what = f"{_outside(skeleton, outside[0])}, and without any of these --alloc {allocation} has nothing to share"
        raise OptionError(f"{what}; leave it out.")


def _outside(skeleton: Skeleton, linear: Matrix) -> str:
    layers = (
        "blocks, whose inputs alone pictures tell"
        if skeleton.images
        else "decoder layers, whose inputs alone text tells"
    )
    return f"{linear.name} lies outside of the {len(skeleton.layers)} {layers}"


def _match(glob: str, names: Iterable[str]) -> bool:
    return any(_matched(glob, names))


def _matched(glob: str, names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if selected(name, (glob,), ()))
