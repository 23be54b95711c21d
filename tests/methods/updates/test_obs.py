"""SparseGPT against the exact OBS recursion, its budgets, and Grams that do not factorise."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from trimcli.errors import OptionError, TrimError
from trimcli.methods.updates.obs import (
    DampingReport,
    Factor,
    MaskScore,
    MaskUpdate,
    UpdateOptions,
    factorise,
    obs_scores,
    sparsegpt,
)

Array = NDArray[np.float64]
KeepRule = Callable[[Array, Array, int], NDArray[np.bool_]]


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

    found = sparsegpt(weight, gram, sparsity=sparsity, options=UpdateOptions(block_size=block_size))
    assert_same(found.weight, found.keep, exact_obs(weight, damped(gram), rule, block_size))


@pytest.mark.parametrize(("kept", "group", "block_size"), [(2, 4, 8), (2, 4, 128), (1, 4, 4), (5, 8, 16), (1, 2, 6)])
def test_n_of_m_is_the_exact_recursion(kept: int, group: int, block_size: int) -> None:
    weight, _, gram = problem(2)

    def rule(columns: Array, corners: Array, _start: int) -> NDArray[np.bool_]:
        return np.stack([without_lowest(row, group - kept) for row in columns**2 / corners])

    found = sparsegpt(weight, gram, pattern=(kept, group), options=UpdateOptions(block_size=block_size))
    assert_same(found.weight, found.keep, exact_obs(weight, damped(gram), rule, group))
    assert (found.keep.unflatten(1, (-1, group)).sum(-1) == kept).all()


@pytest.mark.parametrize("block_size", [7, 24])
@pytest.mark.parametrize("score", ["obs", "wanda", "magnitude"])
def test_row_counts_are_met_and_updated_exactly(score: MaskScore, block_size: int) -> None:
    weight, inputs, gram = problem(3)
    counts = torch.tensor([0, 24, 12, 5, 20, 1])
    sqnorm = inputs.square().sum(0)
    plain = weight.double().numpy()
    norms = sqnorm.double().numpy()

    def rule(columns: Array, corners: Array, _start: int) -> NDArray[np.bool_]:
        scores = {"obs": columns**2 / corners, "wanda": abs(plain) * norms**0.5, "magnitude": abs(plain)}[score]
        return np.stack([without_lowest(row, int(n)) for row, n in zip(scores, counts, strict=True)])

    options = UpdateOptions(block_size=block_size, mask_score=score)
    found = sparsegpt(weight, gram, row_counts=counts, sqnorm=sqnorm, options=options)
    assert_same(found.weight, found.keep, exact_obs(weight, damped(gram), rule, 24))
    assert torch.equal((~found.keep).sum(1), counts)


@pytest.mark.parametrize("update", ["once", "block"])
@pytest.mark.parametrize("score", ["obs", "wanda", "magnitude"])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_every_score_chosen_once_or_in_blocks(
    score: MaskScore, update: MaskUpdate, pattern: tuple[int, int] | None
) -> None:
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
    options = UpdateOptions(block_size=8, mask_score=score, mask_update=update)
    sparsity = None if pattern else 0.55
    found = sparsegpt(weight, gram, sparsity=sparsity, pattern=pattern, sqnorm=sqnorm, options=options)
    assert_same(found.weight, found.keep, exact_obs(weight, damped(gram), rule, stride))


@pytest.mark.parametrize(("score", "published"), [("obs", "block"), ("wanda", "once"), ("magnitude", "once")])
def test_published_mask_update_is_the_default(score: MaskScore, published: MaskUpdate) -> None:
    weight, inputs, gram = problem(5)
    sqnorm = inputs.square().sum(0)
    choices: tuple[MaskUpdate | None, ...] = (None, "once", "block")
    found = {
        update: sparsegpt(
            weight,
            gram,
            sparsity=0.5,
            sqnorm=sqnorm,
            options=UpdateOptions(block_size=8, mask_score=score, mask_update=update),
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

    options = UpdateOptions(block_size=8, numerics="reference")
    found = sparsegpt(weight, gram, sparsity=0.5, options=options)
    assert_same(found.weight, found.keep, exact_obs(weight, damped(gram), rule, 8))
    assert int((~found.keep).sum()) == 29 + 29 + 15


def test_reference_wanda_takes_the_floor_of_every_row_in_every_block() -> None:
    weight, inputs, gram = problem(7, d_in=20)
    sqnorm = inputs.square().sum(0)
    counts: dict[MaskUpdate, int] = {"once": int(20 * 0.57), "block": int(8 * 0.57) * 2 + int(4 * 0.57)}
    for update, gone in counts.items():
        options = UpdateOptions(block_size=8, numerics="reference", mask_score="wanda", mask_update=update)
        found = sparsegpt(weight, gram, sparsity=0.57, sqnorm=sqnorm, options=options)
        assert (~found.keep).sum(1).tolist() == [gone] * 6


def test_pruned_columns_before_kept_ones_give_the_least_squares_optimum() -> None:
    weight, _, gram = problem(8, d_out=4, d_in=16)
    weight = weight.sign() + weight / 10
    weight[:, :7] /= 10  # the lowest magnitudes all lie to the left of what stays
    options = UpdateOptions(block_size=4, mask_score="magnitude")
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
    d_out: int, d_in: int, block_size: int, sparsity: float, score: MaskScore, update: MaskUpdate, ties: bool
) -> None:
    weight, inputs, gram = problem(10, d_out, d_in)
    if ties:
        weight, gram = torch.ones_like(weight), torch.eye(d_in)
    options = UpdateOptions(block_size=block_size, mask_score=score, mask_update=update)
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
    found = sparsegpt(torch.ones(3, 8), torch.eye(8), sparsity=0.5, options=UpdateOptions(block_size=4))
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
    for one in (weight, other):
        from_gram = sparsegpt(one, gram, sparsity=0.5, options=UpdateOptions(damping=0.05))
        from_factor = sparsegpt(one, factor, sparsity=0.5)
        assert torch.equal(from_factor.weight, from_gram.weight)
        assert from_factor.report == from_gram.report


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
    scores = obs_scores(weight, factorise(gram))
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-3)


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
    assert (obs_scores(weight, factor)[:, dead] == 0).all()
    found = sparsegpt(weight, gram, sparsity=0.5)
    assert not found.keep[:, dead].any()
    assert (found.weight[:, dead] == 0).all()
    assert int((~found.keep).sum()) == round(0.5 * weight.numel())

    alive = [c for c in range(24) if c not in dead]  # what fires is pruned as if nothing else were there
    lean = torch.eye(24)[:, alive]
    mean = (gram.diagonal().sum().item() + 3) / 24
    damping = 0.01 * mean / (gram.diagonal().sum().item() / 21)
    counts = (~found.keep[:, alive]).sum(1)
    once = UpdateOptions(damping=damping)
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
    found = sparsegpt(weight, few.T @ few, sparsity=0.5, options=UpdateOptions(damping=damping))
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

    found = sparsegpt(weight, gram, sparsity=0.5, options=UpdateOptions(block_size=8))
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
        ({"mask_score": "taylor"}, "--mask-score 'taylor' is none of obs, wanda, magnitude"),
        ({"mask_update": "never"}, "--mask-update 'never' is none of once, block"),
    ],
)
def test_options_out_of_range_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        UpdateOptions(**values)  # type: ignore[arg-type]


def test_options_that_do_not_go_together_are_refused() -> None:
    weight, _, gram = problem(21)
    blockwise = UpdateOptions(mask_update="block")
    with pytest.raises(OptionError, match="--mask-update block does not go with --use-trim"):
        sparsegpt(weight, gram, row_counts=torch.full((6,), 3), options=blockwise)
    with pytest.raises(OptionError, match=r"--block-size 10 cuts through .* 2:4; give a multiple of 4, such as 8"):
        sparsegpt(weight, gram, pattern=(2, 4), options=UpdateOptions(block_size=10))
    fixed = UpdateOptions(block_size=10, mask_update="once")
    assert int(sparsegpt(weight, gram, pattern=(2, 4), options=fixed).keep.sum()) == 72


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "but 0 were given"),
        ({"sparsity": 0.5, "pattern": (2, 4)}, "but 2 were given"),
        ({"sparsity": 1.5}, "sparsity 1.5 is not between 0 and 1"),
        ({"sparsity": float("nan")}, "sparsity nan is not between"),
        ({"pattern": (4, 4)}, "4:4 does not fit"),
        ({"pattern": (2, 5)}, "2:5 does not fit rows of 24"),
        ({"row_counts": torch.full((5,), 3)}, "each of 6 rows"),
        ({"row_counts": torch.full((6,), 25)}, "from 0 to 24"),
    ],
)
def test_budgets_that_do_not_fit_are_refused(budget: dict[str, object], message: str) -> None:
    weight, _, gram = problem(22)
    with pytest.raises(ValueError, match=message):
        sparsegpt(weight, gram, **budget)  # type: ignore[arg-type]


def test_statistics_that_do_not_fit_are_refused() -> None:
    weight, _, gram = problem(23)
    with pytest.raises(ValueError, match="needs sqnorm"):
        sparsegpt(weight, gram, sparsity=0.5, options=UpdateOptions(mask_score="wanda"))
    factor: Factor = factorise(gram[:8, :8])
    with pytest.raises(ValueError, match="Gram of 8 channels does not fit a weight of 24 inputs"):
        sparsegpt(weight, factor, sparsity=0.5)
