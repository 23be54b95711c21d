"""Refined masks and held-out samples on the command line: counts, what is recorded and what is printed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trim_cli import COMPUTE, save_tokens, trim, trim_json
from trimcli.files.masks import MaskFile
from trimcli.files.tensors import read_manifest

DATA = Path(__file__).parents[1] / "data"

Args = tuple[object, ...]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokens(tmp_path_factory.mktemp("refine") / "tokens", vocabulary=2048, nsamples=9, seqlen=32)


def run(model: Path, tokens: Path, place: Path, *more: object) -> Any:
    place.mkdir()
    shared = ("--sparsity", 0.6, "--tokens", tokens, "--cache-dir", place / "cache", *COMPUTE)
    return trim_json("prune", model, "-o", place / "masks", *shared, *more)


@pytest.mark.parametrize("rows", [(), ("--use-trim", "--iterations", 2)])
def test_swaps_change_masks_and_no_row_count(rows: Args, nano_qwen2: Path, tokens: Path, tmp_path: Path) -> None:
    plain = run(nano_qwen2, tokens, tmp_path / "plain", *rows)
    found = run(nano_qwen2, tokens, tmp_path / "swapped", *rows, "--refine", "swaps")
    assert found["zeros"] == plain["zeros"]
    assert plain["heldout"] == {}
    assert found["heldout"] == {"swaps": [28, 28]}
    before, after = (MaskFile.open(tmp_path / place / "masks") for place in ("plain", "swapped"))
    first = before.names[0]
    assert torch.equal(before.keep(first).sum(dim=1), after.keep(first).sum(dim=1)), "the same inputs, the same rows"
    assert all(not torch.equal(before.keep(name), after.keep(name)) for name in before.names)
    document = read_manifest(tmp_path / "swapped" / "masks")
    assert document["options"]["recipe"]["refine"] == {"by": "swaps"}
    assert set(document["heldout"]) == set(before.names)
    assert all(pair[1] < pair[0] < 1 for steps in document["heldout"].values() for pair in steps.values())


def test_what_barber_throws_away_is_not_told_of(nano_qwen2: Path, tokens: Path, tmp_path: Path) -> None:
    more = ("--method", "admm", "--prune-barber")
    found = run(nano_qwen2, tokens, tmp_path / "one", *more, "--save-model", tmp_path / "a")
    kept = run(nano_qwen2, tokens, tmp_path / "two", *more, "--retain-reconstruction", "--save-model", tmp_path / "b")
    assert (found["heldout"], set(kept["heldout"])) == ({}, {"admm"})


def test_swaps_then_cg(nano_qwen2: Path, tokens: Path, tmp_path: Path) -> None:
    more = ("--refine", "swaps", "--update", "cg")
    found = run(nano_qwen2, tokens, tmp_path / "one", *more, "--save-model", tmp_path / "model")
    assert set(found["heldout"]) == {"swaps", "cg"}
    assert all(0 < some <= of == 28 for some, of in found["heldout"].values())
    assert len(found["remarks"]) == sum(of - some for some, of in found["heldout"].values())
    document = read_manifest(tmp_path / "one" / "masks")
    for name, steps in document["heldout"].items():
        told = [remark for remark in document["remarks"] if remark.startswith(f"{name}: ")]
        assert len(told) == sum(after > before for before, after in steps.values())
    trim_json("verify", tmp_path / "model", "--masks", tmp_path / "one" / "masks")
    dense, saved = load_file(nano_qwen2 / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    name = next(name for name, steps in document["heldout"].items() if steps["cg"][1] < steps["cg"][0])
    keep = MaskFile.open(tmp_path / "one" / "masks").keep(name)
    assert not saved[f"{name}.weight"][~keep].any()
    assert not torch.equal(saved[f"{name}.weight"][keep], dense[f"{name}.weight"][keep])


def test_what_is_printed_and_planned(nano_qwen2: Path, tokens: Path, tmp_path: Path) -> None:
    shared = (nano_qwen2, "--sparsity", 0.6, "--tokens", tokens, "--cache-dir", tmp_path / "cache", *COMPUTE)
    done = trim("prune", *shared, "-o", tmp_path / "m", "--refine", "swaps")
    assert done.status == 0
    assert "swaps stands in 28 of 28 linears" in done.out
    wide = ("plan", DATA / "qwen2.5-3b", "--sparsity", 0.6, "--cache-dir", tmp_path / "cache", *COMPUTE)
    plain, planned = (trim_json(*wide, *more)["peak_host_bytes"] for more in ((), ("--refine", "swaps")))
    assert planned - plain >= 4 * 11_008**2, (
        "two Grams of the widest inputs, beyond what the peak without them has room for"
    )
    refused = trim("prune", *shared, "-o", tmp_path / "n", "--refine", "swaps", "--no-propagate")
    assert (refused.status, "--no-propagate with --refine swaps" in refused.err) == (2, True)


@pytest.mark.parametrize("more", [("--update", "cg"), ("--method", "admm", "--reconstruct", "layer")])
def test_the_dense_target(more: Args, nano_qwen2: Path, tokens: Path, tmp_path: Path) -> None:
    """Whether it stands is said by matrix; in the first layer, both models have the same inputs."""
    found = run(nano_qwen2, tokens, tmp_path / "one", *more, "--target", "dense", "--save-model", tmp_path / "model")
    document = read_manifest(tmp_path / "one" / "masks")
    aims = {name: steps["dense target"] for name, steps in document["heldout"].items()}
    assert len(aims) == 28
    assert any(after < before for name, (before, after) in aims.items() if ".layers.0." not in name)
    assert found["heldout"]["dense target"] == [sum(after <= before for before, after in aims.values()), 28]
    assert document["options"]["recipe"]["target"] == "dense"
    trim_json("verify", tmp_path / "model", "--masks", tmp_path / "one" / "masks")
