"""The prune stage: exact counts for every method and allocation, propagation, and what it writes."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.interrupt import InterruptAt
from tests.small_models import add_uncalled_linears, gpt2_config, llama_config, random_model, save, skeleton_of
from tests.trim_cli import COMPUTE, save_tokens, tree, trim, trim_json, zeros
from trimcli import (
    AllocateOptions,
    AlphaOptions,
    BarberOptions,
    CalibrateOptions,
    ObsOptions,
    OwlOptions,
    PruneOptions,
    Recipe,
    TrimOptions,
    allocate,
    apply_masks,
    calibrate,
    prune,
)
from trimcli.errors import InputError, MismatchError, OptionError, OutputExists
from trimcli.files.masks import MaskFile
from trimcli.files.tensors import read_manifest
from trimcli.methods.masks import matrix_budget
from trimcli.pipeline.walk import Walk

Args = tuple[object, ...]

UP = "model.layers.1.mlp.up_proj"
TRIM: dict[str, Any] = {"rows": "trim", "options": (TrimOptions(iterations=2),)}

RECIPES: dict[str, Recipe] = {
    "magnitude": Recipe(method="magnitude"),
    "magnitude + trim": Recipe(method="magnitude", **TRIM),
    "wanda": Recipe(),
    "wanda, no propagation": Recipe(propagate=False),
    "wanda variant": Recipe(rows="variant"),
    "wanda + trim": Recipe(**TRIM),
    "wanda + trim, no propagation": Recipe(**TRIM, propagate=False),
    "wanda + trim, inputs anew": Recipe(**TRIM, input_recalc=True),
    "wanda + barber": Recipe(barber=BarberOptions(threshold=0.5)),
    "wanda + trim + barber by columns": Recipe(**TRIM, barber=BarberOptions(granularity="input1", metric="W")),
    "magnitude + barber by layer": Recipe(method="magnitude", barber=BarberOptions(granularity="layer")),
    "sparsegpt": Recipe(method="sparsegpt", options=(ObsOptions(block_size=24),)),
    "sparsegpt by wanda": Recipe(method="sparsegpt", options=(ObsOptions(mask_score="wanda"),)),
    "sparsegpt + trim": Recipe(method="sparsegpt", **TRIM),
    "sparsegpt + barber": Recipe(method="sparsegpt", barber=BarberOptions(retain_reconstruction=True)),
    "obs, no update": Recipe(method="obs"),
    "wanda + obs": Recipe(update="obs", options=(ObsOptions(block_size=24),)),
    "variant + obs": Recipe(rows="variant", update="obs"),
    "wanda + swaps": Recipe(refine="swaps"),
    "wanda + trim + swaps, cg": Recipe(**TRIM, refine="swaps", update="cg"),
}
PATTERNED = ["wanda", "wanda + swaps", "magnitude", "wanda + barber", "sparsegpt", "sparsegpt + barber"]
ALLOCATIONS: dict[str, AllocateOptions] = {
    "uniform": AllocateOptions(sparsity=0.613),
    "owl": AllocateOptions(method="owl", sparsity=0.55, options=(OwlOptions(hyper_m=3.0),)),
    "alpha": AllocateOptions(method="alpha", sparsity=0.7, options=(AlphaOptions(mapping_type="layer"),)),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, its `tokens.safetensors`, `calib`, and a ratios file of every allocation."""
    base = tmp_path_factory.mktemp("prune")
    model = str(base / "model")
    save(random_model(llama_config(), dtype=torch.float16), base / "model")
    save_tokens(base / "tokens.safetensors", vocabulary=64, nsamples=5)
    calibrate(model, base / "calib", CalibrateOptions(tokens=base / "tokens.safetensors", **RUN, cache_dir=base / "c"))
    for name, options in ALLOCATIONS.items():
        if name == "owl":
            options = replace(options, calibration=base / "calib")
        allocate(model, base / f"{name}.json", options)
    return base


RUN: dict[str, Any] = {"device": "cpu", "dtype": "float32"}


def options_for(base: Path, tmp_path: Path, **fields: Any) -> PruneOptions:
    return PruneOptions(**{**RUN, "calibration": base / "calib", "cache_dir": tmp_path / "cache", **fields})


def run(base: Path, tmp_path: Path, name: str = "masks", **fields: Any) -> MaskFile:
    prune(str(base / "model"), tmp_path / name, options_for(base, tmp_path, **fields))
    return MaskFile.open(tmp_path / name)


