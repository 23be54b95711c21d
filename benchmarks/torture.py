"""Kills at any moment, disks that fail at any write, two runs at once: what stands afterwards is whole, and goes on.

    python -m benchmarks.torture --seed 0 --kills 200 --faults all --pairs 50 --out benchmarks/results-torture.md

--kills N: commands of all stages are killed (SIGKILL, SIGTERM, Ctrl-C) at random moments, half of them while they
replace earlier outputs, and repeated: the outputs are those of a run that was not. --faults N|all: every write of the
five-stage pipeline (or N drawn ones) fails once for each of ENOSPC, EIO, EACCES and EROFS: the earlier outputs stand,
one sentence says why, and the repeated command succeeds. --pairs N: two prunes of one output and one cache at once.
"""

import argparse
import errno
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from benchmarks.support.children import Child, start
from benchmarks.support.faults import Faults, failing
from benchmarks.support.provenance import head, publish, table
from benchmarks.support.stages import PIPELINE, STAGES, Stage, build, contents, pieces, put_old

SECONDS = 300.0
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS)
# Until a command begins, SIGTERM and Ctrl-C end it as they end any program, since there is nothing to leave tidy.
SIGNALS = {signal.SIGKILL: {-9}, signal.SIGTERM: {143, -15}, signal.SIGINT: {130}}
# A stage is killed again and again; one that ends before its signal comes is not counted.
MOST_TRIES = 20


@dataclass
class Outcome:
    """What was tried, by name and what came of it, and what was not as promised."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, name: str, came: str, wrong: str | None = None) -> None:
        """One try."""
        self.counts[name, came] += 1
        if wrong:
            self.wrong.append(f"{name}: {wrong}")
            print(f"  {name}: {wrong}"[:700], file=sys.stderr, flush=True)


class Bench:
    """Folders to torment, made from one; the outputs of each stage when nothing happens, and how long that takes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, build(folder / "home")
        self.whole: dict[str, dict[str, bytes | None]] = {}
        self.seconds: dict[str, float] = {}
        self._made = 0

    def fresh(self, stage: Stage, *, old: bool) -> Path:
        """A folder with what a stage reads; old: and with outputs of an earlier run."""
        # Always of the same name, since files say which command made them.
        work = self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.home, work)
        if old:
            put_old(work, stage)
        return work

    def start(self, stage: Stage, work: Path, number: int = 0, faults: Faults | None = None) -> Child:
        """The stage's command; `--force` always, so that every run of it is of the same command line."""

        @contextmanager
        def within() -> Iterator[None]:
            if faults is None:
                yield
                return
            with failing(faults):
                yield
            (self.folder / "writes").write_text(str(len(faults.calls)))

        return start([*stage.line, "--force"], work, self.folder / f"said-{number}", within=within)

    def reference(self, stage: Stage) -> dict[str, bytes | None]:
        """The outputs of the stage when nothing happens."""
        if stage.name not in self.whole:
            work = self.fresh(stage, old=False)
            began = time.monotonic()
            child = self.start(stage, work)
            if child.wait(SECONDS):
                raise RuntimeError(f"{stage.name}: {child.said.read_text()}")
            self.seconds[stage.name] = time.monotonic() - began
            self.whole[stage.name] = contents(work, stage.outputs)
        return self.whole[stage.name]

    def differs(self, stage: Stage, work: Path) -> str | None:
        """What is other than in the reference, and what is left of unfinished runs."""
        found, whole = contents(work, stage.outputs), self.reference(stage)
        if left := pieces(work):
            return f"left {left}"
        if stage.timed:
            return None if found else "wrote nothing"
        other = sorted(name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name))
        return f"{other[:5]} differ from an uninterrupted run's" if other else None

    def state(self, stage: Stage, work: Path, before: dict[str, bytes | None]) -> str | None:
        """What is wrong with each output: it is what it was, what it is to be, or, if a directory, put aside."""
        whole, now = self.reference(stage), contents(work, stage.outputs)
        for name in stage.outputs:
            old, new, found = (_of(one, name) for one in (before, whole, now))
            aside = not found and any(path.endswith(".old") for path in pieces(work))
            if not (found in (old, new) or aside or (stage.timed and found)):
                return f"{name} is neither what it was nor what it is to be"
        return None


def _of(found: dict[str, bytes | None], name: str) -> dict[str, bytes | None]:
    return {path: data for path, data in found.items() if path == name or path.startswith(f"{name}/")}


def kills(bench: Bench, count: int, rng: random.Random, stages: Sequence[Stage] = STAGES) -> Outcome:
    """Kill a stage at a random moment, `count` times, and repeat it."""
    outcome = Outcome()
    for number in range(count):
        stage, sent = stages[number % len(stages)], rng.choice(list(SIGNALS))
        bench.reference(stage)
        for _ in range(MOST_TRIES):
            old = rng.random() < 0.5
            work = bench.fresh(stage, old=old)
            before = contents(work, stage.outputs)
            child = bench.start(stage, work)
            time.sleep(rng.uniform(0, bench.seconds[stage.name]))
            child.end(sent)
            status = child.wait(SECONDS)
            if status:
                break
            bench.seconds[stage.name] *= 0.8  # it has become quicker: the machine is less busy
        wrong = None
        if status not in SIGNALS[sent]:
            wrong = f"{sent.name} ended it with {status}: {child.sentence()[:200]}"
        elif sent == signal.SIGINT and "interrupted" not in child.sentence():
            wrong = f"Ctrl-C said {child.sentence()[:200]!r}"
        wrong = wrong or bench.state(stage, work, before)
        again = bench.start(stage, work)
        if (status := again.wait(SECONDS)) and not wrong:
            wrong = f"killed by {sent.name}, and repeated it ended with {status}: {again.sentence()[:200]}"
        outcome.add(stage.name, sent.name, wrong or bench.differs(stage, work))
        if (number + 1) % 20 == 0:
            print(f"kills: {number + 1} of {count}, {len(outcome.wrong)} wrong", file=sys.stderr, flush=True)
    return outcome


