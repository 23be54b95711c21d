"""What hooks gather, against the formulas computed from the model's own activations in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.families import VOCABULARY, save_family
from tests.small_models import add_uncalled_linears, llama_config, random_model, save, skeleton_of
from trimcli.errors import InputError, TrimError
from trimcli.methods.stats import GRAM, STATISTICS, GramOptions, LinearStats
from trimcli.model.matrix import Matrix
from trimcli.pipeline.collector import Collector, find_groups, refuse_unusable
from trimcli.pipeline.walk import Walk

ALL = frozenset(name for name, one in STATISTICS.items() if not one.paired)


def own_inputs(model_directory: Path, names: list[str], tokens: Tensor) -> dict[str, Tensor]:
    """Every linear's inputs [N, L, D_in] in the model's own forward pass."""
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32).eval()
    found: dict[str, Tensor] = {}
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, name=name: found.__setitem__(name, args[0].detach().clone()))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    return {name: inputs.reshape(len(tokens), -1, inputs.shape[-1]) for name, inputs in found.items()}


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "falcon", "phi"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_statistics_are_the_formulas(family: str, batch_size: int, tmp_path: Path) -> None:
    model = save_family(family, tmp_path / family)
    tokens = torch.randint(2, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(1))
    skeleton = skeleton_of(model)
    inputs = own_inputs(model, list(skeleton.linears), tokens)
    walk = Walk(skeleton, tokens, batch_size=batch_size)
    for layer in walk.layers():
        collector = Collector(walk.groups(layer), ALL, 5, 12, skeleton.device)
        walk.advance(layer, collector)
        stats = collector.by_linear()
        assert set(stats) == {linear.name for linear in layer.linears}
        for name, found in stats.items():
            x = inputs[name].double()
            sqnorm = x.square().sum(dim=(0, 1)) / len(tokens)
            gram = 2 / len(tokens) * torch.einsum("nli,nlj->ij", x, x)
            assert set(found.tensors) == ALL
            assert (found.sqnorm.dtype, found.inputs.dtype) == (torch.float32, torch.float32)
            torch.testing.assert_close(found.sqnorm.double(), sqnorm, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found.inputs.double(), x[:, -1].T, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.gram.double(), gram, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_inputs_of_two_models_are_paired(family: str, batch_size: int, tmp_path: Path) -> None:
    """Hidden states of other tokens stand for the dense model's."""
    model = save_family(family, tmp_path / family)
    draw = torch.Generator().manual_seed(1)
    tokens, others = (torch.randint(2, VOCABULARY, (5, 12), generator=draw) for _ in range(2))
    skeleton = skeleton_of(model)
    names = list(skeleton.linears)
    inputs, dense = own_inputs(model, names, tokens), own_inputs(model, names, others)
    walk, other = (Walk(skeleton, one, batch_size=batch_size) for one in (tokens, others))
    for layer in walk.layers():
        beside = lambda rows, layer=layer: walk.call(layer, rows, other.states(rows))  # noqa: E731
        paired = frozenset({"fitting", "heldout", "cross", "heldout_cross", "heldout_dense"})
        collector = Collector(walk.groups(layer), paired, 5, 12, skeleton.device, dense=beside)
        walk.collect(layer, collector)
        for name, found in collector.by_linear().items():
            (x, held), (z, held_z) = ((one[name][:4], one[name][4]) for one in (inputs, dense))
            expected = {
                "fitting": 2 / 4 * torch.einsum("nli,nlj->ij", x, x),
                "heldout": 2 * held.T @ held,
                "cross": 2 / 4 * torch.einsum("nli,nlj->ij", z, x),
                "heldout_cross": 2 * held_z.T @ held,
                "heldout_dense": 2 * held_z.T @ held_z,
            }
            assert set(found.tensors) == set(expected)
            for kind, tensor in expected.items():
                torch.testing.assert_close(found.tensors[kind], tensor, rtol=1e-4, atol=1e-4)
        other.advance(layer)
        walk.advance(layer)


