"""The walk proves itself: which form a model has, what is refused, and that nobody looks twice."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.families import COMMON, SPECIAL, save_family
from tests.small_models import llama_config, random_model, save, save_random, skeleton_of, with_tensors
from tests.trim_cli import COMPUTE, save_tokens, trim, trim_json
from trimcli.errors import InputError
from trimcli.evaluation.perplexity import perplexity
from trimcli.files.documents import read_json
from trimcli.files.masks import MaskFile
from trimcli.model.skeleton import Skeleton
from trimcli.pipeline import proof
from trimcli.pipeline.proof import probe_tokens, prove

five = pytest.mark.skipif(int(transformers.__version__.partition(".")[0]) < 5, reason="a type of transformers 5")


def made(name: str, **fields: Any) -> PretrainedConfig:
    config: PretrainedConfig = getattr(transformers, f"{name}Config")(**{**SPECIAL, **COMMON, **fields})
    return config


def own_perplexity(directory: Path, tokens: torch.Tensor) -> float:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).exp())


def shared_keys(directory: Path) -> Path:
    """A Gemma whose last two layers take keys and values of the layers before them."""
    config = made(
        "Gemma3nText",
        **{"num_hidden_layers": 4, "head_dim": 8, "num_kv_shared_layers": 2, "layer_types": ["full_attention"] * 4},
        **{"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "altup_num_inputs": 4},
        **{"intermediate_size": [64] * 4, "activation_sparsity_pattern": [0.0] * 4, "sliding_window": 5},
    )
    return save_random(config, directory)


def assert_both_ways_measure_alike(model: Path, masks: Path, folder: Path) -> None:
    """The model, and it under masks, measure what transformers makes of it and of the directory `pruned`."""
    tokens = torch.randint(3, 97, (3, 16), generator=torch.Generator().manual_seed(1))
    skeleton = skeleton_of(model)
    prove(skeleton, folder / "cache")
    assert perplexity(skeleton, tokens) == pytest.approx(own_perplexity(model, tokens), rel=1e-5)
    masked = perplexity(skeleton, tokens, mask=MaskFile.open(masks))
    assert masked == pytest.approx(own_perplexity(folder / "pruned", tokens), rel=1e-5)


@five
def test_state_that_layers_hand_on_is_the_models_own(tmp_path: Path) -> None:
    """Keys and values shared between layers, and hidden states in four streams, at every batch size."""
    model, tokens = shared_keys(tmp_path / "gemma"), torch.arange(4, 64).view(5, 12)
    expected = own_perplexity(model, tokens)
    skeleton = skeleton_of(model)
    prove(skeleton, tmp_path / "cache")
    assert skeleton.form == "suspended"
    for batch_size in (1, 2, None):
        assert perplexity(skeleton, tokens, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)


@five
def test_a_suspended_model_is_pruned_calibrated_and_measured(tmp_path: Path) -> None:
    model, masks = shared_keys(tmp_path / "gemma"), tmp_path / "masks"
    tokens = save_tokens(tmp_path / "tokens", vocabulary=97)
    shared = ("--tokens", tokens, "--cache-dir", tmp_path / "cache", *COMPUTE)
    trim_json("prune", model, "-o", masks, "--sparsity", 0.5, "--use-trim", "--alloc", "owl", *shared)
    trim_json("apply-masks", model, masks, "-o", tmp_path / "pruned")
    assert_both_ways_measure_alike(model, masks, tmp_path)


def test_a_pass_that_was_cut_short_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    skeleton = skeleton_of(save_family("llama", tmp_path / "llama"))
    tokens, expected = torch.arange(4, 64).view(5, 12), None
    for form in ("recorded", "suspended", "recorded"):
        skeleton.form = form
        found = perplexity(skeleton, tokens, batch_size=1)
        expected = expected or found
        assert found == pytest.approx(expected, rel=1e-6)
    assert all(parameter.device.type == "meta" for parameter in skeleton.model.parameters())
    assert not any("forward" in vars(module) for module in skeleton.model.modules())


def test_what_was_found_is_kept_for_models_of_the_structure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = save(random_model(llama_config()), tmp_path / "first")
    prove(skeleton_of(first), tmp_path / "cache")
    (kept,) = (tmp_path / "cache" / "proofs").iterdir()
    assert read_json(kept)["form"] == "recorded"

    def never(*_: Any) -> Any:
        raise AssertionError("looked again")

    monkeypatch.setattr(proof, "_form", never)
    second = skeleton_of(save(random_model(llama_config(), seed=1), tmp_path / "second"))
    prove(second, tmp_path / "cache")
    assert (second.form, second.returns) == ("recorded", skeleton_of(first).returns or second.returns)
    with pytest.raises(AssertionError, match="looked again"):
        prove(skeleton_of(save(random_model(llama_config(head_dim=4)), tmp_path / "third")), tmp_path / "cache")


@pytest.mark.parametrize(
    "garbage", ["", "[]", "{}", '{"schema": "trim.proof/2"}', '{"schema": "trim.proof/2", "form": 5, "returns": null}']
)
def test_a_kept_proof_that_is_not_whole_is_made_anew(garbage: str, tmp_path: Path) -> None:
    skeleton = skeleton_of(save_family("llama", tmp_path / "llama"))
    prove(skeleton, tmp_path / "cache")
    (kept,) = (tmp_path / "cache" / "proofs").iterdir()
    whole, returns = kept.read_text(), skeleton.returns
    for damaged in (garbage, whole.replace("recorded", "suspended")):
        kept.write_text(damaged)
        again = skeleton_of(tmp_path / "llama")
        prove(again, tmp_path / "cache")
        assert (again.form, again.returns) == ("recorded", returns)
        assert kept.read_text() == whole


def test_a_model_is_proven_without_a_cache_that_can_be_used(tmp_path: Path) -> None:
    skeleton = skeleton_of(save_family("llama", tmp_path / "llama"))
    (tmp_path / "file").touch()
    prove(skeleton, tmp_path / "file")
    assert skeleton.returns is not None


def test_the_samples_avoid_tokens_with_a_meaning(tmp_path: Path) -> None:
    config = llama_config(bos_token_id=7, eos_token_id=[8, 9], pad_token_id=10)
    tokens = probe_tokens(skeleton_of(save(random_model(config), tmp_path / "llama")))
    assert tokens.shape == (5, 12)
    assert not set(range(7, 11)) & set(tokens.flatten().tolist())
    differ = tokens[3] != tokens[4]
    assert differ.tolist() == [False] * 11 + [True]


def test_rows_of_tokens_that_no_text_has_may_hold_anything(tmp_path: Path) -> None:
    """In the embedding, and, tied or not, in the head: what measures sees what reaches its figure."""
    for tied in (True, False):
        source = save(random_model(llama_config(tie_word_embeddings=tied)), tmp_path / f"{tied}")
        tensors = load_file(source / "model.safetensors")
        for key in {"model.embed_tokens.weight", "lm_head.weight"} & set(tensors):
            tensors[key][[*range(30), 63]] = torch.nan
        skeleton = skeleton_of(with_tensors(source, tmp_path / f"{tied}-damaged", **tensors))
        assert 29 < int(probe_tokens(skeleton).min()) < int(probe_tokens(skeleton).max()) < 63
        prove(skeleton, tmp_path / f"{tied}-cache")
        assert skeleton.returns is not None
        assert math.isnan(perplexity(skeleton, torch.arange(30, 60).view(2, 15)))  # which `eval` refuses
    tensors["model.embed_tokens.weight"][:] = torch.nan
    with pytest.raises(InputError, match="has no finite row"):
        prove(skeleton_of(with_tensors(source, tmp_path / "all", **tensors)), tmp_path / "cache")


def test_an_encoder_is_no_causal_model(tmp_path: Path) -> None:
    model = save_random(made("Bert", is_decoder=False), tmp_path / "bert")
    with pytest.raises(InputError, match="is no causal language model: another last token changes"):
        prove(skeleton_of(model), tmp_path / "cache")
    shutil.copy(tokenizer(tmp_path), model)
    save_tokens(tmp_path / "tokens", vocabulary=97)
    done = trim(
        "calibrate", model, "-o", tmp_path / "c", "--tokens", tmp_path / "tokens", "--cache-dir", tmp_path / "k"
    )
    assert done.status == 2
    assert "is no causal language model" in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "c").exists()


def tokenizer(folder: Path) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text("{}")
    return path


def test_layers_spread_over_lists_are_named(tmp_path: Path) -> None:
    config = made("XLM", n_words=97, emb_dim=32, n_layers=3, n_heads=4, causal=True)
    with pytest.raises(InputError, match=r"over the lists transformer\.attentions, transformer\.ffns"):
        skeleton_of(save_random(config, tmp_path / "xlm"))


def test_a_layer_that_gives_something_else_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk that went wrong at one layer is refused with its name and by how much."""
    from trimcli.pipeline import recorded, suspended

    skeleton = skeleton_of(save_family("llama", tmp_path / "llama"))
    for kind in (recorded.Recorded, suspended.Suspended):
        right = kind.run

        def wrong(self: Any, layer: Any, rows: slice, hidden: Any = None, right: Any = right) -> Any:
            found = right(self, layer, rows, hidden)
            return found * 1.01 if layer.index == 1 else found

        monkeypatch.setattr(kind, "run", wrong)
    with pytest.raises(InputError, match=r"differs from its own forward pass at model\.layers\.1 by 1\.0%"):
        prove(skeleton, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "proofs").iterdir())


