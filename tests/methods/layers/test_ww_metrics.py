"""weightwatcher's ten: their values, that they repeat, and that weightwatcher leaves no trace."""

import importlib
import logging
import math
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from trimcli.methods.layers.spectra import cache_key, measure
from trimcli.methods.layers.ww_metrics import COLUMNS, RANDOMIZED, weightwatcher_metrics


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(24, 30, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)


@pytest.fixture(scope="module")
def found(weight: Tensor) -> dict[str, float]:
    return weightwatcher_metrics(weight, 0)


def test_weightwatcher_leaves_no_trace(
    weight: Tensor, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "weightwatcher"]:
        monkeypatch.delitem(sys.modules, name)
    root = logging.getLogger()
    before = (list(root.handlers), root.level, root.manager.disable, list(warnings.filters))
    state = np.random.get_state()[1].tolist()  # type: ignore[index]
    weightwatcher_metrics(weight[:6], 0)
    assert capfd.readouterr() == ("", "")
    assert (list(root.handlers), root.level, root.manager.disable, list(warnings.filters)) == before
    assert np.random.get_state()[1].tolist() == state  # type: ignore[index]


def test_the_norms_are_those_of_the_spectrum(weight: Tensor, found: dict[str, float]) -> None:
    values = np.linalg.svd(weight.double().numpy(), compute_uv=False) ** 2
    shares = values / values.sum()
    expected = {
        "log_norm": math.log10(values.sum()),
        "spectral_norm": values.max(),
        "log_spectral_norm": math.log10(values.max()),
        "stable_rank": values.sum() / values.max(),
        "entropy": -(shares * np.log(shares)).sum() / math.log(24),
        "alpha_weighted": found["alpha"] * math.log10(values.max()),
        "log_alpha_norm": math.log10((values ** found["alpha"]).sum()),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_the_rest_is_as_weightwatcher_says(weight: Tensor, found: dict[str, float]) -> None:
    """On a module with another matrix before this one, as in an analysis of a whole model."""
    other = torch.nn.Linear(12, 10, bias=False)
    linear = torch.nn.Linear(30, 24, bias=False)
    linear.weight.data = weight.float()
    watcher = importlib.import_module("weightwatcher").WeightWatcher(model=torch.nn.Sequential(other, linear))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        details = watcher.analyze(mp_fit=True, randomize=True)
    row = details.iloc[1]
    assert row["M"] == 24
    for metric in set(COLUMNS) - {"random_distance"}:
        assert found[metric] == pytest.approx(float(row[COLUMNS[metric]]), rel=1e-9)
    assert 0 < found["random_distance"] < 1


def test_the_seed_and_the_name_make_the_permutation(weight: Tensor, found: dict[str, float]) -> None:
    assert weightwatcher_metrics(weight, 0) == found
    runs = [measure("alpha", name, weight, seed) for name, seed in (("a", 0), ("b", 0), ("a", 1))]
    assert all(set(run) == set(COLUMNS) for run in runs)
    assert len({run["random_distance"] for run in runs}) == 3
    assert all(run[metric] == found[metric] for run in runs for metric in COLUMNS if metric not in RANDOMIZED)
    assert cache_key("random_distance", 0) != cache_key("random_distance", 1)
    assert cache_key("alpha", 0) == cache_key("alpha", 1)


def test_small_matrices_are_analysed() -> None:
    found = weightwatcher_metrics(torch.randn(3, 5, generator=torch.Generator().manual_seed(6)), 0)
    assert all(map(math.isfinite, found.values()))


def test_what_has_no_shape_has_no_value() -> None:
    assert "alpha" not in measure("alpha", "a", torch.zeros(8, 16), 0)
    assert not math.isfinite(weightwatcher_metrics(torch.ones(1, 6), 0)["entropy"])