def test_the_gram_in_float64(tmp_path: Path) -> None:
    skeleton = skeleton_of(save(random_model(llama_config()), tmp_path / "llama"))
    walk = Walk(skeleton, torch.arange(24).reshape(2, 12))
    layer = walk.skeleton.layers[0]
    walk.skeleton.load_layer(layer)
    wide = {GRAM: GramOptions("float64")}
    collector = Collector(walk.groups(layer), ALL, 2, 12, skeleton.device, wide.get)
    walk.collect(layer, collector)
    found = collector.by_linear()[layer.linears[0].name]
    assert found.gram.dtype == torch.float64
    assert found.sqnorm.dtype == torch.float32
    narrow = Collector(walk.groups(layer), ALL, 2, 12, skeleton.device)
    walk.collect(layer, narrow)
    close = narrow.by_linear()[layer.linears[0].name].gram
    assert close.dtype == torch.float32
    torch.testing.assert_close(close.double(), found.gram, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("needs", [set(), {"sqnorm"}, {"gram", "inputs"}])
def test_what_is_not_needed_is_not_gathered(needs: set[str], tmp_path: Path) -> None:
    skeleton = skeleton_of(save(random_model(llama_config()), tmp_path / "llama"))
    walk = Walk(skeleton, torch.arange(24).reshape(2, 12))
    layer = walk.skeleton.layers[0]
    walk.skeleton.load_layer(layer)
    collector = Collector(walk.groups(layer), frozenset(needs), 2, 12, skeleton.device)
    walk.collect(layer, collector)
    stats = collector.by_linear()
    assert len(stats) == len(layer.linears)
    assert all(set(found.tensors) == needs for found in stats.values())
    q, k = (stats[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    assert q is k


def outputs_of(linear: Matrix) -> list[Tensor]:
    """What a linear gives from now on."""
    given: list[Tensor] = []
    linear.module.register_forward_hook(lambda _, args, output: given.append(output))
    return given


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_layer_is_left_where_the_last_statistic_is_taken(batch_size: int, tmp_path: Path) -> None:
    tokens = torch.randint(2, 60, (5, 12), generator=torch.Generator().manual_seed(1))
    skeleton = skeleton_of(save(random_model(llama_config()), tmp_path / "llama"))
    walk = Walk(skeleton, tokens, batch_size=batch_size)
    layer = skeleton.layers[0]
    skeleton.load_layer(layer)
    groups, before = walk.groups(layer), walk.states(slice(0, 5)).clone()
    first, middle, last = (outputs_of(groups[place].linears[0]) for place in (0, 1, -1))
    left, whole, part = (Collector(some, ALL, 5, 12, skeleton.device) for some in (groups, groups, groups[:1]))
    walk.collect(layer, left)
    assert (len(first), len(middle), len(last)) == (5 // batch_size, 5 // batch_size, 0)
    assert torch.equal(walk.states(slice(0, 5)), before)
    walk.collect(layer, part)
    assert (len(first), len(middle), len(last)) == (5 // batch_size, 5 // batch_size, 0)
    walk.advance(layer, whole)
    assert len(last) == 5 // batch_size
    for found in (left, part):
        for name, stats in found.by_linear().items():
            for kind, tensor in stats.tensors.items():
                assert torch.equal(tensor, whole.by_linear()[name].tensors[kind])


def test_a_layer_that_calls_a_linear_again_is_run_to_its_end(tmp_path: Path) -> None:
    skeleton = skeleton_of(save(random_model(llama_config()), tmp_path / "llama"))
    walk = Walk(skeleton, torch.arange(24).reshape(2, 12))
    layer = skeleton.layers[0]
    skeleton.load_layer(layer)
    last = outputs_of(layer.linears[-1])
    mlp: Any = layer.module.mlp
    whole = mlp.forward
    mlp.forward = lambda hidden: whole(hidden) + whole(2 * hidden)
    groups = walk.groups(layer)
    assert [group.once for group in groups] == [True, True, False, False, False]
    last.clear()
    walk.collect(layer, Collector(groups, ALL, 2, 12, skeleton.device))
    assert len(last) == 2


GROUPS = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "opt": [["k_proj", "v_proj", "q_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    # Attention and MLP side by side read the same tensor.
    "phi": [["q_proj", "k_proj", "v_proj", "fc1"], ["dense"], ["fc2"]],
}


@pytest.mark.parametrize("family", GROUPS)
def test_linears_that_share_an_input_form_a_group(family: str, tmp_path: Path) -> None:
    walk = Walk(skeleton_of(save_family(family, tmp_path / family)), torch.arange(2, 10)[None])
    layer = walk.skeleton.layers[0]
    walk.skeleton.load_layer(layer)
    groups = walk.groups(layer)
    assert [[one.name.rpartition(".")[2] for one in group.linears] for group in groups] == GROUPS[family]
    order = [linear.name for linear in layer.linears]
    for group in groups:
        assert group.name == group.linears[0].name
        assert [one.name for one in group.linears] == sorted((one.name for one in group.linears), key=order.index)
        assert {linear.d_in for linear in group.linears} == {group.d_in}


def test_a_linear_that_its_layer_never_calls_is_named(tmp_path: Path) -> None:
    walk = Walk(skeleton_of(save(random_model(llama_config()), tmp_path / "llama")), torch.arange(4)[None])
    layer = walk.skeleton.layers[0]
    walk.skeleton.load_layer(layer)
    with pytest.raises(
        TrimError, match=r"self_attn\.q_proj is never called .* --skip '\*\.self_attn\.\*' --skip '\*\.mlp\.\*'\."
    ):
        find_groups(layer, lambda: None)
    with pytest.raises(TrimError, match=r"model\.layers\.0\.mlp\.up_proj is never called by its layer"):
        find_groups(layer, lambda: None, {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"})
    assert find_groups(layer, lambda: None, {"model.layers.1.mlp.up_proj"}) == []


def test_a_linear_that_its_layer_never_calls_is_no_obstacle_where_it_is_not_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_uncalled_linears(monkeypatch)
    skeleton = skeleton_of(save(random_model(llama_config()), tmp_path / "llama"))
    tokens = torch.arange(24).reshape(2, 12)
    names = list(skeleton.linears)
    spares = [name for name in names if name.endswith(".spare")]
    assert len(spares) == 2
    for wanted in (None, names):
        walk = Walk(skeleton, tokens, wanted=wanted)
        for layer in walk.layers():
            with pytest.raises(
                TrimError, match=rf"{layer.name}\.mlp\.spare is never called .* --skip '\*\.mlp\.spare'\.$"
            ):
                walk.groups(layer)
    wanted = [name for name in names if name not in spares]
    walk = Walk(skeleton, tokens, wanted=wanted)
    seen = []
    for layer in walk.layers():
        collector = Collector(walk.groups(layer), ALL, 2, 12, skeleton.device)
        walk.advance(layer, collector)
        seen += list(collector.by_linear())
    assert sorted(seen) == sorted(wanted)


def test_a_group_is_of_the_wanted_linears_alone(tmp_path: Path) -> None:
    walk = Walk(
        skeleton_of(save_family("llama", tmp_path / "llama")),
        torch.arange(2, 10)[None],
        wanted={f"model.layers.0.self_attn.{name}_proj" for name in "kvo"},
    )
    layer = walk.skeleton.layers[0]
    walk.skeleton.load_layer(layer)
    assert [[one.name.rpartition(".")[2] for one in group.linears] for group in walk.groups(layer)] == [
        ["k_proj", "v_proj"],
        ["o_proj"],
    ]


def test_unusable_statistics_are_named() -> None:
    fine = torch.ones(3)
    refuse_unusable(LinearStats(sqnorm=fine), "x")
    refuse_unusable(LinearStats(sqnorm=torch.full((3,), 3e38)), "x")  # the sum overflows, no entry does
    for value in (float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"the inputs of some\.linear hold NaN or infinite values"):
            refuse_unusable(LinearStats(sqnorm=fine, inputs=torch.tensor([1.0, value])), "some.linear")
