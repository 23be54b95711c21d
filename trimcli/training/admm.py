"""Masks learned by ADMM: weights trained under a pull towards their best projection on what the sparsity allows.

Minimise f(x) for x = z, z in the set S of weights with so many zeros (Boyd et al. 2011, section 9.1; ELSA: Lee et al.
2025). x: Adam on f(x) + lambda/2 ||x - z + u||^2. Every `interval` steps: z, the point of S nearest to x + u where
distances are weighted by Adam's second moment, an estimate of the loss's curvature; then u += x - z. lambda grows, so
that x comes to z.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimcli.files.atomic import atomic_file
from trimcli.files.tensors import TensorSpec, open_tensors, write_tensors
from trimcli.methods import masks
from trimcli.model.matrix import Matrix

# By so much lambda has grown at the end.
GROWTH = 100.0
# Added to the second moment, as Adam's own to its root: of what no gradient reached, magnitudes tell.
EPSILON = 1e-16
STATE = "admm.safetensors"
# The bits of the float32 infinity: those of floats from 0 on are in the order of the floats.
HIGHEST = 0x7F800000


@dataclass(frozen=True)
class Budget:
    """How many weights go: `total` of all matrices, or `counts` of each, or N:M `patterns`; by full module name.

    A matrix with a count or a pattern has no part in the total.
    """

    total: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    patterns: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def project(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep masks, bool [D_out, D_in], without the lowest of the scores. scores: float32 from 0 on, alike."""
        free = {name: one for name, one in scores.items() if name not in self.counts and name not in self.patterns}
        counts = {**self.counts, **lowest_counts(free, self.total)}
        return {
            name: masks.n_of_m(one, *self.patterns[name], check=False)
            if name in self.patterns
            else masks.lowest_in_all(one, counts[name])
            for name, one in scores.items()
        }


def lowest_counts(scores: Mapping[str, Tensor], total: int) -> dict[str, int]:
    """How many of each matrix are among the `total` lowest scores of all; of equal ones those of the first matrices.

    scores: float32 from 0 on. No copy of all is made: the score that divides them is found bit by bit.
    """
    bits = {name: one.contiguous().view(torch.int32) for name, one in scores.items()}
    low, high = 0, HIGHEST
    while low < high:
        middle = (low + high) // 2
        if sum(int((one <= middle).count_nonzero()) for one in bits.values()) >= total:
            high = middle
        else:
            low = middle + 1
    found = {name: int((one < low).count_nonzero()) for name, one in bits.items()}
    left = total - sum(found.values())
    for name, one in bits.items():
        taken = min(left, int((one == low).count_nonzero()))
        found[name] += taken
        left -= taken
    return found


class Splitting:
    """The state of ADMM of a loaded model's matrices: z and u, and the masks that z has.

    linears: what the budget is of. steps: of the whole training. penalty: lambda at the start. From the start z is x's
    nearest point by plain distance, and u zero.
    """

    def __init__(self, linears: Iterable[Matrix], budget: Budget, *, steps: int, interval: int, penalty: float) -> None:
        self.linears = {linear.name: linear for linear in linears}
        self.budget, self.steps, self.interval, self.penalty = budget, steps, interval, penalty
        self.step = 0
        self.u = {name: torch.zeros_like(linear.weight) for name, linear in self.linears.items()}
        self.keep = budget.project({name: linear.weight.square() for name, linear in self.linears.items()})
        self.z = {name: linear.weight * self.keep[name] for name, linear in self.linears.items()}

    def drive(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on the optimizer's steps are ADMM's."""
        optimizer.register_step_pre_hook(self.pull)
        optimizer.register_step_post_hook(self.push)

    @property
    def strength(self) -> float:
        """Lambda at this step."""
        return self.penalty * GROWTH ** (self.step / max(1, self.steps))

    def pull(self, *_: Any) -> None:
        """Add the penalty's gradient, lambda (x - z + u), to the loss's."""
        for name, linear in self.linears.items():
            parameter = _parameter(linear)
            if parameter.grad is None:  # an expert that no token reached
                parameter.grad = torch.zeros_like(parameter)
            linear.inside(parameter.grad).add_(linear.weight - self.z[name] + self.u[name], alpha=self.strength)

    def push(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Count the step; at the end of an interval, and at the end of all, renew z, then u."""
        self.step += 1
        if self.step % self.interval and self.step != self.steps:
            return
        scores = {}
        for name, linear in self.linears.items():
            moment = linear.inside(optimizer.state[_parameter(linear)]["exp_avg_sq"])
            scores[name] = (linear.weight + self.u[name]).square_().mul_(moment + EPSILON)
        self.keep = self.budget.project(scores)
        for name, linear in self.linears.items():
            found = linear.weight + self.u[name]
            self.z[name] = found.masked_fill(~self.keep[name], 0)
            self.u[name] = found - self.z[name]

    def settle(self) -> None:
        """Make the last z the model's weights."""
        for name, linear in self.linears.items():
            linear.write(self.z[name], self.keep[name])

    def save(self, folder: Path) -> None:
        """Leave the state in a checkpoint's folder."""
        state = {f"{name}.{part}": getattr(self, part)[name] for name in self.linears for part in ("z", "u")}
        state |= {f"{name}.keep": masks.pack(keep) for name, keep in self.keep.items()}
        state["step"] = torch.tensor([self.step])
        specs = {name: TensorSpec.of(tensor) for name, tensor in state.items()}
        with atomic_file(folder / STATE, force=True) as temporary:
            write_tensors(temporary, specs, state.__getitem__, {"format": "pt"})

    def load(self, folder: Path) -> None:
        """Take the state up that `save` left."""
        with open_tensors(folder / STATE) as handle:
            self.step = int(handle.get_tensor("step"))
            for name, linear in self.linears.items():
                device = linear.weight.device
                self.z[name], self.u[name] = (handle.get_tensor(f"{name}.{part}").to(device) for part in ("z", "u"))
                self.keep[name] = masks.unpack(handle.get_tensor(f"{name}.keep"), linear.d_in).to(device)


def _parameter(linear: Matrix) -> nn.Parameter:
    found: nn.Parameter = getattr(linear.module, linear.parameter_name)
    return found
