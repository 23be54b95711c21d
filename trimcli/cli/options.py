"""The command line made of options classes: each option is declared once, as a field, and expanded here.

A command is a function of its own arguments, of `options` (made of what `takes` names) and of `say` (how it speaks).
`takes` is a text, "module:attribute", so that nothing heavy is imported before the command is asked for.
"""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar, get_args, get_origin

import typer
from rich.markup import escape

from trimcli.cli.boundary import guarded
from trimcli.cli.output import Say
from trimcli.errors import OptionError
from trimcli.options import RUN, Declared, RunOptions, declared

T = TypeVar("T")
Values = Mapping[str, Any]

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A directory in Hugging Face format, or a hub id such as Qwen/Qwen2.5-3B."),
]
SWITCHES = {"on": True, "off": False}


def plain(text: str) -> str:
    """Text for rich that reads as it stands: no markup, and no emoji where it says N:M."""
    return re.sub(r":(?=\S*?:)", ":[b][/b]", escape(text))


def output(what: str) -> Any:
    """The option -o of a command that writes."""
    return typer.Option("--output", "-o", help=f"The {what} to write.")


def switch(flag: str, text: str, panel: str | None = None) -> Any:
    """An option that is on or off."""
    return typer.Option(flag, help=plain(text), rich_help_panel=panel, metavar="")


class Group(Protocol):
    """A set of options that becomes one object."""

    def parameters(self) -> list[inspect.Parameter]:
        """The parameters, as typer reads them."""

    def build(self, values: Values, given: Collection[str]) -> Any:
        """The object. values: by parameter name; given: the names that stood on the command line."""


# --- fields to parameters and back ---------------------------------------------------------------------------


def parameters(
    options: type[Any],
    *,
    fields: Collection[str] | None = None,
    unset: bool = False,
    axis: bool = False,
    panel: str | None = None,
) -> list[inspect.Parameter]:
    """The parameters of an options class.

    fields: only these. unset: none has a default, so that what was not given can be told. axis: each takes several
    values, separated by commas (a switch stays one). panel: in the place of their own.
    """
    chosen = [one for one in declared(options) if fields is None or one.field in fields]
    return [_parameter(one, unset=unset, axis=axis and one.type is not bool, panel=panel) for one in chosen]


def _parameter(one: Declared, *, unset: bool, axis: bool, panel: str | None) -> inspect.Parameter:
    default, kind = one.default, one.type
    text = " ".join([one.flag.help, *one.described])
    if kind is bool:
        default = False
    elif axis:
        kind, text = str, f"{text} Several values."
    elif get_origin(kind) is tuple:
        kind = list[str] if one.flag.repeated else str
        default = None if one.flag.repeated else ",".join(_word(value) for value in default) or None
    elif one.flag.choices is not None:
        kind = Literal[tuple(one.choices or ())]
    if unset or axis:
        text += f" (default {_word(one.default)})" if one.default not in (None, dataclasses.MISSING, False) else ""
        default = False if kind is bool else None
    if default is None:
        kind = kind | None
    if default is dataclasses.MISSING:
        default = inspect.Parameter.empty
    said = typer.Option(
        one.spelled, help=plain(text), rich_help_panel=panel or one.flag.panel, metavar="" if one.type is bool else None
    )
    return inspect.Parameter(
        one.field, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, said]
    )


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(_word(part) for part in value)
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def fields_of(options: type[Any], values: Values) -> dict[str, Any]:
    """The fields of an options class from the parameters' values; what is None stays at its default."""
    found = {}
    for one in declared(options):
        value = values.get(one.field)
        if value is None:
            continue
        if one.flag.off:
            value = not value
        elif get_origin(one.type) is tuple:
            value = tuple(value) if one.flag.repeated else several(one, value)
        found[one.field] = value
    return found


def several(one: Declared, text: str) -> tuple[Any, ...]:
    """Values separated by commas, each of the option's type. Raises OptionError naming one that is none."""
    kinds = [part for part in get_args(one.type) or (one.type,) if part in (int, float, bool)]
    convert: Callable[[str], Any] = kinds[0] if kinds else str
    if convert is bool:
        convert = SWITCHES.__getitem__
    found = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        try:
            found.append(convert(part))
        except (KeyError, ValueError):
            raise OptionError(f"{one.spelled} {text!r}: {part!r} is not usable; separate values by commas.") from None
    return tuple(found)


def chosen_options(classes: Iterable[type[Any]], values: Values) -> tuple[Any, ...]:
    """An instance of every options class of which anything differs from its defaults."""
    made = [kind(**fields_of(kind, values)) for kind in classes]
    return tuple(one for one in made if one != type(one)())


class ClassGroup:
    """The options of one class."""

    def __init__(self, options: type[Any]) -> None:
        self.options = options

    def parameters(self) -> list[inspect.Parameter]:
        """Its fields."""
        return parameters(self.options)

    def build(self, values: Values, given: Collection[str]) -> Any:
        """An instance."""
        return self.options(**fields_of(self.options, values))


# --- a function to a command ---------------------------------------------------------------------------------


def _shared(name: str, kind: Any, default: Any, said: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, said])


def _everywhere() -> list[inspect.Parameter]:
    """What every command takes, so that one set of flags fits a whole Makefile."""
    return [
        _shared("quiet", bool, False, switch("--quiet", "No progress, no summary; errors only.", RUN)),
        _shared("as_json", bool, False, switch("--json", "Print one JSON document on stdout instead of tables.", RUN)),
        _shared(
            "force",
            bool,
            False,
            switch("--force", "Replace an existing output; a directory only if trim made it.", RUN),
        ),
        *parameters(RunOptions),
    ]


def run_option(name: str) -> Any:
    """The annotation of one of the run's options, for a command that takes no others."""
    return next(one.annotation for one in parameters(RunOptions) if one.name == name)


def group_of(takes: str | None) -> Group | None:
    """What `takes` names: an options class, or a group of its own."""
    if takes is None:
        return None
    module, _, name = takes.partition(":")
    found = getattr(import_module(module), name)
    return ClassGroup(found) if isinstance(found, type) and dataclasses.is_dataclass(found) else found


def expanded(function: Callable[..., None], takes: str | None) -> Callable[..., None]:
    """The function as typer makes a command of it: options spelled out, errors in one sentence and an exit status."""
    group = group_of(takes)
    signature = inspect.signature(function)
    own = [one for one in signature.parameters.values() if one.name not in ("options", "say")]
    offered = own + (group.parameters() if group else [])
    names = {one.name for one in offered}
    writes = "output" in names
    shown = {"quiet", "as_json", *(["force"] if writes else [])}
    for one in _everywhere():
        if one.name not in names:
            said = get_args(one.annotation)[1]
            said.hidden = one.name not in shown
            offered.append(one)
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)

    @functools.wraps(function)
    def command(context: typer.Context, **values: Any) -> None:
        def work() -> None:
            given = {name for name in values if _was_given(context, name)}
            say = Say.start(values, given)
            passed = {one.name: values[one.name] for one in own}
            if group is not None:
                passed["options"] = group.build(values, given)
            function(**passed, say=say)

        guarded(work)

    ordered = sorted(offered, key=lambda one: one.default is not inspect.Parameter.empty)
    keywords = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in ordered]
    command.__signature__ = signature.replace(parameters=[context, *keywords])  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in [context, *keywords]}
    return command


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


OutputFile = Annotated[Path | None, typer.Option("--output", "-o", help="A JSON file of what was found.")]
