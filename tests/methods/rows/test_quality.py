"""Quality metrics against their formulas in plain Python."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimcli import registry
from trimcli.errors import OptionError
from trimcli.methods import ranking
from trimcli.methods.rows import metrics
from trimcli.methods.rows.metrics import QUALITIES, ROW_QUALITIES, quality, row_quality
from trimcli.methods.rows.quality import Dense, compare

Rows = list[list[float]]
untimed = settings(deadline=None)


@st.composite
def output_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A and B, some of them alike, small, or with rows and columns of zeros."""
    shape = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    dense = torch.randn(shape, generator=generator) * draw(st.sampled_from([1e-6, 1.0, 300.0]))
    noise = torch.randn(shape, generator=generator) * draw(st.sampled_from([0.0, 1e-3, 0.5]))
    pruned = dense + dense.abs().max() * noise
    if draw(st.booleans()):
        pruned[draw(st.integers(0, shape[0] - 1))] = 0
    if draw(st.booleans()):
        pruned[:, draw(st.integers(0, shape[1] - 1))] = 0
    return dense, pruned


def cosine(a: list[float], b: list[float]) -> float:
    norms = (math.hypot(*a) + 1e-8) * (math.hypot(*b) + 1e-8)
    return min(max(sum(x * y for x, y in zip(a, b, strict=True)) / norms, -1.0), 1.0)


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def square_error(a: list[float], b: list[float]) -> float:
    return mean([(x - y) ** 2 for x, y in zip(a, b, strict=True)])


def peak_ratio(a: list[float], b: list[float]) -> float:
    return 10 * math.log10(max(x * x for x in a) / (square_error(a, b) + 1e-10))


def noise_ratio(a: list[float], b: list[float]) -> float:
    error = square_error(a, b)
    return math.inf if error < 1e-10 else 10 * math.log10(mean([x * x for x in a]) / (error + 1e-10))


def by_row(function: Callable[[list[float], list[float]], float], a: Rows, b: Rows) -> list[float]:
    return [function(x, y) for x, y in zip(a, b, strict=True)]


def turned(rows: Rows) -> Rows:
    return [list(column) for column in zip(*rows, strict=True)]


def flat(rows: Rows) -> list[float]:
    return [value for row in rows for value in row]


WHOLE: dict[str, Callable[[Rows, Rows], float]] = {
    "cosim_flat": lambda a, b: cosine(flat(a), flat(b)),
    "cosim_dim": lambda a, b: mean(by_row(cosine, a, b)),
    "cosim_sample": lambda a, b: mean(by_row(cosine, turned(a), turned(b))),
    "mse": lambda a, b: -square_error(flat(a), flat(b)),
    "mse_dim": lambda a, b: -mean(by_row(square_error, a, b)),
    "mae": lambda a, b: -mean([abs(x - y) for x, y in zip(flat(a), flat(b), strict=True)]),
    "snr": lambda a, b: noise_ratio(flat(a), flat(b)),
    "psnr_flat": lambda a, b: peak_ratio(flat(a), flat(b)),
    "psnr_dim": lambda a, b: mean(by_row(peak_ratio, a, b)),
    "psnr_sample": lambda a, b: mean(by_row(peak_ratio, turned(a), turned(b))),
    "pass": lambda a, b: 1.0,
}
ROWS: dict[str, Callable[[Rows, Rows], list[float]]] = {
    "cosim": lambda a, b: by_row(cosine, a, b),
    "mse": lambda a, b: [-error for error in by_row(square_error, a, b)],
    "psnr": lambda a, b: by_row(peak_ratio, a, b),
}


def test_every_metric_is_registered_with_the_default_first() -> None:
    assert list(QUALITIES) == list(WHOLE)
    assert list(ROW_QUALITIES) == list(ROWS)
    for entry in (*QUALITIES.values(), *ROW_QUALITIES.values()):
        assert entry.help.endswith(".")
        assert "Beck et al. 2025" in entry.source


@pytest.mark.parametrize("name", WHOLE)
@untimed
@given(pair=output_pairs())
def test_whole_matrix(name: str, pair: tuple[Tensor, Tensor]) -> None:
    dense, pruned = pair
    found = QUALITIES[name](compare(Dense(dense), pruned))
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(WHOLE[name](dense.tolist(), pruned.tolist()), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", ROWS)
@untimed
@given(pair=output_pairs())
def test_rows(name: str, pair: tuple[Tensor, Tensor]) -> None:
    dense, pruned = pair
    found = ROW_QUALITIES[name](compare(Dense(dense), pruned))
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(ROWS[name](dense.tolist(), pruned.tolist()), rel=1e-9, abs=1e-12)


def test_sums_do_not_depend_on_the_blocks_they_are_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, pruned = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    whole = compare(Dense(dense), pruned)
    monkeypatch.setattr(ranking, "_SMALLEST_BLOCK", 8)
    blocks = compare(Dense(dense), pruned)
    assert torch.equal(whole.dot, blocks.dot)
    assert torch.equal(whole.row_mse, blocks.row_mse)


def test_equal_outputs_have_no_error() -> None:
    dense = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    outputs = compare(Dense(dense), dense.clone())
    assert QUALITIES["mse"](outputs) == 0
    assert QUALITIES["snr"](outputs) == torch.inf
    assert ROW_QUALITIES["cosim"](outputs).max() <= 1


def test_rows_of_zeros() -> None:
    dense = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    outputs = compare(Dense(dense), dense)
    assert ROW_QUALITIES["cosim"](outputs)[0] == 0
    assert ROW_QUALITIES["psnr"](outputs)[0] == -torch.inf


@pytest.mark.parametrize("name", sorted(WHOLE.keys() - {"pass"}))
def test_nan_outputs_have_nan_quality(name: str) -> None:
    dense = torch.tensor([[torch.nan, 1.0], [1.0, 2.0]])
    assert QUALITIES[name](compare(Dense(dense), dense)).isnan()


def test_shapes_must_match() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\].*\[2, 4\]"):
        compare(Dense(torch.zeros(2, 4)), torch.zeros(2, 3))


def test_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=r"--qmetric 'sharpness' is none of cosim_flat"):
        QUALITIES["sharpness"]
    with pytest.raises(OptionError, match=r"--qmetric-dimwise 'sharpness' is none of cosim, mse, psnr"):
        ROW_QUALITIES["sharpness"]
    with pytest.raises(ValueError, match="a quality metric named 'mse' is registered already"):
        quality("mse", source="nowhere")(metrics.mse)
    with pytest.raises(ValueError, match="a row metric named 'mse' is registered already"):
        row_quality("mse", source="nowhere")(metrics.mse_row)
    monkeypatch.setattr(QUALITIES, "_entries", dict(QUALITIES._entries))
    monkeypatch.setattr(registry, "_everything", list(registry._everything))
    assert quality("sharpness", source="nowhere")(metrics.mae) is metrics.mae
    assert QUALITIES["sharpness"].function is metrics.mae
    assert list(QUALITIES) == [*WHOLE, "sharpness"]
