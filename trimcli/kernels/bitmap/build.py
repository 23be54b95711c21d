"""The C++ behind the products, compiled on first use by torch's extension builder and kept in the stage cache."""

import contextlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path

import torch

from trimcli.errors import ResourceError
from trimcli.files.cache import Cache

SOURCES = ("operator.cpp", "product.h")
COMPILE = ("-O3",)
# at::parallel_for is OpenMP's on Linux; elsewhere rows are multiplied by one thread.
OPENMP = ("-fopenmp",) if sys.platform == "linux" else ()

_loaded = False


def products(cache_dir: Path | None = None) -> Path:
    """The compiled products, made where they do not lie yet for these sources, this torch and this kind of machine.

    Raises ResourceError where they cannot be made. cache_dir: as for `Cache`.
    """
    return Cache(cache_dir).made("kernels", _key(), ".so", _compile)


def load(cache_dir: Path | None = None) -> None:
    """Make the products callable as `torch.ops.trimcli.bitmap_linear` on the CPU. Raises what `products` raises."""
    global _loaded
    if not _loaded:
        torch.ops.load_library(products(cache_dir))
        _loaded = True


def _key() -> list[str]:
    sources = [files(__package__).joinpath(name).read_text(encoding="utf-8") for name in SOURCES]
    return [*sources, *COMPILE, *OPENMP, torch.__version__, platform.system(), platform.machine()]


def _compile(path: Path) -> None:
    with _tools(), tempfile.TemporaryDirectory(dir=path.parent) as folder, as_file(files(__package__)) as sources:
        try:
            from torch.utils import cpp_extension

            cpp_extension.load(
                path.stem,
                [str(sources / SOURCES[0])],
                extra_cflags=[*COMPILE, *OPENMP],
                extra_ldflags=[*OPENMP],
                build_directory=folder,
                with_cuda=False,
                is_python_module=False,
            )
        except (ImportError, OSError, RuntimeError) as problem:
            raise ResourceError(_unusable(_said(problem))) from None
        # The library that was loaded just now is the same file there: loading it by that name loads nothing anew.
        os.replace(Path(folder) / f"{path.stem}.so", path)


@contextlib.contextmanager
def _tools() -> Iterator[None]:
    """The compiler and ninja at hand, ninja also from beside this interpreter. Raises ResourceError."""
    before = os.environ.get("PATH", "")
    beside = str(Path(sys.executable).parent)
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise ResourceError(_unusable(f"there is no C++ compiler {compiler!r}"))
    os.environ["PATH"] = os.pathsep.join([before, beside]) if before else beside
    try:
        if shutil.which("ninja") is None:
            raise ResourceError(_unusable("there is no ninja"))
        yield
    finally:
        os.environ["PATH"] = before


def _said(problem: BaseException) -> str:
    """What a compiler's output complains of, in a line."""
    lines = str(problem).strip().splitlines()
    found = next((line for line in lines if "error:" in line), lines[0] if lines else type(problem).__name__)
    return found.strip().rstrip(".")


def _unusable(why: str) -> str:
    return f"the sparse products cannot be compiled here: {why}; install g++ and ninja, then run `trim kernels build`."
