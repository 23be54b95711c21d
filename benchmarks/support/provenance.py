"""Where figures come from: the machine, the versions and the command, as the head of a results file."""

import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

# Options, each with a value, that say where things lie or who does them.
INCIDENTAL = {"--work", "--runs", "--shard"}


def machine() -> str:
    """Processor, its widest vectors, count, memory, the CUDA device where there is one, and torch's threads."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [f"{_processor()} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} CPUs, {memory:.0f} GiB"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name(0))
    return "; ".join([*parts, f"torch threads: {torch.get_num_threads()}"])


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    for line in information.read_text().splitlines() if information.is_file() else []:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def versions() -> str:
    """Of trim, Python, torch and transformers."""
    named = (f"{label} {version(name)}" for label, name in (("trim", "trimcli"), ("torch", "torch")))
    return ", ".join([*named, f"transformers {version('transformers')}", f"Python {platform.python_version()}"])


def command(script: str) -> str:
    """The command that runs `script` with this process's options.

    Paths from elsewhere appear as their last part; options that shape no figure are left out.
    """
    words = iter(sys.argv[1:])
    shown = ["python", "-m", f"benchmarks.{script}"]
    for word in words:
        if word in INCIDENTAL:
            next(words, None)
        elif word != "--render":
            shown.append(Path(word).name if word.startswith(("/", "..", "~")) else word)
    return shlex.join(shown)


def head(title: str, script: str, facts: Mapping[str, str]) -> list[str]:
    """The first lines of a results file: title, command, machine, versions, and what the caller adds."""
    lines = [f"# {title}", "", f"    {command(script)}", ""]
    known = {"machine": machine(), "versions": versions(), **facts}
    return [*lines, *(f"- {name}: {value}" for name, value in known.items()), ""]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table, its first column to the left and the others to the right."""
    ruler = ["---", *["---:"] * (len(columns) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (columns, ruler, *rows)]


def publish(lines: Iterable[str], out: Path | None) -> None:
    """Write the lines to the file `out`, or print them where there is none."""
    text = "\n".join(lines) + "\n"
    if out is None:
        print(text, end="", flush=True)
    else:
        out.write_text(text, encoding="utf-8")
        print(f"written: {out}", file=sys.stderr)
