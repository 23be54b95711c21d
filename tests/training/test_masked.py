"""What masks hold through an optimizer's steps, against a hand-written loop."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.finetuned import SAMPLES, options, pruned_model, save_counting, weights
from tests.small_models import gpt2_config, llama_config, masks_for, random_model, save
from trimcli.commands.apply import apply_masks
from trimcli.commands.finetune import finetune
from trimcli.commands.options import ApplyOptions
from trimcli.files.masks import MaskFile

TRAINED = SAMPLES - 2


def stored_masks(pruned: Path) -> dict[str, Tensor]:
    """Checkpoint tensor -> what is kept of it, as it is stored."""
    masks, stored = MaskFile.open(pruned.parent / "masks"), weights(pruned)
    found = {}
    for name in masks.names:
        keep, key = masks.keep(name), f"{name}.weight"
        key = key if key in stored else key.removeprefix("transformer.")
        found[key] = keep if stored[key].shape == keep.shape and "c_" not in key else keep.T
    return found


def is_decayed(name: str) -> bool:
    """Trainer decays neither biases nor the weights of norms."""
    return not name.endswith("bias") and "norm" not in name and "ln_" not in name


def by_hand(pruned: Path, steps: int, lr: float, decay: float, clip: float) -> dict[str, Tensor]:
    """AdamW (Loshchilov & Hutter 2019) with gradients masked before, weights after; all samples in every step."""
    model = AutoModelForCausalLM.from_pretrained(pruned).train()
    tokens = load_file(pruned.parent / "tokens")["tokens"][:TRAINED].long()
    keeps = stored_masks(pruned)
    prefix = "" if any(name in keeps for name, _ in model.named_parameters()) else "transformer."
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for step in range(1, steps + 1):
        model.zero_grad()
        logits = model(input_ids=tokens).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        gradients = {}
        for name, parameter in model.named_parameters():
            keep = keeps.get(name.removeprefix(prefix), torch.ones(()))
            gradients[name] = parameter.grad * keep
        norm = math.sqrt(sum(float((one**2).sum()) for one in gradients.values()))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                gradient = gradients[name] * min(1.0, clip / (norm + 1e-6))
                first[name] = 0.9 * first.get(name, torch.zeros(())) + 0.1 * gradient
                second[name] = 0.999 * second.get(name, torch.zeros(())) + 0.001 * gradient**2
                moved = (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.999**step)).sqrt() + 1e-8)
                shrunk = parameter * (1 - lr * decay) if is_decayed(name) else parameter
                keep = keeps.get(name.removeprefix(prefix), torch.ones(()))
                parameter.copy_((shrunk - lr * moved) * keep)
    return {name.removeprefix(prefix): parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_steps_are_those_of_a_hand_written_loop(family: str, tmp_path: Path) -> None:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = llama_config() if family == "llama" else gpt2_config(**dropout)
    pruned = pruned_model(config, tmp_path)
    lr, decay, clip = 3e-3, 0.3, 0.5
    chosen = options(
        pruned, steps=2, batch_size=TRAINED, accumulate=1, lr=lr, weight_decay=decay, clip=clip, warmup=0.0,
        schedule="constant", kl=0.0,
    )  # fmt: skip
    summary = finetune(str(pruned), tmp_path / "out", chosen)
    assert summary.best == 2
    expected, found = by_hand(pruned, 2, lr, decay, clip), weights(tmp_path / "out")
    prefix = "" if family == "llama" else "transformer."
    assert len(expected) == len(found)
    for name, value in expected.items():
        tensor = found[name] if name in found else found[prefix + name]
        if name.endswith("attn.c_attn.bias"):  # of the keys' bias the gradient is rounding alone
            tensor, value = (torch.cat([one[:32], one[64:]]) for one in (tensor, value))
        torch.testing.assert_close(tensor, value, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("how", ["manifest", "masks", "packed"])
def test_a_kept_weight_that_is_zero_trains_and_a_pruned_one_does_not(how: str, tmp_path: Path) -> None:
    """Masks are not where weights are zero: every third column is kept, whose first weight is zero from the start."""
    model = random_model(llama_config())
    up = model.model.layers[0].mlp.up_proj.weight
    up.data[:, 3] = 0
    save(model, tmp_path / "dense")

    def keep_of(_: object, weight: Tensor) -> Tensor:
        keep = torch.zeros_like(weight, dtype=torch.bool)
        keep[:, ::3] = True
        return keep

    masks_for(tmp_path / "dense", tmp_path / "masks", keep_of=keep_of, names=["model.layers.0.mlp.up_proj"])
    form = ApplyOptions(format="packed" if how == "packed" else "dense")
    apply_masks(str(tmp_path / "dense"), tmp_path / "masks", tmp_path / "pruned", form)
    save_counting(tmp_path / "tokens")
    pruned = tmp_path / "pruned"
    given = tmp_path / "masks" if how == "masks" else None
    chosen = options(pruned, masks=given, format="dense", kl=0.0)
    finetune(str(pruned), tmp_path / "out", chosen)
    after = weights(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"]
    assert bool((after[:, 3] != 0).all())
    gone = torch.arange(32) % 3 != 0
    assert not after[:, gone].count_nonzero()
    assert bool((after[:, ~gone] != 0).all())
