"""What hooks gather from the inputs of a layer's linears; those that share an input share its statistics."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimcli.errors import InputError, TrimError
from trimcli.files.names import grouped, inside_layer
from trimcli.methods.stats import STATISTICS, LinearStats, Statistic
from trimcli.model.matrix import Matrix
from trimcli.model.skeleton import DecoderLayer
from trimcli.world import World, current


@dataclass(frozen=True)
class InputGroup:
    """Linears of one layer that read the same tensor, in module order; groups are in order of execution.

    once: whether the layer calls each of them once.
    """

    linears: tuple[Matrix, ...]
    once: bool

    @property
    def name(self) -> str:
        """The full module name of the first linear: the group's key."""
        return self.linears[0].name

    @property
    def d_in(self) -> int:
        """Input features."""
        return self.linears[0].d_in


def find_groups(layer: DecoderLayer, run: Callable[[], Any], wanted: Collection[str] | None = None) -> list[InputGroup]:
    """The layer's input groups of the `wanted` linears, seen in one pass `run`. Raises TrimError for one not called."""
    mine = {linear.name: linear for linear in layer.linears if wanted is None or linear.name in wanted}
    seen: dict[int, Tensor] = {}  # the tensors, which must live for their ids to stay theirs
    read: dict[str, list[int]] = {}

    def note(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        seen[id(args[0])] = args[0]
        read.setdefault(name, []).append(id(args[0]))

    with ExitStack() as hooks:
        for name, linear in mine.items():
            hooks.enter_context(linear.module.register_forward_pre_hook(partial(note, name)))
        run()
    if unused := [name for name in mine if name not in read]:
        globs = dict.fromkeys(f"--skip '*.{_part(name, mine, unused)}'" for name in unused)
        what = f"{unused[0]} is never called by its layer, so it has no inputs"
        raise TrimError(f"{what}; leave it dense with {' '.join(globs)}.")
    # What is called several times reads what no other linear does, even where it begins with the same tensor.
    groups = grouped(read, lambda name: read[name][0] if len(read[name]) == 1 else name)
    return [
        InputGroup(
            tuple(mine[name] for name in mine if name in names), once=all(len(read[name]) == 1 for name in names)
        )
        for names in groups.values()
    ]


def _part(name: str, linears: Collection[str], unused: Collection[str]) -> str:
    """The linear by its place inside the layer, or as a glob the module that holds it and other unused ones alone."""
    place = inside_layer(name)
    holder = name.removesuffix(place) + place.rpartition(".")[0] + "."
    held = [other for other in linears if other.startswith(holder)]
    if len(held) > 1 and "." in place and all(other in unused for other in held):
        return place.rpartition(".")[0] + ".*"
    return place


class LeftEarly(Exception):
    """Leaves a layer where the last statistic has been taken: what it would go on to compute is of no use."""


@dataclass
class Collector:
    """Gathers the statistics `needs` of `groups` while batches of a layer run. nsamples, seqlen: N and L.

    Of N samples a rank runs its share, numbered from 0; what it gathers is joined with the other ranks' in the end.
    dense: runs the layer on the dense model's hidden states of some samples; for statistics of both models' inputs.
    """

    groups: list[InputGroup]
    needs: frozenset[str]
    nsamples: int
    seqlen: int
    device: torch.device
    options_of: Callable[[Statistic], Any] = lambda statistic: None
    dense: Callable[[slice], Any] | None = None
    world: World = field(default_factory=current)
    _paired: dict[str, list[Tensor]] = field(default_factory=dict)
    _pairing: bool = False
    _gathered: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _samples: slice = field(default_factory=lambda: slice(0, 0))
    _leaves: bool = False
    _left: int = 0

    def reset(self) -> None:
        """Forget everything: before the first batch, and when a pass starts over."""
        self._gathered = {group.name: {} for group in self.groups}
        for one in (STATISTICS[name] for name in sorted(self.needs)):
            for group in self.groups:
                start = one(group.d_in, self.nsamples, self.device, options=self.options_of(one))
                self._gathered[group.name][one.name] = start

    @contextmanager
    def watching(self, *, leaves: bool = False) -> Iterator[None]:
        """Hook the first linear of every group for the duration. leaves: a layer may be left with `LeftEarly`."""
        self._leaves = leaves and all(group.once for group in self.groups)
        with ExitStack() as hooks:
            for group in self.groups:
                module = group.linears[0].module
                hooks.enter_context(module.register_forward_pre_hook(partial(self._take_in, group.name)))
            yield

    @contextmanager
    def batch(self, samples: slice) -> Iterator[None]:
        """The forward pass inside holds these samples; if it is left early, that is the end of the block."""
        first = self.world.share(self.nsamples).start
        self._samples, self._left = slice(first + samples.start, first + samples.stop), len(self.groups)
        if self.dense is not None:
            self._paired = {group.name: [] for group in self.groups}
            self._pairing = True
            try:
                with suppress(LeftEarly):
                    self.dense(samples)
            finally:
                self._pairing, self._left = False, len(self.groups)
        with suppress(LeftEarly):
            yield

    def _take_in(self, name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        """The hook of the group `name`."""
        count = self._samples.stop - self._samples.start
        inputs = args[0].detach()
        if inputs.numel() != count * self.seqlen * inputs.shape[-1]:
            what = f"{name} is not given every token (a routed expert, perhaps), so its inputs have no samples"
            raise TrimError(f"{what}; leave it dense with --skip '*.{inside_layer(name)}'.")
        if inputs.ndim != 3 or len(inputs) != count:  # some layers flatten samples and tokens, or add a dimension
            inputs = inputs.reshape(count, -1, inputs.shape[-1])
        if self._pairing:
            self._paired[name].append(inputs)
        else:
            dense = self._paired[name].pop(0) if self.dense is not None else None
            for one, gathered in ((STATISTICS[key], gathered) for key, gathered in self._gathered[name].items()):
                one.add(gathered, inputs, self._samples, self.nsamples, *([dense] if one.paired else []))
        self._left -= 1
        if self._leaves and not self._left:
            raise LeftEarly

    def by_linear(self) -> dict[str, LinearStats]:
        """Full module name -> its group's statistics. Raises InputError when activations are not finite."""
        result: dict[str, LinearStats] = {}
        for group in self.groups:
            gathered = self._gathered[group.name]
            joined = {name: self._joined(STATISTICS[name], tensor) for name, tensor in gathered.items()}
            stats = LinearStats(**{name: STATISTICS[name].finish(tensor) for name, tensor in joined.items()})
            refuse_unusable(stats, group.name)
            result |= dict.fromkeys((linear.name for linear in group.linears), stats)
        return result

    def _joined(self, one: Statistic, gathered: Tensor) -> Tensor:
        return self.world.summed(gathered) if one.dim is None else self.world.whole(gathered, one.dim)


def refuse_unusable(stats: LinearStats, name: str) -> None:
    """Raise InputError when a statistic of the linear `name` holds NaN or infinity."""
    for tensor in stats.tensors.values():
        # The sum first: it is quick, and only where it is not finite need every entry be looked at.
        if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
            what = f"the inputs of {name} hold NaN or infinite values (the model overflows or is damaged)"
            raise InputError(f"{what}; try --dtype float32, or another checkpoint.")
