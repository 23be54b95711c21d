"""Presets: each is a recipe that can be asked for, and what is given beside it replaces its part."""

from pathlib import Path
from typing import Any

import pytest

from tests.trim_cli import trim, trim_json
from trimcli.files.masks import MaskFile
from trimcli.methods.layers.base import ALLOCATIONS
from trimcli.methods.presets import PRESETS

DRAWN = ("--nsamples", 4, "--seqlen", 32, "--device", "cpu")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    from trimcli.demo import calibration_text

    path = tmp_path / "text.txt"
    path.write_text(calibration_text()[:60_000])
    return path


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("pattern", [False, True])
def test_each_is_a_recipe(name: str, pattern: bool) -> None:
    preset = PRESETS[name]
    preset.recipe(pattern=pattern).check(pattern=pattern)
    assert preset.alloc is None or preset.alloc in ALLOCATIONS


def recorded(masks: Path) -> dict[str, Any]:
    manifest = MaskFile.open(masks).manifest
    return {**manifest["options"]["recipe"], "allocate": manifest["options"]["allocate"]}


def test_best_is_all_that_is_typed(nano_qwen2: Path, text: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    made = ("--dataset", text, *DRAWN, "--reconstruct-steps", 2, "--save-model", saved)
    document = trim_json("prune", nano_qwen2, "--sparsity", 0.7, "--preset", "best", *made)
    assert document["sparsity"] == pytest.approx(0.7, abs=1e-4)
    assert Path(document["masks"]) == tmp_path / "saved.masks.safetensors"
    found = recorded(tmp_path / "saved.masks.safetensors")
    assert (found["method"], found["rows"], found["update"]) == ("admm", "free", "admm")
    assert found["reconstruct"]["steps"] == 2
    assert found["allocate"]["method"] == PRESETS["best"].alloc
    assert trim("verify", saved).status == 0
    some, of = document["layers_bettered"]["reconstruction"]
    assert (0 < some <= of, of) == (True, 4)
    assert document["heldout"]["admm"][1] == 28
    card = (saved / "README.md").read_text()
    assert "Norms and biases of the decoder layers were trained along" in card
    assert card.split("```sh\n")[1].split("```")[0].count("\n") == 1, "this run's own command alone"


def test_what_is_given_replaces_its_part(nano_qwen2: Path, text: Path, tmp_path: Path) -> None:
    base = ("prune", nano_qwen2, "--preset", "fast", "--dataset", text, *DRAWN, "--save-model", tmp_path / "saved")
    masks = tmp_path / "masks.safetensors"
    assert trim(*base, "-o", masks, "--sparsity", 0.5, "--rows", "even", "--cg-steps", 3).status == 0
    found = recorded(masks)
    assert (found["method"], found["rows"]) == ("admm", "even")
    assert (found["options"]["admm"]["cg_steps"], found["options"]["admm"]["admm_steps"]) == (3, 15)


def test_a_pattern_fixes_the_counts(nano_qwen2: Path, text: Path, tmp_path: Path) -> None:
    masks, saved = tmp_path / "masks.safetensors", tmp_path / "saved"
    base = ("prune", nano_qwen2, "--preset", "balanced", "--dataset", text, *DRAWN)
    assert trim(*base, "-o", masks, "--sparsity-type", "2:4", "--save-model", saved).status == 0
    found = recorded(masks)
    assert found["rows"] == "even"
    assert found["allocate"] is None


@pytest.mark.parametrize(
    ("preset", "given"),
    [
        ("balanced", ("--reconstruct-steps", 9)),
        ("fast", ("--reconstruct-blend", 0.1)),
        ("best", ("--refine-steps", 9)),
        ("fast", ("--search-evaluations", 20)),
        ("balanced", ("--search-evaluations", 20)),
    ],
)
def test_what_would_do_nothing_beside_it_is_refused(
    preset: str, given: tuple[object, ...], nano_qwen2: Path, text: Path, tmp_path: Path
) -> None:
    base = ("prune", nano_qwen2, "--dataset", text, *DRAWN, "--sparsity", 0.5, "--save-model", tmp_path / "saved")
    done = trim(*base, "--preset", preset, *given)
    assert (done.status, f"{given[0]} {given[1]} does nothing beside --preset {preset}" in done.err) == (2, True)


def test_what_belongs_to_an_allocation_needs_one(nano_qwen2: Path, text: Path, tmp_path: Path) -> None:
    base = ("prune", nano_qwen2, "--dataset", text, *DRAWN, "--sparsity", 0.5, "-o", tmp_path / "masks")
    for given, owner in ((("--group", 8), "owl"), (("--metrics-cache", tmp_path / "m"), "alpha")):
        done = trim(*base, *given)
        assert (done.status, f"add --alloc {owner}" in done.err) == (2, True)


def test_mixed_patterns_fix_the_counts_too(nano_qwen2: Path, text: Path, tmp_path: Path) -> None:
    """Those of a ratios file, and of an allocation in one go."""
    base = ("prune", nano_qwen2, "--preset", "fast", "--dataset", text, *DRAWN)
    mixed = ("--alloc", "owl", "--sparsity", 0.5, "--group", 8)
    assert trim(*base, "-o", tmp_path / "one", *mixed, "--save-model", tmp_path / "a").status == 0
    ratios = tmp_path / "ratios.json"
    drawn = ("--calibration", tmp_path / "calib", "--method", "owl", "--sparsity", 0.5, "--group", 8)
    assert trim("calibrate", nano_qwen2, "-o", tmp_path / "calib", "--dataset", text, *DRAWN).status == 0
    assert trim("alloc-layers", nano_qwen2, "-o", ratios, *drawn).status == 0
    assert trim(*base, "-o", tmp_path / "two", "--ratios", ratios, "--save-model", tmp_path / "b").status == 0
    assert recorded(tmp_path / "one")["rows"] == recorded(tmp_path / "two")["rows"] == "even"


def test_reference_is_the_published_arithmetic(nano_qwen2: Path, text: Path, tmp_path: Path) -> None:
    base = ("prune", nano_qwen2, "--sparsity", 0.5, "--dataset", text, *DRAWN)
    plain, preset = tmp_path / "plain.safetensors", tmp_path / "preset.safetensors"
    words = ("--method", "sparsegpt", "--numerics", "reference")
    assert trim(*base, "-o", plain, *words, "--save-model", tmp_path / "a").status == 0
    assert trim(*base, "-o", preset, "--preset", "reference", "--save-model", tmp_path / "b").status == 0
    one, other = MaskFile.open(plain), MaskFile.open(preset)
    assert all(bool((one.keep(name) == other.keep(name)).all()) for name in one.names)
    assert one.manifest["bos"] == other.manifest["bos"]


def test_without_an_output_the_way_out_is_named(nano_qwen2: Path) -> None:
    done = trim("prune", nano_qwen2, "--sparsity", 0.5)
    assert done.status == 2
    assert "-o FILE" in done.err
    near = trim("prune", nano_qwen2, "--sparsity", 0.5, "--preset", "bset")
    assert near.status == 2
    assert "best" in near.err
