"""AlphaPruning against loops straight from the formulas, and against the published estimator's output."""

import bisect
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tests.layer_survey import MadeSurvey
from trimcli.errors import OptionError
from trimcli.methods.layers import spectra
from trimcli.methods.layers.alpha import METRICS, AlphaOptions, sparsities
from trimcli.methods.layers.base import ALLOCATIONS
from trimcli.methods.layers.spectra import SPECTRAL, alpha_mid, alpha_peak, cache_key, measure, squared_singular_values
from trimcli.methods.layers.ww_metrics import COLUMNS

DATA = Path(__file__).parents[2] / "data"


def exponent(values: list[float], start: int) -> float:
    tail = values[start:]
    return 1 + len(tail) / (sum(map(math.log, tail)) - len(tail) * math.log(values[start]))


def slow_alpha_peak(values: list[float]) -> float:
    logs = [math.log10(value) for value in values]
    width = (logs[-1] - logs[0]) / 100
    edges = [logs[0] + width * index for index in range(100)]
    counts = [0] * 100
    for value in logs:
        counts[bisect.bisect_right(edges, value) - 1] += 1
    peak = 10 ** edges[counts.index(max(counts))]
    best, result = 1.0, exponent(values, 0)
    for start, value in enumerate(values[:-1]):
        if not math.log10(0.95 * peak) <= value <= 1.5 * peak:
            continue
        found, size = exponent(values, start), len(values) - start
        distance = max(abs(1 - (values[start + step] / value) ** (1 - found) - step / size) for step in range(size))
        if found > 1 and distance < best:
            best, result = distance, found
    return result


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (4, 4), (3, 9001), (9001, 3), (1, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squared_singular_values(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = np.linalg.svd(weight.double().numpy(), compute_uv=False)[::-1] ** 2
    found = squared_singular_values(weight)
    assert found.dtype == torch.float64
    assert found.numpy() == pytest.approx(expected, rel=1e-9)
    assert squared_singular_values(weight.T).numpy() == pytest.approx(expected, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 100_000), st.integers(2, 90), st.floats(0.1, 3), st.floats(-6, 6))
def test_both_exponents_follow_the_formulas(seed: int, count: int, spread: float, shift: float) -> None:
    generator = np.random.default_rng(seed)
    values = np.sort(np.exp(generator.normal(shift, spread, count)))
    tensor = torch.from_numpy(values)
    if count > 2:
        assert alpha_mid(tensor) == pytest.approx(exponent(values.tolist(), count // 2), rel=1e-9)
    assert alpha_peak(tensor) == pytest.approx(slow_alpha_peak(values.tolist()), rel=1e-9)


def test_blocks_of_starts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(200, generator=torch.Generator().manual_seed(2), dtype=torch.float64).sort().values
    whole = alpha_peak(values)
    monkeypatch.setattr(spectra, "ELEMENTS", 700)
    assert alpha_peak(values) == whole


def test_the_published_estimator_agrees(nano_qwen2: Path) -> None:
    expected = np.loadtxt(DATA / "nano-qwen2_alpha_peak.txt")
    parts = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    with safe_open(nano_qwen2 / "model.safetensors", "pt") as file:
        found = [
            alpha_peak(squared_singular_values(file.get_tensor(f"model.layers.{layer}.{part}_proj.weight")))
            for layer in range(4)
            for part in parts
        ]
    assert found == pytest.approx(expected, rel=1e-5)


def test_zero_singular_values_are_left_out_only_where_they_must_be() -> None:
    generator = torch.Generator().manual_seed(3)
    full = torch.randn(20, 40, generator=generator)
    padded = torch.cat([full, torch.zeros(15, 40)])
    values = squared_singular_values(padded)
    assert alpha_peak(values) == pytest.approx(alpha_peak(squared_singular_values(full)), rel=1e-6)
    expected = exponent(values.tolist(), 17)
    assert alpha_mid(values) == pytest.approx(expected, rel=1e-9)
    low_rank = squared_singular_values(torch.cat([full[:15], torch.zeros(60, 40)]).T)
    assert alpha_mid(low_rank) == pytest.approx(alpha_mid(squared_singular_values(full[:15])), rel=1e-6)


def test_rank_deficient_products_have_finite_exponents() -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(30, 6, generator=generator) @ torch.randn(6, 50, generator=generator)
    values = squared_singular_values(weight.to(torch.float16))
    assert math.isfinite(alpha_peak(values))
    assert math.isfinite(alpha_mid(values))


@pytest.mark.parametrize("values", [[2.0] * 6, [2.0], [0.0] * 6, [0.0, 0.0, 3.0]])
def test_spectra_without_a_shape_have_no_exponent(values: list[float]) -> None:
    spectrum = torch.tensor(values, dtype=torch.float64)
    assert not math.isfinite(alpha_peak(spectrum))
    assert not math.isfinite(alpha_mid(spectrum))


def slow_sparsities(
    metrics: list[float], layers: list[int], sizes: list[int], target: float, epsilon: float, by_block: bool
) -> list[float]:
    if by_block:
        own = {layer: [q for q, where in zip(metrics, layers, strict=True) if where == layer] for layer in layers}
        metrics = [sum(own[layer]) / len(own[layer]) for layer in layers]
    low, high = min(metrics), max(metrics)
    shares = [(q - low) / (high - low) * 2 * epsilon + (1 - epsilon) for q in metrics]
    scale = sum(size * share for size, share in zip(sizes, shares, strict=True))
    return [share * target * sum(sizes) / scale for share in shares]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(1, 50), st.integers(0, 3), st.integers(1, 1000)), min_size=5, max_size=20),
    st.floats(0.01, 0.99),
    st.floats(0, 0.9),
    st.booleans(),
)
def test_sparsities_follow_the_formula(
    linears: list[tuple[float, int, int]], target: float, epsilon: float, by_block: bool
) -> None:
    linears = [(1.0, 0, 10), (60.0, 1, 20), *linears]
    metrics, layers, sizes = (list(column) for column in zip(*linears, strict=True))
    weights = torch.tensor(sizes, dtype=torch.float64)
    found = sparsities(
        torch.tensor(metrics, dtype=torch.float64), torch.tensor(layers), weights, target, epsilon, by_block=by_block
    )
    expected = slow_sparsities(metrics, layers, sizes, target, epsilon, by_block)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    assert float((found * weights).sum() / weights.sum()) == pytest.approx(target, rel=1e-12)


