"""A tiny random model of every causal-LM type that transformers knows, made from its config class by field names.

A config is its class's defaults with what is large made small: `TINY` says by field name what to, `FIELDS` what single
types need besides. Types that cannot be made here stand in `NOT_BUILT`, each with the reason.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 97
LAYERS = 3

# By field name, wherever it stands in a config; a field whose default is None or a bool stays as it is.
GROUPS: dict[int, str] = {
    0: "bos_token_id decoder_start_token_id num_kv_shared_layers",
    1: (
        "eos_token_id pad_token_id forced_eos_token_id num_dense_layers first_k_dense_replace no_rope_layer_interval "
        "altup_active_idx attn_layer_offset n_group topk_group num_expert_group n_shared_experts num_shared_experts "
        "moe_num_shared_experts mamba_n_groups mamba_ngroups n_groups o_groups ngram num_langs"
    ),
    2: (
        "encoder_layers num_encoder_layers num_key_value_heads num_kv_heads kv_n_heads num_query_groups "
        "swa_num_key_value_heads linear_num_key_heads num_experts_per_tok num_experts_per_token moe_k moe_top_k "
        "moe_topk layer_group_size altup_num_inputs hc_mult hc_count index_n_heads index_topk_blocks "
        "attn_layer_period expert_layer_period global_attn_every_n_layers sliding_window_pattern "
        "_sliding_window_pattern num_layers_per_stack n_layers_per_attn_res_block zero_expert_num "
        "interleave_moe_layer_step prompt_length mamba_dt_rank time_step_rank num_codebooks heads_per_ngram "
        "split_ngram_parts"
    ),
    3: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks depth",
    4: (
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads linear_num_value_heads "
        "linear_num_heads num_experts num_local_experts n_routed_experts moe_num_experts qk_rope_head_dim "
        "qk_nope_head_dim rotary_dim index_block_size adapter_rank laurel_rank gated_norm_rank hc_lowrank d_rel"
    ),
    5: (
        "sliding_window sliding_window_size window_size attention_window_size attention_chunk_size local_attention "
        "keep_window_size index_topk"
    ),
    8: (
        "head_dim attention_head_dim attention_head_size dim_head d_head d_kv v_head_dim qk_head_dim swa_head_dim "
        "index_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim query_pre_attn_scalar kv_channels "
        "mamba_n_heads mamba_num_heads n_mamba_heads mamba_d_head mamba_head_dim mamba_headdim mamba_d_state "
        "state_size ssm_state_size kv_lora_rank o_lora_rank mamba_chunk_size chunk_size hidden_size_per_layer_input "
        "ple_embed_dim block_size local_attn_chunk_length lsh_attn_chunk_length num_centroids floor_scale"
    ),
    16: (
        "q_lora_rank embedding_size input_embedding_size output_embedding_size word_embed_proj_dim prompt_mid_dim "
        "pronunciation_embed_dim shape_embed_dim router_hidden_size image_size"
    ),
    32: (
        "hidden_size n_embd d_model emb_dim embedding_dim hidden_size_global lru_width attention_hidden_size "
        "backbone_hidden_size input_size adapter_in_dim adapter_input_size adapter_out_dim dim_model_base "
        "image_seq_length"
    ),
    64: (
        "intermediate_size moe_intermediate_size dense_intermediate_size shared_expert_intermediate_size "
        "shared_experts_intermediate_size shared_intermediate_size intermediate_size_mlp "
        "moe_shared_expert_intermediate_size d_ff d_inner dff dim_ff ffn_dim decoder_ffn_dim encoder_ffn_dim "
        "ffn_hidden_size expert_ffn_hidden_size feed_forward_size mamba_d_ssm max_position_embeddings "
        "model_max_length max_seq_len max_target_positions max_source_positions n_ctx n_positions "
        "original_max_position_embeddings context_length rel_extent"
    ),
    VOCABULARY: (
        "vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input ngram_vocab_size_base "
        "audio_vocab_size pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab"
    ),
}
TINY = {field: value for value, fields in GROUPS.items() for field in fields.split()}
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")

# What single types need besides, by type; a dictionary stands for a config below.
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [1],
    "eos_token_id": 1,
}
OTHER_WHERE_SLIDING = {
    "head_dim": 8,
    "per_layer_config": {1: {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 16}},
}
SHARED_BLOCK = {"attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 2, "mamba_headdim": 32}
TWO_OF_EACH = ["sliding_attention", "full_attention"] * 2
FIELDS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"text_config": OTHER_WHERE_SLIDING},
    "dots3_note_text": OTHER_WHERE_SLIDING,
    "gemma4": {"text_config": {"global_head_dim": 16}},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified": {"text_config": {"global_head_dim": 16}},
    "gemma4_unified_text": {"global_head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "num_hidden_layers": 4},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "reformer": {"axial_pos_embds": False, "hash_seed": 0},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": SHARED_BLOCK | {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": SHARED_BLOCK,
    "zaya": {"num_experts_per_tok": 1},
}

SHARING = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": TWO_OF_EACH}

# Forms beside a type's plain one: "type+form" -> fields.
FORMS: dict[str, dict[str, Any]] = {
    "llama+one-layer": {"num_hidden_layers": 1},
    "gptj+one-layer": {"n_layer": 1},
    "gemma3n_text+shared-kv": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": TWO_OF_EACH,
        "intermediate_size": [64] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0],
    },
    "gemma4_text+shared-kv": SHARING,
    "gemma4_unified_text+shared-kv": SHARING,
    "zamba2+block-used-twice": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "xlm+encoder": {"causal": False},
}
# Models that look both ways unless they are told to be decoders.
ENCODERS = [
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
]
FORMS |= {f"{name}+encoder": {"is_decoder": False} for name in ENCODERS}

# What cannot be made here, and why.
NOT_BUILT: dict[str, str] = {
    "gemma3n": "its vision tower needs the package timm",
    "gemma4_assistant": "its layers read the keys and values of the model that it assists",
    "gemma4_unified_assistant": "its layers read the keys and values of the model that it assists",
    "musicgen": "AutoModelForCausalLM cannot make its decoder from the whole config",
    "musicgen_melody": "AutoModelForCausalLM cannot make its decoder from the whole config",
}


def causal_types() -> list[str]:
    """Every type and form that is made, in transformers' order."""
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in NOT_BUILT] + list(FORMS)


