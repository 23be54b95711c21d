"""The ranks that share a run: one process alone, or those that torchrun started, on one machine or several.

What works on all samples or all matrices asks the `World` which are its own, and gives it what everyone has to know.
Alone every answer is trivial; under torchrun it is torch.distributed's: gloo between CPUs, nccl between GPUs. Sums are
taken in the order of the ranks, so that a run repeated with as many ranks gives the same bytes.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from trimcli.errors import TrimError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# How long a rank waits for another that is connected but does not answer: beyond the longest that one works on its own
# (a matrix, a model written to disk). One that ends is noticed at once.
TIMEOUT = timedelta(hours=2)
# How long is waited for the launcher's store when a run fails.
STORE_TIMEOUT = timedelta(seconds=5)
# Values that are summed at a time: memory for so many of every rank.
CHUNK = 1 << 22


class Found(NamedTuple):
    """What one rank found and all are told: tensors on the CPU by name, and facts, JSON values."""

    tensors: Mapping[str, Tensor]
    facts: Any


class RankLost(TrimError):
    """Another rank ended or does not answer."""


def rank() -> int:
    """Which of the processes that were launched together this is."""
    return int(os.environ.get("RANK", "0"))


def ranks() -> int:
    """How many processes were launched together, as torchrun and accelerate tell."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one of several that writes and prints."""
    return rank() == 0


class World:
    """A process that works alone: everything is its own, and nobody has to be told."""

    rank, size = 0, 1

    @property
    def is_first(self) -> bool:
        """Whether this rank writes and prints."""
        return self.rank == 0

    def share(self, count: int, rank: int | None = None) -> slice:
        """Which of `count` samples are a rank's, this one's if not told: neighbours, in the order of the ranks.

        Some ranks have one more than others.
        """
        mine = self.rank if rank is None else rank
        each, left = divmod(count, self.size)
        start = mine * each + min(mine, left)
        return slice(start, start + each + (mine < left))

    def meet(self) -> None:
        """Go on when every rank is here."""

    def agreed(self, make: Callable[[], T]) -> T:
        """What the first rank makes, a JSON value, on every rank; elsewhere `make` is not called."""
        return make()

    def first(self, make: Callable[[], Found]) -> Found:
        """What the first rank finds, on every rank; elsewhere `make` is not called."""
        return make()

    def summed(self, tensor: Tensor) -> Tensor:
        """Every rank's tensors of one shape, added up in the order of the ranks, in the place of `tensor`."""
        return tensor

    def whole(self, tensor: Tensor, dim: int) -> Tensor:
        """`tensor`, of which every rank has filled in its `share` along `dim`, with the shares of all."""
        return tensor

    def divided(
        self, items: Sequence[T], work: Callable[[T], Found], cost: Callable[[T], float]
    ) -> Iterator[tuple[T, Found]]:
        """Every item, in order, with what `work` finds: each by one rank, each rank about as much of `cost`."""
        for item in items:
            yield item, work(item)

    def most(self, values: Mapping[str, int]) -> dict[str, int]:
        """The largest that any rank has, by name."""
        return dict(values)


