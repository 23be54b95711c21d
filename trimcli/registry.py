"""Registries: the alternatives that a user can name, each with its options, needs, help and source.

A score, a row allocation, an update, a statistic: each is one decorated function in one file. The command line, `plan`,
manifests, the model card, `sweep` and "did you mean" read the registries. Another package adds its own by an entry
point in the group `trimcli.methods` that names a module to import.

Nothing here, nor in a module of ours that registers, imports torch before a function runs: help stays quick.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from trimcli.errors import OptionError
from trimcli.options import declared, one_of

GROUP = "trimcli.methods"
BUILT_IN = (
    "trimcli.methods.stats",
    "trimcli.methods.scores",
    "trimcli.methods.rows.even",
    "trimcli.methods.rows.free",
    "trimcli.methods.rows.trim",
    "trimcli.methods.rows.variant",
    "trimcli.methods.rows.metrics",
    "trimcli.methods.updates.none",
    "trimcli.methods.updates.obs",
    "trimcli.methods.updates.cg",
    "trimcli.methods.updates.admm",
    "trimcli.methods.layers.uniform",
    "trimcli.methods.layers.owl",
    "trimcli.methods.layers.dlp",
    "trimcli.methods.layers.alpha",
    "trimcli.methods.layers.error",
    "trimcli.methods.layers.depth",
    "trimcli.methods.layers.search",
    "trimcli.methods.layers.auto",
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One alternative, by name on the command line and in files.

    function: its registry says how it is called. help: a sentence. source: paper and section. title: in tables.
    options: a frozen dataclass, of which the function is given an instance. needs: names of the statistics it reads.
    """

    name: str
    function: Callable[..., Any]
    help: str
    source: str
    title: str
    options: type[Any] | None = None
    needs: frozenset[str] = frozenset()

    def __call__(self, *arguments: Any, options: Any = None) -> Any:
        """Call the function, with the options where it takes any: those given, else its own defaults."""
        if self.options is not None:
            arguments = (*arguments, self.options() if options is None else options)
        return self.function(*arguments)


_everything: list[Entry] = []

E = TypeVar("E", bound=Entry)
F = TypeVar("F", bound=Callable[..., Any])


class Registry(Mapping[str, E], Generic[E]):
    """The alternatives of one kind by name; looking up one that there is not raises OptionError.

    kind: what they are, in messages. flag: the option that names one. entry: their class.
    """

    def __init__(self, kind: str, flag: str, entry: type[E]) -> None:
        self.kind, self.flag, self.entry = kind, flag, entry
        self._entries: dict[str, E] = {}

    def register(
        self, name: str, *, needs: Iterable[Entry] = (), title: str = "", help: str = "", **fields: Any
    ) -> Callable[[F], F]:
        """Decorate a function: it becomes the alternative `name`. Raises ValueError when the name is taken.

        needs: the statistics it reads. help: else the docstring's first sentence. fields: the entry's others.
        """

        def enter(function: F) -> F:
            said = help or (function.__doc__ or "").strip().split("\n")[0]
            names = frozenset(one.name for one in needs)
            self.add(self.entry(name=name, function=function, help=said, title=title or name, needs=names, **fields))
            return function

        return enter

    def add(self, entry: E) -> None:
        """Register an alternative. Raises ValueError when its name is taken."""
        if entry.name in self._entries:
            raise ValueError(f"a {self.kind} named {entry.name!r} is registered already; choose another name.")
        self._entries[entry.name] = entry
        _everything.append(entry)

    def __getitem__(self, name: str) -> E:
        load_everything()
        return self._entries[one_of(self.flag, name, self)]

    def __iter__(self) -> Iterator[str]:
        load_everything()
        # Ours in their order, whichever module was imported first; then those of other packages.
        order = {module: place for place, module in enumerate(BUILT_IN)}
        return iter(
            sorted(self._entries, key=lambda name: order.get(self._entries[name].function.__module__, len(order)))
        )

    def __len__(self) -> int:
        load_everything()
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        load_everything()
        return name in self._entries


_loaded = False


def load_everything() -> None:
    """Import every module that registers, once: ours, then those of entry points. Raises OptionError for a broken one.

    Looking something up while these modules are being imported finds what is there so far.
    """
    global _loaded
    if _loaded:
        return
    _loaded = True
    for module in BUILT_IN:
        import_module(module)
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as problem:  # a package of somebody else's may raise anything
            owner = point.dist.name if point.dist else point.value
            _loaded = False
            raise OptionError(
                f"the methods {point.name!r} of the package {owner} cannot be loaded ({type(problem).__name__}: "
                f"{problem}); mend or uninstall it."
            ) from problem


def title_of(registry: Mapping[str, Any], name: str) -> str:
    """What tables call an alternative: its title, or its name where nobody here has registered it."""
    return str(registry[name].title) if name in registry else name


def misplaced(given: Iterable[Any], chosen: Iterable[Entry]) -> Iterator[tuple[str, Any, str]]:
    """What was set of options whose owner was not chosen: flag, value and the owner's name.

    Only of options that are unset by default: others may stand in a command line that serves several methods.
    """
    kinds = {entry.options for entry in chosen}
    for options in given:
        if type(options) not in kinds:
            for one in declared(type(options)):
                value = getattr(options, one.field)
                if one.default is None and value is not None:
                    owner = next(entry.name for entry in _everything if entry.options is type(options))
                    yield one.spelled, value, owner


def option_types(*entries: Entry) -> list[type[Any]]:
    """The option classes of these entries, each once, in order."""
    return list(dict.fromkeys(entry.options for entry in entries if entry.options is not None))
