"""What the full module name of a matrix tells: which decoder layer it is in, and where inside of it."""

from collections.abc import Callable, Iterable
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


def layer_of(name: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.up_proj`: up to the first number; all of a name without one."""
    return ".".join(_parts(name)[0]) or name


def layer_index(name: str) -> int:
    """3 of `model.layers.3.mlp.up_proj`; 0 where the name has no number."""
    layer, _ = _parts(name)
    return int(layer[-1]) if layer else 0


def inside_layer(name: str) -> str:
    """`mlp.up_proj` of `model.layers.3.mlp.up_proj`: after the first number; all of a name that ends there."""
    return ".".join(_parts(name)[1]) or name


def kind_of(name: str) -> str:
    """The same for all experts: `mlp.experts.*.up_proj` of `model.layers.3.mlp.experts.5.up_proj`."""
    return _starred(inside_layer(name))


def list_of(name: str) -> str:
    """`model.layers` of `model.layers.3.mlp.up_proj`: the list that its layer is in; empty of a name without number."""
    return ".".join(_parts(name)[0][:-1])


def kinds_of(names: Iterable[str]) -> dict[str, list[str]]:
    """`kind_of` -> the names of that kind; where layers of several lists are there (a vision tower's), all of the name.

    Numbers are `*` in both.
    """
    known = list(names)
    several = len({found for name in known if (found := list_of(name))}) > 1
    return grouped(known, _starred if several else kind_of)


def grouped(items: Iterable[V], key: Callable[[V], K]) -> dict[K, list[V]]:
    """Key -> the items that have it, such as layer -> names by `layer_of`; both in the order given."""
    found: dict[K, list[V]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def _starred(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _parts(name: str) -> tuple[list[str], list[str]]:
    """The name's parts up to the first number, none where there is no number, and those after it."""
    parts = name.split(".")
    end = next((end for end, part in enumerate(parts, start=1) if part.isdecimal() and len(part) < 10), 0)
    return parts[:end], parts[end:]
