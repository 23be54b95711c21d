"""Checkpoint names against module names."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.families import CONVERTS, save_family
from tests.small_models import gpt2_config, random_model, save
from trimcli.files.checkpoint import Checkpoint
from trimcli.model.names import map_names
from trimcli.model.skeleton import Skeleton


def rewritten(source: Path, target: Path, rename: dict[str, str]) -> Path:
    """The model with the prefixes of its tensors' names replaced."""
    shutil.copytree(source, target)
    tensors = {}
    for key, tensor in load_file(source / "model.safetensors").items():
        for old, new in rename.items():
            if key.startswith(old):
                key = new + key.removeprefix(old)
                break
        tensors[key] = tensor.clone()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def logits_by_layer(model: Path) -> torch.Tensor:
    skeleton = Skeleton(Checkpoint.open(model))
    skeleton.load_everything()
    with torch.no_grad():
        found: torch.Tensor = skeleton.model(torch.arange(8)[None]).logits
    return found


def test_a_checkpoint_without_the_base_prefix_is_read_and_keeps_its_names(tmp_path: Path) -> None:
    with_prefix = save(random_model(gpt2_config()), tmp_path / "with")
    without = rewritten(with_prefix, tmp_path / "without", {"transformer.": ""})
    skeleton = Skeleton(Checkpoint.open(without))
    linear = skeleton.linears["transformer.h.0.attn.c_attn"]
    assert linear.key == "h.0.attn.c_attn.weight"
    assert torch.equal(logits_by_layer(without), logits_by_layer(with_prefix))


@pytest.mark.skipif(not CONVERTS, reason="transformers 4 has the old names itself")
def test_the_names_of_old_gpt_neox_checkpoints(tmp_path: Path) -> None:
    new = save_family("gpt-neox", tmp_path / "new")
    keys = load_file(new / "model.safetensors")
    other = {"embed_out.": "lm_head."} if "embed_out.weight" in keys else {"lm_head.": "embed_out."}
    old = rewritten(new, tmp_path / "old", other)
    assert torch.equal(logits_by_layer(old), logits_by_layer(new))


@pytest.mark.skipif(not CONVERTS, reason="transformers 4 leaves experts apart")
def test_experts_are_assembled_as_transformers_does(tmp_path: Path) -> None:
    model = save_family("mixtral", tmp_path / "mixtral")
    skeleton = Skeleton(Checkpoint.open(model))
    skeleton.load_everything()
    own = AutoModelForCausalLM.from_pretrained(model).state_dict()
    found = skeleton.model.state_dict()
    assert found.keys() == own.keys()
    for name in own:
        assert torch.equal(found[name], own[name]), name
    experts = {name: linear for name, linear in skeleton.linears.items() if "expert" in name}
    assert len(experts) == 3 * 4 * 3
    assert {f"{name}.weight" for name in experts} <= set(skeleton.checkpoint.keys())
    assert all(torch.equal(linear.weight, linear.read(skeleton.checkpoint)) for linear in experts.values())


def test_what_the_model_lacks_is_left_out() -> None:
    model = random_model(gpt2_config())
    names = map_names(model, [*model.state_dict(), "something.else", "transformer.h.0.attn.masked_bias"])
    assert set(names.plain) == set(model.state_dict())
    assert not names.conversions


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "qwen2"])
def test_every_parameter_of_a_saved_model_is_found(family: str, tmp_path: Path) -> None:
    skeleton = Skeleton(Checkpoint.open(save_family(family, tmp_path / family)))
    skeleton.load_everything()
    assert all(parameter.device.type == "cpu" for parameter in skeleton.model.parameters())
