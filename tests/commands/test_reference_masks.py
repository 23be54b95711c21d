"""Reference numerics against what the published implementations kept, run in float32 on a CPU with these tokens.

tests/data/expected holds their masks, one bit a weight, and of SparseGPT's weights two matrices of the first layer.
"""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.trim_cli import COMPUTE, trim_json
from trimcli.methods.masks import unpack

DATA = Path(__file__).parents[1] / "data"
OWL = ("--method", "owl", "--sparsity", 0.7, "--lambda", 0.08, "--hyper-m", 5)
MIXED = ("--method", "owl", "--sparsity", 0.625, "--lambda", 2, "--hyper-m", 6, "--group", 8)
ALPHA = ("--method", "alpha", "--sparsity", 0.7, "--epsilon", 0.3, "--ww-metric", "alpha_peak")
BARBER = ("--prune-barber", "--prune-granularity", "output1", "--threshold", 0.5)
BLOCKS = ("--prune-barber", "--prune-granularity", "block", "--threshold", 0.1)

# model--case: options of alloc-layers, options of prune, share of the mask bits that must agree.
CASES: dict[str, tuple[tuple[object, ...], tuple[object, ...], float]] = {
    "nano-qwen2--wanda-50": ((), ("--method", "wanda", "--sparsity", 0.5), 0.9999),
    "nano-qwen2--magnitude-50": ((), ("--method", "magnitude", "--sparsity", 0.5), 0.9999),
    "nano-qwen2--wanda-2of4": ((), ("--method", "wanda", "--sparsity-type", "2:4"), 0.9999),
    "nano-qwen2--wanda-variant-60": ((), ("--sparsity", 0.6, "--use-variant"), 0.999),
    "nano-qwen2--wanda-alpha-70": (ALPHA, ("--method", "wanda"), 0.9999),
    "nano-qwen2--wanda-owl-mixed-5of8": (MIXED, ("--method", "wanda"), 0.9999),
    "nano-qwen2--wanda-owl-trim-70": (OWL, ("--method", "wanda", "--use-trim"), 0.999),
    "nano-qwen2--wanda-trim-recalc-70": ((), ("--sparsity", 0.7, "--use-trim", "--input-recalc"), 0.999),
    "nano-qwen2--sparsegpt-50": ((), ("--method", "sparsegpt", "--sparsity", 0.5), 0.99),
    "nano-qwen2--sparsegpt-2of4": ((), ("--method", "sparsegpt", "--sparsity-type", "2:4"), 0.99),
    "nano-qwen2--magnitude-barber-block-50": ((), ("--method", "magnitude", "--sparsity", 0.5, *BLOCKS), 0.999),
    "nano-qwen2--wanda-barber-50": ((), ("--method", "wanda", "--sparsity", 0.5, *BARBER), 0.999),
    "nano-opt--wanda-50": ((), ("--method", "wanda", "--sparsity", 0.5), 0.9999),
    "nano-opt--wanda-owl-trim-70": (OWL, ("--method", "wanda", "--use-trim"), 0.999),
    "nano-opt--wanda-barber-50": ((), ("--method", "wanda", "--sparsity", 0.5, *BARBER), 0.999),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, nano_qwen2: Path) -> Path:
    """A folder with the models and their calibration files."""
    base = tmp_path_factory.mktemp("reference")
    (base / "nano-qwen2").symlink_to(nano_qwen2)
    (base / "nano-opt").symlink_to(DATA / "nano-opt")
    for model in ("nano-qwen2", "nano-opt"):
        tokens = DATA / "tokens" / f"{model}.safetensors"
        trim_json("calibrate", base / model, "-o", base / f"{model}.calib", "--tokens", tokens, *COMPUTE)
    return base


@pytest.mark.parametrize("case", CASES)
def test_the_published_masks_come_out(case: str, base: Path, tmp_path: Path) -> None:
    alloc, options, agree = CASES[case]
    model = case.partition("--")[0]
    calibration = base / f"{model}.calib"
    if alloc:
        needs = ("--calibration", calibration) if "owl" in alloc else ()
        trim_json("alloc-layers", base / model, "-o", tmp_path / "ratios", *alloc, *needs, "--numerics", "reference")
        options = (*options, "--ratios", tmp_path / "ratios")
    if "sparsegpt" in options:
        options = (*options, "--save-model", tmp_path / "pruned")
    masks = tmp_path / "masks.safetensors"
    trim_json(
        "prune", base / model, "-o", masks, "--calibration", calibration, *options, "--numerics", "reference",
        "--cache-dir", tmp_path / "cache", *COMPUTE,
    )  # fmt: skip

    expected, found = load_file(DATA / "expected" / f"{case}.safetensors"), load_file(masks)
    dense = load_file(base / model / "model.safetensors")
    keys = [key for key in expected if key.endswith(".keep")]
    assert sorted(found) == sorted(keys)
    equal = total = 0
    for key in keys:
        name = key.removesuffix(".keep")
        stored = f"{name}.weight" if f"{name}.weight" in dense else f"{name.removeprefix('model.')}.weight"
        d_in = dense[stored].shape[1]
        same = unpack(found[key], d_in) == unpack(expected[key], d_in)
        equal, total = equal + int(same.sum()), total + same.numel()
    assert equal / total >= agree

    weights = [key for key in expected if key.endswith(".weight")]
    assert bool(weights) == ("sparsegpt" in options)
    if weights:
        saved = load_file(tmp_path / "pruned" / "model.safetensors")
        for key in weights:
            wanted = expected[key].float()
            assert float((saved[key].float() - wanted).norm() / wanted.norm()) <= 2e-3
