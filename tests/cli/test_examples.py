"""examples/Makefile: five rules; what make would run is run in this process."""

import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.trim_cli import trim
from trimcli.demo import write_texts

MAKEFILE = Path(__file__).parents[2] / "examples" / "Makefile"
STAGES = ["calibrate", "alloc-layers", "prune", "apply-masks", "eval"]


class Example:
    """The Makefile on the embedded model with two sparsities, in a folder of its own."""

    def __init__(self, model: Path, folder: Path) -> None:
        texts = write_texts(folder)
        self.out = folder / "out"
        self._variables = {
            "MODEL": shutil.copytree(model, folder / "model"),
            "TRAIN": texts.calibration,
            "TEST": folder / "test.txt",
            "SEQLEN": 32,
            "NSAMPLES": 4,
            "SPARSITIES": "50 70",
            "OUT": self.out,
            "TRIM": "trim",
            "FLAGS": f"--quiet --device cpu --dtype float32 --cache-dir {folder / 'cache'}",
        }
        (folder / "test.txt").write_text(texts.measurement.read_text()[:4000])

    def _make(self, *options: str) -> subprocess.CompletedProcess[str]:
        given = [f"{name}={value}" for name, value in self._variables.items()]
        command = ["make", *options, "-f", str(MAKEFILE), *given]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def run(self) -> list[str]:
        """Run what make would run; returns the stages in order."""
        listed = self._make("--dry-run")
        assert listed.returncode == 0, listed.stderr
        stages = []
        for line in listed.stdout.splitlines():
            program, *args = shlex.split(line)
            if program == "mkdir":
                subprocess.run([program, *args], check=True)
            elif program == "trim":
                time.sleep(0.01)  # files one after the other are told apart by their times
                assert trim(*args).status == 0
                stages.append(args[0])
        return stages

    def is_done(self) -> bool:
        """Whether make finds nothing to do."""
        return self._make("--question").returncode == 0


def touch(path: Path) -> None:
    """Make `path` newer than every file there is, by more than a file system's clock may lag."""
    newest = max(time.time(), *(file.stat().st_mtime for file in path.parent.rglob("*")))
    os.utime(path, (newest + 0.05, newest + 0.05))
    time.sleep(0.1)


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_the_makefile(nano_qwen2: Path, tmp_path: Path) -> None:
    example = Example(nano_qwen2, tmp_path)
    assert sorted(example.run(), key=STAGES.index) == ["calibrate"] + [stage for stage in STAGES[1:] for _ in "ab"]
    assert example.is_done()
    assert example.run() == []

    touch(example.out / "ratios-70.json")
    assert not example.is_done()
    assert example.run() == ["prune", "apply-masks", "eval"]
    assert example.is_done()

    touch(tmp_path / "test.txt")
    assert example.run() == ["eval", "eval"]
    assert example.is_done()