def tiny_config(name: str) -> PretrainedConfig:
    """The tiny config of a type or form."""
    kind = name.partition("+")[0]
    given = _merged(FIELDS.get(kind, {}), FORMS.get(name, {}))
    defaults = AutoConfig.for_model(kind)
    made: PretrainedConfig = type(defaults)(**_merged(_small(defaults.to_dict()), given))
    return made


def save_causal_type(name: str, directory: Path) -> Path:
    """The type's model with random weights, as save_pretrained writes it: float32, seed 0."""
    torch.manual_seed(0)
    config = tiny_config(name)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # biases and norms too, so that none of them is a constant
        torch.nn.init.normal_(parameter, 0.0 if parameter.ndim > 1 else 0.5, 0.3)
    model.save_pretrained(directory)
    if model.config.model_type != config.model_type:  # made from the text part of a larger config: that one is the type
        config.save_pretrained(directory)
    return directory


def _small(fields: dict[str, Any]) -> dict[str, Any]:
    """Of a config's fields those that change, made small, those of the configs below it too."""
    return dict(_changed(fields))


def _changed(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    layers = next((fields[name] for name in COUNTS if isinstance(fields.get(name), int)), None)
    for name, value in fields.items():
        if isinstance(value, dict):
            if "model_type" in value:
                yield name, _small(value) | ({"model_type": value["model_type"]} if value["model_type"] else {})
        elif name == "is_decoder":
            yield name, True
        elif isinstance(value, list) and len(value) == layers and layers > LAYERS:
            yield name, _first_of_each(value)
        elif name.endswith(("_token_id", "_token_index")) and name not in TINY:
            if value is not None:
                yield name, 2
        elif name == "head_dim" and "qk_rope_head_dim" in fields:
            yield name, TINY["qk_rope_head_dim"]
        elif name == "num_key_value_heads" and "kv_lora_rank" in fields:
            yield name, TINY["num_attention_heads"]
        elif name in TINY and value is not None and not isinstance(value, bool):
            yield name, TINY[name]


def _first_of_each(values: list[Any]) -> list[Any]:
    """As many values as there are layers: each kind in turn, so that few layers hold them all."""
    widest = TINY["intermediate_size"]
    kinds = list(dict.fromkeys(widest if isinstance(value, int) and value > widest else value for value in values))
    return [kinds[place % len(kinds)] for place in range(LAYERS)]


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """`one` with the fields of `other`, those of the configs below it too."""
    return one | {
        name: _merged(one[name], value) if isinstance(value, dict) and isinstance(one.get(name), dict) else value
        for name, value in other.items()
    }
