"""Methods of another package, found by its entry point, pruned with from the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from trimcli import verify
from trimcli.files.masks import MaskFile

PLUGIN = Path(__file__).parent / "data" / "plugin"
TOKENS = Path(__file__).parent / "data" / "tokens" / "nano-qwen2.safetensors"
# Every command in one process of its own: what is registered there is registered nowhere else.
SCRIPT = """
import json, sys
from typer.testing import CliRunner
from trimcli.cli.app import app

found = [CliRunner().invoke(app, command) for command in json.load(sys.stdin)]
json.dump([(one.exit_code, one.stdout, one.stderr) for one in found], sys.stdout)
"""


class Done(NamedTuple):
    """What a command left."""

    status: int
    out: str
    err: str


def run(commands: list[list[object]], path: Path = PLUGIN) -> list[Done]:
    """The commands, with the package on the path as an installed one is."""
    paths = os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([[str(word) for word in command] for command in commands]),
        env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return [Done(*one) for one in json.loads(found.stdout)]


def test_a_score_an_update_and_an_allocation(nano_qwen2: Path, tmp_path: Path) -> None:
    ratios, masks, model = tmp_path / "ratios.json", tmp_path / "masks.safetensors", tmp_path / "pruned"
    common = ["--method", "powered", "--norm-power", 3, "--update", "rescale", "--tokens", TOKENS]
    common += ["--cache-dir", tmp_path / "cache"]
    prune: list[object] = ["prune", nano_qwen2, "-o", masks, *common]
    shown, allocating, allocated, pruned, alone, still = run(
        [
            ["prune", "--help"],
            ["alloc-layers", "--help"],
            ["alloc-layers", nano_qwen2, "-o", ratios, "--method", "ramp", "--sparsity", 0.5],
            [*prune, "--ratios", ratios, "--save-model", model],
            ["prune", nano_qwen2, "-o", tmp_path / "other", *common, "--sparsity", 0.5],
            ["prune", nano_qwen2, "-o", tmp_path / "other", *common, "--sparsity", 0.5, "--no-propagate"],
        ]
    )
    for word in ("powered", "nobody 2026", "--norm-power", "The power of the input norm.", "rescale", "ramp"):
        assert word in shown.out
    assert "ramp" in allocating.out
    assert (allocated.status, pruned.status) == (0, 0), allocated.err + pruned.err
    sparsity = list(json.loads(ratios.read_text())["sparsity"].values())
    assert (sparsity[0], sparsity[-1]) == (pytest.approx(0.4), pytest.approx(0.6))
    found = MaskFile.open(masks)
    recipe = found.manifest["options"]["recipe"]
    assert (recipe["score"], recipe["update"]) == ("powered", "rescale")
    assert recipe["options"]["powered"] == {"norm_power": 3}
    assert found.manifest["changes_weights"]
    assert found.manifest["allocation"] == {"method": "ramp", "rise": 0.2}
    assert "rows were rescaled" in pruned.err
    verify(model).check()
    name = "model.layers.0.self_attn.q_proj"
    dense = load_file(nano_qwen2 / "model.safetensors")[f"{name}.weight"]
    written = load_file(model / "model.safetensors")[f"{name}.weight"]
    keep = found.keep(name)
    assert torch.equal(written != 0, keep & (dense != 0))
    assert not torch.equal(written[keep], dense[keep])
    card = (model / "README.md").read_text(encoding="utf-8")
    assert "powered" in card
    assert "rescale" in card
    # Weights that change are not carried by masks alone, and a statistic that no file holds needs a forward pass.
    assert (alone.status, still.status) == (2, 2)
    assert "--save-model" in alone.err
    assert "its mean_input comes from a forward pass" in still.err


def test_a_broken_package_is_named(nano_qwen2: Path, tmp_path: Path) -> None:
    (tmp_path / "sample_methods.py").write_text("import a_module_that_is_nowhere\n")
    (tmp_path / "sample_methods-1.0.dist-info").mkdir()
    for name in ("METADATA", "entry_points.txt"):
        text = (PLUGIN / "sample_methods-1.0.dist-info" / name).read_text()
        (tmp_path / "sample_methods-1.0.dist-info" / name).write_text(text)
    [told] = run([["prune", nano_qwen2, "-o", tmp_path / "m", "--sparsity", 0.5]], tmp_path)
    assert told.status == 2
    assert told.err.count("\n") == 1
    assert "the package sample-methods cannot be loaded" in told.err
    assert "a_module_that_is_nowhere" in told.err