@pytest.mark.parametrize("by_block", [True, False])
def test_equal_metrics_are_uniform_whatever_their_means_round_to(by_block: bool) -> None:
    metrics = torch.full((9,), 2.3, dtype=torch.float64)
    layers = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2])
    found = sparsities(metrics, layers, torch.ones(9, dtype=torch.float64), 0.7, 0.3, by_block=by_block)
    assert found.tolist() == [0.7] * 9


def test_an_epsilon_that_leaves_nothing_to_scale_is_refused() -> None:
    metrics, weights = torch.tensor([1.0, 1.0, 1.0, 2.0]).double(), torch.ones(4).double()
    with pytest.raises(OptionError, match="--epsilon 3"):
        sparsities(metrics, torch.arange(4), weights, 0.5, 3.0, by_block=False)


def test_every_metric_there_is_can_be_named() -> None:
    assert set(METRICS) == {*SPECTRAL, *COLUMNS}
    assert len(METRICS) == 13
    assert AlphaOptions().ww_metric == "alpha_peak"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ww_metric": "alpha_peek"}, "--ww-metric 'alpha_peek' is none of .*; did you mean 'alpha_peak'"),
        ({"epsilon": -0.1}, "--epsilon -0.1 is not usable"),
        ({"epsilon": float("nan")}, "--epsilon nan is not usable"),
        ({"mapping_type": "blok"}, "--mapping-type 'blok' is none of block, layer; did you mean 'block'"),
    ],
)
def test_options_that_cannot_be_used(fields: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        AlphaOptions(**fields)  # type: ignore[arg-type]


LAYERS = [["a", "b"], ["c"], ["d", "e"]]
LINEARS = {"a": (6, 8), "b": (9, 20), "c": (30, 12), "d": (20, 16), "e": (11, 14)}


@pytest.mark.parametrize("mapping_type", ["block", "layer"])
@pytest.mark.parametrize("metric", ["alpha_peak", "alpha_mid"])
def test_the_allocation_is_the_formula_on_every_spectrum(metric: str, mapping_type: str) -> None:
    survey = MadeSurvey(LAYERS, LINEARS)
    options = AlphaOptions(ww_metric=metric, epsilon=0.2, mapping_type=mapping_type)  # type: ignore[arg-type]
    found = ALLOCATIONS["alpha"](survey, 0.6, options=options)
    metrics = [SPECTRAL[metric](squared_singular_values(survey.weights[name])) for name in survey.names]
    expected = slow_sparsities(
        metrics, [0, 0, 1, 2, 2], [int(count) for count in survey.counts], 0.6, 0.2, mapping_type == "block"
    )
    assert found.metric == metrics
    assert found.sparsity.tolist() == pytest.approx(expected, rel=1e-9)
    assert found.parameters == {"epsilon": 0.2, "mapping_type": mapping_type, "ww_metric": metric}
    # One look at a matrix gives what the other spectral metric would be.
    assert {key for known in survey.known.values() for key in known} == {cache_key(name, 3) for name in SPECTRAL}
    asked = len(survey.asked)
    ALLOCATIONS["alpha"](survey, 0.6, options=AlphaOptions(ww_metric="alpha_mid"))
    assert survey.asked[asked:] == [("remembered", "alpha_mid")]


def test_imported_metrics_need_no_weights() -> None:
    metrics = torch.tensor([2.0, 4.0, 5.0, 3.0, 3.5], dtype=torch.float64)
    survey = MadeSurvey(LAYERS, LINEARS, metrics)
    found = ALLOCATIONS["alpha"](survey, 0.6, options=AlphaOptions(mapping_type="layer"))
    sizes = [int(count) for count in survey.counts]
    expected = slow_sparsities(metrics.tolist(), [0, 0, 1, 2, 2], sizes, 0.6, 0.3, by_block=False)
    assert found.sparsity.tolist() == pytest.approx(expected, rel=1e-9)
    assert found.metric == metrics.tolist()
    assert "ww_metric" not in found.parameters
    assert survey.asked == []


def test_a_spectrum_without_a_shape_measures_nothing() -> None:
    assert measure("alpha_peak", "a", torch.zeros(4, 6), 0) == {"norm": 0}
    assert set(measure("alpha_mid", "a", torch.randn(9, 9), 0)) == set(SPECTRAL)
