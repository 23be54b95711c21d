"""Files that version 0.1 wrote: a tiny Llama, its calibration, ratios, masks, statistics, packed and pruned forms."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.trim_cli import COMPUTE, trim
from trimcli import load_packed, unpack, verify
from trimcli.files.masks import MaskFile

WRITTEN = Path(__file__).parents[1] / "data" / "written-by-0.1"


@pytest.mark.parametrize("name", ["masks.safetensors", "packed", "dense"])
def test_they_verify(name: str) -> None:
    report = verify(WRITTEN / name)
    report.check()
    assert report.zeros == 6912


def test_a_packed_directory_unpacks_to_the_pruned_one(tmp_path: Path) -> None:
    unpack(WRITTEN / "packed", tmp_path / "unpacked")
    shard = "model.safetensors"
    assert (tmp_path / "unpacked" / shard).read_bytes() == (WRITTEN / "dense" / shard).read_bytes()
    model = load_packed(WRITTEN / "packed")
    for name, tensor in load_file(WRITTEN / "dense" / shard).items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_the_same_command_line_still_chooses_the_same_masks(tmp_path: Path) -> None:
    target = ["--ratios", WRITTEN / "ratios.json", "--calibration", WRITTEN / "calibration.safetensors", "--use-trim"]
    model = shutil.copytree(WRITTEN / "model", tmp_path / "model")
    done = trim("prune", model, "-o", tmp_path / "masks", *target, "--cache-dir", tmp_path / "cache", *COMPUTE)
    assert done.status == 0, done.err
    before, after = MaskFile.open(WRITTEN / "masks.safetensors"), MaskFile.open(tmp_path / "masks")
    assert before.names == after.names
    for name in before.names:
        assert torch.equal(before.keep(name), after.keep(name))


def test_a_report_reads_them_all(tmp_path: Path) -> None:
    files = [WRITTEN / name for name in ("ratios.json", "masks.safetensors", "trim.json", "dense", "packed")]
    done = trim("report", *files, "-o", tmp_path / "report.html")
    assert done.status == 0, done.err
    assert (tmp_path / "report.html").stat().st_size > 10_000
