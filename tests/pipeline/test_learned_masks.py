"""Learned masks through the command line: dense values, exact counts, nearer the dense layer, resumed, refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.families import several_forms
from tests.interrupt import InterruptAt, Interrupted
from tests.small_models import skeleton_of
from tests.trim_cli import COMPUTE, trim, trim_json
from trimcli import PruneOptions, Recipe, prune
from trimcli.files.masks import MaskFile
from trimcli.files.tensors import read_manifest
from trimcli.methods.choice import Target
from trimcli.pipeline.reconstruct import Guide, learn_layer
from trimcli.pipeline.walk import Walk

LEARNED: tuple[object, ...] = (
    "--refine",
    "learned",
    "--refine-steps",
    24,
    "--refine-lr",
    0.03,
    "--reconstruct-batch",
    2,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of several forms, and tokens for them."""
    return several_forms(tmp_path_factory.mktemp("learned"))


def pruned(home: Path, form: str, output: Path, *more: object) -> dict[str, Any]:
    shared = ("--tokens", home / "tokens", "--batch-size", 2, "--cache-dir", home / "cache", *COMPUTE)
    found: dict[str, Any] = trim_json("prune", home / form, "-o", output, *shared, *more)
    return found


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
@pytest.mark.parametrize("form", ["llama", "gpt2", "opt", "gpt-neox", "nano"])
def test_masks_change_and_weights_do_not(form: str, method: str, home: Path, tmp_path: Path) -> None:
    what = ("--method", method, "--sparsity", 0.6)
    pruned(home, form, tmp_path / "plain", *what)
    pruned(home, form, tmp_path / "masks", *what, *LEARNED, "--save-model", tmp_path / "model")
    before, after = MaskFile.open(tmp_path / "plain"), MaskFile.open(tmp_path / "masks")
    assert not after.manifest["changes_weights"]
    trim_json("apply-masks", home / form, tmp_path / "masks", "-o", tmp_path / "applied")
    written, dense = (load_file(place / "model.safetensors") for place in (tmp_path / "model", home / form))
    applied = load_file(tmp_path / "applied" / "model.safetensors")
    assert all(torch.equal(one, applied[key]) for key, one in written.items())
    skeleton, moved = skeleton_of(home / form), 0
    for name in after.names:
        key, keep = skeleton.linears[name].key, after.keep(name)
        assert key is not None
        assert torch.equal(
            skeleton.linears[name].within(written[key]), skeleton.linears[name].within(dense[key]) * keep
        )
        assert int(keep.sum()) == int(before.keep(name).sum())
        moved += not torch.equal(keep, before.keep(name))
    errors = read_manifest(tmp_path / "masks")["refinement"]
    assert set(errors) == {layer.name for layer in skeleton.layers}
    assert all(after <= before for before, after in errors.values())
    assert any(after < before for before, after in errors.values())
    assert moved


@pytest.mark.parametrize(
    ("more", "width"), [(("--sparsity", 0.6, "--refine-rows", "held"), None), (("--sparsity-type", "2:4"), 4)]
)
def test_counts_of_rows_and_of_groups_hold(
    more: tuple[object, ...], width: int | None, home: Path, tmp_path: Path
) -> None:
    pruned(home, "nano", tmp_path / "plain", *more)
    pruned(home, "nano", tmp_path / "masks", *more, *LEARNED)
    before, after = MaskFile.open(tmp_path / "plain"), MaskFile.open(tmp_path / "masks")
    changed = 0
    for name in after.names:
        masks = [file.keep(name) for file in (before, after)]
        old, new = (one.reshape(-1, width or one.shape[1]).sum(dim=1) for one in masks)
        assert torch.equal(old, new)
        changed += not torch.equal(*masks)
    assert changed


