"""Options: declared once, as fields of frozen dataclasses that say how they are given on the command line.

`trimcli.cli.options` makes the command line of them, library callers fill the same classes. Here are what every stage
needs to know about the run, and the checks.
"""

import dataclasses
import difflib
import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from trimcli.errors import OptionError
from trimcli.memory import Limits

Check = Callable[[str, Any], object]
"""Takes an option's flag and its value; raises OptionError for a value that cannot be used."""

Numerics = Literal["exact", "reference"]
RUN = "Run"
# Factors and rates beyond this are taken for slips.
LARGEST = 1e6
# Options that say where things lie on the way and what memory they may take, and shape no result.
UNRECORDED = ("cache_dir", "spill", "max_memory", "max_device_memory")


@dataclass(frozen=True)
class Flag:
    """How a field is given on the command line.

    name: the flag, where it is not the field's name with dashes. choices: where the type does not say. off: the flag
    sets a field to False that is True by default. repeated: a tuple given one value at a time, not with commas.
    """

    help: str
    name: str | None = None
    panel: str | None = None
    check: Check | None = None
    choices: Callable[[], Iterable[str]] | None = None
    off: bool = False
    repeated: bool = False


def option(default: Any, help: str, name: str | None = None, **more: Any) -> Any:
    """A field of an options class: its default (`...` for none), and how it is given on the command line (see Flag)."""
    metadata = {"flag": Flag(help, name, **more)}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Declared:
    """One option of a class: the field's name, its type, default and flag, as `spelled` on the command line."""

    field: str
    type: Any
    default: Any
    flag: Flag

    @property
    def spelled(self) -> str:
        """The flag, such as --block-size."""
        return self.flag.name or "--" + self.field.strip("_").replace("_", "-")

    @property
    def described(self) -> list[str]:
        """A sentence for each alternative, where they are entries of a registry."""
        known = self.flag.choices() if self.flag.choices is not None else ()
        entries = known.items() if isinstance(known, Mapping) else ()
        return [f"{name}: {entry.help.rstrip('.')} ({entry.source})." for name, entry in entries]

    @property
    def choices(self) -> list[str] | None:
        """What may be chosen, None where anything of the type may be."""
        if self.flag.choices is not None:
            return list(self.flag.choices())
        inner = [part for part in (self.type, *get_args(self.type)) if get_origin(part) is Literal]
        return [str(value) for value in get_args(inner[0])] if inner else None


def declared(options: Any) -> tuple[Declared, ...]:
    """The options that a class declares, in order."""
    types = get_type_hints(options)
    return tuple(
        Declared(entry.name, types[entry.name], entry.default, entry.metadata["flag"])
        for entry in dataclasses.fields(options)
        if "flag" in entry.metadata
    )


def words(options: Any, *but: str) -> list[str]:
    """The command line of an options object: what differs from the defaults, but for the fields named."""
    found: list[str] = []
    for one in declared(type(options)):
        value = getattr(options, one.field)
        if one.field in but or value == one.default or value is None:
            continue
        if isinstance(value, bool):
            on, _, off = one.spelled.partition("/")
            found.append(on if value or not off else off)
        elif isinstance(value, tuple):
            parts = value if one.flag.repeated else [",".join(map(str, value))]
            found += [word for part in parts for word in (one.spelled, str(part))]
        else:
            found += [one.spelled, str(value)]
    return found


