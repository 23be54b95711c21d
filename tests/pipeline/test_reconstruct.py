"""Reconstruction: masks held to the bit, never worse than its start, norms and biases saved, resumed, and refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, OlmoConfig

from tests.families import several_forms
from tests.interrupt import InterruptAt
from tests.small_models import skeleton_of
from tests.trim_cli import COMPUTE, trim, trim_json
from trimcli import PruneOptions, Recipe, prune
from trimcli.errors import OptionError
from trimcli.files.masks import MaskFile
from trimcli.files.tensors import read_manifest
from trimcli.methods.blocks.reconstruct import Batch, looks, prediction_error, reconstruct
from trimcli.methods.stats import fitting_samples
from trimcli.pipeline.reconstruct import Guide
from trimcli.pipeline.walk import Walk

REC: tuple[object, ...] = ("--reconstruct", "layer", "--reconstruct-steps", 16, "--reconstruct-lr", 0.002)


class Toy(nn.Module):
    """A linear and a norm's gain, which gives back a tuple."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, hidden: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:
        return hidden + scale * torch.tanh(self.linear(hidden)) * self.gain, None


def batches(dense: Toy, count: int, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(
        3, 8, generator=torch.Generator().manual_seed(5)
    )  # of inputs that are alike nothing is made up
    inputs = [torch.randn(2, 5, 3, generator=generator) @ mixing for _ in range(count)]
    targets = [dense(one)[0].detach() for one in inputs]
    return [
        Batch(lambda one=one: ((one,), {"scale": 1.0}), lambda target=target: target)  # type: ignore[misc]
        for one, target in zip(inputs, targets, strict=True)
    ]


def toy(steps: int, lr: float = 0.02) -> tuple[Any, Tensor, Toy]:
    dense, pruned = Toy(), Toy().requires_grad_(False)
    keep = torch.rand(8, 8, generator=torch.Generator().manual_seed(3)) > 0.6
    pruned.linear.weight.mul_(keep)
    made = reconstruct(
        pruned, {"linear.weight": keep, "linear.bias": None, "gain": None}, batches(dense, 40), batches(dense, 3, 9),
        steps=steps, lr=lr,
    )  # fmt: skip
    return made, keep, pruned


def test_the_surviving_weights_come_nearer_and_the_others_stay_zero() -> None:
    made, keep, pruned = toy(80)
    assert made.after < 0.8 * made.before
    assert not made.values["linear.weight"][~keep].count_nonzero()
    assert made.values["linear.weight"][keep].all()
    assert not torch.equal(made.values["gain"], torch.ones(8))
    assert torch.equal(pruned.gain, torch.ones(8)), "the layer is left as it was"


def test_the_errors_are_those_of_the_values() -> None:
    """By hand: squared error relative to the target's, token by token, on the held-out batches."""
    made, _, pruned = toy(40)
    for name, value in (("linear.weight", made.values["linear.weight"]), ("gain", made.values["gain"])):
        pruned.get_parameter(name).copy_(value)
    pruned.linear.bias.copy_(made.values["linear.bias"])
    errors = []
    for batch in batches(Toy(), 3, 9):
        (args, kwargs), target = batch.call(), batch.target()
        gap = (pruned(*args, **kwargs)[0] - target).square().sum(dim=-1)
        errors.append((gap / target.square().sum(dim=-1)).mean())
    assert made.after == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)


@pytest.mark.parametrize("tokens", [100, 2, 1])
def test_the_last_layers_error_is_what_the_predictions_differ_by(tokens: int) -> None:
    """Value and gradient are the KL divergence's, however few logits are held, and though a token is ruled out."""
    generator = torch.Generator().manual_seed(1)
    found, target = torch.randn(2, 2, 5, 8, generator=generator)
    weight, barred = torch.randn(11, 8, generator=generator), torch.zeros(11)
    barred[4] = -torch.inf

    def logits(hidden: Tensor) -> Tensor:
        return hidden @ weight.T + barred

    error = prediction_error(logits, tokens)
    with torch.enable_grad():
        mine, oracle = found.clone().requires_grad_(), found.clone().requires_grad_()
        value = error(mine, target)
        value.backward()
        usable = [token for token in range(11) if token != 4]
        sure, given = (logits(one)[..., usable].log_softmax(dim=-1).flatten(0, 1) for one in (target, oracle))
        wanted = torch.nn.functional.kl_div(given, sure, log_target=True, reduction="batchmean")
        wanted.backward()
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(mine.grad, oracle.grad)
    torch.testing.assert_close(error(found, target), wanted.detach())
    assert not error(target, target)


