"""Outputs that appear whole, one by one and together."""

import contextlib
import errno
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.atomic_outputs import NEW, OLD, WRITERS, contents, expected, write_all, write_directory, write_file
from tests.small_models import llama_config, random_model, save
from tests.trim_cli import COMPUTE, save_tokens, tree, trim
from trimcli.errors import InputError, OptionError, OutputExists
from trimcli.files.atomic import all_or_none, atomic_directory, atomic_file


class Failing:
    """A function in whose place `original` is called, but for the call `number`, counted from 0, which raises."""

    def __init__(self, original: Callable[..., Any], number: int, problem: BaseException) -> None:
        self.original, self.number, self.problem, self.calls = original, number, problem, 0

    def __get__(self, instance: Any, _: type) -> Callable[..., Any]:
        return lambda *args, **named: self(instance, *args, **named)

    def __call__(self, *args: Any, **named: Any) -> Any:
        self.calls += 1
        if self.calls == self.number + 1:
            raise self.problem
        return self.original(*args, **named)


# --- one output ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["masks", "pruned"])
def test_an_output_appears_when_it_is_whole(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, OLD)
    before = contents(tmp_path)

    def half() -> None:
        atomic = atomic_file if name == "masks" else atomic_directory
        with atomic(tmp_path / name, force=True) as temporary:
            assert temporary.parent == tmp_path
            (temporary if name == "masks" else temporary / "part").write_text("half")
            assert {path: data for path, data in contents(tmp_path).items() if path in before} == before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert contents(tmp_path) == before
    WRITERS[name](tmp_path / name, NEW)
    assert contents(tmp_path) == expected(name)


def test_what_may_not_be_replaced_is_refused(tmp_path: Path) -> None:
    write_all(tmp_path, OLD)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    before = contents(tmp_path)
    for atomic, name, force, error in (
        (atomic_file, "masks", False, OutputExists),
        (atomic_directory, "pruned", False, OutputExists),
        (atomic_directory, "mine", True, OutputExists),
        (atomic_directory, "masks", True, OutputExists),
        (atomic_file, "pruned", True, OutputExists),
        (atomic_file, "missing/masks", True, InputError),
    ):
        with pytest.raises(error), atomic(tmp_path / name, force=force):
            pytest.fail("nothing is to be written")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("number", range(4))
def test_a_directory_whose_rename_fails_stays_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write_directory(tmp_path / "pruned", OLD)
    before = contents(tmp_path)
    failing = Failing(Path.rename, number, PermissionError("in use"))
    monkeypatch.setattr(Path, "rename", failing)
    if number < 2:
        with pytest.raises(PermissionError):
            write_directory(tmp_path / "pruned", NEW)
        assert contents(tmp_path) == before
    else:
        write_directory(tmp_path / "pruned", NEW)
        assert failing.calls == 2
        assert (tmp_path / "pruned" / "below" / NEW).is_file()


def test_what_a_killed_process_of_this_id_left_is_no_hindrance(tmp_path: Path) -> None:
    write_all(tmp_path, OLD)
    for name, write in WRITERS.items():
        for end in ("part", "old"):
            write(tmp_path / f".{name}.{os.getpid()}.{end}", "stale")
    with all_or_none():
        write_all(tmp_path, NEW)
    assert contents(tmp_path) == expected(*WRITERS)


@pytest.mark.parametrize("together", [False, True])
def test_directories_are_synced_only_where_they_can_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    """Windows opens no directory."""
    synced = []

    def windows(path: Any, flags: int, *args: Any, **named: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, flags, *args, **named)

    original = os.open
    monkeypatch.setattr(os, "open", windows)
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    if together:
        with all_or_none():
            write_all(tmp_path, NEW)
    else:
        write_all(tmp_path, NEW)
    assert contents(tmp_path) == expected(*WRITERS)
    # Two files and, in each of two directories, one and the `trim.json`, synced once by itself.
    assert synced == [len(NEW)] * 8


