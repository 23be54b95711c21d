"""Free rows: the matrix loses its lowest, wherever they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimcli.methods.rows.base import Rows, row_allocation

if TYPE_CHECKING:
    from torch import Tensor

    from trimcli.methods.choice import Choice


@row_allocation("free", title="free rows", source="Frantar & Alistarh 2023, section 3", working=8)
def free(weight: Tensor, choice: Choice) -> Rows:
    """The lowest of the whole matrix go, whatever the score's comparison group."""
    return Rows(compare="matrix")
