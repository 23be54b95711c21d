"""Tensors written while the next is made: what fails is told as if it had been written at once."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from trimcli.files.tensors import TensorSpec, nonzero, write_artifact, write_tensors

TENSORS = {f"{number}": torch.full((300, 100), float(number)) for number in range(5)} | {"none": torch.zeros(0, 3)}
SPECS = {name: TensorSpec.of(tensor) for name, tensor in TENSORS.items()}


def test_what_is_written_in_the_background_is_whole(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", SPECS, TENSORS.__getitem__)
    found = load_file(tmp_path / "file")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_is_told() -> None:
    with pytest.raises(OSError, match=f"Errno {errno.ENOSPC}"):
        write_tensors(Path("/dev/full"), SPECS, TENSORS.__getitem__)


def test_a_tensor_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    def tensor(name: str) -> Tensor:
        if name == "3":
            raise KeyError("lost")
        return TENSORS[name]

    with pytest.raises(KeyError, match="lost"):
        write_artifact(tmp_path / "file", {}, SPECS, tensor)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_zeros_are_known_by_their_bits(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal / 4  # subnormal
    values = torch.tensor([[0.0, -0.0, 1.0, -2.0], [torch.nan, torch.inf, tiny, -tiny]], dtype=dtype)
    for one in (values, values.T, values[:, ::2]):
        assert torch.equal(nonzero(one), one != 0)
