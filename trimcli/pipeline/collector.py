"""What hooks gather from the inputs of a layer's linears; those that share an input share its statistics."""

from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimcli.errors import InputError, TrimError
from trimcli.files.names import grouped, inside_layer
from trimcli.methods.stats import STATISTICS, LinearStats, Statistic
from trimcli.model.matrix import Matrix
from trimcli.model.skeleton import DecoderLayer
from trimcli.pipeline.routed import watching_experts
from trimcli.world import World, current


@dataclass(frozen=True)
class InputGroup:
    """Linears of one layer that read the same tensor, in module order; groups are in order of execution.

    once: whether the layer calls each of them once, with every token.
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

    @property
    def routed(self) -> bool:
        """Whether only the tokens of one expert come here."""
        return self.linears[0].routed


def find_groups(layer: DecoderLayer, run: Callable[[], Any], wanted: Collection[str] | None = None) -> list[InputGroup]:
    """The layer's input groups of the `wanted` linears, seen in one pass `run`. Raises TrimError for one not called."""
    mine = {linear.name: linear for linear in layer.linears if wanted is None or linear.name in wanted}
    seen: dict[int, Tensor] = {}  # the tensors, which must live for their ids to stay theirs
    read: dict[str, list[Hashable]] = {}

    def note_stack(members: list[Matrix], *_: Any) -> None:
        for linear in sorted(members, key=lambda one: list(one.module._parameters).index(one.parameter_name)):
            read.setdefault(linear.name, [(linear.module, linear.parameter_name, linear.expert)])

    def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        seen[id(args[0])] = args[0]
        # Convolutions of one map may read other places of it.
        read.setdefault(name, []).append((id(args[0]), getattr(module, "stride", None)))

    with ExitStack() as hooks:
        for name, linear in mine.items():
            if not linear.stacked:
                hooks.enter_context(linear.module.register_forward_pre_hook(partial(note, name)))
        stacks = grouped((linear for linear in mine.values() if linear.stacked), lambda linear: linear.module)
        for module, members in stacks.items():
            hooks.enter_context(module.register_forward_pre_hook(partial(note_stack, members)))
        run()
    for name, linear in mine.items():
        if linear.routed and not linear.stacked:  # other samples' tokens may reach it
            read.setdefault(name, [name])
    if unused := [name for name in mine if name not in read]:
        globs = dict.fromkeys(f"--skip '*.{_part(name, mine, unused)}'" for name in unused)
        what = f"{unused[0]} is never called by its layer, so it has no inputs"
        raise TrimError(f"{what}; leave it dense with {' '.join(globs)}.")
    # What is called several times reads what no other linear does, even where it begins with the same tensor.
    groups = grouped(read, lambda name: read[name][0] if len(read[name]) == 1 else name)
    return [
        InputGroup(
            tuple(mine[name] for name in mine if name in names),
            once=all(len(read[name]) == 1 and not mine[name].routed for name in names),
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

    seqlen is None where samples become more or fewer tokens from layer to layer.
    Of N samples a rank runs its share, numbered from 0; what it gathers is joined with the other ranks' in the end.
    dense: runs the layer on the dense model's hidden states of some samples; for statistics of both models' inputs.
    """

    groups: list[InputGroup]
    needs: frozenset[str]
    nsamples: int
    seqlen: int | None
    device: torch.device
    options_of: Callable[[Statistic], Any] = lambda statistic: None
    dense: Callable[[slice], Any] | None = None
    world: World = field(default_factory=current)
    _first: dict[str, Matrix] = field(default_factory=dict)
    _paired: dict[str, list[Tensor]] = field(default_factory=dict)
    _pairing: bool = False
    _gathered: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _tokens: dict[str, int] = field(default_factory=dict)
    _samples: slice = field(default_factory=lambda: slice(0, 0))
    _leaves: bool = False
    _left: int = 0

    def reset(self) -> None:
        """Forget everything: before the first batch, and when a pass starts over."""
        self._gathered = {group.name: {} for group in self.groups}
        self._first = {group.name: group.linears[0] for group in self.groups}
        self._tokens = {group.name: 0 for group in self.groups if group.routed}
        for one in (STATISTICS[name] for name in sorted(self.needs)):
            for group in self.groups:
                entry = one
                if group.routed and one.routed and one.routed.start:
                    entry = replace(one, function=one.routed.start)
                start = entry(group.d_in, self.nsamples, self.device, options=self.options_of(one))
                self._gathered[group.name][one.name] = start

    @contextmanager
    def watching(self, *, leaves: bool = False) -> Iterator[None]:
        """Hook the first linear of every group for the duration. leaves: a layer may be left with `LeftEarly`."""
        self._leaves = leaves and all(group.once for group in self.groups)
        with ExitStack() as hooks:
            experts = {}
            for group in self.groups:
                first, take = group.linears[0], self._take_routed if group.routed else self._take_in
                if first.stacked:
                    experts[first] = partial(self._take_tokens, group.name)
                else:
                    hooks.enter_context(first.module.register_forward_pre_hook(partial(take, group.name)))
            hooks.enter_context(watching_experts(experts))
            yield

    @contextmanager
    def batch(self, samples: slice) -> Iterator[None]:
        """The forward pass inside holds these samples. `LeftEarly` goes on to whoever entered it.

        Swallowed here it would hold the batch's activations until garbage is looked for: from Python 3.12 on its
        traceback leads to the frame that hands it to a generator, and that frame to it.
        """
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
        yield

    def _take_in(self, name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        """The hook of the group `name`."""
        count = self._samples.stop - self._samples.start
        inputs = self._first[name].tokens(args[0].detach())
        tokens = inputs.numel() // inputs.shape[-1]
        if tokens != count * self.seqlen if self.seqlen is not None else len(inputs) % count:
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

    def _take_routed(self, name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        """The hook of the group `name` of an expert that is a module of its own."""
        self._take_tokens(name, args[0].detach().flatten(0, -2))

    def _take_tokens(self, name: str, tokens: Tensor) -> None:
        """Some tokens [T, D_in] that an expert was given."""
        tokens = tokens[tokens[:, 0].argsort()]  # each kernel has an order of its own
        for key, gathered in self._gathered[name].items():
            routed = STATISTICS[key].routed
            assert routed is not None, "refused before anything is gathered"
            routed.add(gathered, tokens, self._tokens[name], self.nsamples)
        self._tokens[name] += len(tokens)

    def by_linear(self) -> dict[str, LinearStats]:
        """Full module name -> its group's statistics. Raises InputError when activations are not finite."""
        result: dict[str, LinearStats] = {}
        for group in self.groups:
            gathered, tokens = self._gathered[group.name], self._tokens.get(group.name)
            found: dict[str, Tensor] = {}
            for name, tensor in gathered.items():
                one = STATISTICS[name]
                if tokens is None:
                    found[name] = one.finish(self._joined(one, tensor))
                elif one.routed is not None and tokens >= one.routed.least(self.nsamples):
                    found[name] = one.routed.finish(tensor, self.nsamples)
            stats = LinearStats(tokens, **found)
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
