"""One tiny random model of every family that the walk is held to, from its config."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

from tests.small_models import NANO, gpt2_config, llama_config, random_model, save
from tests.trim_cli import save_tokens

VOCABULARY = 97
# From version 5 on transformers merges a layer's experts on loading and knows older names of parameters.
CONVERTS = int(transformers.__version__.partition(".")[0]) >= 5
COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
# Those of the families whose config knows neither grouped queries nor an intermediate size.
PLAIN = {name: value for name, value in COMMON.items() if name not in ("num_key_value_heads", "intermediate_size")}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}


def _made(name: str, **fields: Any) -> Callable[[], PretrainedConfig]:
    return lambda: getattr(transformers, f"{name}Config")(**{**SPECIAL, **fields})


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": _made("Llama", **COMMON, head_dim=8),
    "llama-one-layer": _made("Llama", **{**COMMON, "num_hidden_layers": 1}),
    "qwen2": _made(
        "Qwen2", **COMMON, use_sliding_window=True, sliding_window=5, max_window_layers=1, tie_word_embeddings=True
    ),
    "qwen3": _made("Qwen3", **COMMON, head_dim=8),
    "mistral": _made("Mistral", **COMMON, sliding_window=5),
    "opt": _made("OPT", **PLAIN, ffn_dim=64, word_embed_proj_dim=16),
    "gpt-neox": _made("GPTNeoX", **PLAIN, intermediate_size=64),
    "gpt2": _made("GPT2", n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=VOCABULARY),
    "phi": _made("Phi", **{**COMMON, "num_key_value_heads": 4}),
    "gemma2": _made("Gemma2", **COMMON, head_dim=8, sliding_window=5, query_pre_attn_scalar=8),
    "gemma3": _made("Gemma3Text", **COMMON, head_dim=8, sliding_window=5, query_pre_attn_scalar=8),
    "olmo2": _made("Olmo2", **COMMON),
    "falcon": _made("Falcon", **PLAIN, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-alibi": _made("Falcon", **PLAIN, alibi=True, multi_query=False, parallel_attn=False, bias=True),
    "bloom": _made("Bloom", hidden_size=32, n_layer=3, n_head=4, vocab_size=VOCABULARY),
    "bloom-one-layer": _made("Bloom", hidden_size=32, n_layer=1, n_head=4, vocab_size=VOCABULARY),
}
if CONVERTS:
    FAMILIES["mixtral"] = _made("Mixtral", **COMMON, num_local_experts=4)


def save_family(name: str, directory: Path) -> Path:
    """The family's model with random weights, as save_pretrained writes it: float32, seed 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[name]())
    for parameter in model.parameters():  # biases and norms too, so that none of them is a constant
        torch.nn.init.normal_(parameter, 0.0 if parameter.ndim > 1 else 0.1, 0.2)
    model.save_pretrained(directory)
    return directory


def several_forms(home: Path) -> Path:
    """Save `llama`, `gpt2`, `opt` and `gpt-neox`, a trained `nano`, and `tokens` that all of them know, into `home`."""
    save(random_model(llama_config(), dtype=torch.float16), home / "llama")
    save(random_model(gpt2_config()), home / "gpt2")
    save_family("opt", home / "opt")
    save_family("gpt-neox", home / "gpt-neox")
    (home / "nano").symlink_to(NANO)
    save_tokens(home / "tokens", vocabulary=64, nsamples=9)
    return home