# --- counts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_matrix_loses_its_budget_to_the_weight(recipe: str, allocation: str, base: Path, tmp_path: Path) -> None:
    ratios = base / f"{allocation}.json"
    saved = tmp_path / "pruned" if RECIPES[recipe].changes_weights else None
    options = options_for(base, tmp_path, recipe=RECIPES[recipe], ratios=ratios, save_model=saved)
    summary = prune(str(base / "model"), tmp_path / "masks", options)
    found, sparsity = MaskFile.open(tmp_path / "masks"), json.loads(ratios.read_text())["sparsity"]
    assert set(found.names) == set(sparsity)
    total = 0
    for name in found.names:
        budget = matrix_budget(*found.shape(name), sparsity[name])
        assert zeros(found.keep(name)) == budget == found.entry(name)["zeros"], name
        total += budget
    weights = sum(shape[0] * shape[1] for shape in map(found.shape, found.names))
    assert (summary.zeros, summary.weights) == (total, weights)
    assert summary.sparsity == found.manifest["sparsity"] == total / weights
    assert abs(summary.sparsity - ALLOCATIONS[allocation].sparsity) <= len(found.names) / weights  # type: ignore[operator]


def test_barber_by_block_keeps_the_count_of_a_block(base: Path, tmp_path: Path) -> None:
    recipe = Recipe(barber=BarberOptions(granularity="block", threshold=0.5))
    before = run(base, tmp_path, "before", sparsity=0.5)
    after = run(base, tmp_path, "after", sparsity=0.5, recipe=recipe)
    moved = 0
    for layer in (0, 1):
        for block in ("self_attn", "mlp"):
            names = [name for name in before.names if f"layers.{layer}.{block}" in name]
            assert sum(zeros(before.keep(name)) for name in names) == sum(zeros(after.keep(name)) for name in names)
            moved += sum(zeros(before.keep(name)) != zeros(after.keep(name)) for name in names)
    assert moved


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_stored_dtype_does_not_choose_the_masks(recipe: str, base: Path, tmp_path: Path) -> None:
    """The same values stored in float32, where loading converts nothing."""
    wide = save(random_model(llama_config(), dtype=torch.float16).float(), tmp_path / "model")
    options = CalibrateOptions(tokens=base / "tokens.safetensors", **RUN, cache_dir=tmp_path / "cache")
    calibrate(str(wide), tmp_path / "calib", options)
    narrow = run(base, tmp_path, "narrow", sparsity=0.6, recipe=RECIPES[recipe], save_model=tmp_path / "narrow-dir")
    found = run(tmp_path, tmp_path, "wide", sparsity=0.6, recipe=RECIPES[recipe], save_model=tmp_path / "wide-dir")
    same = [float((narrow.keep(name) == found.keep(name)).float().mean()) for name in found.names]
    # New weights are rounded as they are stored, which what follows sees.
    assert min(same) >= (0.97 if RECIPES[recipe].updating.changes else 1.0)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(method="magnitude"), Recipe(**TRIM), RECIPES["sparsegpt"]])
@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.99])
def test_the_ends_of_the_range(recipe: Recipe, sparsity: float, base: Path, tmp_path: Path) -> None:
    found = run(base, tmp_path, recipe=recipe, sparsity=sparsity, save_model=tmp_path / "pruned")
    for name in found.names:
        assert zeros(found.keep(name)) == matrix_budget(*found.shape(name), sparsity)


@pytest.mark.parametrize("recipe", PATTERNED)
def test_n_of_m_patterns(recipe: str, base: Path, tmp_path: Path) -> None:
    chosen = replace(RECIPES[recipe], options=())
    found = run(base, tmp_path, recipe=chosen, sparsity_type="2:4", save_model=tmp_path / "pruned")
    for name in found.names:
        assert bool((found.keep(name).unflatten(1, (-1, 4)).sum(dim=2) == 2).all()), name
        assert (found.entry(name)["pattern"], found.entry(name)["target"]) == ([2, 4], 0.5)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(barber=BarberOptions())])
def test_mixed_patterns_follow_the_ratios_file(recipe: Recipe, base: Path, tmp_path: Path) -> None:
    ratios = json.loads((base / "uniform.json").read_text())
    ratios["pattern"] = {name: [8, 8] if "layers.0" in name else [3, 8] for name in ratios["sparsity"]}
    ratios["sparsity"] = {name: 1 - kept / 8 for name, (kept, _) in ratios["pattern"].items()}
    (tmp_path / "ratios.json").write_text(json.dumps(ratios))
    found = run(base, tmp_path, recipe=recipe, ratios=tmp_path / "ratios.json")
    for name in found.names:
        kept = 8 if "layers.0" in name else 3
        assert bool((found.keep(name).unflatten(1, (-1, 8)).sum(dim=2) == kept).all()), name
    with pytest.raises(OptionError, match="--use-trim with an N:M pattern"):
        run(base, tmp_path, "other", recipe=Recipe(**TRIM), ratios=tmp_path / "ratios.json")


