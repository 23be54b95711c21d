"""ADMM's projection by brute force, its updates from the formulas, and the counts that come out."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.finetuned import pruned_model, tuned, weights
from tests.small_models import gpt2_config, llama_config
from tests.trim_cli import trim_json, zeros
from trimcli.commands.verify import verify
from trimcli.model.matrix import Matrix
from trimcli.training.admm import GROWTH, Budget, Splitting, lowest_counts


def matrix(name: str, *shape: int, seed: int = 0) -> Matrix:
    torch.manual_seed(seed)
    module = nn.Linear(shape[1], shape[0], bias=False)
    return Matrix(name, module, shape[0], shape[1], f"{name}.weight")


def test_z_is_the_nearest_point_by_brute_force() -> None:
    """Of all masks with so many zeros, the one with the least sum of what is lost, weighted."""
    torch.manual_seed(3)
    scores = {"a": torch.rand(2, 3), "b": torch.rand(1, 4)}
    flat = torch.cat([one.flatten() for one in scores.values()])
    for total in range(len(flat) + 1):
        best = min(itertools.combinations(range(len(flat)), total), key=lambda gone: float(flat[list(gone)].sum()))
        expected = torch.ones(len(flat), dtype=torch.bool)
        expected[list(best)] = False
        keep = Budget(total=total).project(scores)
        assert torch.equal(torch.cat([keep["a"].flatten(), keep["b"].flatten()]), expected)


def test_counts_and_patterns_hold_for_their_own_matrices() -> None:
    torch.manual_seed(4)
    scores = {name: torch.rand(4, 8) for name in "abc"}
    keep = Budget(total=3, counts={"b": 20}, patterns={"c": (2, 4)}).project(scores)
    assert [zeros(keep[name]) for name in "abc"] == [3, 20, 16]
    assert bool((keep["c"].unflatten(1, (2, 4)).sum(-1) == 2).all())
    for kept, one in zip(keep["c"].view(-1, 4), scores["c"].view(-1, 4), strict=True):
        assert set(kept.nonzero().flatten().tolist()) == set(one.topk(2).indices.tolist())


def test_equal_scores_go_in_order() -> None:
    scores = {"a": torch.zeros(2, 2), "b": torch.tensor([[0.0, 5.0, torch.inf]])}
    for total, expected in enumerate([(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (4, 1), (4, 2), (4, 3)]):
        assert tuple(lowest_counts(scores, total).values()) == expected


def test_the_updates_are_the_formulas() -> None:
    linear = matrix("a", 3, 4)
    x: nn.Parameter = linear.module.weight  # type: ignore[assignment]
    optimizer = torch.optim.Adam([x], lr=0.05)
    splitting = Splitting([linear], Budget(total=6), steps=5, interval=2, penalty=0.5)
    splitting.drive(optimizer)
    mine = x.detach().clone()
    u = torch.zeros(3, 4)
    z = nearest(mine.square(), mine, 6)
    m = v = torch.zeros(3, 4)
    aim = torch.randn(3, 4)
    for step in range(5):
        optimizer.zero_grad()
        (0.5 * (x - aim).square()).sum().backward()
        optimizer.step()
        strength = 0.5 * GROWTH ** (step / 5)
        gradient = (mine - aim) + strength * (mine - z + u)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        mine = mine - 0.05 * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        if step in (1, 3, 4):
            z = nearest(v * (mine + u) ** 2, mine + u, 6)
            u = u + mine - z
        torch.testing.assert_close(x.detach(), mine, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(splitting.z["a"], z, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(splitting.u["a"], u, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        splitting.settle()
    assert zeros(x.detach()) == 6


def nearest(scores: Tensor, values: Tensor, gone: int) -> Tensor:
    found = values.clone()
    for place in sorted(range(values.numel()), key=lambda place: float(scores.flatten()[place]))[:gone]:
        found.view(-1)[place] = 0
    return found


def test_its_state_is_taken_up_again(tmp_path: Path) -> None:
    one, other = (
        Splitting([matrix("a", 3, 4, seed=seed)], Budget(total=6), steps=5, interval=2, penalty=0.5) for seed in (0, 1)
    )
    one.step = 3
    one.u["a"] += 1.5
    one.save(tmp_path)
    assert not torch.equal(other.z["a"], one.z["a"])
    other.load(tmp_path)
    assert other.step == 3
    for part in ("z", "u", "keep"):
        assert torch.equal(getattr(one, part)["a"], getattr(other, part)["a"])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_dense_model_to_a_share_of_all_its_weights(family: str, tmp_path: Path) -> None:
    config = llama_config() if family == "llama" else gpt2_config()
    pruned_model(config, tmp_path)
    summary = tuned(tmp_path / "dense", tmp_path / "out", mode="admm", sparsity=0.7, interval=2, kl=0.0)
    verify(tmp_path / "out").check()
    weights_in_all = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 40 * 32) if family == "llama" else 2 * 12 * 32 * 32
    assert summary.zeros == round(0.7 * weights_in_all)
    assert [record["phase"] for record in summary.records] == ["admm", "full"]
    assert summary.steps == 6


def test_layers_by_a_file(tmp_path: Path) -> None:
    import json

    pruned_model(llama_config(), tmp_path)
    ratios = tmp_path / "ratios.json"
    trim_json("alloc-layers", tmp_path / "dense", "-o", ratios, "--method", "depth", "--sparsity", 0.5)
    tuned(tmp_path / "dense", tmp_path / "out", mode="admm", ratios=ratios, interval=2, kl=0.0)
    verify(tmp_path / "out").check()
    asked = json.loads(ratios.read_text())["sparsity"]
    found = weights(tmp_path / "out")
    for name, sparsity in asked.items():
        weight = found[f"{name}.weight"]
        assert zeros(weight) == round(sparsity * weight.numel())
    assert len(set(asked.values())) > 1


def test_a_pattern_and_a_pruned_model_s_own(tmp_path: Path) -> None:
    pruned = pruned_model(llama_config(), tmp_path, pattern=(2, 4))
    common = {"mode": "admm", "interval": 2, "kl": 0.0}
    tuned(tmp_path / "dense", tmp_path / "asked", sparsity_type="1:4", **common)
    tuned(pruned, tmp_path / "own", **common)
    for folder, kept in (("asked", 1), ("own", 2)):
        verify(tmp_path / folder).check()
        weight = weights(tmp_path / folder)["model.layers.1.mlp.down_proj.weight"]
        assert bool(((weight != 0).unflatten(1, (-1, 4)).sum(-1) == kept).all())


def test_the_count_of_a_pruned_model_is_kept_and_its_masks_are_not(tmp_path: Path) -> None:
    pruned = pruned_model(llama_config(), tmp_path)
    summary = tuned(pruned, tmp_path / "out", mode="admm", interval=1, steps=12, kl=0.0)
    before, after = weights(pruned), weights(tmp_path / "out")
    names = [name for name in before if "proj" in name]
    assert summary.zeros == sum(zeros(before[name]) for name in names)
    assert any(not torch.equal(before[name] == 0, after[name] == 0) for name in names)
