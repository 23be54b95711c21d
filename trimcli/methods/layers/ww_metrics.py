"""Ten shape metrics from weightwatcher, which logs, warns, prints and draws from numpy's generator: all undone here."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Metric -> weightwatcher's column.
COLUMNS = {
    "alpha": "alpha",
    "entropy": "entropy",
    "stable_rank": "stable_rank",
    "mp_softrank": "mp_softrank",
    "random_distance": "rand_distance",
    "log_norm": "log_norm",
    "log_spectral_norm": "log_spectral_norm",
    "spectral_norm": "spectral_norm",
    "alpha_weighted": "alpha_weighted",
    "log_alpha_norm": "log_alpha_norm",
}
FROM_POWER_LAW = {"alpha", "alpha_weighted", "log_alpha_norm"}
# Negative only where weightwatcher could not compute them.
NOT_NEGATIVE = {"entropy", "mp_softrank"}
RANDOMIZED = {"random_distance"}


def weightwatcher_metrics(weight: Tensor, seed: int) -> dict[str, float]:
    """All ten metrics of a matrix [D_out, D_in], any float dtype and device, by name; NaN where an analysis failed."""
    import numpy as np
    from torch import nn

    with _without_trace(seed):
        import weightwatcher

        linear = nn.Linear(1, 1, bias=False)
        linear.weight = nn.Parameter(weight.detach().cpu().float(), requires_grad=False)
        watcher = weightwatcher.WeightWatcher(model=nn.Sequential(linear))
        try:
            details = watcher.analyze(
                mp_fit=True, randomize=True, min_evals=0, max_evals=0, max_N=max(weight.shape), savefig=False
            )
        except (ArithmeticError, ValueError, IndexError, np.linalg.LinAlgError):
            return dict.fromkeys(COLUMNS, float("nan"))
    return {metric: _value(details, metric, column) for metric, column in COLUMNS.items()}


def _value(details: Any, metric: str, column: str) -> float:
    """The metric, NaN where weightwatcher says that its fit failed: by a status, by a -1, or by no column."""
    if column not in details:
        return float("nan")
    value = float(details[column].iloc[0])
    failed = metric in FROM_POWER_LAW and details["status"].iloc[0] != "success"
    return float("nan") if failed or (metric in NOT_NEGATIVE and value < 0) else value


@contextmanager
def _without_trace(seed: int) -> Iterator[None]:
    """Silence, a seeded generator, and afterwards the logging, warnings and generator of before."""
    import numpy as np
    import torch

    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, logging.root.manager.disable
    state = np.random.get_state()
    try:
        logging.disable(logging.CRITICAL)
        np.random.seed(seed)
        sink = io.StringIO()
        with redirect_stdout(sink), redirect_stderr(sink), warnings.catch_warnings(action="ignore"), torch.no_grad():
            yield
    finally:
        np.random.set_state(state)
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)
