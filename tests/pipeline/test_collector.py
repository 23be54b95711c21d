"""What hooks gather, against the formulas computed from the model's own activations in float64."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.families import VOCABULARY, save_family
from tests.small_models import llama_config, random_model, save, skeleton_of
from trimcli.errors import InputError, TrimError
from trimcli.methods.scores import LinearStats, Statistic
from trimcli.pipeline.collector import Collector, find_groups, refuse_unusable
from trimcli.pipeline.walk import Walk

ALL = frozenset(Statistic)


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
            assert found.sqnorm is not None
            assert found.inputs is not None
            assert found.gram is not None
            assert (found.sqnorm.dtype, found.inputs.dtype) == (torch.float32, torch.float32)
            torch.testing.assert_close(found.sqnorm.double(), sqnorm, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found.inputs.double(), x[:, -1].T, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.gram.double(), gram, rtol=1e-4, atol=1e-4)


def test_the_gram_in_float64(tmp_path: Path) -> None:
    skeleton = skeleton_of(save(random_model(llama_config()), tmp_path / "llama"))
    walk = Walk(skeleton, torch.arange(24).reshape(2, 12))
    layer = walk.skeleton.layers[0]
    walk.skeleton.load_layer(layer)
    collector = Collector(walk.groups(layer), ALL, 2, 12, skeleton.device, torch.float64)
    walk.collect(layer, collector)
    gram = collector.by_linear()[layer.linears[0].name].gram
    assert gram is not None
    assert gram.dtype == torch.float64


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
    with pytest.raises(TrimError, match=r"model\.layers\.0\.mlp\.down_proj is never called by its layer"):
        find_groups(layer, lambda: None)


def test_unusable_statistics_are_named() -> None:
    fine = torch.ones(3)
    refuse_unusable(LinearStats(sqnorm=fine), "x")
    refuse_unusable(LinearStats(sqnorm=torch.full((3,), 3e38)), "x")  # the sum overflows, no entry does
    for value in (float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"the inputs of some\.linear hold NaN or infinite values"):
            refuse_unusable(LinearStats(sqnorm=fine, inputs=torch.tensor([1.0, value])), "some.linear")
