"""What the fields of a document must be, so that who reads them need not ask.

A form is a scalar (NUMBER and its like), a `{name: form}` of an object's known members, `Each` for all its members,
`[form]` for a list's, a tuple for a list of that length, or a function of an object that returns its form. What is
absent or null passes, unless the form is a `Must`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimcli.errors import InputError

# Beyond it, not every whole number is one in the programs that read JSON.
MOST = 2**53


@dataclass(frozen=True)
class Scalar:
    """One value. words: what it is, as in "a number"."""

    words: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True)
class Each:
    """An object whose members, whatever their names, have a form."""

    form: Any


@dataclass(frozen=True)
class Must:
    """A form of what may be neither absent nor null."""

    form: Any


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= MOST if isinstance(value, int) else math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value) and value >= 0


ANY = Scalar("anything", lambda _: True)
TEXT = Scalar("text", lambda value: isinstance(value, str))
NUMBER = Scalar("a number", _is_number)
SCORE = Scalar("a number within 1e30", lambda value: _is_number(value) and abs(value) <= 1e30)
SHARE = Scalar("a share from 0 on", lambda value: _is_number(value) and 0 <= value <= 100)
COUNT = Scalar("a whole number", _is_whole)
SIZE = Scalar("a size", lambda value: _is_whole(value) and 1 <= value < 2**31)
WBITS = Scalar("8 or 4", lambda value: _is_whole(value) and value in (8, 4))
FLAG = Scalar("true or false", lambda value: isinstance(value, bool))
OBJECT = Each(ANY)
MODEL = {"id": TEXT, "structure": TEXT, "content": TEXT}
WHOLE_MODEL = {"id": Must(TEXT), "structure": Must(TEXT), "content": TEXT}
# What is said of a matrix by the masks that take its weights, and by the directory that it lies in, pruned.
MASKED_LINEAR = {
    "shape": Must((Must(SIZE), Must(SIZE))),
    "zeros": Must(COUNT),
    "keep_sha256": Must(TEXT),
    "target": SHARE,
    "pattern": (Must(SIZE), Must(SIZE)),
    "pruned": COUNT,
    "wbits": WBITS,
    "group_size": SIZE,
    "tokens": COUNT,
}
PRUNED_LINEAR = {
    **MASKED_LINEAR,
    "key": Must(TEXT),
    "transposed": Must(FLAG),
    "place": COUNT,
    "kept_zeros": [Must(COUNT)],
}
# Of a prune's manifest, and of what carries it.
PRUNING = {
    "numerics": TEXT,
    "options": {"recipe": OBJECT, "calibrate": OBJECT},
    "allocation": {"method": TEXT},
    "commands": [Must(TEXT)],
    "command_line": TEXT,
    "model": MODEL,
    "bos": TEXT,
}
# Of a fine-tuning: steps and losses by phase.
CURVE = Must([Must((Must(COUNT), Must(NUMBER)))])
TRAINING = {
    "mode": Must(TEXT),
    "teacher": TEXT,
    "phases": Must(
        [
            Must(
                {
                    "phase": Must(TEXT),
                    "steps": Must(COUNT),
                    "tokens": COUNT,
                    "loss": CURVE,
                    "heldout": CURVE,
                    "best": Must(COUNT),
                }
            )
        ]
    ),
}


def check_form(document: Any, form: Any, path: Path, what: str) -> None:
    """Raise InputError, naming the field, unless `document`, read from `path`, has `form`. what: such as "results"."""
    for wrong in _misfits(document, form, ""):
        raise InputError(f"{path} is not a whole {what} file: {wrong}; make it anew.")


def _misfits(value: Any, form: Any, where: str) -> Iterator[str]:
    """What does not fit, in words, field by field."""
    if isinstance(form, Must):
        if value is None:
            yield f"it lacks {where}"
            return
        form = form.form
    if value is None:
        return
    if isinstance(form, Scalar):
        if not form.fits(value):
            yield f"{where} is {value!r:.40}, not {form.words}"
    elif isinstance(form, list | tuple):
        if not isinstance(value, list):
            yield f"{where} is {value!r:.40}, not a list"
        elif isinstance(form, tuple) and len(value) != len(form):
            yield f"{where} has {len(value)} values, not {len(form)}"
        else:
            forms = form if isinstance(form, tuple) else form * len(value)
            for place, (part, inner) in enumerate(zip(value, forms, strict=True)):
                yield from _misfits(part, inner, f"{where}[{place}]")
    elif not isinstance(value, Mapping):
        yield f"{where or 'it'} is {value!r:.40}, not an object"
    else:
        known = form(value) if callable(form) else form
        members = dict.fromkeys(value, known.form) if isinstance(known, Each) else known
        for name, inner in members.items():
            yield from _misfits(value.get(name), inner, f"{where}.{name}".removeprefix("."))
