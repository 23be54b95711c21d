"""Updates: what the kept weights do about those that go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimcli.methods.heldout import Judged
from trimcli.registry import Entry, Registry

if TYPE_CHECKING:
    from torch import Tensor

    from trimcli.methods.updates.grid import Grid


@dataclass(frozen=True)
class Updated:
    """What an update made of a matrix: keep, bool [D_out, D_in], and weight, float32, zero outside; None: as it was.

    judged: what held-out samples say of its steps. grid: where kept weights are quantized, what they are values of.
    """

    keep: Tensor
    weight: Tensor | None = None
    remarks: tuple[str, ...] = ()
    judged: tuple[Judged, ...] = ()
    grid: Grid | None = None


@dataclass(frozen=True, kw_only=True)
class Update(Entry):
    """An update: function(weight float32 [D_out, D_in], choice[, options]) gives Updated.

    changes: the kept weights. chooses: which ones, too, so that a mask refined beforehand would be lost. aims: at the
    dense model's own outputs, where statistics tell of its inputs. working: bytes a weight of the matrix at its peak,
    beside the float32 weight and what is made of statistics.
    """

    changes: bool = True
    chooses: bool = False
    aims: bool = False
    working: int = 32


UPDATES = Registry("update", "--update", Update)
update = UPDATES.register
