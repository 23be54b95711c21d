"""Blocks found by structure, over several architectures; gradients against finite differences."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trimcli.errors import OptionError
from trimcli.methods.blocks.structure import Block, Call, block_gradients, find_blocks

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 1}

ROTARY = (["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"])
FUSED = (["query_key_value", "dense"], ["dense_h_to_4h", "dense_4h_to_h"])

SEQUENTIAL: dict[str, tuple[str, dict[str, Any], tuple[list[str], list[str]]]] = {
    "llama": ("LlamaConfig", GROUPED, ROTARY),
    "mistral": ("MistralConfig", GROUPED, ROTARY),
    "qwen2": ("Qwen2Config", GROUPED, ROTARY),
    "qwen3": ("Qwen3Config", GROUPED, ROTARY),
    "gemma2": ("Gemma2Config", GROUPED, ROTARY),
    "gemma3": ("Gemma3TextConfig", GROUPED, ROTARY),
    "olmo2": ("Olmo2Config", GROUPED, ROTARY),
    "gpt2": ("GPT2Config", {**GPT2, "eos_token_id": 2}, (["c_attn", "c_proj"], ["c_fc", "c_proj"])),
    "opt": (
        "OPTConfig",
        {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16},
        (["k_proj", "v_proj", "q_proj", "out_proj"], ["fc1", "fc2"]),
    ),
    "opt norm after": (
        "OPTConfig",
        {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        (["k_proj", "v_proj", "q_proj", "out_proj"], ["fc1", "fc2"]),
    ),
    "neox in sequence": ("GPTNeoXConfig", {**SIZES, "use_parallel_residual": False}, FUSED),
    "falcon in sequence": ("FalconConfig", {**SIZES, "parallel_attn": False, "multi_query": False}, FUSED),
}
PARALLEL: dict[str, tuple[str, dict[str, Any]]] = {
    "neox": ("GPTNeoXConfig", SIZES),
    "falcon": ("FalconConfig", SIZES),
    "phi": ("PhiConfig", SIZES),
    "cohere": ("CohereConfig", GROUPED),
    "stablelm in parallel": ("StableLmConfig", {**GROUPED, "use_parallel_residual": True}),
}


@dataclass
class Layer:
    """A decoder layer and what its model calls it with."""

    module: nn.Module
    linears: dict[str, nn.Module]
    run: Callable[[Tensor], Any]
    hidden: list[Tensor]


def first_layer(kind: str, sizes: dict[str, Any]) -> Layer:
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    module = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 1)[0]
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = module.register_forward_pre_hook(lambda _m, a, k: seen.append((a, k)), with_kwargs=True)
    with torch.no_grad():
        for _ in range(2):
            model(torch.randint(3, 32, (1, 6)), use_cache=False)
    handle.remove()
    args, kwargs = seen[0]
    return Layer(
        module,
        linears_of(module),
        lambda hidden: module(hidden, *args[1:], **kwargs),
        [call[0][0].detach() for call in seen],
    )


def linears_of(module: nn.Module) -> dict[str, nn.Module]:
    return {f"layers.0.{n}": m for n, m in module.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def blocks_of(layer: Layer) -> list[Block]:
    return find_blocks(layer.module, layer.linears, layer.run, layer.hidden[0], "layers.0")


def prune(layer: Layer) -> dict[str, Tensor]:
    """Zero the smaller half of every linear; returns the dense weights."""
    dense = {}
    with torch.no_grad():
        for name, linear in layer.linears.items():
            weight = linear.get_parameter("weight")
            dense[name] = weight.clone()
            weight.mul_(weight.abs() > weight.abs().median())
    return dense


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_attention_then_mlp(name: str) -> None:
    kind, sizes, expected = SEQUENTIAL[name]
    layer = first_layer(kind, sizes)
    blocks = blocks_of(layer)
    assert tuple([linear.rpartition(".")[2] for linear in block.linears] for block in blocks) == expected
    for block in blocks:
        call = block.capture(layer.run, layer.hidden[1])
        with torch.no_grad():
            torch.testing.assert_close(block.call(call), call.output)
    for module in layer.module.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("name", PARALLEL)
def test_blocks_in_parallel_are_refused(name: str) -> None:
    kind, sizes = PARALLEL[name]
    with pytest.raises(OptionError, match=r"cannot work on layers\.0: .* run in parallel"):
        blocks_of(first_layer(kind, sizes))


def test_experts_without_linears_are_refused() -> None:
    sizes = {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1}
    with pytest.raises(OptionError, match=r"this layer has them in 1 \(q_proj\+k_proj\+v_proj\+o_proj\)"):
        blocks_of(first_layer("MixtralConfig", sizes))


class Mixer(nn.Module):
    """An attention of sorts: a causal mean between two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> list[Tensor]:
        return [self.out(self.into(hidden).cumsum(1))]


