import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.trim_cli import tree
from trimcli.files.manifest import MASKS, sealed
from trimcli.files.parts import Parts
from trimcli.files.rowstats import stats_paths, write_row_stats
from trimcli.files.tensors import read_manifest

NAMES = ["layers.0.up", "layers.1.up"]


def parts_in(folder: Path, scale: float) -> Parts:
    parts = Parts(folder)
    folder.mkdir()
    for index, name in enumerate(NAMES):
        tensors = {f"{name}.row_sparsity": torch.full((3,), scale * (index + 1)), f"{name}.keep": torch.zeros(1)}
        parts.write(index, tensors, {})
    return parts


def write(target: Path, folder: Path, scale: float) -> None:
    document = sealed({"schema": MASKS, "linears": {"a": 1}, "options": {"sparsity": scale}})
    facts = {name: {"step": scale} for name in NAMES}
    write_row_stats(target, document, facts, parts_in(folder, scale), len(NAMES), force=True)


def test_figures_and_row_vectors_lie_beside_each_other(tmp_path: Path) -> None:
    write(tmp_path / "rows.json", tmp_path / "parts", 0.25)
    figures, vectors = stats_paths(tmp_path / "rows.json")
    document = json.loads(figures.read_text(encoding="utf-8"))
    assert document == read_manifest(vectors, "trim.rows/1")
    assert document == {
        "schema": "trim.rows/1",
        "linears": {name: {"step": 0.25} for name in NAMES},
        "options": {"sparsity": 0.25},
    }
    found = load_file(vectors)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "layers.0.up.row_sparsity": [0.25] * 3,
        "layers.1.up.row_sparsity": [0.5] * 3,
    }


def test_both_are_replaced_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write(out / "rows.json", tmp_path / "parts", 0.25)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_: object, **__: object) -> None:
        assert len(tree(out)) == 3
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("trimcli.files.rowstats.write_json", full)
        with pytest.raises(OSError, match="No space"):
            write(out / "rows.json", tmp_path / "full", 0.5)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    write(out / "rows.json", tmp_path / "again", 0.5)
    assert {path.name for path in out.iterdir() if path.read_bytes() != before[path.name]} == before.keys()
