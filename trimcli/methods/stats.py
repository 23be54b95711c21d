"""Statistics: what is collected from a linear's inputs X_j, [L, D_in], of N samples, how, and under which name."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from trimcli.options import check_fields, option
from trimcli.registry import Entry, Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

# Values that are squared at a time: few enough to stay in the processor's cache.
_COLUMNS = 1 << 18
# From so many inputs on, a Gram is computed in so many stripes, each from the diagonal on: 9/16 of the products.
_WIDE, _STRIPES = 512, 8
# One sample in so many is held out of what is fitted.
HELDOUT_SHARE = 8


@dataclass(frozen=True)
class Routed:
    """How a statistic is gathered of the tokens that a router sends to one expert, in any number.

    start(d_in, nsamples, device[, options]): what it is gathered in. add(gathered, tokens [T, D_in], seen, N): takes in
    some, `seen` having come before. finish(gathered, N): what methods read. nbytes(d_in, nsamples): memory. least(N):
    tokens without which it tells nothing.
    """

    add: Callable[[Tensor, Tensor, int, int], None]
    start: Callable[..., Tensor] | None = None
    finish: Callable[[Tensor, int], Tensor] = lambda gathered, nsamples: gathered
    nbytes: Callable[[int, int], int] | None = None
    least: Callable[[int], int] = lambda nsamples: 0


@dataclass(frozen=True, kw_only=True)
class Statistic(Entry):
    """A statistic: function(d_in, nsamples, device) gives the tensor it is gathered in.

    add(gathered, inputs [n, L, D_in], samples, N): takes in a batch, `samples` its slice of 0..N-1. finish(gathered):
    what methods read. columns(tensor, slice): its part of some columns. nbytes(d_in, nsamples): memory, and `copies`
    more of it while it is solved with. stored: its name in `calibrate --stats`; None for what is only collected while
    pruning. paired: `add` takes the dense model's inputs of the batch, too, as its last argument. dim: the dimension
    along which every sample has its own place; None where samples are added up. routed: how it is gathered for an
    expert, None where it cannot be.
    """

    add: Callable[..., None]
    nbytes: Callable[[int, int], int]
    finish: Callable[[Tensor], Tensor] = lambda gathered: gathered
    columns: Callable[[Tensor, slice], Tensor] = lambda tensor, place: tensor[place]
    stored: str | None = None
    copies: int = 0
    paired: bool = False
    dim: int | None = None
    routed: Routed | None = None


STATISTICS = Registry("statistic", "--stats", Statistic)


def statistic(name: str, function: Callable[..., Tensor], *, help: str, **more: Any) -> Statistic:
    """Register a statistic (see Statistic for what there is to say of it) and give its entry."""
    entry = Statistic(name=name, function=function, help=help, title=name, **more)
    STATISTICS.add(entry)
    return entry


def stored_statistics() -> dict[str, Statistic]:
    """What a calibration file can hold, by its name in `calibrate --stats`; tensors are called `<linear>.<name>`."""
    return {one.stored: one for one in STATISTICS.values() if one.stored}


class LinearStats:
    """Tensors by statistic of one linear, or of those that share its input, on one device. place: of which columns.

    tokens: how many reached an expert; None where all do. A statistic that these are too few for is not there.
    """

    def __init__(self, tokens: int | None = None, /, **tensors: Tensor | None) -> None:
        self.tensors: Mapping[str, Tensor] = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        self.tokens = tokens
        self._derived: dict[Hashable, Any] = {}
        self.place = slice(None)

    def __contains__(self, statistic: Statistic) -> bool:
        return statistic.name in self.tensors

    def __getitem__(self, statistic: Statistic) -> Tensor:
        """The tensor of `statistic`. Raises ValueError when it was not collected."""
        if statistic not in self:
            raise ValueError(f"the statistic {statistic.name!r} was not collected; name it in what the method needs.")
        return self.tensors[statistic.name]

    @property
    def sqnorm(self) -> Tensor:
        """Input square norm: float32 [D_in]."""
        return self[SQNORM]

    @property
    def inputs(self) -> Tensor:
        """Last-token inputs: [D_in, N]."""
        return self[INPUTS]

    @property
    def gram(self) -> Tensor:
        """Gram: [D_in, D_in]."""
        return self[GRAM]

    def with_(self, **tensors: Tensor | None) -> LinearStats:
        """The same with other tensors in the place of some; what `once` gives stays."""
        found = LinearStats(self.tokens, **{**self.tensors, **tensors})
        found._derived, found.place = self._derived, self.place
        return found

    def of(self, columns: slice) -> LinearStats:
        """The part of some columns. What `once` gives belongs to all columns still."""
        found = self.with_(**{name: STATISTICS[name].columns(part, columns) for name, part in self.tensors.items()})
        found.place = columns
        return found

    def once(self, key: Hashable, make: Callable[[LinearStats], T]) -> T:
        """What `make` derives from all columns' statistics, made the first time it is asked for under `key`."""
        if key not in self._derived:
            if self.place != slice(None):
                raise ValueError(f"{key!r} is derived from all columns; ask for it before taking some.")
            self._derived[key] = make(self)
        found: T = self._derived[key]
        return found


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: str = "float32") -> Tensor:
    import torch

    return torch.zeros(shape, device=device, dtype=getattr(torch, dtype))


