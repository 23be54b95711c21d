"""Options classes as a command line. A command is a function of its arguments, of `options` and of `say`.

`options` is made of what `takes` names, "module:attribute": nothing heavy is imported before it is asked for.
"""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import typer
from rich.markup import escape

from trimcli.cli.boundary import guarded
from trimcli.cli.output import Say
from trimcli.errors import OptionError
from trimcli.options import RUN, Declared, RunOptions, declared
from trimcli.world import ranks

Values = Mapping[str, Any]
KEYWORD = inspect.Parameter.KEYWORD_ONLY

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A directory in Hugging Face format, or a hub id such as Qwen/Qwen2.5-3B."),
]
# How a value that is one of several is read.
READ: dict[Any, Callable[[str], Any]] = {int: int, float: float, bool: {"on": True, "off": False}.__getitem__}


def plain(text: str) -> str:
    """Text for rich that reads as it stands: no markup, and no emoji where it says N:M."""
    return re.sub(r":(?=\S*?:)", ":[b][/b]", escape(text))


def output(what: str) -> Any:
    """The option -o of a command that writes."""
    return typer.Option("--output", "-o", help=f"The {what} to write.")


def switch(flag: str, text: str, panel: str | None = None) -> Any:
    """An option that is on or off."""
    return typer.Option(flag, help=plain(text), rich_help_panel=panel, metavar="")


class Group(NamedTuple):
    """Options that become one object: as typer reads them, and the object made of their values by name."""

    parameters: Callable[[], list[inspect.Parameter]]
    build: Callable[[Values], Any]


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
    return [_parameter(one, unset, axis and one.type is not bool, panel) for one in chosen]


def _parameter(one: Declared, unset: bool, axis: bool, panel: str | None) -> inspect.Parameter:
    default, kind = one.default, one.type
    text = " ".join([one.flag.help, *one.described])
    if kind is bool:
        default = False
    elif axis:
        kind, text = str, f"{text} Several values."
    elif get_origin(kind) is tuple:
        kind = list[str] if one.flag.repeated else str
        default = None if one.flag.repeated else ",".join(word(value) for value in default) or None
    elif one.flag.choices is not None:
        kind = Literal[tuple(one.choices or ())]
    if unset or axis:
        text += f" (default {word(one.default)})" if one.default not in (None, dataclasses.MISSING, False) else ""
        default = False if kind is bool else None
    if default is None:
        kind = kind | None
    if default is dataclasses.MISSING:
        default = inspect.Parameter.empty
    said = switch(one.spelled, text, panel or one.flag.panel)
    said.metavar = "" if one.type in (bool, bool | None) else None
    return inspect.Parameter(one.field, KEYWORD, default=default, annotation=Annotated[kind, said])


def word(value: Any) -> str:
    """A value as an option takes it."""
    if isinstance(value, tuple):
        return ",".join(word(part) for part in value)
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
    convert = next((READ[part] for part in get_args(one.type) or (one.type,) if part in READ), str)
    found = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        try:
            found.append(convert(part))
        except (KeyError, ValueError):
            raise OptionError(f"{one.spelled} {text!r}: {part!r} is not usable; separate values by commas.") from None
    return tuple(found)


def chosen_options(classes: Iterable[type[Any]], values: Values, base: Iterable[Any] = ()) -> tuple[Any, ...]:
    """An instance of every options class of which anything differs from its defaults. base: where values start."""
    starts = {type(one): one for one in base}
    made = [dataclasses.replace(starts.get(kind) or kind(), **fields_of(kind, values)) for kind in classes]
    return tuple(one for one in made if one != type(one)())


def flag(name: str, spelled: str, text: str, panel: str | None = None) -> inspect.Parameter:
    """A parameter that is on or off."""
    said = Annotated[bool, switch(spelled, text, panel)]
    return inspect.Parameter(name, KEYWORD, default=False, annotation=said)


def run_option(name: str) -> Any:
    """The annotation of one of the run's options, for a command that takes no others."""
    return next(one.annotation for one in parameters(RunOptions) if one.name == name)


def _group(takes: str) -> Group:
    """What `takes` names: an options class, or a group of its own."""
    module, _, name = takes.partition(":")
    found: Any = getattr(import_module(module), name)
    if isinstance(found, Group):
        return found
    return Group(lambda: parameters(found), lambda values: found(**fields_of(found, values)))


def expanded(function: Callable[..., None], takes: str | None, *, alone: str | None = None) -> Callable[..., None]:
    """The function as typer makes a command of it: options spelled out, errors in one sentence and an exit status.

    alone: the name of a command that several ranks cannot share.
    """
    group = _group(takes) if takes else None
    signature = inspect.signature(function)
    own = [one for one in signature.parameters.values() if one.name not in ("options", "say")]
    offered = own + (group.parameters() if group else [])
    names = {one.name for one in offered}
    shown = {"quiet", "as_json", *(["force"] if "output" in names else [])}
    everywhere = [  # so that one set of flags fits a whole Makefile
        flag("quiet", "--quiet", "No progress, no summary; errors only.", RUN),
        flag("as_json", "--json", "Print one JSON document on stdout instead of tables.", RUN),
        flag("force", "--force", "Replace an existing output; a directory only if trim made it.", RUN),
    ]
    for one in everywhere + parameters(RunOptions):
        if one.name not in names:
            get_args(one.annotation)[1].hidden = one.name not in shown
            offered.append(one)
    context = inspect.Parameter("context", KEYWORD, annotation=typer.Context)

    @functools.wraps(function)
    def command(context: typer.Context, **values: Any) -> None:
        def work() -> None:
            if alone and ranks() > 1:
                what = f"trim {alone} works in one process and {ranks()} ranks were started"
                raise OptionError(f"{what}; run it without torchrun.")
            sources = {name: context.get_parameter_source(name) for name in values}
            given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
            say = Say.start(values, given)
            passed = {one.name: values[one.name] for one in own}
            if group is not None:
                passed["options"] = group.build(values)
            function(**passed, say=say)

        guarded(work)

    ordered = sorted(offered, key=lambda one: one.default is not inspect.Parameter.empty)
    keywords = [one.replace(kind=KEYWORD) for one in ordered]
    command.__signature__ = signature.replace(parameters=[context, *keywords])  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in [context, *keywords]}
    return command


OutputFile = Annotated[Path | None, typer.Option("--output", "-o", help="A JSON file of what was found.")]
