"""What `--method` names: every score, alone, and combinations of a score and an update that go by a name."""

from __future__ import annotations

from dataclasses import dataclass

from trimcli.methods.scores import SCORES
from trimcli.options import one_of
from trimcli.registry import load_everything


@dataclass(frozen=True)
class Method:
    """A score and an update by their names. title: in tables. help, source: as an entry's."""

    name: str
    score: str
    update: str
    title: str
    help: str
    source: str


_combined: dict[str, Method] = {}


def method(name: str, *, score: str, update: str, title: str, help: str, source: str) -> None:
    """Give a name to a score with an update. Raises ValueError when the name is taken."""
    if name in _combined:
        raise ValueError(f"a method named {name!r} is registered already; choose another name.")
    _combined[name] = Method(name, score, update, title, help, source)


def methods() -> dict[str, Method]:
    """What `--method` takes, by name."""
    load_everything()
    alone = {name: Method(name, name, "none", entry.title, entry.help, entry.source) for name, entry in SCORES.items()}
    return {**alone, **_combined}


def method_called(name: str) -> Method:
    """The method `name`. Raises OptionError, which proposes the nearest, for one that there is not."""
    known = methods()
    return known[one_of("--method", name, known)]
