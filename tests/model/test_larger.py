"""Decoders inside models that also read images, and models that are no decoders."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PretrainedConfig

from tests.causal_survey import own_loss, sample_windows
from tests.causal_types import tiny_config
from tests.families import CONVERTS
from tests.small_models import skeleton_of
from tests.trim_cli import COMPUTE, save_tokens, trim, trim_json, zeros
from trimcli.commands.unpack import load_packed
from trimcli.evaluation.perplexity import perplexity
from trimcli.files.masks import MaskFile
from trimcli.methods.masks import matrix_budget

VOCABULARY = 97
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
IMAGES: dict[str, Any] = {
    "image_token_id": 5,
    "video_token_id": 6,
    "vision_start_token_id": 7,
    "vision_end_token_id": 8,
}


def qwen2_5_vl() -> PretrainedConfig:
    rope = {"rope_type": "default", "type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    key = "rope_parameters" if int(transformers.__version__.partition(".")[0]) >= 5 else "rope_scaling"
    vision: dict[str, Any] = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 8}
    vision |= {"out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 16}
    return transformers.Qwen2_5_VLConfig(text_config={**TEXT, key: rope}, vision_config=vision, **IMAGES)


def gemma3() -> PretrainedConfig:
    text = {**TEXT, "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}
    tokens: dict[str, Any] = {
        "boi_token_index": 7,
        "eoi_token_index": 8,
        "image_token_index": 5,
        "mm_tokens_per_image": 4,
    }
    return transformers.Gemma3Config(text_config=text, vision_config=VISION, **tokens)


def mistral3() -> PretrainedConfig:
    text = {**TEXT, "model_type": "mistral", "head_dim": 8}
    vision = {**VISION, "model_type": "pixtral", "head_dim": 8}
    return transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=5)


LARGER = {"qwen2_5_vl": qwen2_5_vl, "gemma3": gemma3, "mistral3": mistral3}
if CONVERTS:
    LARGER |= {name: partial(tiny_config, name) for name in ("llama4", "qwen3_vl_moe")}


VISION_TOWER = ("--only", "*vis*")
HALF = ("--method", "magnitude", "--sparsity", 0.5, *COMPUTE)


def save_larger(name: str, directory: Path) -> Path:
    """A tiny random model that reads images beside text, as save_pretrained writes it: float32."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(LARGER[name]())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0 if parameter.ndim > 1 else 0.5, 0.3)
    model.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text("{}")
    return directory


@pytest.fixture(scope="module", params=LARGER)
def larger(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_larger(request.param, tmp_path_factory.mktemp("larger") / request.param)


def stored(directory: Path) -> dict[str, bytes]:
    """Every tensor's bytes, and what is said of it."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_tensor(key)
                found[key] = f"{tensor.dtype} {list(tensor.shape)}".encode() + tensor.numpy().tobytes()
    return found


def test_perplexity_on_text_is_the_models_own(larger: Path) -> None:
    own = AutoModelForImageTextToText.from_pretrained(larger, dtype=torch.float32).eval()
    windows = sample_windows().clamp(min=9)  # no image's token
    skeleton = skeleton_of(larger)
    assert type(skeleton.model) is type(own)
    assert perplexity(skeleton, windows) == pytest.approx(math.exp(own_loss(own, windows)), rel=1e-5)


@pytest.mark.skipif(not CONVERTS, reason="transformers 4 cannot make them tiny alike")
@pytest.mark.parametrize("turned", [False, True])
def test_stacks_that_are_turned_on_loading(turned: bool, tmp_path: Path) -> None:
    """Qwen3-VL's experts are stored either way, and are the same matrices: transformers looks at their shapes."""
    model = AutoModelForImageTextToText.from_config(tiny_config("qwen3_vl_moe"))
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    if turned:
        tensors = {key: one.mT.contiguous() if "mlp.experts" in key else one for key, one in tensors.items()}
        save_file(tensors, path, metadata={"format": "pt"})
    skeleton = skeleton_of(tmp_path / "model")
    routed = [linear for linear in skeleton.linears.values() if linear.routed]
    assert len({linear.transposed for linear in routed}) == 1
    skeleton.load_everything()
    own = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32)
    modules = {module: name for name, module in skeleton.model.named_modules()}
    for linear in routed:
        stack = own.get_parameter(f"{modules[linear.module]}.{linear.parameter_name}")
        assert torch.equal(linear.weight, stack[linear.expert])
        assert torch.equal(linear.read(skeleton.checkpoint), stack[linear.expert])
    assert len(routed) > 0


