"""Models and samples at the edge: zeros in rows, columns and layers, ties, one of everything, overflow in float16."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.cli.test_errors import refused
from tests.interrupt import InterruptAt
from tests.small_models import llama_config, random_model, save, save_random, with_tensors
from tests.trim_cli import save_tokens, trim_json
from trimcli import PruneOptions, Recipe, TrimOptions, prune
from trimcli.commands.options import CalibrateOptions
from trimcli.files.masks import MaskFile
from trimcli.methods.masks import matrix_budget

RUN: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
UP, DOWN, O = (f"model.layers.0.{name}_proj.weight" for name in ("mlp.up", "mlp.down", "self_attn.o"))  # noqa: E741
RECIPES = {
    "wanda": Recipe(),
    "magnitude": Recipe(method="magnitude"),
    "trim": Recipe(rows="trim", options=(TrimOptions(iterations=2),)),
    "sparsegpt": Recipe(method="sparsegpt"),
    "cg": Recipe(update="cg"),
    "admm": Recipe(method="admm"),
    "swaps": Recipe(refine="swaps"),
}


def zeroed(tensor: Tensor, *place: Any) -> Tensor:
    found = tensor.clone()
    found[place] = 0
    return found


MODELS: dict[str, Any] = {
    "a row of zeros": lambda found: {UP: zeroed(found[UP], 3)},
    "a column of zeros": lambda found: {UP: zeroed(found[UP], slice(None), 5)},
    "a matrix of zeros": lambda found: {DOWN: torch.zeros_like(found[DOWN])},
    "a layer of zeros": lambda found: {
        key: torch.zeros_like(one) for key, one in found.items() if ".layers.0." in key and one.ndim == 2
    },
    "inputs that are all zero": lambda found: {"model.layers.0.input_layernorm.weight": torch.zeros(32)},
    "ties everywhere": lambda found: {UP: torch.ones_like(found[UP]), O: torch.full_like(found[O], -0.5)},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(llama_config()), tmp_path_factory.mktemp("degenerate") / "model")


def check(model: Path, folder: Path, recipe: Recipe, **more: Any) -> None:
    """Prune half of the model and hold that every count is exact and every weight finite."""
    calibration = CalibrateOptions(tokens=folder / "tokens", **RUN, cache_dir=folder / "cache")
    options = PruneOptions(
        **RUN, recipe=recipe, sparsity=0.5, calibrate=calibration, save_model=folder / "pruned",
        cache_dir=folder / "cache", **more,
    )  # fmt: skip
    prune(str(model), folder / "masks", options, progress=InterruptAt(None))  # it warns of dead inputs
    masks = MaskFile.open(folder / "masks")
    stored = load_file(folder / "pruned" / "model.safetensors")
    assert masks.names
    for name in masks.names:
        keep, weight = masks.keep(name), stored[f"{name}.weight"]
        assert keep.numel() - int(keep.count_nonzero()) == matrix_budget(keep.shape[0], keep.shape[1], 0.5), name
        assert bool(weight.isfinite().all()), name
        assert not bool(weight[~keep].any()), name


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("form", MODELS)
def test_zeros_and_ties(form: str, recipe: str, dense: Path, tmp_path: Path) -> None:
    save_tokens(tmp_path / "tokens", vocabulary=64)
    model = with_tensors(dense, tmp_path / "model", **MODELS[form](load_file(dense / "model.safetensors")))
    check(model, tmp_path, RECIPES[recipe])


ONES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "one sample": ({}, {"nsamples": 1}),
    "one sample of one token": ({}, {"nsamples": 1, "seqlen": 1}),
    "one layer": ({"num_hidden_layers": 1}, {}),
    "one row and one column": ({"intermediate_size": 1}, {}),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("form", ONES)
def test_one_of_everything(form: str, recipe: str, tmp_path: Path) -> None:
    fields, samples = ONES[form]
    save_random(llama_config(**fields), tmp_path / "model")
    save_tokens(tmp_path / "tokens", vocabulary=64, **samples)
    check(tmp_path / "model", tmp_path, RECIPES[recipe])


def test_overflow_in_float16_is_found_in_its_layer_and_told_how_to_mend(dense: Path, tmp_path: Path) -> None:
    """The second layer's products exceed what float16 holds, and float32 holds them."""
    found = load_file(dense / "model.safetensors")
    names = [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    model = with_tensors(dense, tmp_path / "model", **{name: found[name] * 500 for name in names})
    save_tokens(tmp_path / "tokens", vocabulary=64)
    run = ("--tokens", tmp_path / "tokens", "--device", "cpu", "--cache-dir", tmp_path / "cache")
    line = ("prune", model, "-o", tmp_path / "masks", "--sparsity", 0.5, *run)
    done = refused(2, "model.layers.1", *line, "--dtype", "float16")
    assert "hold NaN or infinite values" in done.err
    assert "--dtype float32" in done.err
    assert not (tmp_path / "masks").exists()
    assert trim_json(*line, "--dtype", "float32")["sparsity"] == 0.5
