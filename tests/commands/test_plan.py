"""What a prune says it will do, against what it then does."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.families import CONVERTS, save_family
from tests.small_models import llama_config, random_model, save
from tests.trim_cli import COMPUTE, save_tokens, trim, trim_json
from trimcli import AllocateOptions, BarberOptions, CalibrateOptions, PruneOptions, Recipe, UsageError, allocate, prune
from trimcli.commands.plan import foresee
from trimcli.errors import InputError, OptionError
from trimcli.methods.layers.auto import AutoOptions
from trimcli.methods.layers.search import SearchOptions
from trimcli.pipeline.plan import forward_passes
from trimcli.world import World

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("plan")
    save(random_model(llama_config(), dtype=torch.float16), base / "model")
    save_tokens(base / "tokens.safetensors", vocabulary=64)
    return base


def test_the_counts_are_those_that_come_out(base: Path, tmp_path: Path) -> None:
    args = ("--sparsity", 0.613, "--skip", "*.mlp.down_proj", "--tokens", base / "tokens.safetensors")
    planned = trim_json("plan", base / "model", *args, "--save-model", tmp_path / "pruned", *COMPUTE)
    done = trim_json(
        "prune", base / "model", "-o", tmp_path / "masks", *args, "--save-model", tmp_path / "pruned", *COMPUTE,
        "--cache-dir", tmp_path / "cache",
    )  # fmt: skip
    assert (planned["weights"], planned["zeros"]) == (done["weights"], done["zeros"])
    assert len(planned["linears"]) == done["linears"] == 12
    assert planned["mask_bytes"] == sum(one["shape"][0] * -(-one["shape"][1] // 8) for one in planned["linears"])
    tensors = sum(path.stat().st_size for path in (tmp_path / "pruned").glob("*.safetensors"))
    assert planned["model_bytes"] == pytest.approx(tensors, abs=4096)
    assert sorted(planned["left_dense"]) == [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]


def test_a_plan_writes_nothing_and_needs_no_weights(tmp_path: Path) -> None:
    planned = trim_json("plan", DATA / "qwen2.5-3b", "--sparsity", 0.7, "--use-trim", "--cache-dir", tmp_path / "c")
    assert len(planned["linears"]) == 252
    assert planned["sparsity"] == pytest.approx(0.7, abs=1e-6)
    assert planned["model_bytes"] is None
    assert planned["peak_host_bytes"] > 1 << 30
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_72_billion_weights_from_its_config_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2.5-72B's published shape, by hand."""
    config = json.loads((DATA / "qwen2.5-3b" / "config.json").read_text())
    heads = {"num_hidden_layers": 80, "max_window_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
    sizes = {"hidden_size": 8192, "intermediate_size": 29568, "vocab_size": 152064, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps({**config, **heads, **sizes}))
    options = PruneOptions(sparsity=0.75, device="cpu", dtype="bfloat16")
    monkeypatch.setattr("trimcli.pipeline.fit.available_bytes", lambda: 1 << 40)
    plan = foresee(str(tmp_path), options)  # on 256 samples of 2,048 tokens

    wide, narrow, mlp = 8192 * 8192, 1024 * 8192, 29568 * 8192  # q and o, k and v, and the MLP's three
    matrices = 2 * wide + 2 * narrow + 3 * mlp
    assert matrices == 877_658_112
    assert (len(plan.linears), plan.weights) == (7 * 80, 80 * matrices)
    assert plan.zeros == 80 * matrices * 3 // 4
    assert plan.mask_bytes == 80 * matrices // 8
    assert plan.forward_passes == pytest.approx(2 - 1 / 80)
    layer = 2 * (matrices + 8192 + 2 * 1024 + 2 * 8192)  # in bfloat16, with the biases of q, k and v and two norms
    states = 256 * 2048 * 8192 * 2
    assert states == pytest.approx(8.6e9, rel=0.01)
    # One matrix in float32 with scores and a mask, blocks of its rows, and the square norms of what down_proj reads.
    worked = (4 + 8) * mlp + 18 * (1 << 22) + 4 * 256 * 29568
    assert plan.host_bytes == (368 << 20) + layer + worked + states == pytest.approx(13.7e9, rel=0.01)

    monkeypatch.setattr("trimcli.pipeline.fit.available_bytes", lambda: 8 << 30)
    small = foresee(str(tmp_path), options)
    assert (small.host_bytes, small.spill_bytes) == (plan.host_bytes - states, states)
    assert small.host_bytes < 8 << 30
    monkeypatch.setattr("trimcli.pipeline.fit.available_bytes", lambda: None)

    four = World()
    four.size = 4
    monkeypatch.setattr("trimcli.pipeline.estimate.current", lambda: four)
    assert foresee(str(tmp_path), options).host_bytes == plan.host_bytes - states * 3 // 4


def test_the_tables_name_matrices_and_passes(base: Path) -> None:
    shown = trim("plan", base / "model", "--sparsity", 0.5, *COMPUTE)
    assert shown.status == 0
    assert "mlp.up_proj" in shown.out
    assert "40 x 32" in shown.out
    assert "14 matrices" in shown.out
    assert "1.5 forward passes in float32 on cpu" in shown.out
    patterned = trim("plan", base / "model", "--sparsity-type", "2:4", *COMPUTE)
    [row] = [line for line in patterned.out.splitlines() if line.startswith("mlp.up_proj")]
    assert row.split() == ["mlp.up_proj", "2", "40", "x", "32", "2:4", "(0.5000)", "1,280"]
    assert "0 matrices left dense" in patterned.out


def test_a_table_shows_the_patterns_of_a_mixed_allocation(base: Path, tmp_path: Path) -> None:
    ratios = tmp_path / "ratios.json"
    allocate(str(base / "model"), ratios, AllocateOptions(sparsity=0.5))
    document = json.loads(ratios.read_text())
    document["pattern"] = {name: [3, 8] if "layers.0" in name else [5, 8] for name in document["sparsity"]}
    document["sparsity"] = {name: 1 - kept / 8 for name, (kept, _) in document["pattern"].items()}
    ratios.write_text(json.dumps(document))
    shown = trim("plan", base / "model", "--ratios", ratios, *COMPUTE)
    [row] = [line for line in shown.out.splitlines() if line.startswith("mlp.up_proj")]
    assert row.split()[2:] == ["40", "x", "32", "3:8,", "5:8", "(0.3750", "to", "0.6250)", "1,280"]


@pytest.mark.skipif(not CONVERTS, reason="transformers 4 leaves experts apart")
def test_matrices_left_dense_are_listed(tmp_path: Path) -> None:
    shown = trim("plan", save_family("mixtral", tmp_path / "mixtral"), "--sparsity", 0.5, *COMPUTE)
    assert "3 matrices left dense" in shown.out
    [experts] = [line for line in shown.out.splitlines() if line.startswith("block_sparse_moe.experts.*.w1")]
    assert experts.split()[1:5] == ["12", "64", "x", "32"]
    assert "left dense: mlp.gate.weight 4 x 32 in 3 layers: it is no linear's" in shown.out
    skipped = trim("plan", tmp_path / "mixtral", "--sparsity", 0.5, "--skip", "*.experts.*", *COMPUTE)
    left = "left dense: block_sparse_moe.experts.*.w2 32 x 64, 12 of them in 3 layers: it was not asked for"
    assert left in skipped.out


@pytest.mark.parametrize(
    ("recipe", "passes"),
    [
        (Recipe(method="magnitude"), 0),
        (Recipe(propagate=False), 0),
        (Recipe(), 1.75),
        (Recipe(method="sparsegpt"), 1.75),
        (Recipe(rows="trim", input_recalc=True), 4.75),
        (Recipe(barber=BarberOptions(metric="W")), 2.5),
        (Recipe(barber=BarberOptions()), 4.5),
        (Recipe(update="obs", propagate=True), 1.75),
        (Recipe(method="magnitude", reconstruct="layer", reconstruct_steps=8), 0.75 + 1.75 + 24),
        (Recipe(reconstruct="layer", reconstruct_steps=8), 1.75 + 1.75 + 24),
        (Recipe(reconstruct="layer", reconstruct_steps=8, reconstruct_blend=0), 1.75 + 1 + 24),
        (Recipe(update="cg"), 1.75),
        (Recipe(update="cg", target="dense"), 1.75 + 2),
        (Recipe(reconstruct="halves", reconstruct_steps=8), 1.75 + 2.75 + 48),
        (Recipe(refine="learned", refine_steps=8), 1.75 + 1 + 24),
        (Recipe(refine="learned", refine_steps=8, reconstruct="layer", reconstruct_steps=2), 1.75 + 1.75 + 30),
        (Recipe(rows="trim", propagate=False), 0),
    ],
)
def test_forward_passes(recipe: Recipe, passes: float) -> None:
    assert forward_passes(recipe, 4) == passes


@pytest.mark.parametrize(
    ("recipe", "seqlen", "training"),
    [
        (Recipe(reconstruct="layer", reconstruct_steps=8), 256, 24 * 2 / 64),
        (Recipe(reconstruct="layer", reconstruct_steps=8), 4096, 24 / 64),
        (Recipe(reconstruct="layer", reconstruct_steps=8, reconstruct_batch=5), 256, 24 * 5 / 64),
        (Recipe(refine="learned", refine_steps=8), 256, 24 * 8 / 64),
        (Recipe(refine="learned", refine_steps=8), 16, 24),
    ],
)
def test_a_step_of_training_is_a_part_of_the_samples(recipe: Recipe, seqlen: int, training: float) -> None:
    without = 1.75 + 1 + 0.75 * (recipe.reconstruct == "layer")
    assert forward_passes(recipe, 4, nsamples=64, seqlen=seqlen) == pytest.approx(without + training)


def test_ratios_and_allocations_are_foreseen(base: Path, tmp_path: Path) -> None:
    ratios = tmp_path / "ratios.json"
    allocate(str(base / "model"), ratios, AllocateOptions(sparsity=0.6))
    document = json.loads(ratios.read_text())
    document["sparsity"]["model.layers.0.mlp.up_proj"] = 0.25
    ratios.write_text(json.dumps(document))
    plan = foresee(str(base / "model"), PruneOptions(ratios=ratios))
    targets = {linear.name: linear.target.sparsity for linear in plan.linears}
    assert targets.pop("model.layers.0.mlp.up_proj") == 0.25
    assert set(targets.values()) == {0.6}
    for method in ("alpha", "owl"):
        plan = foresee(str(base / "model"), PruneOptions(allocate=AllocateOptions(method=method, sparsity=0.4)))
        assert {linear.target.sparsity for linear in plan.linears} == {0.4}


@pytest.mark.parametrize(
    ("chosen", "candidates", "together"),
    [
        (AllocateOptions(method="auto", sparsity=0.5), 5 + 4, 5),
        (AllocateOptions(method="auto", sparsity=0.5, options=(AutoOptions(auto_methods=("owl",)),)), 1 + 4, 4),
        (AllocateOptions(method="search", sparsity=0.5, options=(SearchOptions(search_samples=16),)), 96 + 2, 8),
    ],
)
def test_trials_of_an_allocation_count(
    chosen: AllocateOptions, candidates: int, together: int, base: Path, tmp_path: Path
) -> None:
    tokens = save_tokens(tmp_path / "tokens.safetensors", vocabulary=64, nsamples=32)
    drawn = CalibrateOptions(tokens=tokens, device="cpu", dtype="float32")
    plain = PruneOptions(sparsity=0.5, calibrate=drawn, device="cpu", dtype="float32")
    without, tried = (
        foresee(str(base / "model"), one) for one in (plain, replace(plain, sparsity=None, allocate=chosen))
    )
    walked = candidates + math.ceil(candidates / together)
    assert tried.forward_passes - without.forward_passes == pytest.approx(walked * 16 / 32)


def test_candidates_that_walk_together_need_memory(base: Path, tmp_path: Path) -> None:
    tokens = save_tokens(tmp_path / "tokens.safetensors", vocabulary=64, nsamples=20_000)
    drawn = CalibrateOptions(tokens=tokens, device="cpu", dtype="float32")
    searched = AllocateOptions(method="search", sparsity=0.5, options=(SearchOptions(search_samples=20_000),))
    plain = PruneOptions(sparsity=0.5, calibrate=drawn, device="cpu", dtype="float32")
    without, tried = (
        foresee(str(base / "model"), one) for one in (plain, replace(plain, sparsity=None, allocate=searched))
    )
    one = 20_000 * 16 * 32 * 4  # the hidden states of all samples: the dense model's and those of eight candidates
    assert 7 * one < tried.host_bytes - without.host_bytes < 9 * one


@pytest.mark.parametrize(
    ("recipe", "states", "statistics"),
    [
        (Recipe(method="magnitude"), 0, 0),
        (Recipe(), 1, 1),
        (Recipe(rows="trim"), 1, 2),
        (Recipe(method="obs"), 1, 0),  # a Gram is no larger for more samples
        (Recipe(method="magnitude", barber=BarberOptions()), 1, 0),
        (Recipe(refine="learned"), 2, 0),  # what fitting the last layer holds outweighs the statistics
    ],
)
def test_more_samples_need_more_memory(
    recipe: Recipe, states: int, statistics: int, base: Path, tmp_path: Path
) -> None:
    """The hidden states of every sample, and what every input group of a layer gathers of it."""
    peaks = []
    for nsamples in (40_000, 80_000):
        tokens = save_tokens(tmp_path / "tokens.safetensors", vocabulary=64, nsamples=nsamples)
        drawn = CalibrateOptions(tokens=tokens, device="cpu", dtype="float32")
        options = PruneOptions(sparsity=0.5, recipe=recipe, calibrate=drawn, device="cpu", dtype="float32")
        peaks.append(foresee(str(base / "model"), options).host_bytes)
    groups = 3 * 32 + 40
    assert peaks[1] - peaks[0] == 40_000 * 4 * (states * 16 * 32 + statistics * groups)


def test_nothing_that_matches_is_an_error(base: Path, tmp_path: Path) -> None:
    options = PruneOptions(sparsity=0.5, only=("*.attn.*",), cache_dir=tmp_path / "cache")
    for run in (
        lambda: foresee(str(base / "model"), options),
        lambda: prune(str(base / "model"), tmp_path / "m", options),
    ):
        with pytest.raises(OptionError, match=r"nothing matches: of 14 linears \(such as model\.layers\.0\.self_attn"):
            run()


@pytest.mark.parametrize("flag", ["only", "skip"])
def test_a_glob_without_effect_is_told(base: Path, tmp_path: Path, flag: str) -> None:
    options = PruneOptions(sparsity=0.5, recipe=Recipe(method="magnitude"), cache_dir=tmp_path / "cache")
    globs = ("*.up_proj", "*.mlp.up")
    options = replace(options, only=globs) if flag == "only" else replace(options, skip=globs)
    with pytest.warns(UserWarning, match=rf"--{flag} '\*\.mlp\.up' matches none of the 14 linears") as told:
        plan = foresee(str(base / "model"), options)
    assert len(told) == 1
    assert len(plan.linears) == (2 if flag == "only" else 12)
    with pytest.warns(UserWarning, match="matches none"):
        prune(str(base / "model"), tmp_path / "m", options)


def test_a_pattern_that_does_not_fit_is_refused(base: Path) -> None:
    with pytest.raises(OptionError, match="has 32 inputs, which do not divide into groups of 7"):
        foresee(str(base / "model"), PruneOptions(sparsity_type="3:7"))


def test_what_prune_refuses_plan_refuses(base: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no target was given"):
        foresee(str(base / "model"), PruneOptions())
    shutil.copytree(base / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no config\.json"):
        foresee(str(tmp_path / "model"), PruneOptions(sparsity=0.5))
    with pytest.raises(UsageError, match="there is no file"):
        foresee(str(base / "model"), PruneOptions(ratios=tmp_path / "missing.json"))
