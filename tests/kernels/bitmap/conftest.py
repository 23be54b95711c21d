"""The compiled products, made once for all tests of a run."""

import shutil
from pathlib import Path

import pytest

from trimcli.kernels.bitmap import build


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The cache folder that holds them; the processes of a parallel run share it."""
    if shutil.which("c++") is None or shutil.which("ninja") is None:
        pytest.skip("there is no C++ compiler or no ninja here")
    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "kernels"
    build.load(shared)
    return shared