def test_only_the_decoder_is_pruned(larger: Path, tmp_path: Path) -> None:
    out, masks = tmp_path / "out", tmp_path / "masks"
    tokens = save_tokens(tmp_path / "tokens", vocabulary=VOCABULARY)
    summary = trim_json(
        "prune", larger, "-o", masks, "--save-model", out, "--sparsity", 0.5, "--tokens", tokens,
        "--cache-dir", tmp_path / "cache", *COMPUTE,
    )  # fmt: skip
    skeleton, keeps = skeleton_of(larger), MaskFile.open(masks)
    assert summary["linears"] == len(skeleton.linears) > 0
    inside = skeleton.model.get_decoder() if hasattr(skeleton.model, "get_decoder") else skeleton.model
    assert all(linear.module in set(inside.modules()) for linear in skeleton.linears.values())
    before, after = stored(larger), stored(out)
    assert before.keys() == after.keys()
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {linear.key for linear in skeleton.linears.values()}
    assert any("vis" in key for key in before.keys() - changed)
    for linear in skeleton.linears.values():
        assert zeros(keeps.keep(linear.name)) == matrix_budget(*linear.shape, 0.5)
    assert trim_json("verify", out)["holds"]
    assert (out / "preprocessor_config.json").is_file()

    written = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    windows = sample_windows().clamp(min=9)
    expected = math.exp(own_loss(written, windows))
    assert perplexity(skeleton, windows, mask=keeps) == pytest.approx(expected, rel=1e-5)
    assert perplexity(skeleton_of(out), windows) == pytest.approx(expected, rel=1e-5)


def test_the_vision_tower_is_pruned_by_magnitude_where_it_is_named(larger: Path, tmp_path: Path) -> None:
    """Text gives it no inputs, but what a mask needs of it are its weights."""
    out, masks, packed = tmp_path / "out", tmp_path / "masks", tmp_path / "packed"
    summary = trim_json("prune", larger, "-o", masks, "--save-model", out, *VISION_TOWER, *HALF)
    skeleton, keeps = skeleton_of(larger), MaskFile.open(masks)
    tower = {name: one for name, one in skeleton.outside.items() if "vis" in name}
    assert keeps.names == list(tower)
    assert summary["linears"] == len(tower) > 4
    own, written = (AutoModelForImageTextToText.from_pretrained(one, dtype=torch.float32) for one in (larger, out))
    for name, linear in tower.items():
        keep, weight = keeps.keep(name), own.get_parameter(f"{name}.weight").detach()
        assert zeros(keep) == matrix_budget(*linear.shape, 0.5)
        assert weight[keep].abs().min() >= weight[~keep].abs().max()
        assert torch.equal(written.get_parameter(f"{name}.weight"), weight * keep)
    before, after = stored(larger), stored(out)
    assert before.keys() == after.keys()
    assert {key for key in before if before[key] != after[key]} == {linear.key for linear in tower.values()}
    windows = sample_windows().clamp(min=9)
    assert perplexity(skeleton_of(out), windows) == perplexity(skeleton, windows)
    for place in ((out,), (masks,), (out, "--masks", masks)):
        found = trim_json("verify", *place)
        assert found["holds"]
        assert list(found["linears"]) == list(tower)

    trim_json("apply-masks", larger, masks, "-o", packed, "--format", "packed")
    assert trim_json("verify", packed)["holds"]
    trim_json("unpack", packed, "-o", tmp_path / "unpacked")
    assert stored(tmp_path / "unpacked") == after
    loaded = load_packed(packed).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in written.state_dict().items())