def test_the_last_layer_is_fitted_to_the_predictions(home: Path, tmp_path: Path) -> None:
    """The manifest's error of the last layer is the divergence on the held-out samples, of the directory as written."""
    pruned = ("prune", home / "nano", "--sparsity", 0.6, "--tokens", home / "tokens", "--cache-dir", home / "cache")
    trim_json(*pruned, "-o", tmp_path / "masks", "--save-model", tmp_path / "model", *REC, *COMPUTE)
    errors = read_manifest(tmp_path / "masks")["reconstruction"]
    tokens = load_file(home / "tokens")["tokens"].long()
    held = tokens[fitting_samples(len(tokens)) :]
    dense, mine = (
        AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)(held).logits.log_softmax(dim=-1).flatten(0, 1)
        for place in (home / "nano", tmp_path / "model")
    )
    wanted = float(torch.nn.functional.kl_div(mine, dense, log_target=True, reduction="batchmean"))
    last = list(errors.values())[-1]
    assert last[1] == pytest.approx(wanted, rel=1e-3)
    assert last[1] < last[0]


def test_it_is_never_worse_than_its_start() -> None:
    made, _, pruned = toy(8, lr=0.9)
    assert made.after <= made.before
    if made.after == made.before:
        assert torch.equal(made.values["linear.weight"], pruned.linear.weight)


@pytest.mark.parametrize(("steps", "asked"), [(1, {1}), (3, {1, 2, 3}), (8, {2, 4, 6, 8}), (255, {64, 128, 192, 255})])
def test_the_last_step_is_always_looked_at(steps: int, asked: set[int]) -> None:
    assert looks(steps) == asked


def test_small_gradients_are_not_lost_in_float16() -> None:
    """Of a wide layer's relative error, whose gradient by a hidden state is below what float16 holds."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(512, 512, bias=False, dtype=torch.float16)
    dense = torch.randn(512, 512, generator=generator) / 512**0.5
    keep = torch.rand(512, 512, generator=generator) > 0.5
    layer.weight.data = (dense * keep).half()
    inputs = 1000 * torch.randn(2, 1024, 512, generator=generator)
    batches = [
        Batch(lambda one=one: ((one[None].half(),), {}), lambda one=one: one[None] @ dense.T)  # type: ignore[misc]
        for one in inputs
    ]
    made = reconstruct(layer, {"weight": keep}, batches, batches, steps=8, lr=0.02)
    moved = (made.values["weight"] != layer.weight.float())[keep]
    assert moved.float().mean() > 0.95
    assert made.after < 0.98 * made.before


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of several forms, and tokens for them."""
    return several_forms(tmp_path_factory.mktemp("reconstruct"))


@pytest.mark.parametrize("method", ["wanda", "admm", "magnitude"])
@pytest.mark.parametrize("form", ["llama", "gpt2", "opt", "gpt-neox"])
def test_masks_hold_and_the_directory_is_whole(form: str, method: str, home: Path, tmp_path: Path) -> None:
    masks, pruned, plain = tmp_path / "masks", tmp_path / "pruned", tmp_path / "plain"
    shared = ("--method", method, "--sparsity", 0.5, "--tokens", home / "tokens", "--batch-size", 2, *COMPUTE)
    run = ("--cache-dir", tmp_path / "cache", *shared)
    found = trim_json("prune", home / form, "-o", masks, "--save-model", pruned, *run, *REC)
    assert found["sparsity"] == pytest.approx(0.5, abs=1e-3)
    trim_json("verify", pruned, "--masks", masks)
    trim_json("prune", home / form, "-o", tmp_path / "m", "--save-model", plain, *run)
    dense, keep = load_file(home / form / "model.safetensors"), MaskFile.open(masks)
    before, after = load_file(plain / "model.safetensors"), load_file(pruned / "model.safetensors")
    assert {key: one.dtype for key, one in dense.items()} == {key: one.dtype for key, one in after.items()}
    skeleton = skeleton_of(home / form)
    moved = 0
    for name in keep.names:
        linear = skeleton.linears[name]
        assert linear.key is not None
        assert not linear.within(after[linear.key])[~keep.keep(name)].count_nonzero()
        moved += not torch.equal(after[linear.key], before[linear.key])
    assert moved or method == "admm", "which leaves little to random models"
    vectors = [
        key
        for key, one in dense.items()
        if one.ndim == 1 and any(layer.name.split(".")[-2] in key for layer in skeleton.layers)
    ]
    assert bool(moved) == any(not torch.equal(after[key], dense[key]) for key in vectors)
    errors = read_manifest(masks)["reconstruction"]
    assert set(errors) == {layer.name for layer in skeleton.layers}
    assert all(after <= before for before, after in errors.values())
    assert bool(moved) == any(after < before for before, after in errors.values())
    AutoModelForCausalLM.from_pretrained(pruned)


