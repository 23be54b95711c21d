"""Options classes: what is declared, what is said of it on a command line, what is refused."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from trimcli.errors import OptionError
from trimcli.options import (
    RunOptions,
    at_least,
    check_fields,
    declared,
    fraction,
    not_negative,
    one_of,
    option,
    parse_size,
    positive,
    selected,
    words,
)


@dataclass(frozen=True)
class Knife:
    blades: int = option(1, "How many blades.", check=positive)
    kind_: Literal["bread", "butter"] | None = option(None, "What for.")
    maker: str = option("nobody", "Who made it.", "--by", choices=lambda: {"nobody": 0, "somebody": 1})
    sharp: bool = option(False, "Whether it cuts.")
    rusts: bool = option(True, "Stainless.", "--no-rust", off=True)
    cuts: tuple[str, ...] = option((), "What it cuts.", repeated=True)
    sizes: tuple[int, ...] = option((1, 2), "Sizes.", check=at_least(1))
    owner: str = "not an option"


def test_a_field_and_its_flag() -> None:
    found = {one.field: one for one in declared(Knife)}
    assert [one.spelled for one in found.values()] == [
        *("--blades", "--kind", "--by", "--sharp", "--no-rust", "--cuts", "--sizes")
    ]
    assert found["blades"].choices is None
    assert found["kind_"].choices == ["bread", "butter"]
    assert found["maker"].choices == ["nobody", "somebody"]
    assert (found["blades"].default, found["sizes"].default) == (1, (1, 2))
    assert "owner" not in found


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, []),
        ({"blades": 1, "owner": "me"}, []),
        ({"blades": 3}, ["--blades", "3"]),
        ({"kind_": "bread"}, ["--kind", "bread"]),
        ({"sharp": True, "rusts": False}, ["--sharp", "--no-rust"]),
        ({"cuts": ("a b", "c")}, ["--cuts", "a b", "--cuts", "c"]),
        ({"sizes": (4,)}, ["--sizes", "4"]),
        ({"sizes": (4, 5), "maker": "somebody"}, ["--by", "somebody", "--sizes", "4,5"]),
    ],
)
def test_the_words_are_what_differs_from_the_defaults(fields: dict[str, Any], expected: list[str]) -> None:
    assert words(Knife(**fields)) == expected


def test_words_but_for_some() -> None:
    knife = Knife(blades=3, maker="somebody", sharp=True)
    assert words(knife, "blades", "sharp") == ["--by", "somebody"]
    assert words(knife, "blades", "maker", "sharp") == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blades": 0}, "--blades 0 must be at least 1."),
        ({"kind_": "buttr"}, "--kind 'buttr' is none of bread, butter; did you mean 'butter'?"),
        ({"maker": "x"}, "--by 'x' is none of nobody, somebody."),
        ({"sizes": (3, 0)}, "--sizes 0 must be at least 1."),
        ({"blades": float("nan")}, "--blades nan must be at least 1."),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    check_fields(Knife())
    with pytest.raises(OptionError) as told:
        check_fields(Knife(**fields))
    assert str(told.value) == message


@pytest.mark.parametrize("value", [0.0, 0.5, 0.999])
def test_fractions(value: float) -> None:
    fraction("--sparsity", value)


@pytest.mark.parametrize("value", [1.0, -0.001, 1.5, float("nan"), float("inf")])
def test_what_is_no_fraction(value: float) -> None:
    with pytest.raises(OptionError, match=rf"^--sparsity {value} is outside \[0, 1\); it is the fraction to prune"):
        fraction("--sparsity", value)


def test_bounds() -> None:
    positive("--n", 1)
    at_least(2)("--n", 2)
    not_negative("--n", 0)
    for check, value in ((positive, 0), (at_least(2), 1), (positive, float("inf"))):
        with pytest.raises(OptionError, match=f"--n {value:g} must be at least"):
            check("--n", value)
    for wrong in (-1, -0.5, float("nan"), float("inf"), 1e308):
        with pytest.raises(OptionError, match=re.escape(f"--n {wrong:g} is not usable; give a number from 0 to 1e+06")):
            not_negative("--n", wrong)


def test_one_of() -> None:
    assert one_of("--x", "wanda", ("wanda", "magnitude")) == "wanda"
    with pytest.raises(OptionError, match=r"^--x 'wandda' is none of wanda, magnitude; did you mean 'wanda'\?$"):
        one_of("--x", "wandda", ("wanda", "magnitude"))
    with pytest.raises(OptionError, match=r"^--x '' is none of wanda\.$"):
        one_of("--x", "", ["wanda"])


@pytest.mark.parametrize(
    ("only", "skip", "expected"),
    [
        ((), (), ["a.q", "a.k", "b.q"]),
        (("*.q",), (), ["a.q", "b.q"]),
        (("*.q",), ("b.*",), ["a.q"]),
        ((), ("a.[qk]",), ["b.q"]),
        (("a.q", "b.q"), ("*.Q",), ["a.q", "b.q"]),
        (("q",), (), []),
    ],
)
def test_globs_are_of_full_names(only: tuple[str, ...], skip: tuple[str, ...], expected: list[str]) -> None:
    assert [name for name in ("a.q", "a.k", "b.q") if selected(name, only, skip)] == expected


def test_what_a_manifest_records_and_what_every_stage_takes() -> None:
    options = RunOptions(device="cpu", cache_dir=Path("somewhere"), seed=3)
    assert options.document() == {
        "device": "cpu",
        "dtype": "auto",
        "seed": 3,
        "revision": None,
        "trust_remote_code": False,
    }
    assert RunOptions(**options.run()) == options
    with pytest.raises(OptionError, match="--dtype 'float33' is none of auto, float32, bfloat16, float16"):
        replace(options, dtype="float33").check()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        ("5GB", 5 * 10**9),
        ("500 mb", 500 * 10**6),
        ("1.5GiB", 3 * 2**29),
        ("2K", 2000),
        ("7", 7),
        ("8000000000", 8 * 10**9),
        ("1TB", 10**12),
    ],
)
def test_sizes(size: str, nbytes: int) -> None:
    assert parse_size("--max-memory", size) == nbytes


@pytest.mark.parametrize("size", ["", "GB", "5XB", "-1GB", "0", "five", "5 G B", "1iB", "9" * 400])
def test_sizes_that_are_none(size: str) -> None:
    with pytest.raises(OptionError, match="is not a size; write it like 8GiB"):
        parse_size("--max-memory", size)