@pytest.mark.parametrize("granularity", ["block", "layer", "output1", "input1"])
def test_barber_keeps_the_pattern_of_every_linear_of_a_block(granularity: Any, base: Path, tmp_path: Path) -> None:
    kept = {"q": (2, 4), "k": (3, 8), "v": (8, 8), "o": (1, 2), "gate": (5, 8), "up": (1, 4), "down": (4, 8)}
    ratios = json.loads((base / "uniform.json").read_text())
    patterns = {name: kept[name.rpartition(".")[2].removesuffix("_proj")] for name in ratios["sparsity"]}
    ratios["pattern"] = patterns
    ratios["sparsity"] = {name: 1 - count / group for name, (count, group) in patterns.items()}
    (tmp_path / "ratios.json").write_text(json.dumps(ratios))
    before = run(base, tmp_path, "before", ratios=tmp_path / "ratios.json")
    barber = BarberOptions(granularity=granularity, threshold=1.0)
    after = run(base, tmp_path, "after", ratios=tmp_path / "ratios.json", recipe=Recipe(barber=barber))
    for name, (count, group) in patterns.items():
        assert bool((after.keep(name).unflatten(1, (-1, group)).sum(dim=2) == count).all()), name
        assert after.entry(name)["pattern"] == [count, group]
    assert sum(not torch.equal(before.keep(name), after.keep(name)) for name in patterns) >= 10


def test_conv1d_is_pruned_by_output_rows(tmp_path: Path) -> None:
    save(random_model(gpt2_config()), tmp_path / "model")
    save_tokens(tmp_path / "tokens.safetensors", vocabulary=64)
    options = PruneOptions(
        **RUN, sparsity=0.5, calibrate=CalibrateOptions(tokens=tmp_path / "tokens.safetensors", **RUN),
        cache_dir=tmp_path / "cache", save_model=tmp_path / "pruned",
    )  # fmt: skip
    prune(str(tmp_path / "model"), tmp_path / "masks", options)
    stored = load_file(tmp_path / "pruned" / "model.safetensors")["transformer.h.0.mlp.c_fc.weight"]
    assert stored.shape == (32, 128)
    assert ((stored == 0).sum(dim=0) == 16).all()


