import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import trimcli.kernels.bitmap
from tests.trim_cli import trim, trim_json
from trimcli.errors import ResourceError
from trimcli.kernels.bitmap import build

SOURCES = Path(trimcli.kernels.bitmap.__file__).parent
CHECKS = Path(__file__).parent


def test_built_once_and_found_again(compiled: Path) -> None:
    path = build.products(compiled)
    made = path.stat().st_mtime_ns
    assert path.parent == compiled / "kernels"
    assert build.products(compiled) == path
    assert path.stat().st_mtime_ns == made
    assert trim_json("kernels", "build", "--cache-dir", compiled)["library"] == str(path)


def test_another_process_takes_it_from_the_cache(compiled: Path) -> None:
    """Without a compiler, too."""
    work = (
        "import sys, torch; from pathlib import Path; from trimcli.kernels.bitmap import build, linear;"
        "build.load(Path(sys.argv[1])); print(linear.SparseLinear.of(torch.eye(3))(torch.ones(1, 3)).tolist())"
    )
    environment = {**os.environ, "CXX": "no-such-compiler"}
    found = subprocess.run([sys.executable, "-c", work, compiled], env=environment, capture_output=True, text=True)
    assert found.stdout == "[[1.0, 1.0, 1.0]]\n", found.stderr


@pytest.mark.parametrize("lacking", ["compiler", "ninja"])
def test_without_tools_it_says_so(lacking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    if lacking == "ninja":
        (tools / "c++").write_text("#!/bin/sh\n")
        (tools / "c++").chmod(0o755)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(sys, "executable", str(tools / "python"))
    said = f"there is no {'C++ compiler' if lacking == 'compiler' else 'ninja'}"
    with pytest.raises(ResourceError, match=said.replace("+", r"\+") + r".*install g\+\+ and ninja"):
        build.products(tmp_path)
    assert os.environ["PATH"] == str(tools)
    found = trim("kernels", "build", "--cache-dir", tmp_path)
    assert found.status == 1
    assert said in found.err


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: Path) -> None:
    monkeypatch.setattr(build, "COMPILE", ("-O3", "-include", "no_such_header.h"))
    with pytest.raises(ResourceError, match=r"no_such_header\.h: No such file"):
        build.products(tmp_path)
    assert [path.suffix for path in (tmp_path / "kernels").iterdir()] == [".lock"]


def test_a_wrong_action() -> None:
    found = trim("kernels", "clean")
    assert found.status == 2
    assert "did you mean 'build'" in found.err


@pytest.mark.slow
@pytest.mark.parametrize("emulated", [False, True], ids=["native", "avx512-emulated"])
def test_every_path_under_sanitizers(emulated: bool, tmp_path: Path, compiled: Path) -> None:
    if emulated and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("the instructions are emulated with AVX2, which this processor lacks")
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command = ["c++", "-std=c++17", "-O1", "-w", *sanitizers, f"-I{SOURCES}", f"-I{CHECKS}"]
    command += [*(["-DEMULATED"] if emulated else []), str(CHECKS / "check_product.cpp"), "-o", str(tmp_path / "check")]
    subprocess.run(command, check=True)
    found = subprocess.run([tmp_path / "check"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert ("vbmi2" if emulated else "portable") in found.stdout
