"""A small part of `make torture`: a kill, a failing write and two runs at once, of the stages that take no time."""

import random
from pathlib import Path

import pytest

from benchmarks import torture
from benchmarks.support.faults import Faults, failing
from benchmarks.support.stages import PIPELINE, STAGES

QUICK = [one for one in STAGES if one.name in ("prune, wanda", "apply-masks, packed", "alloc-layers")]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> torture.Bench:
    return torture.Bench(tmp_path_factory.mktemp("torture"))


def test_kills_end_as_if_nothing_had_been(bench: torture.Bench) -> None:
    outcome = torture.kills(bench, 3, random.Random(0), QUICK)
    assert outcome.wrong == []
    assert outcome.counts.total() == 3


def test_writes_that_fail_leave_what_was_there(bench: torture.Bench) -> None:
    outcome = torture.faults(bench, 10, random.Random(0), QUICK[:2])
    assert outcome.wrong == []
    assert outcome.counts.total() == 10


def test_two_prunes_at_once(bench: torture.Bench) -> None:
    outcome = torture.pairs(bench, 2, random.Random(0))
    assert outcome.wrong == []
    assert outcome.counts.total() == 2


def test_every_command_that_writes_is_among_the_stages() -> None:
    written = {one.line[0] for one in STAGES}
    pipeline = ["calibrate", "alloc-layers", "prune", "apply-masks", "eval"]
    assert {*pipeline, "unpack", "export", "sweep", "finetune"} <= written
    assert [one.line[0] for one in PIPELINE] == pipeline


def test_what_is_wrong_is_seen(bench: torture.Bench) -> None:
    """A run that leaves other bytes, or a piece of an output, does not pass."""
    stage = QUICK[0]
    work = bench.fresh(stage, old=False)
    assert "differ" in str(bench.differs(stage, work))
    assert bench.start(stage, work).wait(60) == 0
    assert bench.differs(stage, work) is None
    (work / ".ratios.json.1.part").touch()
    assert "left" in str(bench.differs(stage, work))
    assert bench.state(stage, work, {}) is None
    (work / "ratios.json").write_text("half")
    assert "neither" in str(bench.state(stage, work, {}))


def test_each_write_fails_in_its_turn(tmp_path: Path) -> None:
    def work() -> None:
        with open(tmp_path / "a", "w") as handle:
            handle.write("text")
        (tmp_path / "a").rename(tmp_path / "b")

    counted = Faults(tmp_path)
    with failing(counted):
        work()
    assert counted.calls == ["open", "write", "rename"]
    for at in (1, 2, 3):
        with pytest.raises(OSError, match="No space"), failing(Faults(tmp_path, at)):
            work()
    with failing(Faults(tmp_path, 4)):
        work()
    assert (tmp_path / "b").read_text() == "text"
