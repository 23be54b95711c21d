"""What every stage needs to know about the run, and the checks that stages share."""

import fnmatch
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimcli.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where and how to compute.

    device: auto, cpu, cuda or cuda:N. dtype: of the computation, auto, float32, bfloat16 or float16. seed: of
    every draw. revision: of a hub model. trust_remote_code: run the model's own code. cache_dir: the stage
    cache and the part files of unfinished runs; None for the user's cache folder.
    """

    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    revision: str | None = None
    trust_remote_code: bool = False
    cache_dir: Path | None = None

    def document(self) -> dict[str, Any]:
        """The options as a manifest records them, as JSON values: what shapes the result."""
        found: dict[str, Any] = _recorded(asdict(self))
        return found


def _recorded(value: Any) -> Any:
    """An option's value, or the options of a stage within, with paths as text and without cache folders."""
    if isinstance(value, dict):
        return {key: _recorded(entry) for key, entry in value.items() if key != "cache_dir"}
    return str(value) if isinstance(value, Path) else value


def one_of(option: str, value: str, known: Iterable[str]) -> str:
    """`value` if it is one of `known`. Raises OptionError that proposes the nearest."""
    import difflib

    names = list(known)
    if value in names:
        return value
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise OptionError(f"{option} {value!r} is none of {', '.join(names)}{hint}")


def check_sparsity(sparsity: float) -> float:
    """A fraction to prune in [0, 1). Raises OptionError."""
    if not 0 <= sparsity < 1:
        raise OptionError(f"--sparsity {sparsity} is outside [0, 1); it is the fraction to prune, such as 0.7.")
    return sparsity


def check_positive(option: str, value: int | None) -> None:
    """Raise OptionError unless `value` is None or at least 1."""
    if value is not None and value < 1:
        raise OptionError(f"{option} {value} must be at least 1.")


def selected(name: str, only: Iterable[str], skip: Iterable[str]) -> bool:
    """Whether a full module name matches one of `only` (all, if empty) and none of `skip`; shell-style globs."""
    inside = any(fnmatch.fnmatchcase(name, pattern) for pattern in only) if list(only) else True
    return inside and not any(fnmatch.fnmatchcase(name, pattern) for pattern in skip)