class Routed(nn.Module):
    """Experts in a list that nobody calls; a token goes to one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, hidden: Tensor) -> Tensor:
        chosen: Tensor = self.experts[int(hidden.mean() < 1e9)](hidden)
        return chosen


class Own(nn.Module):
    """A layer that runs its second half itself, in the way `form` says."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.mixer = Mixer()
        if form == "routed":
            self.mlp = Routed()
        else:
            self.up, self.act, self.down = nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)
        if form == "three":
            self.cross = Mixer()

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.mixer(hidden)[0]
        if self.form == "routed":
            routed: Tensor = hidden + self.mlp(hidden)
            return routed
        inner = self.up(hidden)
        inner = self.act(inner) if self.form == "chain" else inner.square()
        if self.form == "twice":
            inner = self.up(inner)
        if self.form == "three":
            inner = self.cross(inner)[0]
        result: Tensor = hidden + self.down(inner)
        # In place, as some layers do with what a block gave.
        return result.mul_(2)


def own_layer(form: str) -> Layer:
    torch.manual_seed(0)
    module = Own(form)
    return Layer(module, linears_of(module), module, [torch.randn(1, 5, 8)])


def test_own_linears_with_modules_between_form_a_chain() -> None:
    attention, mlp = blocks_of(own_layer("chain"))
    assert attention.linears == ("layers.0.mixer.into", "layers.0.mixer.out")
    assert mlp.linears == ("layers.0.up", "layers.0.down")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("function", r"run on their own, up\+down do not give what they give inside the layer"),
        ("twice", r"up\+down sit in no module that a pass runs once, and form no chain"),
        ("three", r"this layer has them in 3 \(into\+out, up\+down, into\+out\)"),
    ],
)
def test_other_forms_are_refused_with_the_reason(form: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        blocks_of(own_layer(form))


def test_an_idle_expert_has_no_gradient() -> None:
    layer = own_layer("routed")
    _, mlp = blocks_of(layer)
    assert isinstance(mlp.module, Routed)
    dense = prune(layer)
    gradients = block_gradients(mlp, dense, [mlp.capture(layer.run, layer.hidden[0])], 1)
    assert not gradients["layers.0.mlp.experts.0"].any()
    assert gradients["layers.0.mlp.experts.1"].all()


def to_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: to_double(entry) for key, entry in value.items()}
    return type(value)(map(to_double, value)) if isinstance(value, tuple) else value


def opt_mlp(module: Any, call: Call) -> Tensor:
    return module.fc2(torch.relu(module.fc1(to_double(call.args[0]))))


