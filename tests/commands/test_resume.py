"""A run that was cut off goes on where it stopped, and ends as if it had not been."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.interrupt import InterruptAt, Interrupted
from tests.small_models import llama_config, random_model, save
from tests.trim_cli import save_tokens, tree
from trimcli import BarberOptions, CalibrateOptions, PruneOptions, Recipe, TrimOptions, calibrate, prune
from trimcli.commands.prune import PruneSummary
from trimcli.console import NO_PROGRESS, Progress

RUN: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
LAYERS = 3
TRIM: dict[str, Any] = {"rows": "trim", "options": (TrimOptions(iterations=2),)}
# Recipe, the task that is cut off when it begins for the n-th time, and how many layers are finished by then.
CASES: dict[str, tuple[Recipe, str, int, int]] = {
    "at the first layer": (Recipe(), "layer 1/3", 1, 0),
    "at the last layer": (Recipe(), "layer 3/3", 1, 2),
    "between a layer's masks and its outputs": (Recipe(), "layer 2/3 forward", 1, 2),
    "trim": (Recipe(**TRIM), "layer 3/3", 1, 2),
    "trim, inputs anew": (Recipe(**TRIM, input_recalc=True), "layer 2/3 collect", 3, 1),
    "sparsegpt": (Recipe(method="sparsegpt"), "layer 3/3", 1, 2),
    "towards the dense model": (Recipe(method="admm", target="dense"), "layer 3/3", 2, 2),
    "swaps and cg": (Recipe(refine="swaps", update="cg"), "layer 3/3", 1, 2),
    "the second pass": (Recipe(barber=BarberOptions(threshold=0.5)), "gradients of", 3, LAYERS + 1),
    "the second pass at its start": (Recipe(barber=BarberOptions()), "rebuilding layers", 1, LAYERS),
    "writing the model": (Recipe(), "writing", 1, LAYERS),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("resume")
    save(random_model(llama_config(num_hidden_layers=LAYERS)), base / "model")
    save_tokens(base / "tokens.safetensors", vocabulary=64)
    options = CalibrateOptions(tokens=base / "tokens.safetensors", stats=("norms",), **RUN, cache_dir=base / "cache")
    calibrate(str(base / "model"), base / "calib", options)
    return base


def run(base: Path, target: Path, progress: Progress = NO_PROGRESS, **fields: Any) -> PruneSummary:
    """Prune into `target`/masks and `target`/pruned, with the cache in `target`/cache."""
    target.mkdir(exist_ok=True)
    given = {"sparsity": 0.5, "save_model": target / "pruned", "calibration": base / "calib", **fields}
    options = PruneOptions(**RUN, **given, cache_dir=target / "cache")
    return prune(str(base / "model"), target / "masks", options, progress=progress)


def outputs(target: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the masks file and of the model."""
    found = dict(load_file(target / "masks"))
    return {**found, **{f"saved {k}": v for k, v in load_file(target / "pruned" / "model.safetensors").items()}}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_prune_goes_on(case: str, base: Path, tmp_path: Path) -> None:
    recipe, title, times, finished = CASES[case]
    assert run(base, tmp_path / "whole", recipe=recipe).resumed == 0

    cut = tmp_path / "cut"
    with pytest.raises(Interrupted):
        run(base, cut, InterruptAt(title, times), recipe=recipe)
    assert sorted(path.name for path in cut.iterdir()) == ["cache"]
    assert not [path for path in tree(cut) if path.endswith(".part")]

    again = InterruptAt(None)
    assert run(base, cut, again, recipe=recipe).resumed == finished
    for layer in range(1, min(finished, LAYERS) + 1):
        assert f"layer {layer}/{LAYERS} collect" not in again.seen
    if finished < LAYERS:
        assert f"layer {LAYERS}/{LAYERS} collect" in again.seen
    elif finished == LAYERS and not recipe.barber:
        assert "pruning layers" not in again.seen
    assert_equal(outputs(cut), outputs(tmp_path / "whole"))
    assert tree(cut / "cache" / "parts") == []


def test_twice_interrupted(base: Path, tmp_path: Path) -> None:
    run(base, tmp_path / "whole")
    for layer in (2, 3):
        with pytest.raises(Interrupted):
            run(base, tmp_path / "cut", InterruptAt(f"layer {layer}/3 collect"))
    assert run(base, tmp_path / "cut").resumed == 2
    assert_equal(outputs(tmp_path / "cut"), outputs(tmp_path / "whole"))


def test_no_resume_starts_over(base: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(base, tmp_path, InterruptAt("layer 3/3"))
    assert run(base, tmp_path, resume=False).resumed == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"sparsity": 0.6},
        {"sparsity": None, "sparsity_type": "2:4"},
        {"recipe": Recipe(numerics="reference")},
        {"recipe": Recipe(rows="variant")},
        {"skip": ("*.q_proj",)},
        {"recipe": Recipe(propagate=False)},
        {"recipe": Recipe(rows="trim")},
        {"recipe": Recipe(refine="swaps")},
    ],
)
def test_another_command_does_not_take_over(fields: dict[str, Any], base: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(base, tmp_path, InterruptAt("layer 3/3"))
    assert run(base, tmp_path, **fields).resumed == 0


def test_what_does_not_shape_the_masks_does_not_matter(base: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(base, tmp_path, InterruptAt("layer 3/3"))
    assert run(base, tmp_path, batch_size=1, save_model=tmp_path / "elsewhere").resumed == 2


def test_the_second_method_on_the_same_first_pass_takes_it_over(base: Path, tmp_path: Path) -> None:
    """Barber's first pass is the prune without it."""
    with pytest.raises(Interrupted):
        run(base, tmp_path, InterruptAt("writing"))
    assert run(base, tmp_path, recipe=Recipe(barber=BarberOptions())).resumed == LAYERS


def test_a_killed_process_leaves_what_another_goes_on_with(base: Path, tmp_path: Path) -> None:
    run(base, tmp_path / "whole")
    script = f"""
import os, signal
from pathlib import Path
from tests.interrupt import InterruptAt
from tests.commands.test_resume import run
try:
    run(Path({str(base)!r}), Path({str(tmp_path / "cut")!r}), InterruptAt("layer 3/3"))
finally:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    found = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=False)
    assert found.returncode == -signal.SIGKILL
    assert run(base, tmp_path / "cut").resumed == 2
    assert_equal(outputs(tmp_path / "cut"), outputs(tmp_path / "whole"))
