"""What the published tools saved as `.npy`: OWL keep ratios per decoder layer, Alpha metrics per linear."""

from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from trimcli.errors import InputError, MismatchError


def read_keep_ratios(path: Path, layers: int) -> Tensor:
    """OWL keep ratios, float64 [layers]. Raises InputError (unreadable, not in 0..1), MismatchError (other length)."""
    ratios = _read(path, layers, "decoder layers")
    if float(ratios.min()) < 0 or float(ratios.max()) > 1:
        held = f"{path} holds values from {ratios.min():.4g} to {ratios.max():.4g}, so no keep ratios"
        raise InputError(f"{held}; give it to --method alpha if they are metrics.")
    return ratios


def read_metrics(path: Path, linears: int) -> Tensor:
    """Metrics in model order, float64 [linears]. Raises InputError (unreadable), MismatchError (other length)."""
    return _read(path, linears, "linears")


def _read(path: Path, expected: int, what: str) -> Tensor:
    try:
        found = open_memmap(path, mode="r")  # no memory for what its header promises
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; check the path.") from None
    except PermissionError:
        raise InputError(f"there is no permission to read {path}; change its rights.") from None
    except (OSError, ValueError, EOFError, ArithmeticError, TokenError) as problem:
        raise InputError(f"{path} is not a readable .npy file of numbers ({problem}); give another.") from None
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu" or found.ndim != 1:
        raise InputError(f"{path} does not hold one row of numbers; give a file the published tools saved.")
    values = torch.from_numpy(found.astype(np.float64).reshape(-1))
    if not len(values) or not bool(values.isfinite().all()):
        raise InputError(f"{path} is empty or holds NaN or infinite values; give another.")
    if len(values) != expected:
        held = f"{path} holds {len(values)} values where the model has {expected} {what}"
        raise MismatchError(f"{held}; give the file made for this model.")
    return values