@pytest.mark.parametrize("unit", ["layer", "halves"])
def test_an_interrupted_run_ends_in_the_same_bytes(unit: Any, home: Path, tmp_path: Path) -> None:
    def run(place: str, progress: Any = None) -> Path:
        recipe = Recipe(method="admm", reconstruct=unit, reconstruct_steps=6)
        options = PruneOptions(
            recipe=recipe, sparsity=0.5, calibration=home / "calib", save_model=tmp_path / place / "model",
            cache_dir=tmp_path / "cache" / place, batch_size=2, device="cpu", dtype="float32",
        )  # fmt: skip
        more = {} if progress is None else {"progress": progress}
        prune(str(home / "llama"), tmp_path / place / "masks", options, **more)
        return tmp_path / place / "model" / "model.safetensors"

    calibrated = ("--tokens", home / "tokens", "--cache-dir", tmp_path / "c", "--force")
    trim_json("calibrate", home / "llama", "-o", home / "calib", *calibrated)
    for place in ("whole", "cut"):
        (tmp_path / place).mkdir()
    expected = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", InterruptAt("layer 2/2 reconstruct"))
    assert run("cut").read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("form", ["recorded", "suspended"])
@pytest.mark.parametrize("blend", [0.0, 0.25, 1.0])
def test_targets_are_what_the_dense_layer_makes_of_a_mixture(blend: float, form: Any, home: Path) -> None:
    """By hand: the hidden states of both models, mixed and handed to the dense model's layer; but for the last one."""
    tokens = load_file(home / "tokens")["tokens"]
    skeleton, rows = skeleton_of(home / "nano"), slice(2, 3)
    walk, dense = (Walk(skeleton, tokens, form=form, batch_size=4) for _ in range(2))
    guide = Guide(dense, Recipe(reconstruct="halves", reconstruct_blend=blend))
    model = AutoModelForCausalLM.from_pretrained(home / "nano", dtype=torch.float32).model.requires_grad_(False)
    mine = model.embed_tokens(tokens[rows].long())
    theirs, last = mine.clone(), len(model.layers) - 1
    places = {"position_embeddings": model.rotary_emb(mine, torch.arange(mine.shape[1])[None])}
    for layer, oracle in zip(walk.layers(), model.layers, strict=True):
        guide.advance(layer, walk)
        given = theirs if layer.index == last else torch.lerp(theirs, mine, blend)
        between = given + oracle.self_attn(oracle.input_layernorm(given), attention_mask=None, **places)[0]
        torch.testing.assert_close(guide.halfway(rows), between)
        torch.testing.assert_close(guide.target(rows), oracle(given, **places))
        theirs = oracle(theirs, **places)
        torch.testing.assert_close(guide.dense(rows), theirs)
        for linear in layer.linears:
            linear.write(None, linear.weight.abs() > linear.weight.abs().median())
            weight = oracle.get_submodule(linear.name.removeprefix(f"{layer.name}.")).weight
            weight.copy_(weight * (weight.abs() > weight.abs().median()))
        mine = oracle(mine, **places)
        walk.advance(layer)
    assert not torch.allclose(mine, theirs)


def test_what_does_not_go_with_it_is_refused(home: Path, tmp_path: Path) -> None:
    base = ("prune", home / "llama", "-o", tmp_path / "m", "--sparsity", 0.5, "--reconstruct", "layer")
    for more, sentence in (
        ((), "--save-model"),
        (("--save-model", tmp_path / "d", "--no-propagate"), "--no-propagate with --reconstruct"),
        (("--save-model", tmp_path / "d", "--prune-barber"), "--prune-barber with --reconstruct"),
        (("--save-model", tmp_path / "d", "--reconstruct-batch", 0), "--reconstruct-batch 0 must be at least 1"),
        (("--save-model", tmp_path / "d", "--reconstruct-lr", 2), "--reconstruct-lr 2 is no learning rate"),
        (("--save-model", tmp_path / "d", "--reconstruct-blend", 1.5), "--reconstruct-blend 1.5 is outside [0, 1]"),
    ):
        done = trim(*base, *more)
        assert done.status == 2
        assert sentence in done.err
    with pytest.raises(OptionError, match="--reconstruct 'halvs' is none of none, layer, halves"):
        Recipe(reconstruct="halvs").check()  # type: ignore[arg-type]


