"""What killed runs leave and the next ones find; links, and what is no file."""

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.atomic_outputs import NEW, OLD, WRITERS, contents, expected, write_all, write_file
from tests.small_models import llama_config, random_model, save
from tests.trim_cli import COMPUTE, tree, trim
from trimcli.errors import OutputExists, TrimError, UsageError
from trimcli.files.atomic import all_or_none, atomic_directory, atomic_file, recover, refuse_existing

# --- killed ----------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from tests.atomic_outputs import NEW, write_all
from trimcli.files import atomic
from trimcli.files.atomic import all_or_none

folder, at = Path(sys.argv[1]), int(sys.argv[2])

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

if at < 0:
    with atomic.atomic_directory(folder / "pruned", force=True) as temporary:
        (temporary / "half").write_text("half")
        with atomic.atomic_file(folder / "masks", force=True) as other:
            other.write_text("half")
            kill()
original = Path.rename
calls = 0

def rename(self, target):
    global calls
    if calls == at:
        kill()
    calls += 1
    return original(self, target)

Path.rename = rename
with all_or_none():
    write_all(folder, NEW)
kill()
"""


def run_killed(folder: Path, at: int) -> None:
    """Write all outputs in another process, which is killed before its rename `at`, in the middle of two for -1."""
    command = [sys.executable, "-c", KILLED, str(folder), str(at)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.skipif(os.name != "posix", reason="processes are killed otherwise")
@pytest.mark.parametrize("at", range(-1, 9))
def test_a_killed_run_leaves_whole_outputs_that_the_next_one_finds(tmp_path: Path, at: int) -> None:
    """Four outputs that replace others, of two renames each; every one is the old or the new, as a whole."""
    write_all(tmp_path, OLD)
    old = contents(tmp_path)
    run_killed(tmp_path, at)
    killed = contents(tmp_path)
    missing = [name for name in WRITERS if name not in killed]
    assert len(missing) == (at % 2 if at > 0 and at < 8 else 0)
    for name in WRITERS:
        recover(tmp_path / name, sweep=False)
    after = contents(tmp_path)
    for place, name in enumerate(WRITERS):
        found = {path: data for path, data in after.items() if path.split("/")[0] == name}
        stood = at >= 0 and place < at // 2
        assert found == (expected(name) if stood else {path: old[path] for path in old if path.split("/")[0] == name})
    for name in WRITERS:
        recover(tmp_path / name)
    assert not [path for path in contents(tmp_path) if path.startswith(".")]
    write_all(tmp_path, NEW)
    assert contents(tmp_path) == expected(*WRITERS)


@pytest.mark.skipif(os.name != "posix", reason="nothing is swept where files have no such locks")
def test_nothing_of_a_run_at_work_is_swept(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "masks") as temporary:
        temporary.write_text(NEW)
        recover(tmp_path / "masks")
        assert temporary.read_text() == NEW
        # Nor where another container has another process of this number, or here a process runs that has no lock.
        with pytest.raises(TrimError, match="another run is writing"), atomic_file(tmp_path / "masks"):
            pytest.fail("it is being written")
    left = tmp_path / f".masks.{os.getppid()}.part"
    left.write_text("of a living process")
    lone = tmp_path / f".rows.{os.getppid()}.old"
    lone.write_text("of a living process")
    recover(tmp_path / "masks")
    recover(tmp_path / "rows")
    assert tree(tmp_path) == sorted([left.name, lone.name, "masks"])


def test_what_is_named_alike_is_not_taken_for_a_leftover(tmp_path: Path) -> None:
    names = [".masks.part", ".masks.99999999x.part", ".other.99999999.part", ".masks.99999999.party"]
    for name in names:
        (tmp_path / name).touch()
    write_file(tmp_path / "masks")
    assert tree(tmp_path) == sorted([*names, "masks"])


@pytest.mark.skipif(os.name != "posix", reason="processes are killed otherwise")
def test_a_command_that_reads_finds_what_a_killed_one_was_replacing(tmp_path: Path) -> None:
    model = save(random_model(llama_config()), tmp_path / "model")
    out = tmp_path / "pruned"
    run = ("--method", "magnitude", "--sparsity", 0.5, "--cache-dir", tmp_path / "cache", *COMPUTE)
    assert trim("prune", model, "-o", tmp_path / "masks", "--save-model", out, *run).status == 0
    before = contents(out)
    out.rename(tmp_path / ".pruned.99999999.old")
    (tmp_path / ".pruned.99999999.part").mkdir()
    done = trim("verify", out)
    assert (done.status, done.err) == (0, "")
    assert contents(out) == before
    assert (tmp_path / ".pruned.99999999.part").exists()  # which the next that writes there removes
    assert trim("prune", model, "-o", tmp_path / "masks", "--save-model", out, *run, "--force").status == 0
    assert not [name for name in tree(tmp_path) if name.endswith(".part")]


# --- links and what is no file ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["masks", "pruned"])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path, name: str, there: bool) -> None:
    (tmp_path / "far").mkdir()
    if there:
        WRITERS[name](tmp_path / "far" / "real", OLD)
    (tmp_path / name).symlink_to(Path("far") / "real", target_is_directory=name == "pruned")
    if there:
        with pytest.raises(OutputExists, match="exists already"):
            refuse_existing(tmp_path / name, force=False)
    with all_or_none():
        WRITERS[name](tmp_path / name, NEW)
        write_file(tmp_path / "rows.json")
    assert (tmp_path / name).is_symlink()
    (tmp_path / name).unlink()
    (tmp_path / "far" / "real").rename(tmp_path / name)
    assert contents(tmp_path) == {**expected(name, "rows.json"), "far": None}


def test_what_is_no_file_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for name, message in (
            ("pipe", "is a pipe, which no output replaces"),
            ("socket", "is a socket"),
            ("null", "is a device"),
            ("/dev/null", "is a device"),
            ("loop", "is a link that leads back to itself"),
        ):
            for atomic in (atomic_file, atomic_directory):
                with pytest.raises(UsageError, match=message), atomic(tmp_path / name, force=True):
                    pytest.fail("nothing is to be written")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert tree(tmp_path) == ["loop", "null", "pipe", "socket"]
