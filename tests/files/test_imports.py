"""Files of the published tools: what they hold, and what is refused."""

import re
from pathlib import Path

import numpy as np
import pytest

from trimcli.errors import InputError, MismatchError
from trimcli.files.imports import read_keep_ratios, read_metrics

DATA = Path(__file__).parents[1] / "data"
OWL = DATA / "OWL_layer_ratios_Qwen2.5-3B_0.7_0.12_5.0.npy"
ALPHA = DATA / "Qwen2.5-3B_alpha_peak.npy"


def test_published_files_read_as_they_are() -> None:
    assert read_keep_ratios(OWL, 36).tolist() == np.load(OWL).tolist()
    assert read_metrics(ALPHA, 252).tolist() == np.load(ALPHA).tolist()


def test_a_count_that_does_not_fit_names_both() -> None:
    with pytest.raises(MismatchError, match="holds 36 values where the model has 28 decoder layers"):
        read_keep_ratios(OWL, 28)
    with pytest.raises(MismatchError, match="holds 252 values where the model has 28 linears"):
        read_metrics(ALPHA, 28)


def test_metrics_are_no_keep_ratios() -> None:
    with pytest.raises(InputError, match="no keep ratios"):
        read_keep_ratios(ALPHA, 252)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "objects.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"objects\.npy is not a readable"):
        read_metrics(path, 1)


@pytest.mark.parametrize(
    "values",
    [
        np.array([1.0, np.nan]),
        np.array([1.0, np.inf]),
        np.zeros((2, 2)),
        np.array(["a", "b"]),
        np.array([]),
        np.array(1.0),
    ],
)
def test_unusable_values_are_refused(values: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "values.npy"
    np.save(path, values)
    with pytest.raises((InputError, MismatchError), match=r"values\.npy"):
        read_metrics(path, 2)


def test_missing_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        read_metrics(tmp_path / "none.npy", 2)
    (tmp_path / "short.npy").write_bytes(ALPHA.read_bytes()[:700])
    (tmp_path / "text.npy").write_text("1 2 3")
    (tmp_path / "empty.npy").write_bytes(b"")
    np.savez(tmp_path / "several.npz", a=np.ones(2))
    for name in ("short.npy", "text.npy", "empty.npy", "several.npz"):
        with pytest.raises(InputError, match=name):
            read_metrics(tmp_path / name, 252)
    with pytest.raises(InputError, match="readable"):
        read_metrics(tmp_path, 252)


def header(text: str) -> bytes:
    """The beginning of a .npy file with this header."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        b"{}",
        b"\x93NUMPY\x01\x00\x76",
        header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }\n"),
        header("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }\n"),
        header("{'descr': '|O', 'fortran_order': False, 'shape': (2,), }\n"),
        header("((((((\n"),
        header("[" * 500 + "\n"),
    ],
)
def test_what_is_no_array_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ratios.npy"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(path))):
        read_keep_ratios(path, 2)