# --- several outputs -------------------------------------------------------------------------------------


def test_outputs_take_their_places_together(tmp_path: Path) -> None:
    write_all(tmp_path, OLD, but=("rows.json",))
    before = contents(tmp_path)
    with all_or_none():
        write_all(tmp_path, NEW, but=("rows", "rows.json"))
        with all_or_none():
            write_all(tmp_path, NEW, but=("masks", "pruned"))
        during = contents(tmp_path)
        assert {path: data for path, data in during.items() if path in before} == before
        assert all(path.startswith(".") for path in during.keys() - before.keys())
    assert contents(tmp_path) == expected(*WRITERS)


@pytest.mark.parametrize("problem", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("last", WRITERS)
def test_what_fails_on_the_way_leaves_the_old_ones(tmp_path: Path, last: str, problem: BaseException) -> None:
    write_all(tmp_path, OLD, but=("rows",))
    before = contents(tmp_path)

    def write_until(last: str) -> None:
        for name, write in WRITERS.items():
            if name == last:
                with atomic_file(tmp_path / "more") as temporary:
                    temporary.write_text("half")
                    raise problem
            write(tmp_path / name, NEW)

    with pytest.raises(type(problem)), all_or_none():
        write_until(last)
    assert contents(tmp_path) == before


def test_an_output_that_fails_leaves_nothing_though_the_others_go_on(tmp_path: Path) -> None:
    with all_or_none():
        write_file(tmp_path / "masks")
        with pytest.raises(OSError, match="full"), atomic_directory(tmp_path / "pruned"):
            raise OSError(errno.ENOSPC, "full")
    assert contents(tmp_path) == {"masks": NEW.encode()}


@pytest.mark.parametrize("problem", [PermissionError("in use"), KeyboardInterrupt()])
@pytest.mark.parametrize("number", range(8))
def test_whichever_rename_fails_the_old_ones_stand_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, problem: BaseException
) -> None:
    """Three outputs that replace others, of two renames each, and one that is new."""
    write_all(tmp_path, OLD, but=("rows.json",))
    before = contents(tmp_path)
    failing = Failing(Path.rename, number, problem)
    monkeypatch.setattr(Path, "rename", failing)
    if number < 7:
        with pytest.raises(type(problem)), all_or_none():
            write_all(tmp_path, NEW)
        assert contents(tmp_path) == before
    else:
        with all_or_none():
            write_all(tmp_path, NEW)
        assert failing.calls == 7


def test_a_sync_that_fails_at_the_end_brings_the_old_ones_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(tmp_path, OLD)
    before = contents(tmp_path)

    def write() -> None:
        with all_or_none():
            write_all(tmp_path, NEW)
            monkeypatch.setattr(os, "fsync", Failing(os.fsync, 0, OSError(errno.EIO, "broken")))

    with pytest.raises(OSError, match="broken"):
        write()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("call", ["link", "replace", "fsync"])
@pytest.mark.parametrize("number", range(3))
def test_one_file_stands_again_whatever_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    write_file(tmp_path / "masks", OLD)
    failing = Failing(getattr(os, call), number, OSError(errno.EIO, "broken"))
    monkeypatch.setattr(os, call, failing)
    with contextlib.suppress(OSError):
        write_file(tmp_path / "masks")
    failed = failing.calls > number
    assert contents(tmp_path) == {"masks": (OLD if failed else NEW).encode()}


@pytest.mark.parametrize("replaces", [True, False])
def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaces: bool) -> None:
    if replaces:
        write_file(tmp_path / "masks", OLD)
    monkeypatch.setattr(os, "link", Failing(os.link, 0, OSError(errno.EPERM, "not permitted")))
    write_file(tmp_path / "masks")
    assert contents(tmp_path) == {"masks": NEW.encode()}


