"""The same inputs give the same bytes; batches and threads do not choose the masks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.atomic_outputs import contents
from tests.small_models import NANO
from tests.trim_cli import save_tokens, trim_json
from trimcli import BarberOptions, CalibrateOptions, PruneOptions, Recipe, TrimOptions, prune
from trimcli.files.masks import MaskFile

RUN: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
RECIPES = {
    "wanda": Recipe(),
    "trim": Recipe(rows="trim", options=(TrimOptions(iterations=2),)),
    "sparsegpt": Recipe(method="sparsegpt"),
    "cg": Recipe(update="cg"),
    "barber": Recipe(barber=BarberOptions()),
}
# The order of a sum changes its last bits with the batches and the threads, and with them weights whose scores are as
# good as equal: so many of a matrix's weights may be others. A Gram's inverse makes more of these bits.
TOLERANCE = {"wanda": 0.0005, "trim": 0.001, "sparsegpt": 0.01, "cg": 0.01, "barber": 0.001}


def masks(folder: Path, recipe: Recipe, **fields: Any) -> MaskFile:
    folder.mkdir()
    tokens = save_tokens(folder / "tokens", vocabulary=2048, nsamples=6)
    calibration = CalibrateOptions(tokens=tokens, **RUN, cache_dir=folder / "cache")
    options = PruneOptions(
        **RUN, recipe=recipe, sparsity=0.5, calibrate=calibration, cache_dir=folder / "cache",
        save_model=folder / "pruned", **fields,
    )  # fmt: skip
    prune(str(NANO), folder / "masks", options)
    return MaskFile.open(folder / "masks")


def agreement(one: MaskFile, other: MaskFile) -> float:
    """The least share, over matrices, of weights on which two masks agree."""
    assert one.names == other.names
    return min(float((one.keep(name) == other.keep(name)).double().mean()) for name in one.names)


@pytest.mark.parametrize("recipe", RECIPES)
def test_neither_batches_nor_threads_choose_the_masks(recipe: str, tmp_path: Path) -> None:
    first = masks(tmp_path / "first", RECIPES[recipe], batch_size=1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if threads != 3 else 2)
        other = masks(tmp_path / "threads", RECIPES[recipe], batch_size=1)
    finally:
        torch.set_num_threads(threads)
    assert agreement(first, other) >= 1 - TOLERANCE[recipe]
    assert agreement(first, masks(tmp_path / "batches", RECIPES[recipe], batch_size=4)) >= 1 - TOLERANCE[recipe]


@pytest.mark.parametrize("more", [(), ("--method", "sparsegpt"), ("--reconstruct", "layer", "--reconstruct-steps", 2)])
def test_the_same_command_gives_the_same_bytes(
    more: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for place in ("one", "other"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        save_tokens(Path("tokens"), vocabulary=2048)
        run = ("--tokens", "tokens", "--cache-dir", "cache", "--device", "cpu", "--dtype", "float32")
        trim_json("prune", NANO, "-o", "masks", "--save-model", "pruned", "--sparsity", 0.5, *more, *run)
        found.append({name: data for name, data in contents(Path()).items() if not name.startswith("cache")})
    assert found[0] == found[1]
