"""The row search against the search written down slowly."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from trimcli.errors import OptionError
from trimcli.methods import masks
from trimcli.methods.choice import Choice, Target
from trimcli.methods.rows import product as outputs
from trimcli.methods.rows.base import ROWS
from trimcli.methods.rows.metrics import QUALITIES, ROW_QUALITIES
from trimcli.methods.rows.options import TrimOptions
from trimcli.methods.rows.search import search_rows
from trimcli.methods.scores import SCORES
from trimcli.methods.stats import LinearStats
from trimcli.options import Numerics

MODES: list[Numerics] = ["exact", "reference"]
CAP = 0.95


@dataclass
class Oracle:
    """Every iteration sorts, masks and multiplies; every quality starts from the outputs."""

    weight: Tensor
    scores: Tensor
    inputs: Tensor
    target: float
    options: TrimOptions
    numerics: Numerics = "exact"

    def pruned(self, counts: list[int]) -> Tensor:
        """B with counts[k] weights gone from row k."""
        weight = self.weight.clone()
        for row, count in enumerate(counts):
            weight[row, self.scores[row].argsort(stable=True)[:count]] = 0
        return weight @ self.inputs

    def quality(self, b: Tensor) -> float:
        """q(A, B)."""
        a, b = (self.weight @ self.inputs).double(), b.double()
        match self.options.qmetric:
            case "cosim_flat":
                return cosine(a.flatten(), b.flatten())
            case "cosim_dim":
                return float(torch.tensor([*map(cosine, a, b)], dtype=torch.float64).mean())
            case "cosim_sample":
                return float(torch.tensor([*map(cosine, a.T, b.T)], dtype=torch.float64).mean())
            case "mse" | "mse_dim":
                return -float((a - b).square().mean())
            case "mae":
                return -float((a - b).abs().mean())
            case "snr":
                error = (a - b).square().mean()
                return torch.inf if error < 1e-10 else decibel(a.square().mean(), error)
            case "psnr_flat":
                return decibel(a.square().max(), (a - b).square().mean())
            case "psnr_dim":
                return decibel(a.square().amax(1), (a - b).square().mean(1))
            case "psnr_sample":
                return decibel(a.square().amax(0), (a - b).square().mean(0))
        return 1.0

    def row_quality(self, b: Tensor) -> Tensor:
        """q_k."""
        a, b = (self.weight @ self.inputs).double(), b.double()
        match self.options.qmetric_dimwise:
            case "cosim":
                return torch.tensor([*map(cosine, a, b)], dtype=torch.float64)
            case "mse":
                return -(a - b).square().mean(1)
        return 10 * torch.log10(a.square().amax(1) / ((a - b).square().mean(1) + 1e-10))

    def counts(self, s: Tensor) -> list[int]:
        """floor(D_in * s_k) in float32, exact: the nearest count; never outside the row."""
        d_in = self.weight.shape[1]
        half = 0.5 if self.numerics == "exact" else 0
        return [min(max(int(d_in * share + half), 0), d_in) for share in s]

    def recentre(self, s: Tensor, cap: float) -> Tensor:
        """Into bounds and onto the target."""
        if self.numerics == "reference":
            s = s.float().clamp(0, cap)
            return s - s.mean() + self.target
        s, top = s.double(), max(cap, self.target)
        low, high = -2.0, 2.0
        for _ in range(80):
            middle = (low + high) / 2
            if float((s + middle).clamp(0, top).mean()) <= self.target:
                low = middle
            else:
                high = middle
        return (s + low).clamp(0, top).float()

    def search(self, step: float) -> tuple[float, Tensor, int]:
        """Best quality, sparsities and iteration of one search."""
        s = best_s = torch.full((self.weight.shape[0],), self.target)
        b = self.pruned(self.counts(s))
        best, best_iteration = self.quality(b), 0
        for iteration in range(1, self.options.iterations + 1):
            q = self.row_quality(b)
            d = (q - q.min()) / (q.max() - q.min() + 1e-6) * 2 * step
            moved = s + (d - d.mean())
            if not moved.isfinite().all():
                break
            s = self.recentre(moved, CAP)
            b = self.pruned(self.counts(s))
            if self.quality(b) > best:
                best, best_s, best_iteration = self.quality(b), s, iteration
        return best, best_s, best_iteration

    def run(self) -> tuple[list[int], float, int, float]:
        """Row counts, step, iteration and quality of the best."""
        d_out, d_in = self.weight.shape
        best_s = torch.full((d_out,), self.target)
        best, best_step, best_iteration = self.quality(self.pruned(self.counts(best_s))), 0.0, 0
        negative = [] if self.options.forbid_negative else [-0.01, -0.02, -0.04]
        for steps in [0.01, 0.02, 0.04, 0.08, 0.12, 0.16], negative:
            if best_step:
                break
            previous = -torch.inf
            for step in steps:
                quality, s, iteration = self.search(step)
                if quality > best:
                    best, best_s, best_step, best_iteration = quality, s, step, iteration
                if not quality > previous:
                    break
                previous = quality
        if self.numerics == "reference":
            return self.counts(self.recentre(best_s, CAP)), best_step, best_iteration, best
        whole = next(n for n in range(d_in, -1, -1) if n <= CAP * d_in + 1e-9) / d_in
        ideal = self.recentre(best_s, whole if whole >= self.target else CAP).double() * d_in
        counts = ideal.floor()
        for row in (counts - ideal).argsort(stable=True)[: round(self.target * d_out * d_in) - int(counts.sum())]:
            counts[row] += 1
        return [int(count) for count in counts], best_step, best_iteration, best


def cosine(a: Tensor, b: Tensor) -> float:
    norms = ((a * a).sum().sqrt() + 1e-8) * ((b * b).sum().sqrt() + 1e-8)
    return float(((a * b).sum() / norms).clamp(-1, 1))


def decibel(signal: Tensor, error: Tensor) -> float:
    return float((10 * torch.log10(signal / (error + 1e-10))).mean())


@st.composite
def whole_number_matrices(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices whose products are exact in float32 in any order, so that the oracle decides the same."""
    d_out, d_in, samples = draw(st.integers(1, 9)), draw(st.integers(1, 40)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    weight = torch.randint(-9, 10, (d_out, d_in), generator=generator).float()
    inputs = torch.randint(-9, 10, (d_in, samples), generator=generator).float()
    match draw(st.sampled_from(["wanda", "magnitude", "constant"])):
        case "wanda":
            scores = weight.abs() * inputs.square().sum(1).sqrt()
        case "magnitude":
            scores = weight.abs()
        case _:
            scores = torch.ones_like(weight)
    if draw(st.booleans()):
        weight[draw(st.integers(0, d_out - 1))] = 0
    return weight, scores, inputs


targets = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.01, 0.5, 0.7, 0.94, 0.95, 0.97, 1.0]))


