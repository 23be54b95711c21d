"""Pairing and swapping of mask entries against loops over Python lists."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimcli.errors import OptionError
from trimcli.methods.blocks import barber
from trimcli.methods.blocks.barber import rebuild
from trimcli.methods.blocks.options import BarberOptions
from trimcli.options import Numerics

Pattern = tuple[int, int]
Place = tuple[str, int, int]
Shapes = dict[str, tuple[int, int]]
Drawn = tuple[dict[Place, float], dict[Place, float], dict[Place, bool]]
T = TypeVar("T")

SHAPES: Shapes = {"q": (3, 8), "down": (4, 4)}


def places(shapes: Shapes) -> list[Place]:
    return [(name, k, c) for name, (rows, cols) in shapes.items() for k in range(rows) for c in range(cols)]


def units(shapes: Shapes, granularity: str) -> Iterator[list[Place]]:
    """The places of each unit, in index order."""
    keys: dict[str, Callable[[Place], object]] = {
        "block": lambda place: 0,
        "layer": lambda place: place[0],
        "output1": lambda place: place[:2],
        "input1": lambda place: (place[0], place[2]),
    }
    key = keys[granularity]
    everything = places(shapes)
    for value in dict.fromkeys(map(key, everything)):
        yield [place for place in everything if key(place) == value]


def pairing(
    unit: list[Place], worth: dict[Place, float], kept: dict[Place, bool], threshold: float
) -> tuple[list[Place], list[Place], int]:
    growth = sorted((p for p in unit if not kept[p]), key=lambda p: -worth[p])
    prune = sorted((p for p in unit if kept[p]), key=lambda p: worth[p])
    rewarding = sum(worth[g] > worth[p] for g, p in zip(growth, prune, strict=False))
    return growth, prune, int(rewarding * threshold)


def oracle(
    shapes: Shapes,
    worth: dict[Place, float],
    kept: dict[Place, bool],
    options: BarberOptions,
    numerics: Numerics,
    patterns: Mapping[str, Pattern | None] | None = None,
) -> dict[Place, bool]:
    """Linears with a pattern pair by row; those without are in units of their own kind."""
    patterned = {name: pattern for name, pattern in (patterns or {}).items() if pattern}
    free = {name: shape for name, shape in shapes.items() if name not in patterned}
    new = dict(kept)
    every: list[tuple[list[Place], Pattern | None]] = [(unit, None) for unit in units(free, options.granularity)]
    for name, own in patterned.items():
        every += [(unit, own) for unit in units({name: shapes[name]}, "output1")]
    for unit, pattern in every:
        growth, prune, count = pairing(unit, worth, kept, options.threshold)
        if not growth or not prune:
            continue
        if numerics == "exact":
            returns, goes = growth[:count], prune[:count]
        else:
            above = worth[growth[min(count, len(growth) - 1)]]
            below = worth[prune[min(count, len(prune) - 1)]]
            returns = [p for p in growth if worth[p] > above]
            goes = [p for p in prune if worth[p] < below]
        if pattern:
            chosen, returns, goes = set(returns), [], []
            for start in range(0, len(unit), pattern[1]):
                group = unit[start : start + pattern[1]]
                back = sorted((p for p in group if p in chosen), key=lambda p: -worth[p])
                out = sorted((p for p in group if kept[p]), key=lambda p: worth[p])
                returns += back[: len(out)]
                goes += out[: len(back)]
        new |= dict.fromkeys(returns, True) | dict.fromkeys(goes, False)
    return new


def as_tensors(shapes: Shapes, values: Mapping[Place, float], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        name: torch.tensor([[values[name, k, c] for c in range(cols)] for k in range(rows)], dtype=dtype)
        for name, (rows, cols) in shapes.items()
    }


def as_places(tensors: dict[str, Tensor]) -> dict[Place, bool]:
    return {
        (name, k, c): bool(tensor[k, c])
        for name, tensor in tensors.items()
        for k, c in itertools.product(*map(range, tensor.shape))
    }


# Few distinct values, so ties are the rule; roots and products are exact in float32.
LEVELS = [0.0, 0.25, 0.5, 1.0, 2.0]


@st.composite
def blocks(draw: st.DrawFn, shapes: Shapes = SHAPES) -> Drawn:
    everything = places(shapes)

    def drawn(values: st.SearchStrategy[T]) -> dict[Place, T]:
        every = draw(st.lists(values, min_size=len(everything), max_size=len(everything)))
        return dict(zip(everything, every, strict=True))

    weight = drawn(st.sampled_from([*LEVELS, *(-level for level in LEVELS)]))
    root = drawn(st.sampled_from(LEVELS))
    return weight, root, drawn(st.booleans())


thresholds = st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.5, 0.7, 1.0])
numerics = st.sampled_from(["exact", "reference"])


@settings(max_examples=60, deadline=None)
@given(blocks(), st.sampled_from(["block", "layer", "output1", "input1"]), thresholds, numerics)
def test_every_granularity_swaps_what_the_loop_swaps(
    block: Drawn, granularity: Any, threshold: float, numerics: Any
) -> None:
    weight, root, kept = block
    options = BarberOptions(granularity=granularity, threshold=threshold)
    dense, keep = as_tensors(SHAPES, weight), as_tensors(SHAPES, kept, torch.bool)
    gradients = {name: g.square() for name, g in as_tensors(SHAPES, root).items()}
    sparse = {name: dense[name] * keep[name] for name in dense}

    rebuilt = rebuild(dense, sparse, keep, gradients, {}, options, numerics)

    worth = {place: abs(weight[place]) * root[place] for place in weight}
    assert as_places(rebuilt.keep) == oracle(SHAPES, worth, kept, options, numerics)
    nothing = dict.fromkeys(SHAPES)
    same = rebuild(dense, sparse, keep, gradients, nothing, options, numerics)
    assert as_places(same.keep) == as_places(rebuilt.keep)
    if numerics == "exact":
        new = as_places(rebuilt.keep)
        for unit in units(SHAPES, granularity):
            assert sum(new[p] for p in unit) == sum(kept[p] for p in unit)


@settings(max_examples=60, deadline=None)
@given(blocks(), st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2)]), thresholds, numerics)
def test_patterns_keep_their_groups(block: Drawn, pattern: tuple[int, int], threshold: float, numerics: Any) -> None:
    weight, root, kept = block
    kept_per_group, group = pattern
    # No group keeps more than the pattern lets it.
    kept = {
        (name, k, c): here and sum(kept[name, k, i] for i in range(c - c % group, c)) < kept_per_group
        for (name, k, c), here in kept.items()
    }
    options, patterns = BarberOptions(threshold=threshold), dict.fromkeys(SHAPES, pattern)
    dense, keep = as_tensors(SHAPES, weight), as_tensors(SHAPES, kept, torch.bool)
    gradients = {name: g.square() for name, g in as_tensors(SHAPES, root).items()}

    rebuilt = rebuild(dense, dense, keep, gradients, patterns, options, numerics)

    worth = {place: abs(weight[place]) * root[place] for place in weight}
    assert as_places(rebuilt.keep) == oracle(SHAPES, worth, kept, options, numerics, patterns)
    for name, new in rebuilt.keep.items():
        counts = new.view(-1, group).sum(1)
        assert torch.equal(counts, keep[name].view(-1, group).sum(1))


MIXED: Shapes = {"q": (3, 8), "k": (2, 8), "up": (4, 6), "down": (4, 4)}
ANY_PATTERN: st.SearchStrategy[Pattern | None] = st.sampled_from([None, (1, 2), (1, 4), (2, 4), (3, 4)])


@settings(max_examples=80, deadline=None)
@given(
    blocks(MIXED),
    st.fixed_dictionaries({"q": ANY_PATTERN, "k": ANY_PATTERN, "up": st.sampled_from([None, (1, 2), (2, 3)])}),
    st.sampled_from(["block", "layer", "output1", "input1"]),
    thresholds,
    numerics,
)
def test_every_linear_of_a_block_has_a_pattern_of_its_own_or_none(
    block: Drawn, patterns: dict[str, Pattern | None], granularity: Any, threshold: float, numerics: Any
) -> None:
    weight, root, kept = block
    for (name, k, c), here in list(kept.items()):
        if pattern := patterns.get(name):
            room = sum(kept[name, k, i] for i in range(c - c % pattern[1], c)) < pattern[0]
            kept[name, k, c] = here and room
    options = BarberOptions(granularity=granularity, threshold=threshold)
    dense, keep = as_tensors(MIXED, weight), as_tensors(MIXED, kept, torch.bool)
    gradients = {name: g.square() for name, g in as_tensors(MIXED, root).items()}

    rebuilt = rebuild(dense, dense, keep, gradients, patterns, options, numerics)

    worth = {place: abs(weight[place]) * root[place] for place in weight}
    assert as_places(rebuilt.keep) == oracle(MIXED, worth, kept, options, numerics, patterns)
    for name, pattern in patterns.items():
        if pattern:
            counts = rebuilt.keep[name].view(-1, pattern[1]).sum(1)
            assert torch.equal(counts, keep[name].view(-1, pattern[1]).sum(1))
            assert int(counts.max()) <= pattern[0]
    assert rebuilt.weight.keys() == rebuilt.keep.keys() == rebuilt.swapped.keys() == MIXED.keys()
    for name in MIXED:
        assert torch.equal(rebuilt.weight[name], dense[name] * rebuilt.keep[name])
        assert rebuilt.swapped[name] == int((rebuilt.keep[name] & ~keep[name]).sum())


def test_linears_without_a_pattern_make_a_block_by_themselves() -> None:
    """The best pruned weight of the block is in the patterned linear, where only its own group makes room."""
    dense = {
        "a": torch.tensor([[1.0, 9.0, 2.0, 3.0]]),
        "b": torch.tensor([[4.0, 5.0]]),
        "c": torch.tensor([[6.0, 1.0]]),
    }
    keep = {
        "a": torch.tensor([[True, False, False, True]]),
        "b": torch.tensor([[True, False]]),
        "c": torch.tensor([[False, True]]),
    }
    options = BarberOptions(granularity="block", metric="W", threshold=1.0)
    rebuilt = rebuild(dense, dense, keep, None, {"a": (1, 2), "b": None}, options)
    # a: the pair (9, 1) swaps, the pair (2, 3) does not. b and c: the pairs (6, 1) and (5, 4) swap.
    assert {name: new.tolist() for name, new in rebuilt.keep.items()} == {
        "a": [[False, True, False, True]],
        "b": [[False, True]],
        "c": [[True, False]],
    }


@pytest.mark.parametrize(
    ("metric", "kept"), [("WD", [False, True, False]), ("W", [False, False, True]), ("D", [True, False, False])]
)
def test_metrics_rank_weights(metric: Any, kept: list[bool]) -> None:
    dense = {"q": torch.tensor([[0.1, 2.0, -3.0]])}
    gradients = {"q": torch.tensor([[16.0, 4.0, 1.0]])}
    sparse_keep = {"q": torch.tensor([[metric == "W", metric == "D", metric == "WD"]])}
    options = BarberOptions(metric=metric, threshold=1.0)
    rebuilt = rebuild(dense, dense, sparse_keep, gradients, {}, options)
    assert rebuilt.keep["q"].tolist() == [kept]
    assert torch.equal(rebuilt.weight["q"], dense["q"] * rebuilt.keep["q"])
    assert rebuilt.swapped == {"q": 1}


def test_retained_reconstruction_enters_the_metric_and_the_weights() -> None:
    dense = {"q": torch.tensor([[1.0, 2.0, 3.0, 4.0]])}
    sparse = {"q": torch.tensor([[0.0, 5.0, 0.0, 0.5]])}
    keep = {"q": torch.tensor([[False, True, False, True]])}
    retained = rebuild(
        dense, sparse, keep, None, {}, BarberOptions(metric="W", threshold=1.0, retain_reconstruction=True)
    )
    # Worth 1, 5, 3, 0.5: the pair (3, 0.5) swaps, the pair (1, 5) does not.
    assert retained.weight["q"].tolist() == [[0.0, 5.0, 3.0, 0.0]]
    plain = rebuild(dense, sparse, keep, None, {}, BarberOptions(metric="W", threshold=1.0))
    # Worth 1, 2, 3, 4: the pair (3, 2) swaps, and what is kept has its dense value.
    assert plain.weight["q"].tolist() == [[0.0, 0.0, 3.0, 4.0]]


@pytest.mark.parametrize("numerics", ["exact", "reference"])
@pytest.mark.parametrize("granularity", ["block", "layer", "output1", "input1"])
@pytest.mark.parametrize("everything_kept", [True, False])
def test_an_empty_side_changes_nothing(granularity: Any, numerics: Any, everything_kept: bool) -> None:
    dense = {"q": torch.randn(4, 8, generator=torch.Generator().manual_seed(0))}
    keep = {"q": torch.full((4, 8), everything_kept)}
    options = BarberOptions(granularity=granularity, metric="W", threshold=1.0)
    for patterns in ({}, {"q": (2, 4)}):
        rebuilt = rebuild(dense, dense, keep, None, patterns, options, numerics)
        assert torch.equal(rebuilt.keep["q"], keep["q"])
        assert rebuilt.swapped == {"q": 0}


@pytest.mark.parametrize("granularity", ["output1", "input1"])
def test_chunks_do_not_show(granularity: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    dense = {"q": torch.randn(24, 16, generator=generator)}
    keep = {"q": torch.rand(24, 16, generator=generator) > 0.5}
    gradients = {"q": torch.rand(24, 16, generator=generator)}
    for pattern in (None, (2, 4)):
        options, patterns = BarberOptions(granularity=granularity, threshold=0.5), {"q": pattern}
        whole = rebuild(dense, dense, keep, gradients, patterns, options)
        with monkeypatch.context() as patch:
            patch.setattr(barber, "_CHUNK", 50)
            parts = rebuild(dense, dense, keep, gradients, patterns, options)
        assert torch.equal(whole.keep["q"], parts.keep["q"])


def test_weights_keep_the_dense_dtype_and_inputs_stay() -> None:
    dense = {"q": torch.tensor([[1.0, 2.0]], dtype=torch.float16)}
    keep = {"q": torch.tensor([[True, False]])}
    granularities: list[Literal["block", "output1"]] = ["block", "output1"]
    for granularity in granularities:
        rebuilt = rebuild(
            dense, dense, keep, None, {}, BarberOptions(granularity=granularity, metric="W", threshold=1.0)
        )
        assert rebuilt.weight["q"].dtype == torch.float16
        assert rebuilt.weight["q"].tolist() == [[0.0, 2.0]]
    assert dense["q"].tolist() == [[1.0, 2.0]]
    assert keep["q"].tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"granularity": "row"}, "--prune-granularity 'row' is none of block, layer"),
        ({"metric": "G"}, "--prune-metric 'G' is none of WD, W, D"),
        ({"threshold": 1.5}, r"--threshold 1\.5"),
        ({"threshold": float("nan")}, "--threshold nan"),
    ],
)
def test_unusable_options(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        BarberOptions(**values)


def test_a_metric_without_its_gradients() -> None:
    dense = {"q": torch.ones(1, 2)}
    keep = {"q": torch.tensor([[True, False]])}
    with pytest.raises(OptionError, match="--prune-metric WD needs gradients"):
        rebuild(dense, dense, keep, None, {}, BarberOptions())


def test_a_pattern_needs_whole_groups() -> None:
    dense = {"q": torch.ones(2, 6)}
    keep = {"q": torch.ones(2, 6, dtype=torch.bool)}
    with pytest.raises(OptionError, match="2:4 needs whole groups, and 6 inputs"):
        rebuild(dense, dense, keep, None, {"q": (2, 4)}, BarberOptions(metric="W"))


@pytest.mark.parametrize("numerics", ["exact", "reference"])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("granularity", ["block", "layer", "output1", "input1"])
def test_weights_stored_transposed_are_no_different(
    granularity: Any, pattern: tuple[int, int] | None, numerics: Any
) -> None:
    generator = torch.Generator().manual_seed(2)
    dense = torch.randint(-3, 4, (12, 8), generator=generator).float()
    keep = torch.tensor([[True, False, False, True], [False, True, True, False]]).repeat(6, 2)
    gradients = torch.randint(0, 4, (12, 8), generator=generator).float()
    options, patterns = BarberOptions(granularity=granularity, threshold=0.8), {"q": pattern}
    plain = rebuild({"q": dense}, {"q": dense}, {"q": keep}, {"q": gradients}, patterns, options, numerics)
    dense, keep, gradients = (tensor.T.contiguous().T for tensor in (dense, keep, gradients))
    stored = rebuild({"q": dense}, {"q": dense}, {"q": keep}, {"q": gradients}, patterns, options, numerics)
    assert plain.swapped["q"] > 0
    assert torch.equal(plain.keep["q"], stored.keep["q"])
    assert torch.equal(plain.weight["q"], stored.weight["q"])