def test_the_future_is_seen_in_sixteen_bits_too(tmp_path: Path) -> None:
    """Rounding in bfloat16 is not taken for a difference, nor a difference for rounding."""
    from trimcli.files.checkpoint import Checkpoint

    for name, form in (("llama", "recorded"), ("mixtral", "recorded"), ("gemma2", "recorded")):
        if name == "mixtral" and int(transformers.__version__[0]) < 5:
            continue
        skeleton = Skeleton(Checkpoint.open(save_family(name, tmp_path / name)), dtype=torch.bfloat16)
        prove(skeleton, tmp_path / "cache")
        assert skeleton.form == form
    bert = Skeleton(
        Checkpoint.open(save_random(made("Bert", is_decoder=False), tmp_path / "bert")), dtype=torch.bfloat16
    )
    with pytest.raises(InputError, match="no causal"):
        prove(bert, tmp_path / "cache")


@five
def test_what_several_layers_use_stays_dense_and_is_said(tmp_path: Path) -> None:
    """A shared block, used twice: masks on the model and the directory written with them measure the same."""
    config = made(
        "Zamba2",
        **{"num_hidden_layers": 4, "num_key_value_heads": 4, "n_mamba_heads": 8, "mamba_d_state": 8, "chunk_size": 8},
        **{"mamba_ngroups": 1, "mamba_headdim": 8, "num_mem_blocks": 1, "hybrid_layer_ids": [1, 3], "adapter_rank": 4},
        **{"layers_block_type": ["mamba", "hybrid"] * 2, "mamba_expand": 2, "pad_token_id": 2},
    )
    model, masks = save_random(config, tmp_path / "zamba"), tmp_path / "masks"
    plan = trim_json("plan", model, "--sparsity", 0.5)
    shared = [name for name, why in plan["why_dense"].items() if why == "more than one layer uses it"]
    assert any(name.startswith("model.layers.1.shared_transformer.") for name in shared)
    assert any(name.startswith("model.layers.3.shared_transformer.") for name in shared)
    assert not any("shared_transformer" in linear["name"] for linear in plan["linears"])
    trim_json("prune", model, "-o", masks, "--sparsity", 0.5, "--method", "magnitude")
    trim_json("apply-masks", model, masks, "-o", tmp_path / "pruned")
    assert_both_ways_measure_alike(model, masks, tmp_path)


def test_a_layer_that_half_a_pass_leaves_changed_is_run_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = LlamaDecoderLayer.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        given = 2 * hidden_states if getattr(self, "inside", False) else hidden_states
        self.inside = True
        result = own(self, given, *args, **kwargs)
        self.inside = False
        return result

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    skeleton = skeleton_of(save(random_model(llama_config()), tmp_path / "llama"))
    prove(skeleton, tmp_path / "cache")
    assert skeleton.form == "suspended"