@pytest.mark.parametrize("numerics", MODES)
@settings(deadline=None, max_examples=100)
@given(
    matrices=whole_number_matrices(),
    target=targets,
    qmetric=st.sampled_from([name for name in QUALITIES if name != "pass"]),
    qmetric_dimwise=st.sampled_from(list(ROW_QUALITIES)),
    iterations=st.integers(1, 4),
    forbid_negative=st.booleans(),
)
def test_search_equals_the_oracle(
    numerics: Numerics,
    matrices: tuple[Tensor, Tensor, Tensor],
    target: float,
    qmetric: str,
    qmetric_dimwise: str,
    iterations: int,
    forbid_negative: bool,
) -> None:
    options = TrimOptions(qmetric, qmetric_dimwise, iterations, forbid_negative)
    counts, step, iteration, quality = Oracle(*matrices, target, options, numerics).run()
    found = search_rows(*matrices, target, options, numerics)
    assert (found.counts.tolist(), found.step, found.iteration) == (counts, step, iteration)
    assert found.quality_best == pytest.approx(quality, rel=1e-12)
    assert torch.equal(found.keep, masks.lowest_per_row(matrices[1], found.counts))


def real_matrix(d_out: int, d_in: int, samples: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uneven rows and channels, wanda scores."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.randn(d_in, generator=generator).mul(0.7).exp()
    weight = torch.randn(d_out, d_in, generator=generator)
    weight *= channels ** torch.randn(d_out, 1, generator=generator)
    inputs = torch.randn(d_in, samples, generator=generator) * channels.unsqueeze(1)
    inputs += torch.randn(d_in, 4, generator=generator) @ torch.randn(4, samples, generator=generator)
    return weight, weight.abs() * inputs.square().mean(1).sqrt(), inputs


@pytest.mark.parametrize("numerics", MODES)
@pytest.mark.parametrize(("qmetric", "dimwise"), [("cosim_flat", "cosim"), ("mse", "mse"), ("mae", "psnr")])
@pytest.mark.parametrize("target", [0.5, 0.8])
def test_real_numbers(qmetric: str, dimwise: str, target: float, numerics: Numerics) -> None:
    matrices = real_matrix(96, 200, 24, seed=5)
    options = TrimOptions(qmetric, dimwise, 5)
    counts, step, iteration, quality = Oracle(*matrices, target, options, numerics).run()
    found = search_rows(*matrices, target, options, numerics)
    assert (found.step, found.iteration) == (step, iteration)
    assert found.quality_best == pytest.approx(quality, rel=1e-6)
    assert (found.counts == torch.tensor(counts)).float().mean() >= 0.995


@pytest.mark.parametrize("linear", ["0.mlp.down_proj", "2.self_attn.k_proj"])
def test_matrices_of_the_embedded_model(linear: str, nano_qwen2: Path) -> None:
    weight = load_file(nano_qwen2 / "model.safetensors")[f"model.layers.{linear}.weight"].float()
    _, _, inputs = real_matrix(1, weight.shape[1], 32, seed=6)
    matrices = weight, weight.abs() * inputs.square().mean(1).sqrt(), inputs
    counts, step, iteration, _ = Oracle(*matrices, 0.7, TrimOptions(), "reference").run()
    found = search_rows(*matrices, 0.7, TrimOptions(), "reference")
    assert (found.step, found.iteration) == (step, iteration)
    assert (found.counts == torch.tensor(counts)).float().mean() >= 0.995


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), target=st.floats(0, 1), d_in=st.integers(1, 70))
def test_exact_counts(seed: int, target: float, d_in: int) -> None:
    """The matrix budget is met and no row exceeds 95% unless the target leaves no choice."""
    d_out = 9
    found = search_rows(*real_matrix(d_out, d_in, 3, seed), target, TrimOptions(iterations=3))
    assert int(found.counts.sum()) == round(target * d_out * d_in)
    assert torch.equal((~found.keep).sum(1), found.counts)
    assert found.row_sparsity.dtype == torch.float32
    assert float(found.row_sparsity.double().mean()) == pytest.approx(target, abs=1e-7)
    if target * d_in <= int(CAP * d_in + 1e-9):
        assert int(found.counts.max()) <= CAP * d_in + 1e-9


