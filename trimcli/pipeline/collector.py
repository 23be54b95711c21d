"""What hooks gather from the inputs of a layer's linears.

Linears that share an input form a group and share its statistics. Square norms and last-token inputs are kept
per sample at the sample's own place, so a batch may be run again, and neither batch size nor order changes
the result.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimcli.errors import InputError, TrimError
from trimcli.methods.stats import STATISTICS, LinearStats, Statistic
from trimcli.model.matrix import Matrix
from trimcli.model.skeleton import DecoderLayer


@dataclass(frozen=True)
class InputGroup:
    """Linears of one layer that read the same tensor, in module order; groups are in order of execution."""

    linears: tuple[Matrix, ...]

    @property
    def name(self) -> str:
        """The full module name of the first linear: the group's key."""
        return self.linears[0].name

    @property
    def d_in(self) -> int:
        """Input features."""
        return self.linears[0].d_in


def find_groups(layer: DecoderLayer, run: Callable[[], Any], wanted: Collection[str] | None = None) -> list[InputGroup]:
    """The layer's input groups, seen in one pass `run` of a small batch.

    wanted: names of the linears that matter, None for all. Raises TrimError for one that the pass never calls.
    """
    mine = [linear for linear in layer.linears if wanted is None or linear.name in wanted]
    seen: list[tuple[Tensor, list[Matrix]]] = []

    def watch(linear: Matrix) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            for tensor, members in seen:
                if tensor is args[0]:
                    if linear not in members:
                        members.append(linear)
                    return
            seen.append((args[0], [linear]))

        return hook

    hooks = [linear.module.register_forward_pre_hook(watch(linear)) for linear in mine]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    order = {linear.name: index for index, linear in enumerate(mine)}
    groups = [InputGroup(tuple(sorted(members, key=lambda linear: order[linear.name]))) for _, members in seen]
    unused = set(order) - {linear.name for group in groups for linear in group.linears}
    if unused:
        raise TrimError(f"{sorted(unused)[0]} is never called by its layer, so it has no inputs; name it in --skip.")
    return groups


@dataclass
class Collector:
    """Gathers statistics of `groups` while batches of a layer run.

    needs: names of the statistics. nsamples, seqlen: N and L. options_of: what a statistic is started with, by entry;
    its defaults where that is None.
    """

    groups: list[InputGroup]
    needs: frozenset[str]
    nsamples: int
    seqlen: int
    device: torch.device
    options_of: Callable[[Statistic], Any] = lambda statistic: None
    _gathered: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _samples: slice = field(default_factory=lambda: slice(0, 0))

    def reset(self) -> None:
        """Forget everything: before the first batch, and when a pass starts over."""
        wanted = [STATISTICS[name] for name in sorted(self.needs)]
        self._gathered = {
            group.name: {
                one.name: one(group.d_in, self.nsamples, self.device, options=self.options_of(one)) for one in wanted
            }
            for group in self.groups
        }

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hook the first linear of every group for the duration."""
        hooks = [group.linears[0].module.register_forward_pre_hook(self._hook(group.name)) for group in self.groups]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def batch(self, samples: slice) -> None:
        """The next forward pass holds these samples."""
        self._samples = samples

    def _hook(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            samples = self._samples
            count = samples.stop - samples.start
            inputs = args[0].detach()
            if inputs.numel() != count * self.seqlen * inputs.shape[-1]:
                raise TrimError(
                    f"{name} is not given every token (a routed expert, perhaps), so its inputs have no samples; "
                    f"leave it dense with --skip '{name}'."
                )
            if inputs.shape[0] != count:  # some layers flatten samples and tokens into one dimension
                inputs = inputs.reshape(count, -1, inputs.shape[-1])
            for statistic, gathered in self._gathered[name].items():
                STATISTICS[statistic].add(gathered, inputs, samples, self.nsamples)

        return hook

    def by_linear(self) -> dict[str, LinearStats]:
        """Full module name -> its group's statistics. Raises InputError when activations are not finite."""
        result: dict[str, LinearStats] = {}
        for group in self.groups:
            found = {name: STATISTICS[name].finish(tensor) for name, tensor in self._gathered[group.name].items()}
            stats = LinearStats(**found)
            refuse_unusable(stats, group.name)
            result.update({linear.name: stats for linear in group.linears})
        return result


def refuse_unusable(stats: LinearStats, name: str) -> None:
    """Raise InputError when a statistic of the linear `name` holds NaN or infinity."""
    for tensor in stats.tensors.values():
        # The sum first: it is quick, and only where it is not finite need every entry be looked at.
        if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"the inputs of {name} hold NaN or infinite values (the model overflows or is damaged); "
                "try --dtype float32, or another checkpoint."
            )
