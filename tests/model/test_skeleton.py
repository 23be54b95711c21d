"""The skeleton: what is found by structure, identity, parameters in and out."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.families import COMMON, CONVERTS, SPECIAL, save_family
from tests.small_models import (
    edited_config,
    gpt2_config,
    llama_config,
    random_model,
    save,
    save_random,
    skeleton_of,
    with_tensors,
)
from trimcli.errors import InputError
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.names import inside_layer
from trimcli.model.empty import find_decoder_layers
from trimcli.model.skeleton import DecoderLayer, Skeleton

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(llama_config()), tmp_path_factory.mktemp("model") / "llama")


def test_layers_and_linears_are_found_by_structure(llama: Path) -> None:
    skeleton = skeleton_of(llama)
    assert [layer.name for layer in skeleton.layers] == ["model.layers.0", "model.layers.1"]
    assert [layer.index for layer in skeleton.layers] == [0, 1]
    shapes = {linear.name: linear.shape for linear in skeleton.layers[1].linears}
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    assert shapes == {
        f"{attention}.q_proj": (32, 32),
        f"{attention}.k_proj": (16, 32),
        f"{attention}.v_proj": (16, 32),
        f"{attention}.o_proj": (32, 32),
        f"{mlp}.gate_proj": (40, 32),
        f"{mlp}.up_proj": (40, 32),
        f"{mlp}.down_proj": (32, 40),
    }
    assert list(skeleton.linears) == [linear.name for layer in skeleton.layers for linear in layer.linears]
    assert not skeleton.left_dense()


def test_conv1d_is_stored_transposed(tmp_path: Path) -> None:
    model = save(random_model(gpt2_config()), tmp_path / "gpt2")
    skeleton = skeleton_of(model)
    linear = skeleton.linears["transformer.h.0.mlp.c_fc"]
    assert (linear.transposed, linear.shape, linear.numel) == (True, (128, 32), 4096)
    stored = load_file(model / "model.safetensors")["transformer.h.0.mlp.c_fc.weight"]
    assert torch.equal(linear.read(skeleton.checkpoint), stored.T)
    skeleton.load_layer(skeleton.layers[0])
    linear.weight[3, 5] = 7.0
    assert float(linear.module.weight[5, 3]) == 7.0  # type: ignore[index]


def test_a_layer_is_there_only_between_load_and_drop(llama: Path) -> None:
    skeleton = skeleton_of(llama)
    first, second = skeleton.layers

    def devices(layer: DecoderLayer) -> set[str]:
        return {parameter.device.type for parameter in layer.module.parameters()}

    assert devices(first) == devices(second) == {"meta"}
    skeleton.load_layer(first)
    assert devices(first) == {"cpu"}
    assert devices(second) == {"meta"}
    skeleton.drop_layer(first)
    assert devices(first) == {"meta"}


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_writing_to_a_layer_does_not_reach_the_checkpoint(form: str, llama: Path, tmp_path: Path) -> None:
    """In float32 nothing is converted on loading, so that nothing but a copy keeps the two apart."""
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    if form == "bin":
        torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
        (model / "model.safetensors").unlink()
    skeleton = skeleton_of(model)
    linear = skeleton.linears[UP]
    dense = linear.read(skeleton.checkpoint).clone()
    skeleton.load_layer(skeleton.layers[1])
    linear.weight.zero_()
    assert torch.equal(linear.read(skeleton.checkpoint), dense)
    skeleton.drop_layer(skeleton.layers[1])
    skeleton.load_everything()
    assert torch.equal(linear.weight, dense)


def test_tied_weights_are_read_once_and_stay_tied(nano_qwen2: Path) -> None:
    checkpoint = Checkpoint.open(nano_qwen2)
    assert "lm_head.weight" not in set(checkpoint.keys())
    skeleton = Skeleton(checkpoint)
    skeleton.load_everything()
    model = skeleton.model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    own = AutoModelForCausalLM.from_pretrained(nano_qwen2, dtype=torch.float32)
    assert all(torch.equal(found, own.state_dict()[name]) for name, found in model.state_dict().items())


def test_buffers_of_the_checkpoint_are_read(tmp_path: Path) -> None:
    model = save_family("bloom", tmp_path / "bloom")
    names = dict(skeleton_of(model).model.named_buffers())
    assert all(buffer.device.type == "cpu" for buffer in names.values())


# --- what cannot be used ---------------------------------------------------------------------------------


def test_a_config_of_no_language_model_is_refused(llama: Path, tmp_path: Path) -> None:
    unknown = edited_config(llama, tmp_path / "unknown", model_type="nonesuch")
    with pytest.raises(InputError, match="no causal language model can be built from"):
        skeleton_of(unknown)


def test_other_shapes_and_missing_tensors_are_named(llama: Path, tmp_path: Path) -> None:
    wider = edited_config(llama, tmp_path / "wider", intermediate_size=48)
    with pytest.raises(InputError, match=r"proj\.weight has shape \(.*\) where config\.json calls for"):
        skeleton_of(wider)
    lacking = with_tensors(llama, tmp_path / "lacking", **{f"{UP}.weight": None})
    with pytest.raises(InputError, match=rf"lacks a tensor for {UP}\.weight"):
        skeleton_of(lacking)


def test_a_head_that_is_not_tied_must_be_there(llama: Path, tmp_path: Path) -> None:
    lacking = with_tensors(llama, tmp_path / "lacking", **{"lm_head.weight": None})
    with pytest.raises(InputError, match=r"lacks a tensor for lm_head\.weight"):
        skeleton_of(lacking)


@pytest.mark.parametrize("same", [True, False])
def test_a_head_of_its_own_under_a_tied_config_is_what_transformers_makes_of_it(
    same: bool, llama: Path, tmp_path: Path
) -> None:
    """Transformers 5 does not tie what has other values, 4 ties in any case."""
    embedding = load_file(llama / "model.safetensors")["model.embed_tokens.weight"]
    head = {"lm_head.weight": embedding.clone()} if same else {}
    model = edited_config(with_tensors(llama, tmp_path / "made", **head), tmp_path / "model", tie_word_embeddings=True)
    skeleton = skeleton_of(model)
    skeleton.load_everything()
    skeleton.model.tie_weights()  # as lm-eval does
    own = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name, tensor in own.state_dict().items():
        assert torch.equal(skeleton.model.state_dict()[name], tensor), name
    tied = skeleton.model.lm_head.weight is skeleton.model.model.embed_tokens.weight
    assert tied is (own.lm_head.weight is own.model.embed_tokens.weight) is (same or not CONVERTS)
    assert skeleton.fingerprint.structure == Skeleton(Checkpoint.open(model, weights=False)).fingerprint.structure


@pytest.mark.skipif(not CONVERTS, reason="transformers 4 leaves experts apart")
@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("experts.", r"lacks a tensor for model\.layers\.1\.mlp\.experts"),
        ("experts.2.", r"model\.layers\.1\.mlp\.experts\.\S+ the shape \(3, "),
        ("experts.2.w1.", r"do not make up model\.layers\.1\.mlp\.experts"),
    ],
)
def test_missing_experts_are_named(missing: str, message: str, tmp_path: Path) -> None:
    model = save_family("mixtral", tmp_path / "mixtral")
    tensors = load_file(model / "model.safetensors")
    gone = [key for key in tensors if ".layers.1." in key and missing in key]
    lacking = with_tensors(model, tmp_path / "lacking", **dict.fromkeys(gone))

    def load() -> None:
        skeleton = skeleton_of(lacking)
        skeleton.load_layer(skeleton.layers[1])

    with pytest.raises(InputError, match=message):
        load()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, llama: Path, tmp_path: Path) -> None:
    weight = load_file(llama / "model.safetensors")[f"{UP}.weight"].clone()
    weight[3, 4] = value
    damaged = skeleton_of(with_tensors(llama, tmp_path / "damaged", **{f"{UP}.weight": weight}))
    with pytest.raises(InputError, match=rf"the tensor {UP}\.weight of .*damaged holds NaN or infinite"):
        damaged.linears[UP].read(damaged.checkpoint)
    with pytest.raises(InputError, match=rf"the tensor {UP}\.weight"):
        damaged.load_layer(damaged.layers[1])


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_outside_the_layers_values_are_not_looked_at(name: str, llama: Path, tmp_path: Path) -> None:
    """Rows of tokens that no text has may hold anything; what others do to the outputs is seen there."""
    tensor = load_file(llama / "model.safetensors")[name].clone()
    tensor[63] = torch.nan
    skeleton = skeleton_of(with_tensors(llama, tmp_path / "damaged", **{name: tensor}))
    skeleton.load_everything()
    assert torch.equal(skeleton.model.get_parameter(name)[:63], tensor[:63])


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    model = random_model(llama_config())
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(InputError, match="LlamaForCausalLM has no list of decoder layers; its form is not supported"):
        find_decoder_layers(model)


def test_weights_are_converted_to_the_compute_dtype(nano_qwen2: Path) -> None:
    skeleton = Skeleton(Checkpoint.open(nano_qwen2), dtype=torch.float32)
    linear = skeleton.layers[0].linears[0]
    assert linear.read(skeleton.checkpoint).dtype == torch.float16
    skeleton.load_layer(skeleton.layers[0])
    assert linear.weight.dtype == torch.float32
    assert torch.equal(linear.weight, linear.read(skeleton.checkpoint).float())


def test_the_list_of_layers_with_the_most_parameters_is_the_decoder() -> None:
    model = random_model(LlamaConfig(**{**llama_config().to_dict(), "num_hidden_layers": 2}))
    model.decoys = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])
    assert find_decoder_layers(model)[0] == "model.layers"


@pytest.mark.parametrize(
    ("name", "fields", "gates"),
    [
        ("Qwen2Moe", {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}, {"mlp.shared_expert_gate"}),
        ("Llama4Text", {"num_local_experts": 4, "intermediate_size_mlp": 48, "head_dim": 8}, {"feed_forward.router"}),
        ("Mixtral", {"num_local_experts": 4}, {"mlp.gate", "block_sparse_moe.gate"}),
    ],
)
def test_routers_and_gates_stay_dense(name: str, fields: dict[str, Any], gates: set[str], tmp_path: Path) -> None:
    """Whether a linear or a parameter of another module: what decides where a token goes is no matrix to prune."""
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **SPECIAL, "num_experts": 4, **fields})
    skeleton = skeleton_of(save_random(config, tmp_path / name))
    pruned = {inside_layer(linear) for linear in skeleton.linears}
    dense = {
        inside_layer(parameter).removesuffix(".weight"): left.why for parameter, left in skeleton.left_dense().items()
    }
    assert not gates & pruned
    assert {dense[gate] for gate in gates & dense.keys()} <= {"it routes or gates", "it is no linear's"}
    assert gates & dense.keys()
    assert "self_attn.q_proj" in pruned


def test_filters_of_a_convolution_are_no_experts(tmp_path: Path) -> None:
    """A linear with as many outputs as a convolution beside it has filters routes nothing."""
    fields: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 8,
        "time_step_rank": 4,
    }
    config = transformers.MambaConfig(**fields)
    skeleton = skeleton_of(save_random(config, tmp_path / "mamba"))
    pruned = {inside_layer(linear) for linear in skeleton.linears}
    assert pruned == {f"mixer.{name}" for name in ("in_proj", "x_proj", "dt_proj", "out_proj")}
    assert "it routes or gates" not in {left.why for left in skeleton.left_dense().values()}
