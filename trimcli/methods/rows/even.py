"""Even rows: no row is looked at by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimcli.methods.rows.base import Rows, row_allocation

if TYPE_CHECKING:
    from torch import Tensor

    from trimcli.methods.choice import Choice


@row_allocation("even", source="Sun et al. 2023, section 3", working=8)
def even(weight: Tensor, choice: Choice) -> Rows:
    """The score's comparison group decides: every row loses alike, or the lowest of the matrix go."""
    return Rows()
