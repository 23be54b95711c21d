"""SparseGPT against the exact OBS recursion, its budgets, and Grams that do not factorise."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from trimcli.errors import OptionError, TrimError
from trimcli.methods import masks
from trimcli.methods.choice import Choice, Target, uniform_target
from trimcli.methods.scores import SCORES
from trimcli.methods.stats import LinearStats
from trimcli.methods.updates.base import UPDATES
from trimcli.methods.updates.obs import ObsOptions, factor_of, obs, obs_scores
from trimcli.methods.updates.obs_solver import DampingReport, Factor, factorise
from trimcli.options import Numerics

Array = NDArray[np.float64]
KeepRule = Callable[[Array, Array, int], NDArray[np.bool_]]
MaskUpdate = Literal["once", "block"]


@dataclass(frozen=True)
class Pruned:
    """What became of a matrix, and what it took to factorise its Gram."""

    weight: Tensor
    keep: Tensor
    report: DampingReport
    remarks: tuple[str, ...]


def stats_of(gram: Tensor | Factor, sqnorm: Tensor | None = None, damping: float = 0.01) -> LinearStats:
    """The statistics of a linear whose Gram is given or, as of linears that share an input, factorised already."""
    if not isinstance(gram, Factor):
        return LinearStats(gram=gram, sqnorm=sqnorm)
    stats, factor = LinearStats(gram=torch.full_like(gram.upper, torch.nan), sqnorm=sqnorm), gram
    stats.once(("factor", damping), lambda _: factor)
    return stats


def sparsegpt(
    weight: Tensor,
    gram: Tensor | Factor,
    *,
    sparsity: float = 0.0,
    pattern: tuple[int, int] | None = None,
    row_counts: Tensor | None = None,
    sqnorm: Tensor | None = None,
    numerics: Numerics = "exact",
    options: ObsOptions | None = None,
) -> Pruned:
    """Prune one matrix by OBS under one budget: a sparsity, N:M, or how many weights go from each row."""
    options = options or ObsOptions()
    stats = stats_of(gram, sqnorm, options.damping)
    score = SCORES[options.mask_score or "obs"]
    own = options if score.options is ObsOptions else None
    choice = Choice(score, stats, Target(sparsity, pattern), numerics, own)
    if row_counts is not None:
        choice = replace(choice, keep=masks.lowest_per_row(choice.scores(weight), row_counts))
    made = obs(weight, choice, options)
    assert made.weight is not None
    return Pruned(made.weight, made.keep, factor_of(stats, options.damping).report, made.remarks)


def problem(seed: int, d_out: int = 6, d_in: int = 24, samples: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, inputs with correlated channels of unequal size, and the Gram of those inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d_in, d_in, generator=generator) / d_in**0.5 + torch.eye(d_in)
    inputs = torch.randn(samples, d_in, generator=generator) @ mixing
    inputs *= torch.rand(d_in, generator=generator) * 3 + 0.2
    return torch.randn(d_out, d_in, generator=generator), inputs, 2 * inputs.T @ inputs / samples


def damped(gram: Tensor, damping: float = 0.01) -> Array:
    found: Array = gram.double().numpy().copy()
    found[np.diag_indices(len(found))] += damping * found.diagonal().mean()
    return found


def remaining_inverse(hessian: Array, column: int) -> Array:
    """Inverse of the Hessian of the columns from `column` on, the others being frozen."""
    inverse: Array = np.linalg.inv(hessian[column:, column:]).astype(np.float64)
    return inverse


def exact_obs(weight: Tensor, hessian: Array, rule: KeepRule, stride: int) -> tuple[Array, NDArray[np.bool_]]:
    """The OBS recursion one weight at a time; `rule` gives the keep mask of the next `stride` columns.

    The rule gets those columns' weights as updated so far, the corners of their remaining inverses, and where
    they start.
    """
    updated = weight.double().numpy().copy()
    keep = np.ones(updated.shape, dtype=bool)
    corners = np.array([remaining_inverse(hessian, c)[0, 0] for c in range(len(hessian))])
    for column in range(len(hessian)):
        if column % stride == 0:
            reached = slice(column, column + stride)
            keep[:, reached] = rule(updated[:, reached], corners[reached], column)
        inverse = remaining_inverse(hessian, column)
        for row in np.flatnonzero(~keep[:, column]):
            updated[row, column:] -= updated[row, column] / inverse[0, 0] * inverse[0]
            updated[row, column] = 0.0
    return updated, keep


def without_lowest(scores: Array, count: int) -> NDArray[np.bool_]:
    keep = np.ones(scores.size, dtype=bool)
    keep[np.argsort(scores.ravel(), kind="stable")[:count]] = False
    return keep.reshape(scores.shape)


def assert_same(weight: Tensor, keep: Tensor, expected: tuple[Array, NDArray[np.bool_]]) -> None:
    assert weight.dtype == torch.float32
    assert keep.dtype == torch.bool
    np.testing.assert_array_equal(keep.numpy(), expected[1])
    np.testing.assert_allclose(weight.numpy(), expected[0], rtol=2e-4, atol=2e-5)
    assert (weight[~keep] == 0).all()


@pytest.mark.parametrize("block_size", [1, 5, 8, 24, 128])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.75, 1.0])
def test_unstructured_is_the_exact_recursion(block_size: int, sparsity: float) -> None:
    weight, _, gram = problem(1)
    d_out = weight.shape[0]

    def rule(columns: Array, corners: Array, start: int) -> NDArray[np.bool_]:
        end = start + columns.shape[1]
        count = round(sparsity * d_out * end) - round(sparsity * d_out * start)
        return without_lowest(columns**2 / corners, count)

    found = sparsegpt(weight, gram, sparsity=sparsity, options=ObsOptions(block_size=block_size))
    assert_same(found.weight, found.keep, exact_obs(weight, damped(gram), rule, block_size))


@pytest.mark.parametrize(("kept", "group", "block_size"), [(2, 4, 8), (2, 4, 128), (1, 4, 4), (5, 8, 16), (1, 2, 6)])
def test_n_of_m_is_the_exact_recursion(kept: int, group: int, block_size: int) -> None:
    weight, _, gram = problem(2)

    def rule(columns: Array, corners: Array, _start: int) -> NDArray[np.bool_]:
        return np.stack([without_lowest(row, group - kept) for row in columns**2 / corners])

    found = sparsegpt(weight, gram, pattern=(kept, group), options=ObsOptions(block_size=block_size))
    assert_same(found.weight, found.keep, exact_obs(weight, damped(gram), rule, group))
    assert (found.keep.unflatten(1, (-1, group)).sum(-1) == kept).all()


@pytest.mark.parametrize("block_size", [7, 24])
@pytest.mark.parametrize("score", ["obs", "wanda", "magnitude"])
def test_row_counts_are_met_and_updated_exactly(score: str, block_size: int) -> None:
    weight, inputs, gram = problem(3)
    counts = torch.tensor([0, 24, 12, 5, 20, 1])
    sqnorm = inputs.square().sum(0)
    plain = weight.double().numpy()
    norms = sqnorm.double().numpy()

    def rule(columns: Array, corners: Array, _start: int) -> NDArray[np.bool_]:
        scores = {"obs": columns**2 / corners, "wanda": abs(plain) * norms**0.5, "magnitude": abs(plain)}[score]
        return np.stack([without_lowest(row, int(n)) for row, n in zip(scores, counts, strict=True)])

    options = ObsOptions(block_size=block_size, mask_score=score)
    found = sparsegpt(weight, gram, row_counts=counts, sqnorm=sqnorm, options=options)
    assert_same(found.weight, found.keep, exact_obs(weight, damped(gram), rule, 24))
    assert torch.equal((~found.keep).sum(1), counts)


@pytest.mark.parametrize("update", ["once", "block"])
@pytest.mark.parametrize("score", ["obs", "wanda", "magnitude"])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_every_score_chosen_once_or_in_blocks(score: str, update: MaskUpdate, pattern: tuple[int, int] | None) -> None:
    weight, inputs, gram = problem(4, d_out=5)
    sqnorm = inputs.square().sum(0)
    norms = sqnorm.double().numpy()

    def rule(columns: Array, corners: Array, start: int) -> NDArray[np.bool_]:
        end = start + columns.shape[1]
        scores = {"obs": columns**2 / corners, "wanda": abs(columns) * norms[start:end] ** 0.5}.get(score, abs(columns))
        if pattern is not None:
            groups = scores.reshape(-1, 4)
            return np.stack([without_lowest(group, 2) for group in groups]).reshape(scores.shape)
        gone, before = round(0.55 * 5 * end), round(0.55 * 5 * start)
        if score != "wanda":
            return without_lowest(scores, gone - before)
        shares = [gone // 5 + (k < gone % 5) - before // 5 - (k < before % 5) for k in range(5)]
        return np.stack([without_lowest(row, n) for row, n in zip(scores, shares, strict=True)])

    stride = 24 if update == "once" else 4 if pattern else 8
    options = ObsOptions(block_size=8, mask_score=score, mask_update=update)
    found = sparsegpt(weight, gram, sparsity=0.0 if pattern else 0.55, pattern=pattern, sqnorm=sqnorm, options=options)
    assert_same(found.weight, found.keep, exact_obs(weight, damped(gram), rule, stride))


@pytest.mark.parametrize(("score", "published"), [("obs", "block"), ("wanda", "once"), ("magnitude", "once")])
def test_published_mask_update_is_the_default(score: str, published: MaskUpdate) -> None:
    weight, inputs, gram = problem(5)
    sqnorm = inputs.square().sum(0)
    choices: tuple[MaskUpdate | None, ...] = (None, "once", "block")
    found = {
        update: sparsegpt(
            weight,
            gram,
            sparsity=0.5,
            sqnorm=sqnorm,
            options=ObsOptions(block_size=8, mask_score=score, mask_update=update),
        ).weight
        for update in choices
    }
    assert torch.equal(found[None], found[published])
    assert not torch.equal(found["once"], found["block"])


def test_reference_threshold_takes_everything_up_to_it_in_every_block() -> None:
    weight, _, gram = problem(6, d_out=7, d_in=20)

    def rule(columns: Array, corners: Array, _start: int) -> NDArray[np.bool_]:
        scores = columns**2 / corners
        return scores > np.sort(scores.ravel())[int(scores.size * 0.5)]

    found = sparsegpt(weight, gram, sparsity=0.5, numerics="reference", options=ObsOptions(block_size=8))
    assert_same(found.weight, found.keep, exact_obs(weight, damped(gram), rule, 8))
    assert int((~found.keep).sum()) == 29 + 29 + 15


@pytest.mark.parametrize("block_size", [8, 128])
def test_reference_wanda_chosen_once_takes_the_floor_of_every_row(block_size: int) -> None:
    weight, inputs, gram = problem(7, d_in=20)
    sqnorm = inputs.square().sum(0)
    options = ObsOptions(block_size=block_size, mask_score="wanda", mask_update="once")
    found = sparsegpt(weight, gram, sparsity=0.57, sqnorm=sqnorm, numerics="reference", options=options)
    assert (~found.keep).sum(1).tolist() == [int(20 * 0.57)] * 6
    expected = SCORES["wanda"](weight, LinearStats(sqnorm=sqnorm)).argsort(dim=1)[:, : int(20 * 0.57)]
    assert torch.equal((~found.keep).nonzero()[:, 1].view(6, -1), expected.sort(dim=1).values)


@pytest.mark.parametrize("block_size", [1, 3, 8, 20, 128])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.57, 0.9])
@pytest.mark.parametrize("score", ["wanda", "magnitude", "obs"])
def test_reference_numerics_cut_every_block_at_one_score_of_all_its_rows(
    score: str, sparsity: float, block_size: int
) -> None:
    """As the published ablation: a block sorted as a whole, and what is no more than one of its scores goes."""
    weight, inputs, gram = problem(7, d_in=20)
    sqnorm = inputs.square().sum(0)
    norms = sqnorm.double().numpy()
    gone = 0

    def rule(columns: Array, corners: Array, start: int) -> NDArray[np.bool_]:
        nonlocal gone
        rows, width = columns.shape
        scores = [
            {
                "wanda": abs(columns[k, c]) * norms[start + c] ** 0.5,
                "magnitude": abs(columns[k, c]),
                "obs": columns[k, c] ** 2 / corners[c],
            }[score]
            for k in range(rows)
            for c in range(width)
        ]
        cut = sorted(scores)[int(len(scores) * sparsity)]
        gone += sum(value <= cut for value in scores)
        return np.array([value > cut for value in scores]).reshape(rows, width)

    options = ObsOptions(block_size=block_size, mask_score=score, mask_update="block")
    found = sparsegpt(weight, gram, sparsity=sparsity, sqnorm=sqnorm, numerics="reference", options=options)
    assert_same(found.weight, found.keep, exact_obs(weight, damped(gram), rule, block_size))
    assert int((~found.keep).sum()) == gone
    widths = [min(block_size, 20 - start) for start in range(0, 20, block_size)]
    assert gone == sum(int(6 * width * sparsity) + 1 for width in widths)


def test_reference_wanda_lets_equal_scores_of_a_block_go_together() -> None:
    options = ObsOptions(block_size=4, mask_score="wanda", mask_update="block")
    weight = torch.tensor([[1.0, 2.0, 2.0, 3.0], [2.0, 2.0, 4.0, 5.0]]).repeat(1, 2)
    found = sparsegpt(weight, torch.eye(8), sparsity=0.25, sqnorm=torch.ones(8), numerics="reference", options=options)
    assert found.keep.int().tolist() == [[0, 0, 0, 1] * 2, [0, 0, 1, 1] * 2]


def test_pruned_columns_before_kept_ones_give_the_least_squares_optimum() -> None:
    weight, _, gram = problem(8, d_out=4, d_in=16)
    weight = weight.sign() + weight / 10
    weight[:, :7] /= 10  # the lowest magnitudes all lie to the left of what stays
    options = ObsOptions(block_size=4, mask_score="magnitude")
    found = sparsegpt(weight, gram, sparsity=7 / 16, options=options)
    assert not found.keep[:, :7].any()
    hessian = damped(gram)
    dense = weight.double().numpy()
    moved = np.linalg.solve(hessian[7:, 7:], hessian[7:, :7] @ dense[:, :7].T).T
    np.testing.assert_allclose(found.weight[:, 7:].numpy(), dense[:, 7:] + moved, rtol=1e-4, atol=1e-6)


def test_update_beats_the_mask_alone() -> None:
    weight, inputs, gram = problem(9, d_out=12, d_in=48, samples=200)
    found = sparsegpt(weight, gram, sparsity=0.6)
    target = inputs @ weight.T
    updated = (inputs @ found.weight.T - target).square().sum()
    masked = (inputs @ (weight * found.keep).T - target).square().sum()
    assert updated < masked


@settings(max_examples=40, deadline=None)
@given(
    d_out=st.integers(1, 9),
    d_in=st.integers(1, 20),
    block_size=st.integers(1, 24),
    sparsity=st.floats(0, 1),
    score=st.sampled_from(["obs", "wanda", "magnitude"]),
    update=st.sampled_from(["once", "block"]),
    ties=st.booleans(),
)
def test_exact_numerics_meet_the_budget(
    d_out: int, d_in: int, block_size: int, sparsity: float, score: str, update: MaskUpdate, ties: bool
) -> None:
    weight, inputs, gram = problem(10, d_out, d_in)
    if ties:
        weight, gram = torch.ones_like(weight), torch.eye(d_in)
    options = ObsOptions(block_size=block_size, mask_score=score, mask_update=update)
    found = sparsegpt(weight, gram, sparsity=sparsity, sqnorm=inputs.square().sum(0), options=options)
    gone = ~found.keep
    assert int(gone.sum()) == round(sparsity * d_out * d_in)
    assert (found.weight[gone] == 0).all()
    if score == "wanda":
        assert int(gone.sum(1).max() - gone.sum(1).min()) <= 1
    if update == "block":
        for end in range(block_size, d_in, block_size):
            assert int(gone[:, :end].sum()) == round(sparsity * d_out * end)


def test_equal_scores_go_in_index_order() -> None:
    found = sparsegpt(torch.ones(3, 8), torch.eye(8), sparsity=0.5, options=ObsOptions(block_size=4))
    assert found.keep.int().tolist() == [[0, 0, 0, 0] * 2, [0, 0, 1, 1] * 2, [1, 1, 1, 1] * 2]


def test_arguments_stay_as_they_are_and_layout_does_not_matter() -> None:
    weight, _, gram = problem(11)
    before = weight.clone(), gram.clone()
    plain = sparsegpt(weight, gram, sparsity=0.5)
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])
    parameter = torch.nn.Parameter(weight.T.contiguous())
    transposed = sparsegpt(parameter.T, gram, sparsity=0.5)
    assert torch.equal(transposed.weight, plain.weight)
    assert transposed.weight.is_contiguous()
    assert not transposed.weight.requires_grad
    half = sparsegpt(weight.bfloat16(), gram, sparsity=0.5)
    assert half.weight.dtype == torch.float32


def test_a_shared_factor_gives_what_the_gram_gives() -> None:
    weight, _, gram = problem(12)
    other, _, _ = problem(13, d_out=3)
    factor = factorise(gram, 0.05)
    options = ObsOptions(damping=0.05)
    for one in (weight, other):
        from_gram = sparsegpt(one, gram, sparsity=0.5, options=options)
        from_factor = sparsegpt(one, factor, sparsity=0.5, options=options)
        assert torch.equal(from_factor.weight, from_gram.weight)
        assert from_factor.report == from_gram.report
    stats = LinearStats(gram=gram)
    kept = factor_of(stats, 0.05)
    assert torch.equal(kept.upper, factor.upper)
    assert factor_of(stats, 0.05) is kept
    assert factor_of(stats.with_(sqnorm=torch.ones(24)), 0.05) is kept
    assert factor_of(stats.of(slice(3, 9)), 0.05) is kept
    assert factor_of(stats, 0.01) is not kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [1e-3, 0.01, 1.0])
def test_factor_is_the_cholesky_factor_of_the_inverse(dtype: torch.dtype, damping: float) -> None:
    _, _, gram = problem(14)
    factor = factorise(gram.to(dtype), damping)
    expected = np.linalg.cholesky(np.linalg.inv(damped(gram, damping))).T
    np.testing.assert_allclose(factor.upper.numpy(), expected, rtol=1e-3, atol=1e-5)
    report = factor.report
    name = "float32" if dtype == torch.float32 else "float64"
    assert report == DampingReport(damping, damping, report.added, 1, name, 0)
    assert report.added == pytest.approx(damping * gram.diagonal().mean().item())
    assert report.remarks == ()


def test_obs_scores_divide_by_the_remaining_inverse() -> None:
    weight, _, gram = problem(15)
    corners = [remaining_inverse(damped(gram), c)[0, 0] for c in range(24)]
    expected = weight.double().numpy() ** 2 / np.array(corners)
    stats = LinearStats(gram=gram)
    scores = obs_scores(weight, stats, ObsOptions())
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-3)
    columns = slice(5, 11)
    assert torch.equal(obs_scores(weight[:, columns], stats.of(columns), ObsOptions()), scores[:, columns])


def test_obs_says_what_it_reads() -> None:
    for entry in (SCORES["obs"], UPDATES["obs"]):
        assert entry.needs == {"gram"}
        assert entry.options is ObsOptions
        assert "Frantar & Alistarh 2023" in entry.source
    assert SCORES["obs"].compare == "matrix"
    assert UPDATES["obs"].changes
    assert not UPDATES["none"].changes
    weight, _, gram = problem(15)
    assert torch.equal(SCORES["obs"](weight, LinearStats(gram=gram)), obs_scores(weight, stats_of(gram), ObsOptions()))


def test_dead_columns_go_first_and_are_reported() -> None:
    weight, inputs, _ = problem(16)
    dead = [3, 10, 11]
    inputs[:, dead] = 0.0
    weight[:, dead] = 100.0
    gram = 2 * inputs.T @ inputs / len(inputs)
    factor = factorise(gram)
    assert factor.dead.nonzero().flatten().tolist() == dead
    assert factor.report.dead_columns == 3
    assert factor.report.remarks == ("3 input channels never fire; their weights became zero.",)
    assert (obs_scores(weight, stats_of(factor), ObsOptions())[:, dead] == 0).all()
    found = sparsegpt(weight, gram, sparsity=0.5)
    assert found.remarks == factor.report.remarks
    assert not found.keep[:, dead].any()
    assert (found.weight[:, dead] == 0).all()
    assert int((~found.keep).sum()) == round(0.5 * weight.numel())

    alive = [c for c in range(24) if c not in dead]  # what fires is pruned as if nothing else were there
    lean = torch.eye(24)[:, alive]
    mean = (gram.diagonal().sum().item() + 3) / 24
    damping = 0.01 * mean / (gram.diagonal().sum().item() / 21)
    counts = (~found.keep[:, alive]).sum(1)
    once = ObsOptions(damping=damping)
    alone = sparsegpt(weight @ lean, gram[alive][:, alive], row_counts=counts, options=once)
    together = sparsegpt(weight, factor, row_counts=counts + 3)
    assert torch.equal(together.keep[:, alive], alone.keep)
    torch.testing.assert_close(together.weight[:, alive], alone.weight, rtol=1e-4, atol=1e-5)


def test_more_dead_columns_than_the_budget_has_room_for() -> None:
    weight, inputs, _ = problem(17)
    inputs[:, :20] = 0.0
    found = sparsegpt(weight, inputs.T @ inputs, sparsity=0.25)
    assert int((~found.keep).sum()) == round(0.25 * weight.numel())
    assert found.keep[:, 20:].all()
    assert (found.weight[:, :20] == 0).all()


def test_a_gram_of_nothing_but_dead_columns() -> None:
    weight, _, _ = problem(18)
    found = sparsegpt(weight, torch.zeros(24, 24), pattern=(2, 4))
    assert (found.weight == 0).all()
    assert (found.keep.sum(1) == 12).all()
    assert found.report.dead_columns == 24
    assert found.report.added == pytest.approx(0.01)


@pytest.mark.parametrize("damping", [1e-8, 0.01])
def test_a_singular_gram_is_pruned(damping: float) -> None:
    weight, inputs, _ = problem(19, d_in=40)
    few = inputs[:5]
    found = sparsegpt(weight, few.T @ few, sparsity=0.5, options=ObsOptions(damping=damping))
    assert torch.isfinite(found.weight).all()
    assert int((~found.keep).sum()) == 120
    if damping < 1e-6:  # below what float32 resolves
        assert found.report.attempts > 1
        assert found.report.dtype == "float64"


def test_a_gram_that_is_not_positive_definite_climbs_the_ladder() -> None:
    weight, _, gram = problem(20)
    scale = gram.diagonal().rsqrt()
    gram = gram * scale * scale[:, None] * 2  # correlations that are too large, some beyond 1
    gram.fill_diagonal_(1.0)
    assert -1 < torch.linalg.eigvalsh(gram)[0] < -0.1
    report = factorise(gram, 0.01).report
    assert report.requested == 0.01
    assert report.damping == pytest.approx(1.0)
    assert report.added == pytest.approx(1.0)
    assert (report.attempts, report.dtype) == (3, "float64")
    assert report.remarks == (
        "the Gram could not be factorised with damping 0.01; damping 1 in float64 held at attempt 3.",
    )

    def rule(columns: Array, corners: Array, start: int) -> NDArray[np.bool_]:
        return without_lowest(columns**2 / corners, columns.size // 2)

    found = sparsegpt(weight, gram, sparsity=0.5, options=ObsOptions(block_size=8))
    assert_same(found.weight, found.keep, exact_obs(weight, damped(gram, 1.0), rule, 8))


def test_a_gram_that_no_damping_mends_is_refused() -> None:
    gram = torch.eye(4)
    gram[0, 1] = gram[1, 0] = 1e6
    with pytest.raises(TrimError, match=r"in float64 with damping 1000; .*--method wanda"):
        factorise(gram, 0.01)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gram_that_is_not_finite_is_refused(value: float) -> None:
    gram = torch.eye(4)
    gram[2, 1] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        factorise(gram)


def test_matrices_that_are_no_gram_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        factorise(torch.ones(2, 3))
    with pytest.raises(ValueError, match="diagonal holds -1"):
        factorise(torch.diag(torch.tensor([1.0, -1.0])))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"damping": 0.0}, "--damping 0 must be"),
        ({"damping": float("nan")}, "--damping nan must be"),
        ({"damping": float("inf")}, "--damping inf must be"),
        ({"block_size": 0}, "--block-size 0"),
        ({"mask_score": "taylor"}, "--mask-score 'taylor' is none of wanda, magnitude, obs"),
        ({"mask_update": "never"}, "--mask-update 'never' is none of once, block"),
    ],
)
def test_options_out_of_range_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ObsOptions(**values)  # type: ignore[arg-type]


def test_options_that_do_not_go_together_are_refused() -> None:
    weight, _, gram = problem(21)
    blockwise = ObsOptions(mask_update="block")
    with pytest.raises(
        OptionError, match=r"--mask-update block does not go with row sparsities, .* use --mask-update once"
    ):
        sparsegpt(weight, gram, row_counts=torch.full((6,), 3), options=blockwise)
    with pytest.raises(OptionError, match=r"--block-size 10 cuts through .* 2:4; give a multiple of 4, such as 8"):
        sparsegpt(weight, gram, pattern=(2, 4), options=ObsOptions(block_size=10))
    fixed = ObsOptions(block_size=10, mask_update="once")
    assert int(sparsegpt(weight, gram, pattern=(2, 4), options=fixed).keep.sum()) == 72


@pytest.mark.parametrize("sparsity", [1.5, -0.5, 1.0, float("nan")])
def test_a_sparsity_that_is_no_fraction_is_refused(sparsity: float) -> None:
    with pytest.raises(OptionError, match=rf"--sparsity {sparsity} is outside \[0, 1\)"):
        uniform_target(sparsity, "unstructured")


@pytest.mark.parametrize(
    ("pattern", "update", "message"),
    [
        ((4, 4), "once", "4:4 keeps 4 of every 4 weights, which must be between 0 and 4"),
        ((4, 4), "block", "4:4 keeps 4 of every 4 weights, which must be between 0 and 4"),
        ((2, 5), "once", "2:5 does not fit rows of 24"),
        ((2, 5), "block", "2:5 does not fit rows of 4"),
    ],
)
def test_budgets_that_do_not_fit_are_refused(pattern: tuple[int, int], update: MaskUpdate, message: str) -> None:
    weight, _, gram = problem(22)
    options = ObsOptions(mask_update=update, block_size=20)
    with pytest.raises(ValueError, match=message):
        sparsegpt(weight, gram, pattern=pattern, options=options)


@pytest.mark.parametrize("shape", [(5, 24), (6, 20), (1, 24), (24, 6)])
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, int]) -> None:
    weight, _, gram = problem(22)
    keep = torch.ones(shape, dtype=torch.bool)
    choice = Choice(SCORES["obs"], LinearStats(gram=gram), Target(0.5), keep=keep)
    with pytest.raises(ValueError, match=rf"mask \[{shape[0]}, {shape[1]}\] does not fit a weight \[6, 24\]"):
        obs(weight, choice, ObsOptions())


def test_statistics_that_do_not_fit_are_refused() -> None:
    weight, _, gram = problem(23)
    with pytest.raises(ValueError, match="'sqnorm' was not collected"):
        sparsegpt(weight, gram, sparsity=0.5, options=ObsOptions(mask_score="wanda"))
    with pytest.raises(ValueError, match="'gram' was not collected"):
        obs(weight, Choice(SCORES["magnitude"], LinearStats(), Target(0.5)), ObsOptions())
    factor: Factor = factorise(gram[:8, :8])
    with pytest.raises(ValueError, match="Gram of 8 channels does not fit a weight of 24 inputs"):
        sparsegpt(weight, factor, sparsity=0.5)


@pytest.mark.parametrize("update", ["once", "block"])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("block_size", [4, 128])
def test_a_weight_that_is_nan_is_refused(update: MaskUpdate, pattern: tuple[int, int] | None, block_size: int) -> None:
    weight, _, gram = problem(24)
    weight[2, 3] = torch.nan  # in the last column of a group: whatever is NaN after it may go as a whole
    options = ObsOptions(mask_update=update, block_size=block_size)
    with pytest.raises(ValueError, match="NaN"):
        sparsegpt(weight, gram, sparsity=0.5, pattern=pattern, options=options)
