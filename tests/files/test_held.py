"""What a pruned directory tells of its masks."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.small_models import gpt2_config, llama_config, masks_for, random_model, save
from trimcli.commands.apply import apply_masks
from trimcli.commands.options import ApplyOptions
from trimcli.commands.unpack import unpack
from trimcli.errors import InputError, MismatchError
from trimcli.files.atomic import MARK
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.documents import write_json
from trimcli.files.held import DirectoryMasks
from trimcli.files.manifest import sealed
from trimcli.files.masks import MaskFile


def pruned(home: Path, family: str, format: str) -> Path:
    """A model some of whose kept weights are zero."""
    model = random_model(llama_config() if family == "llama" else gpt2_config())
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.view(-1)[::7] = 0
    save(model, home / "dense")

    def keep_of(_: object, weight: Tensor) -> Tensor:
        return torch.arange(weight.numel()).view_as(weight) % 3 != 0

    masks_for(home / "dense", home / "masks", keep_of=keep_of)
    apply_masks(str(home / "dense"), home / "masks", home / "pruned", ApplyOptions(format=format))  # type: ignore[arg-type]
    return home / "pruned"


def assert_told(directory: Path, masks: Path) -> None:
    found, expected = DirectoryMasks(Checkpoint.open(directory)), MaskFile.open(masks)
    assert found.names == expected.names
    for name in found.names:
        assert found.shape(name) == expected.shape(name)
        assert found.entry(name)["zeros"] == expected.entry(name)["zeros"]
        assert torch.equal(found.keep(name), expected.keep(name))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("format", ["dense", "packed"])
def test_masks_are_told_where_kept_weights_are_zero(format: str, family: str, tmp_path: Path) -> None:
    assert_told(pruned(tmp_path, family, format), tmp_path / "masks")
    if format == "packed":
        unpack(tmp_path / "pruned", tmp_path / "plain")
        assert_told(tmp_path / "plain", tmp_path / "masks")


def test_what_is_not_told_is_refused(tmp_path: Path) -> None:
    """As directories of earlier versions are, which list no kept weights at zero."""
    directory = pruned(tmp_path, "llama", "dense")
    document = json.loads((directory / MARK).read_text())
    linears = {
        name: {field: value for field, value in entry.items() if field != "kept_zeros"}
        for name, entry in document["linears"].items()
    }
    write_json(directory / MARK, sealed({**document, "linears": linears}), force=True)
    found = DirectoryMasks(Checkpoint.open(directory))
    with pytest.raises(InputError, match=r"does not tell the weights of .*q_proj that were pruned .*with --masks"):
        found.keep(found.names[0])
    write_json(directory / MARK, {**document, "linears": linears}, force=True)
    with pytest.raises(InputError, match="was changed after trim wrote it"):
        DirectoryMasks(Checkpoint.open(directory))
    write_json(directory / MARK, {**document, "schema": "trim.adapter/1"}, force=True)
    with pytest.raises(MismatchError, match=r"of schema 'trim.adapter/1'"):
        DirectoryMasks(Checkpoint.open(directory))
    with pytest.raises(InputError, match=r"dense has no trim.json"):
        DirectoryMasks(Checkpoint.open(tmp_path / "dense"))
