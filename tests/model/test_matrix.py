"""A prunable matrix in every form that a module and a checkpoint hold one in."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trimcli.errors import InputError
from trimcli.files.checkpoint import Checkpoint
from trimcli.model.matrix import Matrix, matrices_in


@dataclass
class Form:
    """A module, its matrix of three rows and four columns, and how that reads from the stored tensor."""

    module: nn.Module
    fields: dict[str, object]
    plain: object


class Experts(nn.Module):
    """Experts stacked in one parameter, as transformers holds them."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(*shape))


def turned(rows: list[list[float]]) -> list[list[float]]:
    """Columns as rows."""
    return [list(column) for column in zip(*rows, strict=True)]


FORMS = {
    "linear": Form(nn.Linear(4, 3), {}, lambda stored: stored.tolist()),
    "Conv1D": Form(
        Conv1D(3, 4), {"transposed": True}, lambda stored: [list(row) for row in zip(*stored.tolist(), strict=True)]
    ),
    "expert": Form(Experts(2, 3, 4), {"place": 1, "parameter_name": "down_proj"}, lambda stored: stored.tolist()[1]),
    "transposed expert": Form(
        Experts(2, 4, 3),
        {"place": 1, "transposed": True, "parameter_name": "down_proj"},
        lambda stored: turned(stored.tolist()[1]),
    ),
    "convolution": Form(
        nn.Conv2d(2, 3, (1, 2)),
        {},
        lambda stored: [[x for c in row for line in c for x in line] for row in stored.tolist()],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_reads_and_writes_as_rows_of_output_features(name: str, tmp_path: Path) -> None:
    form = FORMS[name]
    kind = str(form.fields.get("parameter_name", "weight"))
    stored: Tensor = getattr(form.module, kind).detach().clone()
    (tmp_path / "config.json").write_text("{}")
    save_file({"some.key": stored}, tmp_path / "model.safetensors")
    matrix = Matrix("some.matrix", form.module, 3, 4, "some.key", **form.fields)  # type: ignore[arg-type]
    assert (matrix.shape, matrix.numel) == ((3, 4), 12)
    expected = torch.tensor(form.plain(stored))  # type: ignore[operator]
    assert torch.equal(matrix.read(Checkpoint.open(tmp_path)), expected)
    assert torch.equal(matrix.weight, expected)

    other, keep = torch.arange(1.0, 13.0).view(3, 4), torch.rand(3, 4) > 0.5
    new = matrix.replaced(stored, other)
    assert new.shape == stored.shape
    assert torch.equal(matrix.within(new), other)
    assert torch.equal(matrix.within(stored), expected)  # a copy was written
    matrix.write(other, keep)
    held: Tensor = getattr(form.module, kind).detach()
    assert torch.equal(matrix.within(held), other * keep)
    if "place" in form.fields:  # its neighbour in the stack is as it was
        assert torch.equal(held[0], stored[0])
        assert torch.equal(new[0], stored[0])


def test_linears_and_conv1d_are_found_in_module_order() -> None:
    layer = nn.ModuleDict({"attn": Conv1D(6, 4), "norm": nn.LayerNorm(4), "up": nn.Linear(4, 8, bias=False)})
    keys: dict[str, str | None] = {"h.0.attn.weight": "a", "h.0.up.weight": "b"}
    found = list(matrices_in(layer, "h.0", keys.get, stored=True))
    assert [(one.name, one.key, one.shape, one.transposed) for one in found] == [
        ("h.0.attn", "a", (6, 4), True),
        ("h.0.up", "b", (8, 4), False),
    ]
    keys.pop("h.0.up.weight")
    assert [one.name for one in matrices_in(layer, "h.0", keys.get, stored=True)] == ["h.0.attn"]
    assert [one.name for one in matrices_in(layer, "h.0", lambda _: None, stored=False)] == ["h.0.attn", "h.0.up"]


def test_without_weights_there_is_nothing_to_read(nano_qwen2: Path) -> None:
    matrix = Matrix("some.matrix", nn.Linear(4, 3), 3, 4, None)
    with pytest.raises(InputError, match=r"has no weights for some\.matrix"):
        matrix.read(Checkpoint.open(nano_qwen2, weights=False))
