"""Tiny random mixtures of experts, one of each form that transformers holds them in, and an eager loop over experts."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from tests.families import COMMON, SPECIAL

EXPERTS = 4
FUSED = {"gpt_oss", "llama4", "granitemoe", "jetmoe"}
"""Whose checkpoints hold stacks of experts."""
SMALL: dict[str, Any] = {**COMMON, "num_hidden_layers": 2, "intermediate_size": 24}
DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
PER_TOKEN = {"num_experts_per_tok": 2}
ROPE = {"rope_type": "default", "rope_theta": 150000.0}  # as version 4 has it by itself


def _made(name: str, **fields: Any) -> Callable[[], PretrainedConfig]:
    return lambda: getattr(transformers, f"{name}Config")(**{**SPECIAL, **SMALL, **fields})


MIXTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "mixtral": _made("Mixtral", num_local_experts=EXPERTS),
    "qwen3_moe": _made("Qwen3Moe", num_experts=EXPERTS, moe_intermediate_size=20, head_dim=8, **PER_TOKEN),
    "olmoe": _made("Olmoe", num_experts=EXPERTS, **PER_TOKEN),
    "deepseek_v3": _made("DeepseekV3", moe_intermediate_size=20, **PER_TOKEN, **DEEPSEEK),
    "gpt_oss": _made("GptOss", num_local_experts=EXPERTS, head_dim=8, sliding_window=5, rope_scaling=ROPE, **PER_TOKEN),
    "llama4": _made(
        "Llama4Text",
        num_local_experts=EXPERTS,
        num_experts_per_tok=1,
        intermediate_size_mlp=24,
        head_dim=8,
        attention_chunk_size=16,
    ),
}
MIXTURES["granitemoe"] = _made("GraniteMoe", num_local_experts=EXPERTS, **PER_TOKEN)
MIXTURES["jetmoe"] = _made("JetMoe", num_local_experts=EXPERTS, kv_channels=8, **PER_TOKEN)


def save_mixture(name: str, directory: Path) -> Path:
    """The mixture's model as save_pretrained writes it: float32, weights random by their names alone, biases small.

    So every version of transformers, whatever form it gives the weights once loaded, reads the same ones.
    """
    AutoModelForCausalLM.from_config(MIXTURES[name]()).save_pretrained(directory)
    file, generator = directory / "model.safetensors", torch.Generator().manual_seed(0)
    tensors = load_file(file)
    for key in sorted(tensors):
        vector = tensors[key].ndim == 1 or key.endswith("bias")
        tensors[key].normal_(0.1 if vector else 0.0, 0.01 if vector else 0.2, generator=generator)
    save_file(tensors, file, {"format": "pt"})
    return directory


def eager_inputs(model: Any, tokens: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """What each expert is given, by the name of its module: per expert the inputs [T, H] of its first matrices and of
    its last one, from a loop over experts that is written out here. tokens: int64 [N, L].
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def note(name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        args = (*args, *kwargs.values())
        if hasattr(module, "input_size"):  # one stack, given the tokens of one expert after those of another
            found[name] = [(mine, mine) for mine in args[0].split(list(args[1]))]
            return
        pairs = []
        for expert in range(EXPERTS):
            if len(args) == 1:  # Llama 4: every token for each expert, times its score, which is zero for the others
                mine = args[0].view(EXPERTS, -1, args[0].shape[-1])[expert]
                mine = mine[mine.abs().sum(dim=1) > 0]
            else:
                mine = args[0].flatten(0, -2)[(args[1] == expert).any(dim=1)]
            pairs.append((mine, _inner(module, mine, expert)))
        found[name] = pairs

    with torch.no_grad():
        hooks = [
            module.register_forward_pre_hook(partial(note, name), with_kwargs=True)
            for name, module in model.named_modules()
            if any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
        ]
        model(input_ids=tokens, use_cache=False)
        for hook in hooks:
            hook.remove()
    return found


def _inner(module: Any, inputs: Tensor, expert: int) -> Tensor:
    """What the last matrix of an expert is given."""
    both = module.gate_up_proj[expert]
    if type(module).__name__ == "GptOssExperts":
        joint = inputs @ both + module.gate_up_proj_bias[expert]
        gate, up = joint[:, ::2].clamp(max=7.0), joint[:, 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    joint = inputs @ (both if both.shape[0] == inputs.shape[1] else both.T)
    gate, up = joint.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
