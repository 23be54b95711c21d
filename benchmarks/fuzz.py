"""Damaged files of every kind and random command lines: whatever comes in, trim answers in a sentence.

    python -m benchmarks.fuzz --seed 0 --examples 10000 --lines 2000 --out benchmarks/results-fuzz.md

Every run must end in a documented exit status with one sentence, without a traceback, without partial outputs, within
a minute and 2 GiB of memory beyond what the program takes by itself. --only KIND: files of that kind alone.
--keep DIR: what failed is left there.
"""

import argparse
import os
import random
import resource
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.support.corpus import Corpus, build
from benchmarks.support.lines import random_line
from benchmarks.support.mutations import mutated
from benchmarks.support.provenance import head, publish, table
from benchmarks.support.watched import Found, memory_limit, run

MOST = 2 * 2**30
BLOCK = 500


@dataclass
class Tally:
    """What a block of examples came to: runs by what was put in and exit status, and what was not as promised."""

    runs: Counter[tuple[str, int]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    peak: int = 0

    def add(self, other: "Tally") -> None:
        """Take in another block's."""
        self.runs += other.runs
        self.wrong += other.wrong
        self.peak = max(self.peak, other.peak)


class Sandbox:
    """A corpus in `home`, put back after every run. keep: where to leave what failed."""

    def __init__(self, home: Path, keep: Path | None = None) -> None:
        self.corpus = Corpus(home) if home.is_dir() else build(home)
        self._pristine = home.with_name(f"{home.name}.pristine")
        if not self._pristine.is_dir():
            shutil.copytree(home, self._pristine)
        self._keep = keep
        self._contents = {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file()}
        self.readers = self.corpus.readers()

    def damaged_file(self, rng: random.Random, tally: Tally, only: str | None = None) -> None:
        """One run of a command on a damaged file."""
        kind = only or rng.choice(sorted(self.readers))
        files, lines = self.readers[kind]
        name, line = rng.choice(files), rng.choice(lines)
        path = self.corpus.home / name
        data = mutated(path.read_bytes(), name, rng)
        path.write_bytes(data)
        self._note(f"{kind}: {name}, {line}")
        self._finish(kind, line, run(line, self.corpus.out), tally, {name: data})

    def random_line(self, rng: random.Random, tally: Tally) -> None:
        """One run of a random command line."""
        line = random_line(self.corpus, rng)
        self._note(f"command line: {line}")
        self._finish("command line", line, run(line, self.corpus.out), tally, {})

    def _note(self, what: str) -> None:
        self.corpus.home.with_name(f"{self.corpus.home.name}.last").write_text(what, errors="backslashreplace")

    def _finish(self, kind: str, line: list[str], found: Found, tally: Tally, files: dict[str, bytes]) -> None:
        tally.runs[kind, found.status] += 1
        if found.wrong:
            tally.wrong.append(f"{kind}: {found.wrong} ({line[0]})")
            if self._keep is not None:
                folder = self._keep / f"{len(list(self._keep.iterdir())):04d}"
                folder.mkdir()
                (folder / "said").write_text(f"{line}\n{found.wrong}\n{found.said}", errors="backslashreplace")
                for name, data in files.items():
                    (folder / name.replace("/", "_")).write_bytes(data)
        self.restore()

    def restore(self) -> None:
        """Make the corpus what it was."""
        home = self.corpus.home
        for path in sorted(home.rglob("*"), reverse=True):
            if path.is_symlink() or (path.is_file() and path not in self._contents):
                path.unlink()
            elif path.is_dir() and not (self._pristine / path.relative_to(home)).is_dir():
                shutil.rmtree(path)
        for path, changed in self._contents.items():
            if not path.is_file() or path.stat().st_mtime_ns != changed:
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self._pristine / path.relative_to(home), path)


def examples(work: Callable[[random.Random], None], count: int, start: int) -> None:
    """Call `work` so many times with random numbers that hypothesis draws."""

    @seed(start)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=False,
    )
    @given(st.integers(0, 2**64))
    def each(number: int) -> None:
        work(random.Random(number))

    each()


def block(folder: Path, what: str, count: int, start: int, options: argparse.Namespace) -> Tally:
    """So many examples in a process of their own, so that one that dies is told, and what it took is measured."""
    home, tally_file = folder / "corpus", folder / "tally"
    tally_file.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            tally, sandbox = Tally(), Sandbox(home, options.keep)
            base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with memory_limit(MOST):
                work = (
                    sandbox.random_line
                    if what == "lines"
                    else lambda rng, into: sandbox.damaged_file(rng, into, options.only)
                )
                examples(lambda rng: work(rng, tally), count, start)
            tally.peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024
            tally_file.write_text(repr((dict(tally.runs), tally.wrong, tally.peak)))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if status or not tally_file.is_file():
        noted = folder / "corpus.last"
        last = noted.read_text() if noted.is_file() else "nothing"
        Sandbox(home).restore()
        return Tally(wrong=[f"the process ended with {os.waitstatus_to_exitcode(status)} after {last}"])
    runs, wrong, peak = eval(tally_file.read_text(), {"__builtins__": {}})
    return Tally(Counter(runs), wrong, peak)


def fuzzed(folder: Path, options: argparse.Namespace) -> Tally:
    """All examples."""
    build(folder / "corpus")
    tally = Tally()
    for what, total in (("files", options.examples), ("lines", options.lines)):
        for number, begin in enumerate(range(0, total, BLOCK)):
            count = min(BLOCK, total - begin)
            found = block(folder, what, count, options.seed * 1000 + number, options)
            tally.add(found)
            print(f"{what}: {begin + count} of {total}, {len(tally.wrong)} wrong", file=sys.stderr, flush=True)
            for one in found.wrong:
                print(f"  {one}"[:600], file=sys.stderr, flush=True)
    return tally


def main() -> None:
    """Run, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=1000, help="damaged files")
    parser.add_argument("--lines", type=int, default=200, help="random command lines")
    parser.add_argument("--only")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="trim-fuzz-") as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "user-cache")
        os.environ["HF_HOME"] = str(Path(folder) / "huggingface")
        tally = fuzzed(Path(folder), options)
    kinds = sorted({kind for kind, _ in tally.runs})
    statuses = sorted({status for _, status in tally.runs})
    rows = [[kind, *(str(tally.runs[kind, status]) for status in statuses)] for kind in kinds]
    facts = {
        "runs": str(tally.runs.total()),
        "not as promised": str(len(tally.wrong)),
        "most memory taken beyond the program's own": f"{tally.peak / 2**20:.0f} MiB",
    }
    lines = [*head("Damaged files and random command lines", "fuzz", facts)]
    lines += table(("what was damaged", *(f"exit {status}" for status in statuses)), rows)
    publish([*lines, *([""] if tally.wrong else []), *(f"- {one}" for one in tally.wrong)], options.out)
    sys.exit(bool(tally.wrong))


if __name__ == "__main__":
    main()