def test_the_weights_are_fitted_under_the_learned_masks(home: Path, tmp_path: Path) -> None:
    steps = ("--reconstruct", "layer", "--reconstruct-steps", 8, "--reconstruct-blend", 0)
    pruned(home, "nano", tmp_path / "alone", "--sparsity", 0.6, *LEARNED)
    pruned(home, "nano", tmp_path / "masks", "--sparsity", 0.6, *LEARNED, *steps, "--save-model", tmp_path / "model")
    manifest = read_manifest(tmp_path / "masks")
    assert manifest["changes_weights"]
    first = min(manifest["refinement"])
    assert manifest["refinement"][first] == read_manifest(tmp_path / "alone")["refinement"][first]
    for name, (_, learned) in manifest["refinement"].items():
        before, after = manifest["reconstruction"][name]
        assert before == pytest.approx(learned, rel=1e-3)
        assert after <= before
    trim_json("verify", tmp_path / "model", "--masks", tmp_path / "masks")


def test_an_interrupted_run_ends_in_the_same_bytes(home: Path, tmp_path: Path) -> None:
    trim_json("calibrate", home / "nano", "-o", home / "calib", "--tokens", home / "tokens", *COMPUTE)

    def run(place: str, progress: Any = None) -> dict[str, torch.Tensor]:
        options = PruneOptions(
            recipe=Recipe(rows="trim", refine="learned", refine_steps=8), sparsity=0.5, calibration=home / "calib",
            cache_dir=tmp_path / "cache" / place, batch_size=2, device="cpu", dtype="float32",
        )  # fmt: skip
        prune(str(home / "nano"), tmp_path / place, options, **({} if progress is None else {"progress": progress}))
        return load_file(tmp_path / place)

    expected, interrupt = run("whole"), InterruptAt("layer 3/4 learn masks")
    with pytest.raises(Interrupted):
        run("cut", interrupt)
    again = InterruptAt(None)
    found = run("cut", again)
    assert [one for one in again.seen if "learn" in one] == ["layer 3/4 learn masks", "layer 4/4 learn masks"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(one, expected[name]) for name, one in found.items())


def test_both_forms_of_the_walk_learn_the_same(home: Path) -> None:
    """Inside of the model's own forward pass samples come one at a time."""
    tokens = load_file(home / "tokens")["tokens"]

    def learned(form: Any, batch: int | None) -> list[torch.Tensor]:
        skeleton = skeleton_of(home / "nano")
        walk, dense = (Walk(skeleton, tokens, form=form, batch_size=4) for _ in range(2))
        layers = walk.layers()
        layer = next(layers)
        weights = {one.name: one.weight.clone() for one in layer.linears}
        pruned = {name: (one, one.abs() > one.abs().median(), one.abs()) for name, one in weights.items()}
        recipe = Recipe(refine="learned", refine_steps=40, refine_lr=0.01, reconstruct_batch=batch)
        guide = Guide(dense, recipe)
        guide.advance(layer, walk)
        targets = dict.fromkeys(pruned, Target(0.5))
        keep, made = learn_layer(walk, guide, layer, pruned, targets, recipe)
        assert made.after < made.before
        return list(keep.values())

    one, other = learned("suspended", 3), learned("recorded", 1)
    assert all(map(torch.equal, one, other))
    assert not all(map(torch.equal, one, learned("recorded", 3)))


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--no-propagate",), "--no-propagate with --refine learned"),
        (("--prune-barber",), "--prune-barber with --refine learned"),
        (("--method", "sparsegpt", "--save-model", "d"), "--method sparsegpt with --refine learned"),
        (("--update", "cg", "--save-model", "d"), "--update cg with --refine learned"),
        (("--refine-lr", 2), "--refine-lr 2 is no learning rate"),
        (("--refine-steps", 0), "--refine-steps 0 must be at least 1"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    more: tuple[object, ...], sentence: str, home: Path, tmp_path: Path
) -> None:
    done = trim("prune", home / "llama", "-o", tmp_path / "m", "--sparsity", 0.5, "--refine", "learned", *more)
    assert done.status == 2
    assert sentence in done.err