def _add_sqnorm(gathered: Tensor, inputs: Tensor, samples: slice, nsamples: int) -> None:
    import torch

    if inputs.device.type == "cpu" and inputs.stride(-1) == 1:
        gathered[samples] = _square_norms(inputs)
    else:
        gathered[samples] = torch.linalg.vector_norm(inputs, dim=1, dtype=torch.float32).square()


def _square_norms(inputs: Tensor) -> Tensor:
    """Over the tokens of each sample, float32 [n, D_in]; inputs: [n, L, D_in] on the CPU, any float dtype.

    As torch's vector_norm squared, to the last bit on x86, where that goes down one column after the other: numpy goes
    over many at once, five to nine times as fast on one core.
    """
    import numpy as np
    import torch

    count, length, d_in = inputs.shape
    found = np.empty((count, d_in), dtype=np.float32)
    step = max(64, _COLUMNS // (count * length))
    for start in range(0, d_in, step):
        part = inputs[..., start : start + step].float().numpy()
        found[:, start : start + step] = np.sqrt(np.add.reduce(part * part, axis=1))
    return torch.from_numpy(found).square_()


def _add_inputs(gathered: Tensor, inputs: Tensor, samples: slice, nsamples: int) -> None:
    gathered[:, samples] = inputs[:, -1].T.float()


def _add_gram(gathered: Tensor, inputs: Tensor, samples: slice, nsamples: int) -> None:
    flat = inputs.reshape(-1, inputs.shape[-1]).to(gathered.dtype)
    for rows in _stripes(flat.shape[1]):
        right = slice(rows.start, None)
        gathered[rows, right].addmm_(flat[:, rows].T, flat[:, right], alpha=2.0 / nsamples)


def _stripes(width: int) -> Iterator[slice]:
    """Rows of a symmetric matrix, of which what lies left of the diagonal need not be computed where that pays."""
    step = width if width < _WIDE else -(-width // _STRIPES)
    yield from (slice(start, start + step) for start in range(0, width, step))


def _mirrored(gathered: Tensor) -> Tensor:
    """The whole of a symmetric matrix that was gathered in stripes."""
    for rows in _stripes(len(gathered)):
        gathered[rows.stop :, rows] = gathered[rows, rows.stop :].T
    return gathered


def fitting_samples(nsamples: int) -> int:
    """How many samples, the first ones, are fitted on; the others, an eighth and at least one, are held out.

    All where there is one only.
    """
    return nsamples - max(1, nsamples // HELDOUT_SHARE) if nsamples > 1 else nsamples


def _add_fitting(gathered: Tensor, inputs: Tensor, samples: slice, nsamples: int) -> None:
    count = fitting_samples(nsamples)
    if samples.start < count:
        _add_gram(gathered, inputs[: count - samples.start], samples, count)


def _add_heldout(gathered: Tensor, inputs: Tensor, samples: slice, nsamples: int) -> None:
    count = fitting_samples(nsamples)
    if samples.stop > count:
        _add_gram(gathered, inputs[max(0, count - samples.start) :], samples, nsamples - count)


def _add_cross(gathered: Tensor, inputs: Tensor, count: int, dense: Tensor) -> None:
    first, second = (one.reshape(-1, one.shape[-1]).to(gathered.dtype) for one in (dense, inputs))
    gathered.addmm_(first.T, second, alpha=2.0 / count)


def _add_fitting_cross(gathered: Tensor, inputs: Tensor, samples: slice, nsamples: int, dense: Tensor) -> None:
    count = fitting_samples(nsamples)
    if samples.start < count:
        mine = slice(count - samples.start)
        _add_cross(gathered, inputs[mine], count, dense[mine])


def _add_heldout_cross(gathered: Tensor, inputs: Tensor, samples: slice, nsamples: int, dense: Tensor) -> None:
    count = fitting_samples(nsamples)
    if samples.stop > count:
        mine = slice(max(0, count - samples.start), None)
        _add_cross(gathered, inputs[mine], nsamples - count, dense[mine])


def _add_heldout_dense(gathered: Tensor, inputs: Tensor, samples: slice, nsamples: int, dense: Tensor) -> None:
    _add_heldout(gathered, dense, samples, nsamples)


def _add_routed_squares(gathered: Tensor, tokens: Tensor, seen: int, nsamples: int) -> None:
    gathered += tokens.float().square().sum(dim=0, dtype=gathered.dtype)


def _add_drawn(gathered: Tensor, tokens: Tensor, seen: int, nsamples: int) -> None:
    """Keep N of all tokens, each as likely as any other (Vitter 1985, algorithm R); draws hang on counts alone."""
    import numpy as np
    import torch

    draws = np.random.Generator(np.random.PCG64(0).advance(seen)).random(len(tokens))
    numbers = np.arange(seen, seen + len(tokens))
    places = np.where(numbers < nsamples, numbers, np.floor(draws * (numbers + 1)).astype(np.int64))
    last = {int(place): number for number, place in enumerate(places) if place < nsamples}
    if last:
        to, of = (torch.tensor(list(some), device=tokens.device) for some in (last, last.values()))
        gathered[:, to] = tokens[of].T.float()


def _add_routed_gram(gathered: Tensor, tokens: Tensor, seen: int, nsamples: int) -> None:
    _add_gram(gathered, tokens, slice(None), nsamples)


def _held_out(tokens: Tensor, seen: int) -> Tensor:
    """Which tokens are held out of what is fitted, bool [T]: one in so many, as they come."""
    import torch

    return torch.arange(seen + 1, seen + 1 + len(tokens), device=tokens.device) % HELDOUT_SHARE == 0


def _add_routed_fitting(gathered: Tensor, tokens: Tensor, seen: int, nsamples: int) -> None:
    _add_gram(gathered, tokens[~_held_out(tokens, seen)], slice(None), fitting_samples(nsamples))


def _add_routed_heldout(gathered: Tensor, tokens: Tensor, seen: int, nsamples: int) -> None:
    _add_gram(gathered, tokens[_held_out(tokens, seen)], slice(None), max(1, nsamples - fitting_samples(nsamples)))


@dataclass(frozen=True)
class GramOptions:
    """How the Gram is accumulated. Raises OptionError for another dtype."""

    gram_dtype: Literal["float32", "float64"] = option(
        "float32", "Accumulate the Gram in this dtype.", panel="SparseGPT"
    )

    def __post_init__(self) -> None:
        check_fields(self)


# Every sample has its own place, so that neither batch size nor order changes the sum.
SQNORM = statistic(
    "sqnorm",
    lambda d_in, nsamples, device: _zeros((nsamples, d_in), device),
    help="input square norms a_c = (1/N) * sum_j ||X_j[:, c]||^2, float32 [D_in]",
    source="Sun et al. 2023, section 3",
    add=_add_sqnorm,
    finish=lambda gathered: gathered.double().mean(dim=0).float(),
    nbytes=lambda d_in, nsamples: 4 * d_in * nsamples,
    stored="norms",
    dim=0,
    routed=Routed(
        _add_routed_squares,
        start=lambda d_in, nsamples, device: _zeros((d_in,), device, "float64"),
        finish=lambda gathered, nsamples: (gathered / nsamples).float(),
        nbytes=lambda d_in, nsamples: 8 * d_in,
    ),
)
INPUTS = statistic(
    "inputs",
    lambda d_in, nsamples, device: _zeros((d_in, nsamples), device),
    help="last-token inputs: column j is the last token's input in sample j, float32 [D_in, N]",
    source="Beck et al. 2025, section 3",
    add=_add_inputs,
    nbytes=lambda d_in, nsamples: 4 * d_in * nsamples,
    stored="inputs",
    dim=1,
    routed=Routed(_add_drawn, least=lambda nsamples: nsamples),
)


def _cross_like(name: str, add: Callable[..., None], help: str, **more: Any) -> Statistic:
    return statistic(
        name,
        lambda d_in, nsamples, device, options: _zeros((d_in, d_in), device, options.gram_dtype),
        help=f"{help}, [D_in, D_in]",
        source="Frantar & Alistarh 2023, section 3",
        add=add,
        nbytes=lambda d_in, nsamples: 4 * d_in * d_in,
        columns=lambda tensor, place: tensor[place, place],
        options=GramOptions,
        **more,
    )


def _gram_like(name: str, add: Callable[..., None], help: str, **more: Any) -> Statistic:
    return _cross_like(name, add, help, finish=_mirrored, **more)


def _routed(add: Callable[[Tensor, Tensor, int, int], None], **more: Any) -> Routed:
    return Routed(add, finish=lambda gathered, nsamples: _mirrored(gathered), **more)


GRAM = _gram_like("gram", _add_gram, "Gram H = (2/N) * sum_j X_j^T X_j", copies=5, routed=_routed(_add_routed_gram))
# A sample is in one of the two, so that together they take no longer to gather than the Gram.
FITTING = _gram_like(
    "fitting",
    _add_fitting,
    "Gram of all samples but those held out",
    copies=5,
    routed=_routed(_add_routed_fitting, least=lambda nsamples: 2 * HELDOUT_SHARE),
)
HELDOUT = _gram_like(
    "heldout",
    _add_heldout,
    "Gram of the held-out samples, the last eighth",
    routed=_routed(_add_routed_heldout, least=lambda nsamples: 2 * HELDOUT_SHARE),
)
# Of the dense model's inputs Z_j and the pruned one's X_j of the same samples.
CROSS = _cross_like("cross", _add_fitting_cross, "sum_j Z_j^T X_j of all samples but these", paired=True, copies=1)
HELDOUT_CROSS = _cross_like("heldout_cross", _add_heldout_cross, "the same of the held-out samples", paired=True)
HELDOUT_DENSE = _gram_like("heldout_dense", _add_heldout_dense, "Gram of their dense inputs Z_j", paired=True)
AIMING = frozenset({CROSS.name, HELDOUT_CROSS.name, HELDOUT_DENSE.name})
