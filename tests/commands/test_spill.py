"""Hidden states in files: the same results, nothing left of them, and memory without them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.interrupt import InterruptAt, Interrupted
from tests.small_models import llama_config, random_model, save, skeleton_of
from tests.trim_cli import COMPUTE, save_tokens, tree, trim_json
from trimcli import CalibrateOptions, PruneOptions, Recipe, calibrate, prune
from trimcli.files.spilled import Spilled
from trimcli.memory import anonymous_bytes
from trimcli.pipeline.walk import Walk

RUN: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
RECIPES = {
    "wanda": Recipe(),
    "sparsegpt": Recipe(method="sparsegpt"),
    "halves": Recipe(reconstruct="halves", reconstruct_steps=3),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("spill")
    save(random_model(llama_config(num_hidden_layers=3)), base / "model")
    save_tokens(base / "tokens", vocabulary=64, nsamples=9)
    return base


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of everything that was spilled."""
    found: list[int] = []
    make = Spilled.__init__

    def noted(self: Spilled, folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        make(self, folder, shape, dtype)
        found.append(self.tensor.nbytes)

    monkeypatch.setattr(Spilled, "__init__", noted)
    return found


def run(base: Path, target: Path, recipe: Recipe, progress: Any = None, **fields: Any) -> dict[str, torch.Tensor]:
    """Prune into `target`; every tensor of the masks file and of the model."""
    run: dict[str, Any] = {**RUN, "cache_dir": target / "cache"}
    drawn = CalibrateOptions(tokens=base / "tokens", **run)
    options = PruneOptions(
        sparsity=0.5, recipe=recipe, calibrate=drawn, save_model=target / "pruned", batch_size=2, **run, **fields
    )
    more = {} if progress is None else {"progress": progress}
    prune(str(base / "model"), target / "masks", options, **more)
    return {**load_file(target / "masks"), **load_file(target / "pruned" / "model.safetensors")}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_masks_and_weights(recipe: str, base: Path, tmp_path: Path, made: list[int]) -> None:
    for name in ("memory", "files"):
        (tmp_path / name).mkdir()
    expected = run(base, tmp_path / "memory", RECIPES[recipe])
    assert made == []
    found = run(base, tmp_path / "files", RECIPES[recipe], spill=tmp_path / "spill")
    # The pruned model's, the dense one's, what lies between its halves, and what it makes of a mixture of the two.
    streams = 4 if recipe == "halves" else 1
    assert made == [9 * 16 * 32 * 4] * streams
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    assert tree(tmp_path / "spill") == []


def test_every_stage_that_walks_takes_it(base: Path, tmp_path: Path, made: list[int]) -> None:
    tokens = ("--tokens", base / "tokens", "--cache-dir", tmp_path / "cache", *COMPUTE)
    spill = ("--spill", tmp_path / "spill")
    for name, more in {"memory": (), "files": spill}.items():
        made.clear()
        trim_json("calibrate", base / "model", "-o", tmp_path / name, *tokens, *more)
        assert made == [9 * 16 * 32 * 4] * bool(more)
    one, other = load_file(tmp_path / "memory"), load_file(tmp_path / "files")
    assert all(torch.equal(one[name], other[name]) for name in one)
    found = []
    for more in ((), spill):
        made.clear()
        options = ("--method", "search", "--search-evaluations", 12, "--sparsity", 0.5, "--search-samples", 2)
        allocated = trim_json(
            "alloc-layers", base / "model", "-o", tmp_path / "r", *options, "--force", *COMPUTE,
            "--calibration", tmp_path / "memory", "--cache-dir", tmp_path / "cache", *more,
        )  # fmt: skip
        assert bool(made) == bool(more)
        found.append(allocated["sparsity"])
    assert found[0] == found[1]


def test_nothing_is_left_of_a_run_that_fails(base: Path, tmp_path: Path, made: list[int]) -> None:
    with pytest.raises(Interrupted):
        run(base, tmp_path, Recipe(), InterruptAt("layer 2/3"), spill=tmp_path / "spill")
    assert made
    assert tree(tmp_path / "spill") == []
    assert str(tmp_path / "spill") not in Path("/proc/self/maps").read_text()


def test_memory_that_would_not_do_is_spared(
    base: Path, tmp_path: Path, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `plan` says it, into the stage cache; where there is room, or a folder was named, nothing is chosen."""
    target = ("--sparsity", 0.5, "--tokens", base / "tokens", "--cache-dir", tmp_path / "cache", *COMPUTE)
    monkeypatch.setattr("trimcli.pipeline.fit.available_bytes", lambda: 1 << 40)
    roomy = trim_json("plan", base / "model", *target)
    assert (roomy["spill"], roomy["spill_bytes"]) == (None, 0)
    states = 9 * 16 * 32 * 4
    monkeypatch.setattr("trimcli.pipeline.fit.available_bytes", lambda: roomy["peak_host_bytes"] - 1)
    for more, folder in {(): tmp_path / "cache" / "spilled", ("--spill", tmp_path / "own"): tmp_path / "own"}.items():
        tight = trim_json("plan", base / "model", *target, *more)
        assert (tight["spill"], tight["spill_bytes"]) == (str(folder), states)
        assert tight["peak_host_bytes"] == roomy["peak_host_bytes"] - states
    assert made == []
    trim_json("prune", base / "model", "-o", tmp_path / "masks", *target)
    assert made == [states]


def test_hidden_states_are_not_in_memory(tmp_path: Path) -> None:
    """64 MiB of them, through a layer."""
    config = llama_config(num_hidden_layers=1, hidden_size=256, intermediate_size=8, num_attention_heads=1,
                          num_key_value_heads=1)  # fmt: skip
    skeleton = skeleton_of(save(random_model(config), tmp_path / "model"))
    tokens = torch.zeros(2048, 32, dtype=torch.int32)
    states, grown = 2048 * 32 * 256 * 4, []
    for spill in (None, tmp_path / "spill"):
        skeleton.spill = spill
        Walk(skeleton, tokens[:64], batch_size=64)  # what is used first is there already
        before = anonymous_bytes()
        walk = Walk(skeleton, tokens, batch_size=64)
        for layer in walk.layers():
            walk.advance(layer)
        grown.append(anonymous_bytes() - before)
        assert walk.states(slice(0, 1)).isfinite().all()
        del walk
    assert grown[0] > 0.9 * states
    assert grown[1] < 0.3 * states


def test_where_it_lies_is_no_part_of_the_result(base: Path, tmp_path: Path) -> None:
    options = CalibrateOptions(tokens=base / "tokens", stats=("norms",), **RUN, cache_dir=tmp_path / "cache")
    for name, spill in (("one", None), ("other", tmp_path / "spill")):
        calibrate(str(base / "model"), tmp_path / name, replace(options, spill=spill))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    assert "spill" not in options.document()
