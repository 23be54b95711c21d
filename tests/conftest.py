"""What every test shares: no network, no cache of the user's, a trained model."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.simulated_device import SimulatedDevice

# The same examples in every run, so that a check of the same tree says the same; no deadline on a busy machine.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# The libraries read these when they are imported, so they are set before any test module is.
CACHE = Path(tempfile.mkdtemp(prefix="trim-tests-"))
os.environ.update(
    HF_HOME=str(CACHE / "huggingface"),
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    XDG_CACHE_HOME=str(CACHE / "cache"),
)
# The matrices are tiny: threads would wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for variable in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "TRIM_TRACEBACK"):
    os.environ.pop(variable, None)


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def nano_qwen2() -> Path:
    """A trained model: Qwen2 form, 4 layers, float16, vocabulary 2,048."""
    from tests.small_models import NANO

    return NANO


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """What is synced, and when, test_atomic holds; thousands of small files need not wait for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(scope="session", autouse=True)
def _accelerator() -> None:
    """Autograd counts the devices that there are when it first runs: this one is there before any test."""
    from tests.simulated_device import simulated_device

    simulated_device()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder of the compiled sparse products, which work from here on; a parallel run makes them once."""
    if shutil.which("c++") is None or shutil.which("ninja") is None:
        pytest.skip("there is no C++ compiler or no ninja here")
    from trimcli.kernels.bitmap import build

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernels"
    build.load(folder)
    return folder


@pytest.fixture
def sim() -> "Iterator[SimulatedDevice]":
    """An accelerator that is simulated on the CPU, `--device sim:0`: copies and waits are counted, memory is short."""
    from tests.simulated_device import simulated

    with simulated() as device:
        yield device


@pytest.fixture
def model_copy(nano_qwen2: Path, tmp_path: Path) -> Path:
    """A copy of the trained model that a test may damage."""
    return Path(shutil.copytree(nano_qwen2, tmp_path / "model"))
