"""Adapters under masks: the product in the forward pass, in the merge, and what peft does without."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.finetuned import LENGTH, SAMPLES, options, pruned_model, tuned, weights
from tests.small_models import gpt2_config, llama_config
from tests.trim_cli import zeros
from trimcli.errors import OptionError
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.masks import MaskFile
from trimcli.model.skeleton import Skeleton
from trimcli.training.lora import adapted, add_adapters

# What peft calls of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CONFIGS = {"llama": llama_config, "gpt2": gpt2_config}
TOKENS = torch.arange(24).view(2, 12)


def opened(pruned: Path) -> tuple[Skeleton, MaskFile]:
    skeleton = Skeleton(Checkpoint.open(pruned))
    skeleton.load_everything()
    return skeleton, MaskFile.open(pruned.parent / "masks")


def with_random_adapters(skeleton: Skeleton, masks: MaskFile, pruned: Path) -> Any:
    """Adapters whose product is not zero, as it is before training."""
    chosen = options(pruned, mode="lora", rank=3, alpha=5.0, targets=("all",))
    model = add_adapters(
        skeleton.model, adapted(skeleton.linears, ("all",)), masks.names, masks.keep, chosen, str(pruned)
    )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0.0, 0.3)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS).logits
    return found


@pytest.mark.parametrize("family", CONFIGS)
def test_the_product_is_masked_before_and_in_the_merge(family: str, tmp_path: Path) -> None:
    pruned = pruned_model(CONFIGS[family](), tmp_path)
    skeleton, masks = opened(pruned)
    before = logits(skeleton.model.eval())
    linears = dict(skeleton.linears)
    dense = {name: linear.weight.clone() for name, linear in linears.items()}
    model = with_random_adapters(skeleton, masks, pruned)
    factors = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(factors) == len(masks.names)
    expected = {}
    for name, module in factors.items():
        own = name.removeprefix("base_model.model.")
        product = module.lora_B["default"].weight @ module.lora_A["default"].weight
        expected[own] = (dense[own] + 5.0 / 3 * product * masks.keep(own)).detach()
    unmerged = logits(model)
    assert not torch.allclose(unmerged, before, atol=1e-2)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), unmerged, rtol=1e-5, atol=1e-5)
    for name, linear in linears.items():
        torch.testing.assert_close(linear.weight, expected[name], rtol=1e-5, atol=1e-6)
        assert zeros(linear.weight) == masks.entry(name)["zeros"]


@pytest.mark.parametrize("family", CONFIGS)
def test_an_ordinary_merge_fills_the_zeros(family: str, tmp_path: Path) -> None:
    pruned = pruned_model(CONFIGS[family](), tmp_path)
    skeleton, masks = opened(pruned)
    linears = list(skeleton.linears.values())
    config = LoraConfig(target_modules=[one.name for one in linears], fan_in_fan_out=family == "gpt2")
    plain = get_peft_model(skeleton.model, config)
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0.0, 0.3)
    plain.merge_and_unload()
    assert sum(zeros(one.weight) for one in linears) == 0
    assert sum(masks.entry(name)["zeros"] for name in masks.names) > 0


def test_a_plain_adapter_is_peft_s_own(tmp_path: Path) -> None:
    """What `PeftModel.from_pretrained` loads has the held-out loss that was recorded; merging it fills the zeros."""
    pruned = pruned_model(llama_config(), tmp_path)
    summary = tuned(pruned, tmp_path / "adapter", mode="lora", merge="none", kl=0.0, targets=("all",), steps=8)
    assert summary.after < summary.before
    assert summary.zeros is None
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pruned), tmp_path / "adapter").eval()
    from safetensors.torch import load_file

    tokens = load_file(tmp_path / "tokens")["tokens"][SAMPLES - 2 :].long()
    assert tokens.shape == (2, LENGTH)
    with torch.no_grad():
        loss = float(model(input_ids=tokens, labels=tokens).loss)
    assert loss == pytest.approx(summary.after, abs=1e-5)
    merged = model.merge_and_unload()
    assert zeros(merged.model.layers[0].mlp.up_proj.weight) == 0
    assert zeros(weights(pruned)["model.layers.0.mlp.up_proj.weight"]) == 0.75 * 32 * 40


def test_targets(tmp_path: Path) -> None:
    pruned = pruned_model(llama_config(), tmp_path / "llama")
    linears = Skeleton(Checkpoint.open(pruned)).linears
    ends = ["self_attn.q_proj", "self_attn.v_proj"]
    assert [one.name for one in adapted(linears, ())] == [f"model.layers.{n}.{end}" for n in (0, 1) for end in ends]
    assert [one.name for one in adapted(linears, ("mlp.up_proj",))] == [f"model.layers.{n}.mlp.up_proj" for n in (0, 1)]
    assert len(adapted(linears, ("all",))) == 14
    with pytest.raises(OptionError, match=r"'proj' matches no linear; give some of self_attn.q_proj, .*, or all"):
        adapted(linears, ("proj",))
    gpt2 = Skeleton(Checkpoint.open(pruned_model(gpt2_config(), tmp_path / "gpt2"))).linears
    assert len(adapted(gpt2, ())) == len(gpt2) == 8
