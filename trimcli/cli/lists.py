"""Options that take several values, separated by commas."""

from collections.abc import Callable
from typing import TypeVar

from trimcli.cli.common import split
from trimcli.errors import OptionError

T = TypeVar("T")


def values(option: str, text: str, kind: Callable[[str], T]) -> tuple[T, ...]:
    """The values in `text`, such as "0.02,0.05", each made by `kind`. Raises OptionError naming one that is none."""
    found = []
    for part in split(text):
        try:
            found.append(kind(part))
        except (KeyError, ValueError):
            raise OptionError(f"{option} {text!r}: {part!r} is not usable; separate values by commas.") from None
    return tuple(found)


def some(option: str, text: str | None, kind: Callable[[str], T]) -> tuple[T, ...] | None:
    """The same, None where the option was not given."""
    return None if text is None else values(option, text, kind)
