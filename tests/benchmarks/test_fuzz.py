"""A small part of `make fuzz`: damaged files of every kind, random command lines."""

import random
from pathlib import Path

import pytest

from benchmarks.fuzz import Sandbox, Tally
from benchmarks.support.mutations import joined, mutated, split
from benchmarks.support.watched import run

ROUNDS = 2
LINES = 40


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("fuzz") / "corpus")


def test_damaged_files_are_read_or_refused(sandbox: Sandbox) -> None:
    tally, rng = Tally(), random.Random(0)
    for kind in sandbox.readers:
        for _ in range(ROUNDS):
            sandbox.damaged_file(rng, tally, kind)
    assert tally.wrong == []
    assert tally.runs.total() == ROUNDS * len(sandbox.readers)
    assert sum(count for (_, status), count in tally.runs.items() if status == 2) > tally.runs.total() / 3


def test_random_command_lines_are_answered(sandbox: Sandbox) -> None:
    tally, rng = Tally(), random.Random(0)
    for _ in range(LINES):
        sandbox.random_line(rng, tally)
    assert tally.wrong == []
    assert {status for _, status in tally.runs} >= {0, 2}


def test_the_undamaged_files_are_read(sandbox: Sandbox) -> None:
    """Else every refusal would say nothing."""
    for files, lines in sandbox.readers.values():
        assert files
        for line in lines:
            found = run(line, sandbox.corpus.out)
            assert (found.status, found.wrong) == (0, None), (line, found.said)
            sandbox.restore()


def test_what_is_wrong_is_seen(sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / ".masks.123.part").touch()
    found = run(["verify", str(sandbox.corpus.home / "nothing")], tmp_path)
    assert found.wrong is not None
    assert "behind" in found.wrong


def test_damage_is_damage(sandbox: Sandbox) -> None:
    data, rng = (sandbox.corpus.home / "masks.safetensors").read_bytes(), random.Random(0)
    assert split(joined(*split(data))) == split(data)
    assert sum(mutated(data, "masks.safetensors", rng) != data for _ in range(50)) > 30