@pytest.mark.parametrize("inner", ["pruned", "pruned/masks", "../{}/pruned"])
def test_an_output_inside_another_is_refused(tmp_path: Path, inner: str) -> None:
    write_directory(tmp_path / "pruned", OLD)
    before = contents(tmp_path)
    outputs = [tmp_path / "pruned", tmp_path / inner.format(tmp_path.name)]

    def write(targets: list[Path]) -> None:
        with all_or_none():
            for target in targets:
                (write_file if target.name == "masks" else write_directory)(target)

    for targets in (outputs, outputs[::-1]):
        with pytest.raises(OptionError, match="one would replace the other"):
            write(targets)
        assert contents(tmp_path) == before


# --- prune -----------------------------------------------------------------------------------------------


def test_a_forced_prune_replaces_all_of_its_outputs_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base"
    save(random_model(llama_config()), base / "model")
    tokens = save_tokens(base / "tokens.safetensors", vocabulary=64)

    def prune(sparsity: float) -> int:
        out = tmp_path / "out"
        outputs = ("-o", out / "masks", "--save-model", out / "pruned", "--stats-out", out / "rows.json")
        run = ("--tokens", tokens, "--use-trim", "--iterations", 1, "--cache-dir", base / "cache", *COMPUTE, "--force")
        return trim("prune", base / "model", *outputs, "--sparsity", sparsity, *run).status

    (tmp_path / "out").mkdir()
    assert prune(0.5) == 0
    old = contents(tmp_path / "out")
    assert {"masks", "pruned/model.safetensors", "rows.json", "rows.safetensors"} < old.keys()

    def full(*_: object, **__: object) -> None:
        written = set(tree(tmp_path / "out")) - old.keys()
        assert {name.split(".")[1] for name in written} == {"masks", "pruned", "rows"}
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("trimcli.files.rowstats.write_json", full)
        assert prune(0.75) == 1
    assert contents(tmp_path / "out") == old
    assert prune(0.75) == 0
    new = contents(tmp_path / "out")
    assert new.keys() == old.keys()
    changed = {name for name in new if new[name] != old[name]}
    assert changed == {"masks", "pruned/model.safetensors", "pruned/README.md", "pruned/trim.json"} | {
        "rows.json",
        "rows.safetensors",
    }


OUTPUTS = {
    "masks": "trimcli.commands.prune.write_masks",
    "model": "trimcli.commands.prune.write_model",
    "rows' vectors": "trimcli.files.rowstats.write_artifact",
    "rows": "trimcli.files.rowstats.write_json",
}


@pytest.mark.parametrize("problem", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_forced_prune_that_fails_at_any_output_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, problem: BaseException
) -> None:
    save(random_model(llama_config()), tmp_path / "model")
    tokens = save_tokens(tmp_path / "tokens.safetensors", vocabulary=64)
    out = tmp_path / "out"
    out.mkdir()
    outputs = ("-o", out / "masks", "--save-model", out / "pruned", "--stats-out", out / "rows.json")
    run = ("--tokens", tokens, "--use-trim", "--iterations", 1, "--cache-dir", tmp_path / "cache", *COMPUTE, "--force")
    assert trim("prune", tmp_path / "model", *outputs, "--sparsity", 0.5, *run).status == 0
    before = contents(out)
    original = import_module(OUTPUTS[output].rpartition(".")[0]).__dict__[OUTPUTS[output].rpartition(".")[2]]
    staged: list[list[str]] = []

    def fails(*args: Any, **named: Any) -> None:
        original(*args, **named)
        staged.append([name for name in tree(out) if name.endswith(".part")])
        raise problem

    monkeypatch.setattr(OUTPUTS[output], fails)
    done = trim("prune", tmp_path / "model", *outputs, "--sparsity", 0.75, *run)
    assert done.status == (130 if isinstance(problem, KeyboardInterrupt) else 1)
    assert len(staged) == 1
    assert len(staged[0]) == list(OUTPUTS).index(output) + 1
    assert contents(out) == before
