import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trimcli.errors import InputError, MismatchError, OutputExists
from trimcli.files.documents import write_json
from trimcli.files.manifest import MASKS, ModelFingerprint, manifest
from trimcli.files.masks import MaskFile, keep_digest, write_masks
from trimcli.methods.masks import pack

SHAPES = {"model.layers.10.fc1": (3, 13), "model.layers.2.fc1": (4, 8), "model.layers.2.fc2": (1, 1)}


def keeps() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.rand(shape) > 0.4 for name, shape in SHAPES.items()}


def document() -> dict[str, Any]:
    known = {name: {"target": 0.4, "pattern": None} for name in SHAPES}
    return manifest(MASKS, "prune", {"numerics": "exact"}, ModelFingerprint("m", "s", "c"), linears=known)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    masks = keeps()
    write_masks(tmp_path / "masks.safetensors", document(), SHAPES, masks.__getitem__)
    return tmp_path / "masks.safetensors"


def test_masks_come_back_in_the_models_order(path: Path) -> None:
    found = MaskFile.open(path)
    assert found.names == list(SHAPES)
    assert found.manifest["model"] == {"id": "m", "structure": "s", "content": "c"}
    for name, keep in keeps().items():
        assert found.shape(name) == SHAPES[name]
        assert torch.equal(found.keep(name), keep)


def test_the_manifest_counts(path: Path) -> None:
    found = MaskFile.open(path)
    masks = keeps()
    for name, keep in masks.items():
        entry = found.entry(name)
        assert entry["zeros"] == int((~keep).sum())
        assert entry["target"] == 0.4
        assert entry["pattern"] is None
        bits = np.packbits(keep.numpy(), axis=1)
        assert entry["keep_sha256"] == hashlib.sha256(bits.tobytes()).hexdigest()
    zeros = sum(int((~keep).sum()) for keep in masks.values())
    assert found.manifest["sparsity"] == zeros / (3 * 13 + 4 * 8 + 1)


def test_the_file_is_what_its_specification_says(path: Path) -> None:
    with safe_open(path, "np") as handle:
        assert set(handle.keys()) == {f"{name}.keep" for name in SHAPES}
        for name, keep in keeps().items():
            stored = handle.get_tensor(f"{name}.keep")
            assert stored.dtype == np.uint8
            assert np.array_equal(stored, np.packbits(keep.numpy(), axis=1))
        assert json.loads(handle.metadata()["manifest"])["schema"] == MASKS


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**32))
def test_the_digest_is_that_of_the_packed_bits(rows: int, columns: int, seed: int) -> None:
    keep = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) > 0.5
    bits = np.packbits(keep.numpy(), axis=1).tobytes()
    assert keep_digest(pack(keep)) == hashlib.sha256(bits).hexdigest()


def rewrite(path: Path, *, flip: str | None = None, drop: str | None = None, edit: bool = False) -> None:
    tensors = load_file(path)
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    if flip:
        tensors[f"{flip}.keep"][0, 0] ^= 128
    if drop:
        del tensors[f"{drop}.keep"]
    if edit:
        changed = json.loads(metadata["manifest"])
        changed["linears"]["model.layers.2.fc1"]["zeros"] += 1
        metadata["manifest"] = json.dumps(changed)
    save_file(tensors, path, metadata)


def test_an_altered_mask_is_refused(path: Path) -> None:
    rewrite(path, flip="model.layers.2.fc1")
    found = MaskFile.open(path)
    found.keep("model.layers.10.fc1")
    with pytest.raises(InputError, match=r"model\.layers\.2\.fc1 .* altered"):
        found.keep("model.layers.2.fc1")


def test_an_edited_manifest_is_refused(path: Path) -> None:
    rewrite(path, edit=True)
    with pytest.raises(InputError, match="changed after trim wrote it"):
        MaskFile.open(path)


def test_a_missing_mask_is_refused(path: Path) -> None:
    rewrite(path, drop="model.layers.2.fc1")
    with pytest.raises(InputError, match=r"lacks the mask of model\.layers\.2\.fc1"):
        MaskFile.open(path)


def test_a_truncated_file_is_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        MaskFile.open(path)


def test_other_files_are_refused(tmp_path: Path, path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        MaskFile.open(tmp_path / "none.safetensors")
    write_json(tmp_path / "ratios.json", {"schema": "trim.layer-sparsity/1"})
    with pytest.raises(InputError, match="not a whole safetensors file"):
        MaskFile.open(tmp_path / "ratios.json")
    save_file({"tokens": torch.zeros(2, 2)}, tmp_path / "tokens.safetensors")
    with pytest.raises(MismatchError, match="no trim manifest"):
        MaskFile.open(tmp_path / "tokens.safetensors")


def test_an_existing_file_is_replaced_only_by_force(path: Path) -> None:
    before = path.read_bytes()
    everything = {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
    with pytest.raises(OutputExists):
        write_masks(path, document(), SHAPES, everything.__getitem__)
    assert path.read_bytes() == before
    write_masks(path, document(), SHAPES, everything.__getitem__, force=True)
    assert MaskFile.open(path).manifest["sparsity"] == 0


def test_a_failure_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    def fails(name: str) -> torch.Tensor:
        raise RuntimeError(name)

    with pytest.raises(RuntimeError):
        write_masks(tmp_path / "masks.safetensors", document(), SHAPES, fails)
    assert list(tmp_path.iterdir()) == []