def child(path: str) -> Callable[[Any, Call], Tensor]:
    def value(module: Any, call: Call) -> Tensor:
        output = module.get_submodule(path)(*to_double(call.args), **to_double(call.kwargs))
        return output[0] if isinstance(output, tuple) else output

    return value


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("qwen2", (child("self_attn"), child("mlp"))),
        ("gpt2", (child("attn"), child("mlp"))),
        ("opt", (child("self_attn"), opt_mlp)),
    ],
)
def test_gradients_are_the_finite_differences(name: str, values: tuple[Callable[[Any, Call], Tensor], ...]) -> None:
    kind, sizes, _ = SEQUENTIAL[name]
    layer = first_layer(kind, sizes)
    blocks = blocks_of(layer)
    dense = prune(layer)
    double = copy.deepcopy(layer.module).double()
    outside = {n: m.get_parameter("weight") for n, m in linears_of(double).items()}
    with torch.no_grad():
        for linear, weight in outside.items():
            weight.copy_(dense[linear])
    for block, value in zip(blocks, values, strict=True):
        calls = [block.capture(layer.run, hidden) for hidden in layer.hidden]
        gradients = block_gradients(block, dense, iter(calls), len(calls))
        assert set(gradients) == set(block.linears)
        for linear in block.linears:
            expected = torch.zeros(10, dtype=torch.float64)
            weight = outside[linear]
            assert gradients[linear].shape == weight.shape
            assert gradients[linear].dtype == torch.float32
            # The largest ones: of the smallest, float32 keeps no digits that a difference could confirm.
            chosen = gradients[linear].flatten().topk(10).indices
            for slot, index in enumerate(chosen.tolist()):
                for call in calls:
                    expected[slot] += difference(double, weight, index, value, call) ** 2 / len(calls)
            torch.testing.assert_close(gradients[linear].flatten()[chosen].double(), expected, rtol=1e-3, atol=0.0)


def difference(
    module: nn.Module, weight: Tensor, index: int, value: Callable[[Any, Call], Tensor], call: Call
) -> float:
    """Central difference of one sample's loss over one weight, in float64."""
    step, losses = 1e-5, []
    with torch.no_grad():
        flat = weight.view(-1)
        for sign in (1, -1):
            flat[index] += sign * step
            gap = value(module, call) - call.output.double()
            losses.append(float(gap.square().mean()))
            flat[index] -= sign * step
    return (losses[0] - losses[1]) / (2 * step)


def test_shares_of_the_samples_add_up_and_nothing_is_left_behind() -> None:
    layer = first_layer("Qwen2Config", GROUPED)
    dense = prune(layer)
    before = {name: p.clone() for name, p in layer.module.named_parameters()}
    for block in blocks_of(layer):
        calls = [block.capture(layer.run, hidden) for hidden in layer.hidden]
        whole = block_gradients(block, dense, calls, 2)
        shares = [block_gradients(block, dense, [call], 2) for call in calls]
        for name, gradient in whole.items():
            torch.testing.assert_close(shares[0][name] + shares[1][name], gradient)
            assert not gradient.requires_grad
    for name, parameter in layer.module.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_another_dtype_and_inference_mode_give_the_same_float32_gradients() -> None:
    layer = first_layer("Qwen2Config", GROUPED)
    dense = prune(layer)
    expected = [
        block_gradients(block, dense, [block.capture(layer.run, layer.hidden[0])], 1) for block in blocks_of(layer)
    ]
    wide = copy.deepcopy(layer.module).double()
    kwargs: dict[str, Any] = {}
    handle = layer.module.register_forward_pre_hook(lambda _m, _a, k: kwargs.update(k), with_kwargs=True)
    layer.run(layer.hidden[0])
    handle.remove()
    with torch.inference_mode():
        kwargs = to_double(kwargs)
        doubled = Layer(wide, linears_of(wide), lambda h: wide(h, **kwargs), [to_double(layer.hidden[0])])
        for block, before in zip(blocks_of(doubled), expected, strict=True):
            call = block.capture(doubled.run, doubled.hidden[0])
            assert call.output.dtype == torch.float64
            gradients = block_gradients(block, dense, [call], 1)
            for name, gradient in gradients.items():
                assert gradient.dtype == torch.float32
                torch.testing.assert_close(gradient, before[name], rtol=1e-3, atol=1e-12)