class Ranks(World):
    """One of several ranks. Everything that is told has to be asked for by all of them, in the same order."""

    def __init__(self) -> None:
        import torch.distributed as group

        self._group = group
        self.rank, self.size = group.get_rank(), group.get_world_size()

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Around what all ranks do at once. Raises RankLost where one of them does not."""
        try:
            yield
        except RuntimeError as problem:
            if "out of memory" in str(problem):
                raise
            what = f"another of the {self.size} ranks ended, and the run with it"
            raise RankLost(f"{what}; repeat the command: what layers it finished are gone on from.") from problem

    def meet(self) -> None:
        """Go on when every rank is here."""
        import torch

        with self._together():
            self._group.all_reduce(torch.zeros(1))

    def _told(self, source: int, text: str) -> str:
        """`text` of the rank `source`, on every rank."""
        import torch

        said = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0).byte()
        length = torch.tensor([len(said)])
        self._group.broadcast(length, source)
        if self.rank != source:
            said = torch.empty(int(length), dtype=torch.uint8)
        self._group.broadcast(said, source)
        return said.numpy().tobytes().decode()

    def agreed(self, make: Callable[[], T]) -> T:
        """What the first rank makes, a JSON value, on every rank; elsewhere `make` is not called."""
        text = json.dumps(make()) if self.is_first else ""
        with self._together():
            found: T = json.loads(self._told(0, text))
        return found

    def first(self, make: Callable[[], Found]) -> Found:
        """What the first rank finds, on every rank; elsewhere `make` is not called."""
        found = make() if self.is_first else None
        with self._together():
            return self._sent(0, found)

    def _sent(self, source: int, found: Found | None) -> Found:
        """What the rank `source` found, on every rank."""
        import torch

        tensors = dict(found.tensors) if found else {}
        header: dict[str, Any] = {"facts": found.facts if found else None}
        header["tensors"] = {
            name: [str(one.dtype).removeprefix("torch."), list(one.shape)] for name, one in tensors.items()
        }
        header = json.loads(self._told(source, json.dumps(header) if found else ""))
        for name, (dtype, shape) in header["tensors"].items():
            if self.rank != source:
                tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            if tensors[name].numel():
                self._group.broadcast(_bytes(tensors[name]), source)
        return Found(tensors, header["facts"])

    def summed(self, tensor: Tensor) -> Tensor:
        """Every rank's tensors of one shape, contiguous, added up in the order of the ranks, in place of `tensor`."""
        import torch

        self.meet()  # over gloo, which notices an ended rank at once, as nccl does not
        with self._together():
            for part in tensor.view(-1).split(CHUNK):
                parts = [torch.empty_like(part) for _ in range(self.size)]
                self._group.all_gather(parts, part)
                part.copy_(parts[0])
                for other in parts[1:]:
                    part += other
        return tensor

    def whole(self, tensor: Tensor, dim: int) -> Tensor:
        """`tensor`, of which every rank has filled in its `share` along `dim`, with the shares of all."""
        self.meet()
        with self._together():
            for source in range(self.size):
                share = self.share(tensor.shape[dim], source)
                place = tensor.narrow(dim, share.start, share.stop - share.start)
                if place.numel():
                    part = place.contiguous()
                    self._group.broadcast(part, source)
                    place.copy_(part)
        return tensor

    def divided(
        self, items: Sequence[T], work: Callable[[T], Found], cost: Callable[[T], float]
    ) -> Iterator[tuple[T, Found]]:
        """Every item, in order, with what `work` finds: each by one rank, each rank about as much of `cost`."""
        owners = assigned([cost(item) for item in items], self.size)
        mine = {place: work(item) for place, item in enumerate(items) if owners[place] == self.rank}
        for place, item in enumerate(items):
            with self._together():
                found = self._sent(owners[place], mine.pop(place, None))
            yield item, found

    def most(self, values: Mapping[str, int]) -> dict[str, int]:
        """The largest that any rank has, by name."""
        found: dict[str, int] = {}
        with self._together():
            for source in range(self.size):
                for name, value in self._sent(source, Found({}, dict(values))).facts.items():
                    found[name] = max(value, found.get(name, 0))
        return found


def assigned(costs: Sequence[float], ranks: int) -> list[int]:
    """Which rank works on each item: the costliest first, each to the rank that has least to do so far."""
    loads = [(0.0, rank) for rank in range(ranks)]
    owners = [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        load, owner = heapq.heappop(loads)
        owners[place] = owner
        heapq.heappush(loads, (load + costs[place], owner))
    return owners


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory, uint8 [n]: what every backend carries, whatever the dtype."""
    import torch

    return tensor.view(-1).view(torch.uint8)


_current = World()


def current() -> World:
    """The ranks that share the run, in `joined`; outside of it this process is alone."""
    return _current


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """The ranks that were launched together share what happens inside; every one of them has to come here.

    Where something fails inside, the connections stay until the process ends, so that the others notice it only after
    this one has said why.
    """
    global _current
    if _current.size > 1:
        _current.meet()
        yield _current
        return
    if ranks() == 1:
        yield _current
        return
    import torch.distributed

    mine = not torch.distributed.is_initialized()
    try:
        if mine:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            torch.distributed.init_process_group(backend, timeout=TIMEOUT)
        _current = Ranks()
    except (RuntimeError, ValueError) as problem:
        what = f"the {ranks()} ranks cannot reach one another ({str(problem).splitlines()[0]})"
        raise RankLost(f"{what}; start them with torchrun.") from problem
    try:
        yield _current
        _current.meet()
        if mine:
            torch.distributed.destroy_process_group()
    finally:
        _current = World()


def speaks() -> bool:
    """Whether this rank is the first of all to ask, and so the one that says why the run ended."""
    if ranks() == 1:
        return True
    import torch.distributed

    run = [os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")]
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        connect = torch.distributed.TCPStore  # type: ignore[attr-defined]
        store = connect(host, port, is_master=False, wait_for_workers=False, timeout=STORE_TIMEOUT)
        return bool(store.add("/".join(["trim", *run]), 1) == 1)
    except (RuntimeError, LookupError, ValueError):  # no launcher is there any more to ask
        return is_first()
