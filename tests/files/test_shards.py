from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trimcli.errors import InputError
from trimcli.files.shards import BinShards, SafeShards, Shards, shard_names
from trimcli.files.tensors import TensorSpec

TENSORS = {
    "layers.10.a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "layers.2.a": torch.ones(4, dtype=torch.int64),
    "embed": torch.zeros(0, 3),
}
PLACES = {"one": ["layers.10.a", "embed"], "two": ["layers.2.a"]}


def test_plain_file_names_are_shards(tmp_path: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model.bin", "..a", "a b", "ö.safetensors"]
    assert shard_names(iter(names), tmp_path) == names


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "/a", "a/", "a/b", "..\\a", "a\\b", "C:a", "C:\\a", 3, None])
def test_other_names_are_not(tmp_path: Path, name: object) -> None:
    with pytest.raises(InputError) as raised:
        shard_names(["model.bin", name], tmp_path / "index.json")
    assert str(raised.value).startswith(
        f"{tmp_path / 'index.json'} names the shard {name!r} outside the model directory;"
    )


@pytest.mark.parametrize("form", [SafeShards, BinShards])
def test_tensors_of_several_shards(tmp_path: Path, form: type[SafeShards | BinShards]) -> None:
    for place, keys in PLACES.items():
        part = {key: TENSORS[key] for key in keys}
        if form is SafeShards:
            save_file(part, tmp_path / place)
        else:
            torch.save({**part, "step": 3}, tmp_path / place)
    shards: Shards = form(tmp_path, PLACES)
    assert {place: set(keys) for place, keys in shards.files.items()} == {
        place: set(keys) for place, keys in PLACES.items()
    }
    assert shards.keys() == ["embed", "layers.2.a", "layers.10.a"]
    for key, tensor in TENSORS.items():
        assert shards.spec(key) == TensorSpec(tensor.dtype, tuple(tensor.shape)) == TensorSpec.of(tensor)
        assert shards.load(key).dtype == tensor.dtype
        assert torch.equal(shards.load(key), tensor)