def test_patterns_for_the_decoder_and_for_the_rest_may_be_mixed(tmp_path: Path) -> None:
    """Gemma 3's vision tower has a q_proj, too: one that matches the decoder's means the decoder's alone."""
    model, outs = save_larger("gemma3", tmp_path / "model"), {}
    given: dict[str, tuple[str, ...]] = {
        "decoder": ("--only", "*q_proj"),
        "both": ("--only", "*q_proj", "--only", "*vision_tower*", "--skip", "*fc2"),
    }
    for name, globs in given.items():
        outs[name] = trim_json("plan", model, *globs, *HALF)
    decoder, both = ({linear["name"]: linear for linear in one["linears"]} for one in outs.values())
    assert len(decoder) == 2
    assert not any("vision" in name for name in decoder)
    tower = [name for name in skeleton_of(model).outside if "vision_tower" in name and not name.endswith("fc2")]
    assert list(both) == [*decoder, *tower]
    assert {name.rpartition(".")[2] for name in tower} >= {"q_proj", "out_proj", "fc1"}
    shown = " ".join(trim("plan", model, *given["both"], *HALF).out.split())
    assert shown.count("self_attn.q_proj 2 32 x 32") == 2  # the decoder's and the tower's are told apart


def test_an_allocation_is_over_the_layers_and_the_rest_takes_its_target(tmp_path: Path) -> None:
    model, ratios = save_larger("qwen2_5_vl", tmp_path / "model"), tmp_path / "ratios.json"
    mixed = ("--only", "*mlp*", *VISION_TOWER)
    trim_json("alloc-layers", model, "-o", ratios, "--method", "depth", "--sparsity", 0.4, "--only", "*mlp*")
    shares = json.loads(ratios.read_text())["sparsity"]
    assert len(set(shares.values())) == 2
    common = ("prune", model, *mixed, "--method", "magnitude", *COMPUTE, "--cache-dir", tmp_path / "cache")
    trim_json(*common, "-o", tmp_path / "file", "--ratios", ratios)
    trim_json(*common, "-o", tmp_path / "made", "--alloc", "depth", "--sparsity", 0.4)
    for found in (MaskFile.open(tmp_path / "file"), MaskFile.open(tmp_path / "made")):
        targets = {name: found.entry(name)["target"] for name in found.names}
        outside = [name for name in targets if "visual" in name]
        assert len(outside) == 12
        assert targets == pytest.approx({**shares, **dict.fromkeys(outside, 0.4)})
        for name, target in targets.items():
            assert zeros(found.keep(name)) == matrix_budget(*found.shape(name), target)

    document = json.loads(ratios.read_text())
    document["pattern"] = {name: [2, 4] for name in shares}
    ratios.write_text(json.dumps(document))
    done = trim(*common, "-o", tmp_path / "patterns", "--ratios", ratios)
    assert done.status == 2
    assert "model.visual.blocks.0.attn.qkv lies outside of the layers, whose N:M patterns alone" in one_line(done.err)
    done = trim(*common[:2], *VISION_TOWER, *common[6:], "-o", tmp_path / "a", "--alloc", "depth", "--sparsity", 0.4)
    assert done.status == 2
    assert "without any of these --alloc depth has nothing to share; leave it out" in one_line(done.err)


def one_line(text: str) -> str:
    return " ".join(text.split())


REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "wanda": (
        ("prune", "--method", "wanda", "--sparsity", 0.5),
        "--method wanda reads inputs; take --method magnitude",
    ),
    "plan": (("plan", "--sparsity-type", "2:4"), "--method wanda reads inputs"),
    "trim": (("prune", "--method", "magnitude", "--use-trim", "--sparsity", 0.5), "--use-trim reads inputs; drop that"),
    "layer": (
        ("prune", "--method", "magnitude", "--reconstruct", "layer", "--sparsity", 0.5, "--save-model", "unmade"),
        "--reconstruct layer reads inputs",
    ),
    "calibrate": (("calibrate",), "--only takes linears inside of them here, as"),
    "alloc": (("alloc-layers", "--method", "depth", "--sparsity", 0.5), "--only takes linears inside of them here"),
}


@pytest.mark.parametrize("way", REFUSED)
@pytest.mark.parametrize("globs", [(), ("--only", "*mlp*")])
def test_what_reads_inputs_is_refused_outside_of_the_decoder(way: str, globs: tuple[str, ...], tmp_path: Path) -> None:
    model, tokens = save_larger("qwen2_5_vl", tmp_path / "model"), save_tokens(tmp_path / "t", vocabulary=VOCABULARY)
    (command, *given), why = REFUSED[way]
    given += [] if command == "alloc-layers" else ["--tokens", tokens]
    given += [] if command == "plan" else ["-o", tmp_path / "out"]
    done = trim(command, model, *given, *VISION_TOWER, *globs, "--cache-dir", tmp_path / "cache")
    assert done.status == 2
    said = one_line(done.err)
    assert "model.visual.blocks.0.attn.qkv lies outside of the 2 decoder layers, whose inputs alone text tells" in said
    assert why in said
    assert said.count(". ") == 0
    assert not (tmp_path / "out").exists()


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    small: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 32}
    models = {
        "t5": transformers.T5ForConditionalGeneration(transformers.T5Config(num_layers=2, num_heads=4, **small)),
        "bart": transformers.BartForConditionalGeneration(
            transformers.BartConfig(encoder_layers=2, decoder_layers=2, max_position_embeddings=64, **small)
        ),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        for command in (("plan", tmp_path / name), ("prune", tmp_path / name, "-o", tmp_path / "masks")):
            done = trim(*command, "--sparsity", 0.5, *COMPUTE)
            assert done.status == 2
            said = " ".join(done.err.split())
            assert f"is of an encoder-decoder ({name}), whose decoder reads what its encoder made" in said
            assert said.count(". ") == 0


def test_what_a_decoder_would_ask_an_encoder_is_no_matrix_to_prune(tmp_path: Path) -> None:
    """Bart's decoder on its own: its layers never call what attends to the encoder, as a forward pass shows."""
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    transformers.BartForCausalLM(config).save_pretrained(tmp_path / "bart")
    tokens = save_tokens(tmp_path / "tokens", vocabulary=VOCABULARY)
    common = ("prune", tmp_path / "bart", "-o", tmp_path / "masks", "--sparsity", 0.5, "--tokens", tokens)
    cache = ("--cache-dir", tmp_path / "cache", *COMPUTE)
    done = trim(*common, *cache)
    assert done.status == 1
    said = " ".join(done.err.split())
    assert "encoder_attn.k_proj is never called by its layer, so it has no inputs" in said
    assert "--skip '*.encoder_attn.*'" in said
    assert trim(*common, *cache, "--skip", "*.encoder_attn.*").status == 0


@pytest.mark.filterwarnings("ignore:If you want to use")
def test_what_looks_both_ways_is_refused(tmp_path: Path) -> None:
    """Bert as a causal model: another last token changes what is predicted before it."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tokens = save_tokens(tmp_path / "tokens", vocabulary=VOCABULARY)
    common = ("--sparsity", 0.5, "--tokens", tokens, "--cache-dir", tmp_path / "cache", *COMPUTE)
    done = trim("prune", tmp_path / "bert", "-o", tmp_path / "masks", *common)
    assert done.status == 2
    assert "is no causal language model: another last token changes what it predicts" in " ".join(done.err.split())
