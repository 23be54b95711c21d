"""Scores: how much each weight matters. A score is a pure function and one entry in the registry here."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from trimcli.errors import OptionError


class Statistic(Enum):
    """What a method may ask to be collected from a linear's inputs; values are `LinearStats` fields."""

    SQNORM = "sqnorm"
    INPUTS = "inputs"
    GRAM = "gram"


@dataclass(frozen=True)
class LinearStats:
    """Activation statistics of one linear; what was not collected is None.

    sqnorm: float32 [D_in], mean over samples of the inputs' squared L2 norm.
    inputs: [D_in, N], column j the last token's input in sample j.
    gram: float32 [D_in, D_in], (2/N) * sum over samples of X^T X.
    """

    sqnorm: Tensor | None = None
    inputs: Tensor | None = None
    gram: Tensor | None = None

    def __getitem__(self, statistic: Statistic) -> Tensor:
        """The tensor of `statistic`. Raises ValueError when it was not collected."""
        found: Tensor | None = getattr(self, statistic.value)
        if found is None:
            raise ValueError(f"the statistic {statistic.value!r} was not collected; name it in the score's needs.")
        return found


ScoreFunction = Callable[[Tensor, LinearStats], Tensor]


@dataclass(frozen=True)
class Score:
    """A registered score: call it with a weight [D_out, D_in] and the statistics it needs."""

    name: str
    function: ScoreFunction
    needs: frozenset[Statistic]
    source: str

    def __call__(self, weight: Tensor, stats: LinearStats) -> Tensor:
        """Scores of `weight`, float32 [D_out, D_in]; the lowest are the first to go."""
        return self.function(weight, stats)


_registry: dict[str, Score] = {}


def register_score(
    name: str, *, needs: Collection[Statistic] = (), source: str
) -> Callable[[ScoreFunction], ScoreFunction]:
    """Enter the decorated function in the registry as `name`.

    needs: the statistics it reads. source: the paper and section it comes from. Raises ValueError when the
    name is taken.
    """

    def enter(function: ScoreFunction) -> ScoreFunction:
        if name in _registry:
            raise ValueError(f"a score named {name!r} is registered already; choose another name.")
        _registry[name] = Score(name, function, frozenset(needs), source)
        return function

    return enter


def score_names() -> list[str]:
    """Names of the registered scores, in order of registration."""
    return list(_registry)


def score_function(name: str) -> Score:
    """The score registered as `name`. Raises OptionError for an unknown name."""
    if name not in _registry:
        raise OptionError(f"there is no score {name!r}; choose one of {', '.join(_registry)}.")
    return _registry[name]


@register_score("magnitude", source="Han et al. 2015, section 3")
def magnitude(weight: Tensor, _stats: LinearStats) -> Tensor:
    """Weight magnitude.

    weight: [D_out, D_in]. Returns scores [D_out, D_in] in float32; the lowest of the matrix go first.
    """
    return weight.abs().float()


@register_score("wanda", needs={Statistic.SQNORM}, source="Sun et al. 2023, section 3")
def wanda(weight: Tensor, stats: LinearStats) -> Tensor:
    """Weight magnitude times input norm.

    weight: [D_out, D_in]. stats.sqnorm: [D_in], mean over samples of the inputs' squared L2 norm.
    Returns scores [D_out, D_in] in float32; the lowest of each row are the first to go.
    """
    return weight.abs().float().mul_(stats[Statistic.SQNORM].sqrt())