@pytest.mark.parametrize("form", ["sharded", "bin", "tied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_storage_forms_end_to_end(form: str, dtype: torch.dtype, base: Path, tmp_path: Path) -> None:
    model = random_model(llama_config(tie_word_embeddings=form == "tied"), dtype=dtype)
    source = save(model, tmp_path / "model", max_shard_size="20KB" if form == "sharded" else "5GB")
    if form == "bin":
        torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
        (source / "model.safetensors").unlink()
    drawn = CalibrateOptions(tokens=base / "tokens.safetensors", **RUN)
    options = options_for(base, tmp_path, calibration=None, calibrate=drawn, sparsity=0.6, save_model=tmp_path / "out")
    prune(str(source), tmp_path / "masks", options)

    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    if form == "sharded":
        assert len(shards) > 1
        assert shards == sorted(path.name for path in source.glob("*.safetensors"))
    else:
        assert shards == ["model.safetensors"]
    stored = {key: tensor for name in shards for key, tensor in load_file(tmp_path / "out" / name).items()}
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert ("lm_head.weight" in stored) == (form != "tied")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == dtype
    found = MaskFile.open(tmp_path / "masks")
    for name, parameter in loaded.named_parameters():
        dense = model.get_parameter(name)
        linear = name.removesuffix(".weight")
        if linear in found.names:
            assert zeros(parameter) == round(0.6 * parameter.numel()), name
            dense = dense * found.keep(linear)
        assert torch.equal(parameter, dense), name


# --- what is chosen --------------------------------------------------------------------------------------


def input_norms(model: Any, names: list[str], tokens: Tensor) -> dict[str, Tensor]:
    """The summed square norm of every linear's inputs in a full forward pass."""
    norms: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_: torch.nn.Module, args: tuple[Tensor]) -> None:
            norms[name] = args[0].square().sum(dim=(0, 1))

        return model.get_submodule(name).register_forward_pre_hook(hook)

    hooks = [watch(name) for name in names]
    with torch.no_grad():
        model(input_ids=tokens.long(), use_cache=False)
    for hook in hooks:
        hook.remove()
    return norms


def by_hand(directory: Path, tokens: Tensor, sparsity: float, *, propagate: bool) -> dict[str, Tensor]:
    """Wanda with the whole model in memory, one decoder layer after the other."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    keeps: dict[str, Tensor] = {}
    for layer in skeleton_of(directory).layers:
        for name, norms in input_norms(model, [linear.name for linear in layer.linears], tokens).items():
            scores = model.get_submodule(name).weight.data.abs() * norms.sqrt()
            keeps[name] = scores.argsort(dim=1).argsort(dim=1) >= round(sparsity * scores.shape[1])
        if propagate:
            for linear in layer.linears:
                model.get_submodule(linear.name).weight.data *= keeps[linear.name]
    return keeps


@pytest.mark.parametrize("propagate", [True, False])
def test_later_layers_see_what_pruned_layers_produce(propagate: bool, base: Path, tmp_path: Path) -> None:
    tokens = load_file(base / "tokens.safetensors")["tokens"]
    found = run(base, tmp_path, sparsity=0.75, recipe=Recipe(propagate=propagate))
    expected = by_hand(base / "model", tokens, 0.75, propagate=propagate)
    other = by_hand(base / "model", tokens, 0.75, propagate=not propagate)
    agree = {name: float((found.keep(name) == expected[name]).float().mean()) for name in expected}
    assert min(agree.values()) >= 0.999
    assert float((found.keep(UP) == other[UP]).float().mean()) < 0.99


def test_no_forward_pass_runs_without_propagation(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a walk began")

    monkeypatch.setattr(Walk, "__init__", refuse)
    run(base, tmp_path, sparsity=0.5, recipe=Recipe(**TRIM, propagate=False))
    run(base, tmp_path, "magnitude", sparsity=0.5, recipe=Recipe(method="magnitude"), calibration=None)


def test_only_and_skip(base: Path, tmp_path: Path) -> None:
    found = run(base, tmp_path, sparsity=0.5, only=("*.layers.1.*", "*.q_proj"), skip=("*.mlp.*",))
    attention = [f"model.layers.1.self_attn.{one}_proj" for one in "qkvo"]
    assert found.names == ["model.layers.0.self_attn.q_proj", *attention]


def test_layers_without_a_chosen_linear_stay_dense(base: Path, tmp_path: Path) -> None:
    for name, recipe in (("wanda", Recipe(barber=BarberOptions())), ("sparsegpt", RECIPES["sparsegpt"])):
        found = run(base, tmp_path, name, sparsity=0.5, recipe=recipe, only=(UP,), save_model=tmp_path / f"{name}-dir")
        assert found.names == [UP]


def test_the_batch_size_does_not_choose_the_masks(base: Path, tmp_path: Path) -> None:
    one, other = (run(base, tmp_path, f"m{size}", sparsity=0.5, batch_size=size) for size in (1, 4))
    same = [float((one.keep(name) == other.keep(name)).float().mean()) for name in one.names]
    assert min(same) >= 0.999


def test_a_linear_that_its_layer_never_calls_can_be_skipped(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = save(random_model(llama_config()), tmp_path / "plain")
    names = list(skeleton_of(plain).linears)
    run_there: Args = ("--tokens", base / "tokens.safetensors", "--cache-dir", tmp_path / "cache", *COMPUTE)
    trim_json("prune", plain, "-o", tmp_path / "plain-masks", "--sparsity", 0.5, *run_there)
    others: dict[str, Args] = {"owl": ("--alloc", "owl"), "barber": ("--prune-barber",)}
    for name, more in others.items():
        trim_json("prune", plain, "-o", tmp_path / f"plain-{name}", "--sparsity", 0.5, *more, *run_there)
    weights = load_file(plain / "model.safetensors")

    add_uncalled_linears(monkeypatch)
    model = save(random_model(llama_config()), tmp_path / "model")
    spares = {f"model.layers.{layer}.mlp.spare": torch.rand(8, 32) for layer in (0, 1)}
    stored = {**weights, **{f"{name}.weight": weight for name, weight in spares.items()}}
    save_file(stored, model / "model.safetensors", metadata={"format": "pt"})

    first = next(iter(spares))
    for method in ("wanda", "sparsegpt"):
        saved: Args = ("--save-model", tmp_path / method, "--method", method, "--sparsity", 0.5)
        done = trim("prune", model, "-o", tmp_path / f"{method}-masks", *saved, *run_there)
        assert (done.status, done.out) == (1, "")
        what = f"trim: {first} is never called by its layer, so it has no inputs"
        sentence = f"{what}; leave it dense with --skip '*.mlp.spare'."
        assert done.err.splitlines()[-1] == sentence
        trim_json("prune", model, "-o", tmp_path / f"{method}-masks", *saved, *run_there, "--skip", "*.spare")
        assert MaskFile.open(tmp_path / f"{method}-masks").names == names
        found = load_file(tmp_path / method / "model.safetensors")
        assert all(torch.equal(found[f"{name}.weight"], weight) for name, weight in spares.items())
    one, other = MaskFile.open(tmp_path / "plain-masks"), MaskFile.open(tmp_path / "wanda-masks")
    assert all(torch.equal(one.keep(name), other.keep(name)) for name in names)
    # Neither an allocation nor a second pass asks for what is skipped.
    for name, more in others.items():
        skipping = ("--sparsity", 0.5, "--skip", "*.spare", *more, *run_there)
        trim_json("prune", model, "-o", tmp_path / name, *skipping)
        one, other = MaskFile.open(tmp_path / f"plain-{name}"), MaskFile.open(tmp_path / name)
        assert one.names == other.names == names
        assert all(torch.equal(one.keep(linear), other.keep(linear)) for linear in names)
    # Magnitude asks for no inputs, so nothing keeps it from pruning what is never called.
    magnitude = trim_json("prune", model, "-o", tmp_path / "m", "--method", "magnitude", "--sparsity", 0.5, *run_there)
    assert magnitude["linears"] == 16
    trim_json("calibrate", model, "-o", tmp_path / "calib", "--skip", "*.spare", *run_there)
    dense: Args = ("prune", model, "-o", tmp_path / "dense", "--no-propagate", "--sparsity", 0.5)
    dense = (*dense, "--calibration", tmp_path / "calib", "--cache-dir", tmp_path / "cache", *COMPUTE)
    done = trim(*dense)
    assert (done.status, done.out) == (2, "")
    assert done.err.splitlines()[-1].startswith(f"trim: {tmp_path / 'calib'} holds no statistics of {first}")
    trim_json(*dense, "--skip", "*.spare")
    assert MaskFile.open(tmp_path / "dense").names == names
    # In one go the calibration that is made on the way skips it, too.
    at_once: Args = ("prune", model, "-o", tmp_path / "at-once", "--no-propagate", "--sparsity", 0.5, *run_there)
    trim_json(*at_once, "--skip", "*.spare")
    one, other = MaskFile.open(tmp_path / "dense"), MaskFile.open(tmp_path / "at-once")
    assert all(torch.equal(one.keep(name), other.keep(name)) for name in names)


# --- what is written -------------------------------------------------------------------------------------


def test_the_manifest_says_what_was_done(base: Path, tmp_path: Path) -> None:
    run(base, tmp_path, ratios=base / "owl.json", recipe=Recipe(**TRIM), save_model=tmp_path / "pruned")
    manifest = read_manifest(tmp_path / "masks", "trim.masks/1")
    assert manifest["model"] == skeleton_of(base / "model").fingerprint.document()
    assert set(manifest["sources"]) == {"calibration", "ratios"}
    recipe = manifest["options"]["recipe"]
    assert (recipe["method"], recipe["score"], recipe["rows"], recipe["update"]) == ("wanda", "wanda", "trim", "none")
    assert recipe["options"] == {"trim": asdict(TRIM["options"][0])}
    assert recipe["options"]["trim"]["iterations"] == 2
    assert manifest["allocation"] == {"method": "owl", "lambda": 0.08, "hyper_m": 3.0}
    assert not manifest["changes_weights"]
    mark = json.loads((tmp_path / "pruned" / "trim.json").read_text())
    assert mark["schema"] == "trim.pruned/1"
    assert mark["sparsity"] == manifest["sparsity"]
    assert {name: entry["zeros"] for name, entry in mark["linears"].items()} == {
        name: entry["zeros"] for name, entry in manifest["linears"].items()
    }


def test_the_saved_model_is_what_apply_masks_writes(base: Path, tmp_path: Path) -> None:
    run(base, tmp_path, sparsity=0.6, save_model=tmp_path / "saved")
    apply_masks(str(base / "model"), tmp_path / "masks", tmp_path / "applied")
    saved, applied = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "applied"))
    assert saved.keys() == applied.keys()
    for name in saved:
        assert saved[name].dtype == torch.float16
        assert torch.equal(saved[name], applied[name])


def test_earlier_zeros_stay_in_a_layer_that_a_mixed_pattern_leaves_whole(base: Path, tmp_path: Path) -> None:
    run(base, tmp_path, "first", sparsity_type="2:4", save_model=tmp_path / "pruned")
    ratios = json.loads((base / "uniform.json").read_text())
    ratios["pattern"] = {name: [1, 4] if "layers.0" in name else [4, 4] for name in ratios["sparsity"]}
    ratios["sparsity"] = {name: 1 - kept / 4 for name, (kept, _) in ratios["pattern"].items()}
    ratios["model"]["content"] = None
    (tmp_path / "ratios.json").write_text(json.dumps(ratios))
    options = PruneOptions(
        **RUN, cache_dir=tmp_path / "cache", calibrate=CalibrateOptions(tokens=base / "tokens.safetensors", **RUN),
        recipe=Recipe(reconstruct="layer", reconstruct_steps=8), ratios=tmp_path / "ratios.json",
        save_model=tmp_path / "again",
    )  # fmt: skip
    prune(str(tmp_path / "pruned"), tmp_path / "masks", options)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "again"))
    for name in ratios["sparsity"]:
        one, other = before[f"{name}.weight"], after[f"{name}.weight"]
        assert not other[one == 0].any(), name
        assert not torch.equal(one, other)
    trim_json("verify", tmp_path / "again", "--masks", tmp_path / "masks")


def test_sparsegpt_writes_its_weights(base: Path, tmp_path: Path) -> None:
    found = run(base, tmp_path, sparsity=0.5, recipe=RECIPES["sparsegpt"], save_model=tmp_path / "saved")
    saved, dense = (load_file(path / "model.safetensors") for path in (tmp_path / "saved", base / "model"))
    for name in found.names:
        weight, keep = saved[f"{name}.weight"], found.keep(name)
        assert not weight[~keep].any()
        assert not torch.equal(weight[keep], dense[f"{name}.weight"][keep])
    others = dense.keys() - {f"{name}.weight" for name in found.names}
    assert all(torch.equal(saved[name], dense[name]) for name in others)
    assert found.manifest["changes_weights"]
    with pytest.raises(MismatchError, match="changed the kept weights"):
        apply_masks(str(base / "model"), tmp_path / "masks", tmp_path / "applied")


def test_barber_without_reconstruction_leaves_dense_values(base: Path, tmp_path: Path) -> None:
    recipe = Recipe(method="sparsegpt", barber=BarberOptions())
    found = run(base, tmp_path, sparsity=0.5, recipe=recipe, save_model=tmp_path / "saved")
    saved, dense = (load_file(path / "model.safetensors") for path in (tmp_path / "saved", base / "model"))
    for name in found.names:
        assert torch.equal(saved[f"{name}.weight"], dense[f"{name}.weight"] * found.keep(name))


def test_barber_returns_and_keeps_stored_values(base: Path, tmp_path: Path) -> None:
    """Computing in fewer bits than are stored must not reach the weights that are written."""
    save(random_model(llama_config()), tmp_path / "model")
    fields: dict[str, Any] = {
        "dtype": "bfloat16",
        "calibration": None,
        "calibrate": CalibrateOptions(tokens=base / "tokens.safetensors", device="cpu", dtype="bfloat16"),
        "sparsity": 0.5,
    }
    barber = BarberOptions(retain_reconstruction=True, threshold=0.5)
    for name, recipe in (("once", Recipe(method="sparsegpt")), ("twice", Recipe(method="sparsegpt", barber=barber))):
        run(tmp_path, tmp_path, name, recipe=recipe, save_model=tmp_path / f"{name}-dir", **fields)
    dense, once, twice = (
        load_file(tmp_path / name / "model.safetensors") for name in ("model", "once-dir", "twice-dir")
    )
    masks_once, masks_twice = MaskFile.open(tmp_path / "once"), MaskFile.open(tmp_path / "twice")
    returned = 0
    for name in masks_once.names:
        key, before, after = f"{name}.weight", masks_once.keep(name), masks_twice.keep(name)
        assert torch.equal(twice[key], torch.where(before, once[key], dense[key]) * after), name
        returned += int((after & ~before).sum())
    assert returned


def test_what_trim_found(base: Path, tmp_path: Path) -> None:
    found = run(base, tmp_path, sparsity=0.7, recipe=Recipe(**TRIM), stats_out=tmp_path / "rows.json")
    document, tensors = json.loads((tmp_path / "rows.json").read_text()), load_file(tmp_path / "rows.safetensors")
    assert list(document["linears"]) == found.names
    for name, facts in document["linears"].items():
        assert facts["target"] == 0.7
        assert facts["quality_best"] >= facts["quality_uniform"]
        sparsity = tensors[f"{name}.row_sparsity"]
        assert sparsity.shape == (found.shape(name)[0],)
        counts = (~found.keep(name)).sum(dim=1)
        assert float((counts / found.shape(name)[1] - sparsity).abs().max()) <= 1 / found.shape(name)[1] + 1e-6
        assert tensors[f"{name}.row_quality_after"].shape == sparsity.shape


@pytest.mark.parametrize(("rows", "told"), [("trim", True), ("even", False), ("free", False), ("variant", False)])
def test_only_a_search_tells_what_it_improved(rows: str, told: bool, base: Path, tmp_path: Path) -> None:
    options = options_for(base, tmp_path, sparsity=0.7, recipe=Recipe(rows=rows))
    found = prune(str(base / "model"), tmp_path / "masks", options).rows_improved
    assert (found is not None) == told


def test_outputs_that_would_meet_are_refused(base: Path, tmp_path: Path) -> None:
    for fields in (
        {"stats_out": tmp_path / "masks.json", "recipe": Recipe(**TRIM)},  # its rows go to masks.safetensors
        {"stats_out": tmp_path / "rows.safetensors", "recipe": Recipe(**TRIM)},
        {"save_model": tmp_path / "masks.safetensors"},
        {"save_model": tmp_path / "sub" / ".." / "masks.safetensors"},
    ):
        with pytest.raises(OptionError, match="would write two outputs to"):
            run(base, tmp_path, "masks.safetensors", sparsity=0.5, **fields)
        assert tree(tmp_path) == []


def test_existing_outputs_are_refused_before_any_pass(base: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.safetensors").touch()
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "file").touch()
    before = tree(tmp_path)
    for fields in (
        {"stats_out": tmp_path / "rows.json", "recipe": Recipe(**TRIM)},
        {"save_model": tmp_path / "directory"},
    ):
        with pytest.raises(OutputExists):
            run(base, tmp_path, sparsity=0.5, **fields)
    with pytest.raises(InputError, match="does not exist; create it"):
        run(base, tmp_path, "missing/masks", sparsity=0.5)
    assert tree(tmp_path) == before


# --- in one go -------------------------------------------------------------------------------------------


def test_the_stages_in_one_go_are_the_stages_one_by_one(base: Path, tmp_path: Path) -> None:
    by_hand = run(base, tmp_path, "one-by-one", ratios=base / "owl.json", recipe=Recipe(**TRIM))
    fields = {
        "recipe": Recipe(**TRIM),
        "calibration": None,
        "calibrate": CalibrateOptions(tokens=base / "tokens.safetensors", **RUN, cache_dir=tmp_path / "cache"),
        "allocate": replace(ALLOCATIONS["owl"], **RUN, cache_dir=tmp_path / "cache"),
    }
    first, second = InterruptAt(None), InterruptAt(None)
    for name, progress in (("first", first), ("second", second)):
        options = options_for(base, tmp_path, **fields)
        prune(str(base / "model"), tmp_path / name, options, progress=progress)
        found = MaskFile.open(tmp_path / name)
        assert all(torch.equal(found.keep(linear), by_hand.keep(linear)) for linear in by_hand.names)
    assert "calibrating layers" in first.seen
    assert "outliers" in first.seen
    assert not {"calibrating layers", "outliers"} & set(second.seen)
    kinds = {path.parent.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert kinds == {"calibration", "proofs", "ratios"}


def test_other_samples_make_another_calibration(base: Path, tmp_path: Path) -> None:
    tokens = save_tokens(tmp_path / "tokens.safetensors", vocabulary=64, seed=1)
    for seed in (1, 2):
        save_tokens(tokens, vocabulary=64, seed=seed)  # the same file with other samples
        drawn = CalibrateOptions(tokens=tokens, **RUN, cache_dir=tmp_path / "cache")
        run(base, tmp_path, f"m{seed}", sparsity=0.5, calibration=None, calibrate=drawn, recipe=Recipe(propagate=False))
    assert len(list((tmp_path / "cache" / "calibration").glob("*.safetensors"))) == 2
    one, other = MaskFile.open(tmp_path / "m1"), MaskFile.open(tmp_path / "m2")
    assert any(not torch.equal(one.keep(name), other.keep(name)) for name in one.names)


def test_statistics_that_the_file_lacks_are_named(base: Path, tmp_path: Path) -> None:
    norms = CalibrateOptions(tokens=base / "tokens.safetensors", stats=("norms",), **RUN, cache_dir=tmp_path / "c")
    calibrate(str(base / "model"), tmp_path / "norms", norms)
    with pytest.raises(InputError, match=r"holds no inputs \(it was made with --stats norms\)"):
        run(base, tmp_path, sparsity=0.5, calibration=tmp_path / "norms", recipe=Recipe(**TRIM, propagate=False))
    run(base, tmp_path, sparsity=0.5, calibration=tmp_path / "norms", recipe=Recipe(**TRIM))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "no target was given"),
    ({"sparsity": 0.5, "ratios": Path("ratios.json")}, "--ratios with --sparsity"),
    ({"sparsity_type": "2:4", "ratios": Path("ratios.json")}, "--ratios with --sparsity-type 2:4"),
    ({"ratios": Path("r.json"), "allocate": AllocateOptions(sparsity=0.5)}, "--ratios with --alloc"),
    ({"sparsity_type": "2:4", "allocate": AllocateOptions(sparsity=0.5)}, "--alloc with --sparsity-type 2:4"),
    ({"sparsity": 0.5, "calibrate": CalibrateOptions()}, "--calibration with --dataset"),
    ({"sparsity": 0.5, "stats_out": Path("rows.json")}, "--stats-out without --use-trim"),
    ({"sparsity": 0.5, "recipe": Recipe(method="sparsegpt")}, "--method sparsegpt without --save-model"),
    ({"sparsity": 0.5, "recipe": Recipe(update="cg")}, "--update cg without --save-model"),
    ({"sparsity": 0.5, "recipe": Recipe(reconstruct="layer")}, "--reconstruct layer without --save-model"),
    ({"sparsity": 0.5, "batch_size": 0}, "--batch-size 0 must be at least 1"),
    ({"allocate": AllocateOptions(method="owll", sparsity=0.5)}, "--alloc 'owll' is none of .*did you mean 'owl'"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_options_that_do_not_go_together(fields: dict[str, Any], message: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        run(base, tmp_path, **fields)
    assert tree(tmp_path) == []


# --- a model that is sparse already ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with half of its weights gone, as `prune --save-model` writes it."""
    folder = tmp_path_factory.mktemp("half")
    prune(str(base / "model"), folder / "masks", options_for(base, folder, sparsity=0.5, save_model=folder / "model"))
    return folder / "model"


def again(half: Path, base: Path, tmp_path: Path, *options: object) -> tuple[Any, dict[str, Tensor]]:
    """Prune the half-pruned model once more with an update; what the command left, and the weights."""
    output = tmp_path / "model"
    shared = ("--tokens", base / "tokens.safetensors", "--cache-dir", tmp_path / "cache", *COMPUTE)
    done = trim("prune", half, "-o", tmp_path / "masks", "--save-model", output, *shared, *options)
    assert done.status == 0, done.err
    return done, load_file(output / "model.safetensors")


METHODS: dict[str, tuple[object, ...]] = {
    "2:4": ("--method", "sparsegpt", "--sparsity-type", "2:4"),
    "unstructured": ("--method", "sparsegpt", "--sparsity", 0.6),
    "mask fixed beforehand": ("--update", "obs", "--sparsity", 0.6),
    "TRIM": ("--method", "sparsegpt", "--use-trim", "--sparsity", 0.6),
    "Barber": ("--method", "sparsegpt", "--prune-barber", "--retain-reconstruction", "--sparsity", 0.6),
}


@pytest.mark.parametrize("method", METHODS)
def test_earlier_zeros_stay(method: str, half: Path, base: Path, tmp_path: Path) -> None:
    _, weights = again(half, base, tmp_path, *METHODS[method])
    before, found = load_file(half / "model.safetensors"), MaskFile.open(tmp_path / "masks")
    for name in found.names:
        earlier, weight = before[f"{name}.weight"] == 0, weights[f"{name}.weight"]
        assert int(earlier.sum()) == round(0.5 * earlier.numel())
        assert not weight[earlier].count_nonzero(), name
        assert zeros(weight) >= zeros(found.keep(name)) >= round(0.5 * weight.numel())
        if method == "2:4":
            assert int((weight.view(-1, 4) != 0).sum(dim=1).max()) == 2
        elif method == "mask fixed beforehand":  # every row loses alike, so half of it was gone already
            assert zeros(found.keep(name)) == round(0.6 * weight.numel())
    trim_json("verify", tmp_path / "model")


def test_earlier_zeros_may_return_where_that_is_asked_for(half: Path, base: Path, tmp_path: Path) -> None:
    done, weights = again(half, base, tmp_path, *METHODS["2:4"], "--no-keep-zeros")
    before = load_file(half / "model.safetensors")
    earlier = {key: tensor == 0 for key, tensor in before.items() if "proj" in key}
    assert sum(int(weights[key][gone].count_nonzero()) for key, gone in earlier.items())
    count = sum(int(gone.sum()) for gone in earlier.values())
    assert f"{count:,} weights of {half} are zero already, and some may return; --keep-zeros holds them" in done.err


def test_zeros_of_a_dense_model_are_kept_where_that_is_asked_for(base: Path, tmp_path: Path) -> None:
    model = save(random_model(llama_config()), tmp_path / "dense")
    tensors = load_file(model / "model.safetensors")
    gone = torch.zeros_like(tensors[f"{UP}.weight"], dtype=torch.bool).view(-1, 8, 4)
    gone[:, 4:, 1:] = True  # of the last groups' four weights 2:4 keeps one of these, which updates from the left reach
    gone = gone.view(-1, 32)
    tensors[f"{UP}.weight"][gone] = 0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    folders = {"--keep-zeros": tmp_path / "kept", "--no-keep-zeros": tmp_path / "free", "--quiet": tmp_path / "default"}
    returned = {}
    for option, folder in folders.items():
        folder.mkdir()
        _, weights = again(model, base, folder, *METHODS["2:4"], option)
        returned[option] = int(weights[f"{UP}.weight"][gone].count_nonzero())
    assert returned["--keep-zeros"] == 0 < returned["--no-keep-zeros"] == returned["--quiet"]
