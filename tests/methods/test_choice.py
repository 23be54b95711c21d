"""Which weights go: targets as they are given, and the rule for a matrix or for blocks of its columns."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimcli.errors import OptionError
from trimcli.methods import masks
from trimcli.methods.choice import Choice, Target, parse_pattern, uniform_target
from trimcli.methods.scores import SCORES
from trimcli.methods.stats import LinearStats
from trimcli.options import Numerics

Kept = list[list[bool]]

# --- targets ---------------------------------------------------------------------------------------------


def test_parse_pattern() -> None:
    assert parse_pattern("unstructured") is None
    assert parse_pattern("2:4") == (2, 4)
    assert parse_pattern("7:16") == (7, 16)


@pytest.mark.parametrize("text", ["4:2", "4:4", "0:4", "2-4", "2:4:8", "", " 2:4", "-1:4", "2:", "Unstructured"])
def test_parse_pattern_refuses_and_says_what_is_kept(text: str) -> None:
    with pytest.raises(OptionError, match="N is how many of every M consecutive weights are kept"):
        parse_pattern(text)


def test_the_uniform_target() -> None:
    assert uniform_target(0.7, "unstructured") == Target(0.7)
    assert uniform_target(None, "2:4") == Target(0.5, (2, 4))
    assert uniform_target(0.5, "2:4") == Target(0.5, (2, 4))
    assert uniform_target(0.25, "3:4") == Target(0.25, (3, 4))
    for sparsity, kind, message in (
        (None, "unstructured", "no target was given"),
        (0.6, "2:4", "2 kept of 4 implies 0.5"),
        (1.0, "unstructured", r"--sparsity 1.0 is outside \[0, 1\)"),
        (-0.1, "unstructured", "outside"),
        (float("nan"), "unstructured", "outside"),
        (0.5, "2:5:7", "neither 'unstructured' nor N:M"),
        (0.5, "4:2", "neither 'unstructured' nor N:M"),
    ):
        with pytest.raises(OptionError, match=message):
            uniform_target(sparsity, kind)


# --- the rule --------------------------------------------------------------------------------------------


def matrix(d_out: int, d_in: int, seed: int, *, ties: bool = False) -> tuple[Tensor, LinearStats]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator)
    if ties:
        weight = weight.mul(2).round()
    tokens = torch.randn(3 * d_in, d_in, generator=generator)
    return weight, LinearStats(sqnorm=tokens.square().sum(0), gram=tokens.T @ tokens)


def without_lowest(scores: list[float], count: int) -> list[bool]:
    going = sorted(range(len(scores)), key=lambda index: scores[index])[:count]
    return [index not in going for index in range(len(scores))]


def up_to(scores: list[float], sparsity: float) -> list[bool]:
    """The published rule: whatever is no more than the score at int(count * sparsity) goes."""
    cut = sorted(scores)[min(int(len(scores) * sparsity), len(scores) - 1)]
    return [score > cut for score in scores]


def shaped(flat: list[bool], width: int) -> Kept:
    return [flat[start : start + width] for start in range(0, len(flat), width)]


def expected(scores: Tensor, compare: str, before: int, target: Target, numerics: Numerics, *, whole: bool) -> Kept:
    """What a block of columns from `before` on keeps, from loops."""
    rows: list[list[float]] = scores.tolist()
    d_out, width = scores.shape
    flat = [score for row in rows for score in row]
    if target.pattern:
        kept, group = target.pattern
        parts = [flat[start : start + group] for start in range(0, len(flat), group)]
        return shaped([keep for part in parts for keep in without_lowest(part, group - kept)], width)
    if numerics == "reference" and whole and compare == "row":
        return [without_lowest(row, int(width * target.sparsity)) for row in rows]
    if numerics == "reference":
        return shaped(up_to(flat, target.sparsity), width)
    end = round(target.sparsity * d_out * (before + width))
    start = round(target.sparsity * d_out * before)
    if compare == "matrix":
        return shaped(without_lowest(flat, end - start), width)
    shares = [end // d_out + (row < end % d_out) - start // d_out - (row < start % d_out) for row in range(d_out)]
    return [without_lowest(row, count) for row, count in zip(rows, shares, strict=True)]


targets = st.one_of(
    st.floats(0, 1).map(Target),
    st.sampled_from([Target(0.5, (2, 4)), Target(0.75, (1, 4)), Target(0.25, (3, 4)), Target(0.5, (1, 2))]),
)


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 7),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 99),
    st.booleans(),
    st.sampled_from(["wanda", "magnitude", "obs"]),
    st.sampled_from(["exact", "reference"]),
    targets,
)
def test_a_matrix_and_its_blocks_of_columns_lose_what_the_loops_say(
    d_out: int, groups: int, step: int, seed: int, ties: bool, name: str, numerics: Any, target: Target
) -> None:
    d_in = 4 * groups
    weight, stats = matrix(d_out, d_in, seed, ties=ties)
    choice = Choice(SCORES[name], stats, target, numerics)
    scores = choice.scores(weight)
    assert torch.equal(scores, SCORES[name](weight, stats))
    compare = SCORES[name].compare
    whole = expected(scores, compare, 0, target, numerics, whole=True)
    assert choice.of_matrix(weight).tolist() == whole
    assert choice.pattern == target.pattern
    width = 4 * step
    for start in range(0, d_in, width):
        columns = slice(start, min(start + width, d_in))
        part = weight[:, columns]
        assert torch.equal(choice.scores(part, columns), scores[:, columns])
        block = expected(scores[:, columns], compare, start, target, numerics, whole=False)
        assert choice.of_columns(part, start).tolist() == block


@pytest.mark.parametrize("name", ["wanda", "magnitude", "obs"])
def test_a_mask_that_rows_have_chosen_is_the_mask(name: str) -> None:
    weight, stats = matrix(4, 8, 0)
    keep = masks.lowest_per_row(weight.abs(), torch.tensor([1, 2, 3, 4]))
    choice = replace(Choice(SCORES[name], stats, Target(0.5, (2, 4))), keep=keep)
    assert choice.of_matrix(weight) is keep
    assert choice.pattern is None


@pytest.mark.parametrize("name", ["wanda", "magnitude"])
@pytest.mark.parametrize("target", [Target(0.5), Target(0.5, (2, 4))])
def test_scores_that_are_nan_are_refused(name: str, target: Target) -> None:
    weight, stats = matrix(4, 8, 0)
    weight[1, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        Choice(SCORES[name], stats, target).of_matrix(weight)