def check_fields(options: Any) -> None:
    """Raise OptionError for a field whose value is none of its choices or does not pass its check."""
    for one in declared(type(options)):
        value = getattr(options, one.field)
        if value is None:
            continue
        for part in value if isinstance(value, tuple) else (value,):
            if one.choices is not None and not isinstance(part, bool):
                one_of(one.spelled, part, one.choices)
            if one.flag.check is not None:
                one.flag.check(one.spelled, part)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a model is opened."""

    revision: str | None = option(None, "Revision of a hub model.", panel=RUN)
    trust_remote_code: bool = option(False, "Run code that the model brings.", panel=RUN)


@dataclass(frozen=True, kw_only=True)
class RunOptions(ModelOptions):
    """Where and how to compute.

    cache_dir holds the stage cache and the part files of unfinished runs; None for the user's cache folder.
    """

    device: str = option("auto", "Where to compute: auto, cpu, cuda or cuda:N.", panel=RUN)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "Of the computation. auto takes the model's own where the device computes in it natively, else float32.",
        panel=RUN,
    )
    seed: int = option(0, "Seed of every random draw.", panel=RUN)
    cache_dir: Path | None = option(None, "The stage cache (default: in the user's cache folder).", panel=RUN)

    @property
    def limits(self) -> Limits:
        """What the run may take of memory."""
        return Limits()

    def check(self) -> None:
        """Raise OptionError for a value or a combination that cannot be used."""
        check_fields(self)

    def document(self) -> dict[str, Any]:
        """The options as a manifest records them, as JSON values: what shapes the result."""
        found: dict[str, Any] = _recorded(asdict(self))
        return found

    def run(self) -> dict[str, Any]:
        """What every stage takes from the run, by name."""
        return {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(RunOptions)}


def parse_size(option: str, text: str) -> int:
    """Bytes of a size such as "5GB" (decimal), "5GiB" (binary) or "5000000000". Raises OptionError."""
    found = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*(?:([KMGT])(I?))?B?", text.strip().upper())
    if found:
        size = int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2] or " "))
        if size:
            return size
    raise OptionError(f"{option} {text!r} is not a size; write it like 8GiB, 500MB or 8000000000.")


@dataclass(frozen=True, kw_only=True)
class LimitedOptions(RunOptions):
    """Where and how to compute, and with how much memory."""

    max_memory: str | None = option(
        None,
        "Memory that this process may take, such as 8GiB: the plan is made to fit (hidden states in files, smaller "
        "batches), or says before any work that it cannot and what the least would be.",
        panel=RUN,
        check=parse_size,
    )
    max_device_memory: str | None = option(
        None,
        "The same of the accelerator's memory, such as 16GiB: hidden states then lie in the host's, or in files.",
        panel=RUN,
        check=parse_size,
    )

    @property
    def limits(self) -> Limits:
        """What the run may take of memory. Raises OptionError."""
        host, device = self.max_memory, self.max_device_memory
        return Limits(
            None if host is None else parse_size("--max-memory", host),
            None if device is None else parse_size("--max-device-memory", device),
        )


@dataclass(frozen=True, kw_only=True)
class WalkOptions(LimitedOptions):
    """Where and how to compute what walks through the layers with all samples."""

    spill: Path | None = option(
        None,
        "Hold the samples' hidden states in files in this folder, not in memory; nothing is left of them. "
        "Chosen by itself, in the stage cache, where memory would not do.",
        panel=RUN,
    )

    def run(self) -> dict[str, Any]:
        """What every stage takes from the run, by name."""
        return {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(WalkOptions)}


def _recorded(value: Any) -> Any:
    """An option's value, or the options of a stage within, with paths as text and without what is UNRECORDED."""
    if isinstance(value, dict):
        return {key: _recorded(entry) for key, entry in value.items() if key not in UNRECORDED}
    return str(value) if isinstance(value, Path) else value


def one_of(option: str, value: str, known: Iterable[str]) -> str:
    """`value` if it is one of `known`. Raises OptionError that proposes the nearest."""
    names = list(known)
    if value in names:
        return value
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise OptionError(f"{option} {value!r} is none of {', '.join(names)}{hint}")


def fraction(option: str, value: float) -> None:
    """Raise OptionError unless the value is a fraction to prune, in [0, 1)."""
    if not 0 <= value < 1:
        raise OptionError(f"{option} {value} is outside [0, 1); it is the fraction to prune, such as 0.7.")


def share(option: str, value: float) -> None:
    """Raise OptionError unless the value is a part of a whole, in [0, 1]."""
    if not 0 <= value <= 1:
        raise OptionError(f"{option} {value:g} is outside [0, 1]; it is a part of the whole, such as 0.5.")


def at_least(least: int) -> Check:
    """A check that a number is not smaller."""

    def check(option: str, value: float) -> None:
        if not (math.isfinite(value) and value >= least):
            raise OptionError(f"{option} {value:g} must be at least {least}.")

    return check


positive = at_least(1)


def above_zero(option: str, value: float) -> None:
    """Raise OptionError unless the value is above 0, and no larger than arithmetic in float32 bears."""
    if not 0 < value <= LARGEST:
        raise OptionError(f"{option} {value:g} must be a positive number up to {LARGEST:g}, such as 0.01.")


def not_negative(option: str, value: float) -> None:
    """Raise OptionError unless the value is 0 or above, and no larger than arithmetic in float32 bears."""
    if not 0 <= value <= LARGEST:
        raise OptionError(f"{option} {value:g} is not usable; give a number from 0 to {LARGEST:g}.")


def selected(name: str, only: Iterable[str], skip: Iterable[str]) -> bool:
    """Whether a full module name matches one of `only` (all, if empty) and none of `skip`; shell-style globs."""
    inside = any(fnmatch.fnmatchcase(name, pattern) for pattern in only) if list(only) else True
    return inside and not any(fnmatch.fnmatchcase(name, pattern) for pattern in skip)
