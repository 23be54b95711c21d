"""What hooks gather from the inputs of a layer's linears.

Linears that share an input form a group and share its statistics. Square norms and last-token inputs are kept
per sample at the sample's own place, so a batch may be run again, and neither batch size nor order changes
the result.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimcli.errors import InputError, TrimError
from trimcli.methods.scores import LinearStats, Statistic
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


def find_groups(layer: DecoderLayer, run: Callable[[], Any]) -> list[InputGroup]:
    """The layer's input groups, seen in one pass `run` of a small batch. Raises TrimError for an unused linear."""
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

    hooks = [linear.module.register_forward_pre_hook(watch(linear)) for linear in layer.linears]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    order = {linear.name: index for index, linear in enumerate(layer.linears)}
    groups = [InputGroup(tuple(sorted(members, key=lambda linear: order[linear.name]))) for _, members in seen]
    unused = set(order) - {linear.name for group in groups for linear in group.linears}
    if unused:
        raise TrimError(f"{sorted(unused)[0]} is never called by its layer, so it has no inputs; name it in --skip.")
    return groups


@dataclass
class GroupStatistics:
    """The statistics of one input group over `nsamples` samples.

    sample_sqnorm: float32 [nsamples, D_in], squared L2 norm over the sample's tokens. inputs: [D_in, nsamples],
    the last token's inputs. gram: [D_in, D_in], (2/N) sum_j X_j^T X_j. None where not asked for.
    """

    sample_sqnorm: Tensor | None = None
    inputs: Tensor | None = None
    gram: Tensor | None = None

    @property
    def sqnorm(self) -> Tensor | None:
        """Input square norm, float32 [D_in]: the mean over samples, summed in float64."""
        if self.sample_sqnorm is None:
            return None
        return self.sample_sqnorm.double().mean(dim=0).float()

    def view(self) -> LinearStats:
        """What the methods read."""
        return LinearStats(sqnorm=self.sqnorm, inputs=self.inputs, gram=self.gram)


@dataclass
class Collector:
    """Gathers statistics of `groups` while batches of a layer run.

    needs: which statistics. nsamples, seqlen: N and L. gram_dtype: accumulation of the Gram (float32 or float64).
    """

    groups: list[InputGroup]
    needs: frozenset[Statistic]
    nsamples: int
    seqlen: int
    device: torch.device
    gram_dtype: torch.dtype = torch.float32
    found: dict[str, GroupStatistics] = field(default_factory=dict)
    _rows: slice = field(default_factory=lambda: slice(0, 0))

    def reset(self) -> None:
        """Forget everything: before the first batch, and when a pass starts over."""
        self.found = {group.name: self._fresh(group) for group in self.groups}

    def _fresh(self, group: InputGroup) -> GroupStatistics:
        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        return GroupStatistics(
            zeros(self.nsamples, group.d_in) if Statistic.SQNORM in self.needs else None,
            zeros(group.d_in, self.nsamples) if Statistic.INPUTS in self.needs else None,
            zeros(group.d_in, group.d_in, dtype=self.gram_dtype) if Statistic.GRAM in self.needs else None,
        )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hook the first linear of every group for the duration."""
        hooks = [group.linears[0].module.register_forward_pre_hook(self._hook(group.name)) for group in self.groups]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def batch(self, rows: slice) -> None:
        """The next forward pass holds samples `rows`."""
        self._rows = rows

    def _hook(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            rows, found = self._rows, self.found[name]
            count = rows.stop - rows.start
            inputs = args[0].detach()
            if inputs.numel() != count * self.seqlen * inputs.shape[-1]:
                raise TrimError(
                    f"{name} is not given every token (a routed expert, perhaps), so its inputs have no samples; "
                    f"leave it dense with --skip '{name}'."
                )
            if inputs.shape[0] != count:  # some layers flatten samples and tokens into one dimension
                inputs = inputs.reshape(count, -1, inputs.shape[-1])
            if found.sample_sqnorm is not None:
                found.sample_sqnorm[rows] = torch.linalg.vector_norm(inputs, dim=1, dtype=torch.float32).square()
            if found.inputs is not None:
                found.inputs[:, rows] = inputs[:, -1].T.float()
            if found.gram is not None:
                flat = inputs.reshape(-1, inputs.shape[-1]).to(found.gram.dtype)
                found.gram.addmm_(flat.T, flat, alpha=2.0 / self.nsamples)

        return hook

    def by_linear(self) -> dict[str, LinearStats]:
        """Full module name -> its group's statistics. Raises InputError when activations are not finite."""
        result: dict[str, LinearStats] = {}
        for group in self.groups:
            view = self.found[group.name].view()
            refuse_unusable(view, group.name)
            result.update({linear.name: view for linear in group.linears})
        return result


def refuse_unusable(stats: LinearStats, name: str) -> None:
    """Raise InputError when a statistic of the linear `name` holds NaN or infinity."""
    for tensor in (stats.sqnorm, stats.inputs, stats.gram):
        if tensor is not None and not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"the inputs of {name} hold NaN or infinite values (the model overflows or is damaged); "
                "try --dtype float32, or another checkpoint."
            )