def fitted(home: Path, form: str, place: Path, *more: object) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The masks' manifest and the tensors of a prune with a reconstruction."""
    place.mkdir()
    shared = ("--sparsity", 0.5, "--tokens", home / "tokens", "--cache-dir", place / "cache", *COMPUTE)
    trim_json("prune", home / form, "-o", place / "masks", "--save-model", place / "model", *shared, *more)
    trim_json("verify", place / "model", "--masks", place / "masks")
    return read_manifest(place / "masks"), load_file(place / "model" / "model.safetensors")


@pytest.mark.parametrize("form", ["nano", "gpt2", "opt"])
def test_halves_fit_attention_and_mlp(form: str, home: Path, tmp_path: Path) -> None:
    halves = ("--reconstruct", "halves", *REC[2:])
    manifest, after = fitted(home, form, tmp_path / "halves", *halves)
    start = fitted(home, form, tmp_path / "start", "--reconstruct", "layer", "--reconstruct-steps", 1)[0]
    layers = sorted(start["reconstruction"])
    assert manifest["reconstruction"][layers[0]][0] == pytest.approx(start["reconstruction"][layers[0]][0], rel=1e-5)
    assert all(after < before for before, after in manifest["reconstruction"].values())
    assert manifest["options"]["recipe"]["reconstruct"]["unit"] == "halves"
    dense, keep = load_file(home / form / "model.safetensors"), MaskFile.open(tmp_path / "halves" / "masks")
    skeleton = skeleton_of(home / form)
    for name in keep.names:  # those of both halves moved
        linear, mask = skeleton.linears[name], keep.keep(name)
        assert linear.key is not None
        found = linear.within(after[linear.key])
        assert not found[~mask].count_nonzero()
        assert not torch.equal(found, linear.within(dense[linear.key]) * mask)


def test_halves_are_never_worse_than_their_start(home: Path, tmp_path: Path) -> None:
    manifest, after = fitted(home, "llama", tmp_path / "a", "--reconstruct", "halves", "--reconstruct-lr", 0.99)
    trim_json(
        "prune", home / "llama", "-o", tmp_path / "m", "--save-model", tmp_path / "plain", "--sparsity", 0.5,
        "--tokens", home / "tokens", "--cache-dir", tmp_path / "cache", *COMPUTE,
    )  # fmt: skip
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    pairs = list(manifest["reconstruction"].values())
    assert all(after <= before for before, after in pairs)
    if all(after == before for before, after in pairs):
        assert all(torch.equal(one, plain[key]) for key, one in after.items())


@pytest.mark.parametrize("half", ["--only", "--skip"])
def test_half_a_layer_may_have_nothing_to_learn(half: str, home: Path, tmp_path: Path) -> None:
    """OLMo's layers have neither biases nor norms with weights."""
    config = OlmoConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(home / "olmo")
    manifest, _ = fitted(home, "olmo", tmp_path / "one", "--reconstruct", "halves", *REC[2:], half, "*mlp*")
    assert all(after < before for before, after in manifest["reconstruction"].values())


def test_halves_of_a_layer_without_them_are_refused(home: Path, tmp_path: Path) -> None:
    done = trim(
        "prune", home / "gpt-neox", "-o", tmp_path / "m", "--sparsity", 0.5, "--save-model", tmp_path / "d",
        "--tokens", home / "tokens", "--cache-dir", tmp_path / "cache", "--reconstruct", "halves", *COMPUTE,
    )  # fmt: skip
    assert done.status == 2
    assert "--reconstruct halves cannot work on gpt_neox.layers.0" in done.err
    assert "run in parallel" in done.err


def test_a_step_is_of_so_many_samples_whatever_the_batches_of_the_walk(home: Path, tmp_path: Path) -> None:
    two = ("--reconstruct-batch", 2)
    _, one = fitted(home, "llama", tmp_path / "one", *REC, *two, "--batch-size", 1)
    _, four = fitted(home, "llama", tmp_path / "four", *REC, *two, "--batch-size", 4)
    _, other = fitted(home, "llama", tmp_path / "other", *REC, "--reconstruct-batch", 5, "--batch-size", 4)
    key = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(one[key], four[key], rtol=0, atol=2e-4)
    assert (other[key] - one[key]).abs().max() > 2e-3, "or the sizes would not matter"