def faults(bench: Bench, count: int | None, rng: random.Random, stages: Sequence[Stage] = PIPELINE) -> Outcome:
    """Every write of the stages fails, for every error; count: so many drawn of them."""
    outcome, tries = Outcome(), []
    for stage in stages:
        bench.reference(stage)
        work = bench.fresh(stage, old=True)
        bench.start(stage, work, faults=Faults(work)).wait(SECONDS)
        writes = int((bench.folder / "writes").read_text())
        tries += [(stage, at, number) for at in range(1, writes + 1) for number in ERRORS]
    for place, (stage, at, number) in enumerate(tries if count is None else rng.sample(tries, min(count, len(tries)))):
        work = bench.fresh(stage, old=True)
        before = contents(work, stage.outputs)
        child = bench.start(stage, work, faults=Faults(work, at, number))
        status = child.wait(SECONDS)
        wrong = _told(child, status) or (bench.state(stage, work, before) if not status else None)
        if status and not wrong and contents(work, stage.outputs) != before:
            # Where nothing can be written any more, not even a name, the next run puts back what was put aside.
            wrong = bench.state(stage, work, before) if number == errno.EROFS else "the earlier outputs do not stand"
        again = bench.start(stage, work)
        if (status := again.wait(SECONDS)) and not wrong:
            wrong = f"repeated it ended with {status}: {again.sentence()[:200]}"
        wrong = wrong or bench.differs(stage, work)
        outcome.add(stage.name, errno.errorcode[number], wrong and f"{errno.errorcode[number]} at write {at}: {wrong}")
        if (place + 1) % 100 == 0:
            print(f"faults: {place + 1} of {len(tries)}, {len(outcome.wrong)} wrong", file=sys.stderr, flush=True)
    return outcome


def _told(child: Child, status: int) -> str | None:
    """What is wrong with how a run whose disk failed ended: 1 with a sentence; 2 before it began; 0 without a cache."""
    said, last = child.said.read_text(errors="replace"), child.sentence()
    if "Traceback" in said or "internal error" in said:
        return f"said {said.strip()[-400:]}"
    if status and not (last.startswith("trim: ") and last.endswith(".")):
        return f"ended with {status} and {last[:200]!r}"
    before = "cannot be written in" in last  # told before any work, as for a wrong command line
    return None if status in (0, 2 if before else 1) else f"ended with {status}: {last[:200]}"


def pairs(bench: Bench, count: int, rng: random.Random) -> Outcome:
    """Two runs of one prune at once, with one output and one cache."""
    outcome, stage = Outcome(), next(one for one in STAGES if one.name == "prune, wanda")
    bench.reference(stage)
    for _ in range(count):
        work = bench.fresh(stage, old=rng.random() < 0.5)
        first = bench.start(stage, work, 0)
        time.sleep(rng.choice((0.0, rng.uniform(0, bench.seconds[stage.name]))))
        second = bench.start(stage, work, 1)
        statuses = sorted(child.wait(SECONDS) for child in (first, second))
        wrong = None
        for child in (first, second):
            if "Traceback" in child.said.read_text() or "internal error" in child.said.read_text():
                wrong = child.said.read_text()[-400:]
        if statuses not in ([0, 0], [0, 1]):
            wrong = f"ended with {statuses}: {first.sentence()[:150]} / {second.sentence()[:150]}"
        came = "both end well" if statuses == [0, 0] else "one is refused"
        outcome.add("two prunes", came, wrong or bench.differs(stage, work))
    return outcome


def main() -> None:
    """Run, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=38)
    parser.add_argument("--faults", default="40", help="so many writes, or all")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="trim-torture-") as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "user-cache")
        bench = Bench(Path(folder))
        found = {
            "Kills": kills(bench, options.kills, rng),
            "Writes that fail": faults(bench, None if options.faults == "all" else int(options.faults), rng),
            "Two at once": pairs(bench, options.pairs, rng),
        }
    wrong = [one for outcome in found.values() for one in outcome.wrong]
    totals = {name: f"{sum(one.counts.values())}, not as promised: {len(one.wrong)}" for name, one in found.items()}
    lines = head("Kills, failing disks, two runs at once", "torture", totals)
    for name, outcome in found.items():
        names = list(dict.fromkeys(stage for stage, _ in outcome.counts))
        kinds = sorted({kind for _, kind in outcome.counts})
        rows = [[stage, *(str(outcome.counts[stage, kind]) for kind in kinds)] for stage in names]
        lines += [f"## {name}", "", *table(("stage", *kinds), rows), ""]
    publish([*lines, *(f"- {one}" for one in wrong)], options.out)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
