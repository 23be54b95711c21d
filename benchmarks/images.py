"""Image classifiers trained on scikit-learn's digits within seconds: top-1 by method, comparison group and sparsity.

    python -m benchmarks.images --epochs 30 --out benchmarks/results-images.md

The first 1,297 of the 1,797 digits (8 x 8) train and calibrate, the others measure. The models are those of the tests.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.support.provenance import head, publish, table
from tests.digits import CLASSIFIERS, TRAINED, digits, train
from trimcli import CalibrateOptions, EvaluateOptions, PruneOptions, Recipe, calibrate, evaluate, prune
from trimcli.files.checkpoint import Checkpoint
from trimcli.model.skeleton import Skeleton

TARGETS = (0.5, 0.7, 0.9)
# Methods, their comparison groups, and how the pruned weights' inputs are seen.
RECIPES = {
    "magnitude, row": Recipe(method="magnitude", compare="row"),
    "magnitude, layer": Recipe(method="magnitude", compare="layer"),
    "wanda, row": Recipe(compare="row"),
    "wanda, row, dense inputs": Recipe(compare="row", propagate=False),
    "wanda, layer": Recipe(compare="layer"),
    "sparsegpt": Recipe(method="sparsegpt"),
}


def top1(model: Path, scratch: Path) -> str:
    """The share of the held-back digits whose class is the likeliest."""
    run: dict[str, Any] = {"cache_dir": scratch / "cache", "device": "cpu"}
    found = evaluate(str(model), EvaluateOptions(images=scratch / "test.npz", **run))["images"][0]["top1"]
    return f"{found:.1%}"


def rows(name: str, model: Path, scratch: Path, nsamples: int) -> Iterator[list[str]]:
    """A line of the table for each recipe."""
    run: dict[str, Any] = {"cache_dir": scratch / "cache", "device": "cpu"}
    calibration = scratch / f"{name}.calibration"
    calibrate(str(model), calibration, CalibrateOptions(images=scratch / "train.npz", nsamples=nsamples, **run))
    dense = top1(model, scratch)
    for title, recipe in RECIPES.items():
        found = []
        for sparsity in TARGETS:
            out = scratch / "pruned"
            options = PruneOptions(recipe=recipe, sparsity=sparsity, calibration=calibration, save_model=out, **run)
            prune(str(model), scratch / "masks", options, force=True)
            found.append(top1(out, scratch))
        yield [name, title, dense, *found]


def main() -> None:
    """Train, prune, measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epochs", type=int, default=30, help="of training")
    parser.add_argument("--nsamples", type=int, default=512, help="calibration samples")
    parser.add_argument("--out", type=Path, help="the Markdown file to write (default: print)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for data, name in zip(digits(), ("train.npz", "test.npz"), strict=True):
            data.save(scratch / name)
        found: list[list[str]] = []
        weights = []
        for name in (one for one in CLASSIFIERS if one != "resnet"):
            model = train(name, scratch / name, epochs=given.epochs)
            count = sum(linear.numel for linear in Skeleton(Checkpoint.open(model)).linears.values())
            weights.append(f"{name} {count:,}")
            found += rows(name, model, scratch, given.nsamples)
    facts = {
        "data": f"scikit-learn's digits: {TRAINED:,} to train and calibrate on, {len(digits()[1].labels)} to measure",
        "prunable weights": ", ".join(weights),
        "training": f"{given.epochs} epochs; calibration: {given.nsamples} pictures",
    }
    columns = ("model", "method", "dense", *(f"{target:.0%}" for target in TARGETS))
    publish([*head("Image classifiers", "images", facts), *table(columns, found)], given.out)


if __name__ == "__main__":
    main()
