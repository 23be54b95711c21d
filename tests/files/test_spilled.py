"""Tensors in files without a name."""

import errno
import os
from pathlib import Path

import pytest
import torch

from trimcli.errors import ResourceError
from trimcli.files.spilled import Spilled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_holds_what_is_written_and_no_file_is_seen(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    found = Spilled(folder, (5, 300, 7), dtype)
    expected = torch.randn(5, 300, 7).to(dtype)
    for sample in range(5):
        rows = slice(sample, sample + 1)
        found.ahead(slice(rows.stop, rows.stop + 2))
        found.tensor[rows] = expected[rows]
        found.behind(rows)
    assert torch.equal(found.tensor, expected)
    assert list(folder.iterdir()) == []


def test_the_room_is_taken_at_once_and_given_back(tmp_path: Path) -> None:
    def files() -> set[str]:
        return {name for number in os.listdir("/proc/self/fd") if (name := _link(number)).startswith(str(tmp_path))}

    def mapped() -> bool:
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    found = Spilled(tmp_path, (1000, 1000), torch.float32)
    assert mapped()
    tensor = found.tensor[:2]
    del found
    assert mapped()  # a part of it is in use
    del tensor
    assert not mapped()
    assert not files()


def _link(number: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return ""


def test_a_disk_without_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match=r"--spill .*: its disk has no room for 3\.8 MiB of hidden states; name a"):
        Spilled(tmp_path, (1000, 1000), torch.float32)
    assert list(tmp_path.iterdir()) == []
