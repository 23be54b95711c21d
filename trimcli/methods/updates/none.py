"""No update: the kept weights stay as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimcli.methods.updates.base import Updated, update

if TYPE_CHECKING:
    from torch import Tensor

    from trimcli.methods.choice import Choice


@update("none", source="Sun et al. 2023, section 3", changes=False, working=8)
def none(weight: Tensor, choice: Choice) -> Updated:
    """The kept weights stay as they are."""
    return Updated(choice.of_matrix(weight))