def test_updating_and_multiplying_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = real_matrix(128, 300, 16, seed=8)
    updated = search_rows(*matrices, 0.7)
    monkeypatch.setattr(outputs, "_UPDATE_SHARE", -1.0)
    multiplied = search_rows(*matrices, 0.7)
    assert (updated.step, updated.iteration) == (multiplied.step, multiplied.iteration)
    assert (updated.counts == multiplied.counts).float().mean() >= 0.995
    assert updated.quality_best == pytest.approx(multiplied.quality_best, rel=1e-7)


def test_result_tells_what_was_found() -> None:
    weight, _, inputs = matrices = real_matrix(64, 128, 16, seed=2)
    found = search_rows(*matrices, 0.6)
    assert found.quality_best > found.quality_uniform
    assert found.step != 0
    assert 1 <= found.iteration <= 10
    oracle = Oracle(*matrices, 0.6, TrimOptions())
    before, after = oracle.pruned([round(0.6 * 128)] * 64), (weight * found.keep) @ inputs
    for state, variance, quality in (
        (before, found.variance_before, found.row_quality_before),
        (after, found.variance_after, found.row_quality_after),
    ):
        assert torch.allclose(quality, oracle.row_quality(state), rtol=0, atol=1e-6)
        assert variance == pytest.approx(float(oracle.row_quality(state).var()), rel=1e-4)
    assert found.quality_uniform == pytest.approx(oracle.quality(before), abs=1e-7)


def test_forbidden_negative_steps() -> None:
    # The row that suffers less is nearly all of the matrix's output, so taking more from it makes that worse.
    weight, inputs = torch.stack([torch.linspace(100, 400, 999), torch.linspace(1, 2, 999)]), torch.eye(999)
    negative = search_rows(weight, weight, inputs, 0.7)
    assert negative.row_quality_before.diff() < 0
    assert negative.step == -0.04
    assert negative.counts.diff() > 0
    forbidden = search_rows(weight, weight, inputs, 0.7, TrimOptions(forbid_negative=True))
    assert (forbidden.step, forbidden.iteration, forbidden.counts.tolist()) == (0, 0, [700, 699])


def test_no_quality_is_above_one_under_pass() -> None:
    matrices = real_matrix(12, 50, 4, seed=0)
    uniform = search_rows(*matrices, 0.7, TrimOptions("pass"), "reference")
    assert uniform.counts.tolist() == [35] * 12
    assert (uniform.step, uniform.iteration, uniform.quality_best) == (0, 0, 1)
    last = search_rows(*matrices, 0.7, TrimOptions("pass", iterations=6))
    assert (last.step, last.iteration, last.quality_best) == (0.01, 6, 1)
    oracle = Oracle(*matrices, 0.7, TrimOptions())
    s = torch.full((12,), 0.7)
    for _ in range(6):
        q = oracle.row_quality(oracle.pruned(oracle.counts(s)))
        d = (q - q.min()) / (q.max() - q.min() + 1e-6) * 0.02
        s = oracle.recentre(s + d - d.mean(), CAP)
    assert torch.allclose(last.row_sparsity, s, rtol=0, atol=1e-5)


