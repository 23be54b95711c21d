"""Registries: names in order, lookups that propose, entries that are called with their options."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from trimcli import registry
from trimcli.errors import OptionError
from trimcli.methods.layers.base import ALLOCATIONS
from trimcli.methods.layers.owl import OwlOptions
from trimcli.methods.rows.base import ROWS
from trimcli.methods.rows.metrics import QUALITIES, ROW_QUALITIES
from trimcli.methods.scores import SCORES
from trimcli.methods.stats import SQNORM, STATISTICS
from trimcli.methods.updates.base import UPDATES
from trimcli.methods.updates.obs import ObsOptions
from trimcli.options import option
from trimcli.registry import Entry, Registry, misplaced, option_types

REGISTRIES: list[Registry[Any]] = [SCORES, ROWS, UPDATES, ALLOCATIONS, QUALITIES, ROW_QUALITIES, STATISTICS]


@dataclass(frozen=True)
class Sharpness:
    sharpness: int = option(2, "How sharp.")
    edge: int | None = option(None, "Where it is cut.")


@pytest.fixture
def knives(monkeypatch: pytest.MonkeyPatch) -> Registry[Entry]:
    """A registry with `bread`, `butter` and `steak`, which leaves no trace."""
    monkeypatch.setattr(registry, "_everything", list(registry._everything))
    made = Registry("knife", "--knife", Entry)

    @made.register("bread", source="nobody 2030", needs={SQNORM})
    def bread(loaf: int) -> int:
        """Cuts bread.

        In slices.
        """
        return loaf + 1

    @made.register("butter", source="nobody 2030", title="Butter knife", help="Spreads.")
    def butter(loaf: int, much: int) -> int:
        """Is never shown."""
        return loaf * much

    @made.register("steak", source="nobody 2030", options=Sharpness)
    def steak(meat: int, options: Sharpness) -> int:
        """Cuts meat."""
        return meat * options.sharpness

    return made


def test_a_mapping_of_names_in_order(knives: Registry[Entry]) -> None:
    assert list(knives) == ["bread", "butter", "steak"]
    assert len(knives) == 3
    assert "butter" in knives
    assert "fork" not in knives
    assert [entry.name for entry in knives.values()] == list(knives)
    assert {name: entry.title for name, entry in knives.items()} == {
        "bread": "bread",
        "butter": "Butter knife",
        "steak": "steak",
    }
    assert (knives["bread"].help, knives["butter"].help) == ("Cuts bread.", "Spreads.")
    assert knives["bread"].needs == {"sqnorm"}
    assert knives["butter"].needs == frozenset()


def test_an_unknown_name_proposes_the_nearest(knives: Registry[Entry]) -> None:
    with pytest.raises(OptionError, match=r"^--knife 'steek' is none of bread, butter, steak; did you mean 'steak'\?$"):
        knives["steek"]
    with pytest.raises(OptionError, match=r"^--knife 'xyz' is none of bread, butter, steak\.$"):
        knives["xyz"]


def test_a_name_is_taken_once(knives: Registry[Entry]) -> None:
    with pytest.raises(ValueError, match="a knife named 'bread' is registered already; choose another name"):
        knives.register("bread", source="somebody 2031")(lambda loaf: loaf)
    assert knives["bread"](1) == 2


def test_an_entry_is_called_with_its_options_or_their_defaults(knives: Registry[Entry]) -> None:
    assert knives["bread"](1) == 2
    assert knives["bread"](1, options=Sharpness(9)) == 2
    assert knives["butter"](3, 4) == 12
    assert knives["steak"](3) == 6
    assert knives["steak"](3, options=Sharpness(5)) == 15


def test_what_is_registered_stays_a_plain_function() -> None:
    def cut(loaf: int) -> int:
        return loaf

    other = Registry("knife", "--knife", Entry)
    assert other.register("cut", source="nobody 2030")(cut) is cut
    registry._everything.remove(other["cut"])


@pytest.mark.parametrize("one", REGISTRIES, ids=[one.kind for one in REGISTRIES])
def test_every_entry_of_ours_says_what_it_is(one: Registry[Any]) -> None:
    assert len(one) >= 2
    for name, entry in one.items():
        assert entry.name == name
        assert entry.help
        assert "\n" not in entry.help
        assert any(part.isdigit() for part in entry.source.replace(",", " ").split()), entry.source
        assert entry.title
        assert entry.needs <= set(STATISTICS)
        if entry.options is not None:
            entry.options()  # all of them have defaults
    with pytest.raises(OptionError, match=f"{one.flag} 'nothing of the kind' is none of"):
        one["nothing of the kind"]


def test_what_was_set_for_something_that_was_not_chosen(knives: Registry[Entry]) -> None:
    given = (Sharpness(3, edge=1), Sharpness(9), ObsOptions(mask_score="wanda", block_size=7), OwlOptions(group=8))
    told = list(misplaced(given, [knives["bread"], UPDATES["obs"]]))
    assert told == [("--edge", 1, "steak"), ("--group", 8, "owl")]
    assert list(misplaced(given, [knives["steak"], ALLOCATIONS["owl"], SCORES["obs"]])) == []
    assert list(misplaced((), [knives["steak"]])) == []


def test_option_classes_are_told_once(knives: Registry[Entry]) -> None:
    entries = (knives["bread"], UPDATES["obs"], knives["steak"], SCORES["obs"], knives["steak"])
    assert option_types(*entries) == [ObsOptions, Sharpness]
    assert option_types() == []


@pytest.mark.parametrize("look", [len, list, lambda one: "wanda" in one, lambda one: one["wanda"]])
def test_whatever_is_asked_first_loads_all(look: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(registry, "_loaded", False)
    monkeypatch.setattr(registry, "import_module", loaded.append)
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    look(SCORES)
    assert tuple(loaded) == registry.BUILT_IN
    look(SCORES)
    assert tuple(loaded) == registry.BUILT_IN