@pytest.mark.parametrize("numerics", MODES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_quality_that_is_nan_never_wins(value: float, numerics: Numerics) -> None:
    weight, scores, inputs = real_matrix(6, 20, 4, seed=0)
    inputs[3, 2] = value
    found = search_rows(weight, scores, inputs, 0.5, numerics=numerics)
    assert (found.step, found.iteration) == (0, 0)
    assert found.counts.tolist() == [10] * 6


def test_a_row_without_finite_quality_ends_the_search() -> None:
    weight, scores, inputs = real_matrix(6, 20, 4, seed=0)
    weight[2] = 0  # its peak signal-to-noise ratio is minus infinity
    found = search_rows(weight, scores, inputs, 0.5, TrimOptions(qmetric_dimwise="psnr"))
    assert (found.step, found.counts.tolist()) == (0, [10] * 6)


def test_parameters_and_other_types_are_taken() -> None:
    weight, _, inputs = real_matrix(16, 40, 4, seed=0)
    weight = weight.half().float()
    scores = weight.abs()
    expected = search_rows(weight, scores, inputs, 0.5)
    for other in torch.nn.Parameter(weight), weight.half():
        found = search_rows(other, scores, inputs, 0.5)
        assert torch.equal(found.keep, expected.keep)
        assert not found.row_quality_after.requires_grad


def test_one_row_has_no_variance() -> None:
    found = search_rows(*real_matrix(1, 30, 4, seed=0), 0.5)
    assert (found.variance_before, found.variance_after, found.counts.tolist()) == (0, 0, [15])


def test_bad_options_and_arguments() -> None:
    with pytest.raises(OptionError, match="--qmetric 'sharp' is none of cosim_flat, "):
        TrimOptions("sharp")
    with pytest.raises(OptionError, match="--qmetric-dimwise 'sharp' is none of cosim, mse, psnr"):
        TrimOptions(qmetric_dimwise="sharp")
    for iterations in (-1, 0):
        with pytest.raises(OptionError, match=f"--iterations {iterations} must be at least 1"):
            TrimOptions(iterations=iterations)
    with pytest.raises(OptionError, match="did you mean 'cosim_flat'"):
        TrimOptions("cosim_flt")
    weight, scores, inputs = real_matrix(4, 10, 3, seed=0)
    with pytest.raises(ValueError, match="do not fit"):
        search_rows(weight, scores, inputs.T, 0.5)
    with pytest.raises(ValueError, match="do not fit"):
        search_rows(weight, scores[:3], inputs, 0.5)
    with pytest.raises(ValueError, match="sparsity 1"):
        search_rows(weight, scores, inputs, 1.5)
    with pytest.raises(ValueError, match="NaN"):
        search_rows(weight, scores * torch.nan, inputs, 0.5)


@pytest.mark.parametrize("numerics", MODES)
@pytest.mark.parametrize("name", ["wanda", "magnitude", "obs"])
def test_the_row_allocation_searches_by_the_scores_of_the_choice(name: str, numerics: Numerics) -> None:
    weight, _, inputs = real_matrix(24, 40, 6, seed=9)
    tokens = torch.randn(80, 40, generator=torch.Generator().manual_seed(9))
    stats = LinearStats(sqnorm=tokens.square().sum(0), inputs=inputs, gram=tokens.T @ tokens)
    choice = Choice(SCORES[name], stats, Target(0.6), numerics)
    options = TrimOptions("mse", "mse", 4, forbid_negative=True)
    rows = ROWS["trim"](weight, choice, options=options)
    expected = search_rows(weight, SCORES[name](weight, stats), inputs, 0.6, options, numerics)
    assert torch.equal(rows.keep, expected.keep)
    assert rows.keep is rows.found.keep
    assert torch.equal(rows.found.counts, expected.counts)
    assert len(set(expected.counts.tolist())) > 1
    assert ROWS["trim"].needs == {"inputs"}
    assert ROWS["trim"].options is TrimOptions
    default = ROWS["trim"](weight, choice)
    assert torch.equal(default.keep, search_rows(weight, SCORES[name](weight, stats), inputs, 0.6, None, numerics).keep)
