"""Heads and projections outside of the decoder layers, reached by name, through every stage that knows masks."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig

from tests.causal_survey import own_loss
from tests.small_models import LLAMA, gpt2_config, llama_config, save_random, skeleton_of, with_tensors
from tests.trim_cli import COMPUTE, trim, trim_json, zeros
from trimcli import load_exported, load_packed, load_sparse
from trimcli.evaluation.perplexity import perplexity
from trimcli.files.masks import MaskFile
from trimcli.model.outside import find_outside

HEAD = ("--only", "lm_head", "--method", "magnitude", "--sparsity", 0.5, *COMPUTE)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose head is its own."""
    config = llama_config(tie_word_embeddings=False)
    return save_random(config, tmp_path_factory.mktemp("untied") / "model")


@pytest.fixture(scope="module")
def pruned(untied: Path) -> tuple[Path, Path]:
    """Its masks, of the head alone, and the directory written with them."""
    masks, out = untied.parent / "masks", untied.parent / "pruned"
    trim_json("prune", untied, "-o", masks, "--save-model", out, *HEAD)
    return masks, out


def own(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def windows() -> torch.Tensor:
    return torch.randint(2, 64, (3, 12), generator=torch.Generator().manual_seed(1))


def test_an_untied_head_is_reached_and_measured(untied: Path, pruned: tuple[Path, Path]) -> None:
    masks, out = pruned
    found, skeleton, written = MaskFile.open(masks), skeleton_of(untied), own(out)
    assert found.names == list(skeleton.outside) == ["lm_head"]
    assert zeros(found.keep("lm_head")) == 64 * 32 // 2
    dense = own(untied).state_dict()
    for name, tensor in written.state_dict().items():
        expected = dense[name] * found.keep("lm_head") if name == "lm_head.weight" else dense[name]
        assert torch.equal(tensor, expected)
    expected = math.exp(own_loss(written, windows()))
    assert perplexity(skeleton, windows(), mask=found) == pytest.approx(expected, rel=1e-5)
    assert perplexity(skeleton_of(out), windows()) == pytest.approx(expected, rel=1e-5)
    assert perplexity(skeleton, windows()) != pytest.approx(expected, rel=1e-4)  # without the masks, dense again


def test_a_head_is_read_from_every_form(untied: Path, pruned: tuple[Path, Path], tmp_path: Path) -> None:
    masks, out = pruned
    trim_json("apply-masks", untied, masks, "-o", tmp_path / "packed", "--format", "packed")
    assert trim_json("verify", tmp_path / "packed", "--masks", masks)["holds"]
    expected = own(out)(windows()).logits
    for made in (
        load_packed(tmp_path / "packed"),
        load_sparse(tmp_path / "packed"),
        load_sparse(out),
        load_sparse(untied, masks=masks),
    ):
        torch.testing.assert_close(made(windows()).logits, expected)
    assert not isinstance(load_sparse(out).lm_head, nn.Linear)  # but its keep bits and kept values
    done = trim_json("export", out, "-o", tmp_path / "export", "--to", "csr")
    assert done["linears"]["lm_head"]["zeros"] == 64 * 32 // 2
    assert done["linears"]["lm_head"]["reason"] != "not pruned"
    torch.testing.assert_close(load_exported(tmp_path / "export")(windows()).logits, expected)


def test_masks_of_a_head_hold_in_training(untied: Path, pruned: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from tests.finetuned import save_counting

    masks, out = pruned
    tokens, keep = save_counting(tmp_path / "tokens"), MaskFile.open(masks).keep("lm_head")
    common = ("--tokens", tokens, "--steps", 3, "--device", "cpu")
    for mode in ("full", "lora"):
        trim_json("finetune", out, "-o", tmp_path / mode, "--mode", mode, *common)
        assert trim_json("verify", tmp_path / mode, "--masks", masks)["holds"]
        head = own(tmp_path / mode).lm_head.weight
        assert torch.equal(head != 0, keep)
        assert torch.equal(head, own(out).lm_head.weight) == (mode == "lora")
    done = trim("finetune", out, "-o", tmp_path / "admm", "--mode", "admm", "--sparsity", 0.5, *common)
    assert done.status == 2
    assert "lm_head lies outside of the decoder layers, and --mode admm chooses masks anew" in " ".join(
        done.err.split()
    )


STAY = {
    "tied": ("lm_head", "lm_head stays dense, as it is one with"),
    "embedding": ("*embed_tokens", "model.embed_tokens stays dense, as it is one with"),
    "untied": ("*embed_tokens", "model.embed_tokens stays dense, as it is an embedding, whose rows are looked up"),
    "gpt2": ("*wpe", "transformer.wpe stays dense, as it is an embedding"),
    "unknown": ("*other*", "nothing matches: of 14 linears"),
}


@pytest.mark.parametrize("name", STAY)
def test_what_stays_dense_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    config = gpt2_config() if name == "gpt2" else llama_config(tie_word_embeddings=name != "untied")
    model, (glob, why) = save_random(config, tmp_path / "model"), STAY[name]
    done = trim("prune", model, "-o", tmp_path / "masks", "--only", glob, *HEAD[2:])
    assert done.status == 2
    assert why in " ".join(done.err.split())
    both = trim("plan", model, "--only", glob, "--only", "*down_proj", "--only", "*c_proj", *HEAD[2:])
    assert both.status == 0
    assert why.partition(":")[0].replace("nothing matches", "matches none") in " ".join(both.err.split())


def test_a_head_saved_with_other_values_than_the_embeddings_is_no_longer_tied(tmp_path: Path) -> None:
    tied = save_random(llama_config(tie_word_embeddings=True), tmp_path / "tied")
    assert not skeleton_of(tied).outside
    apart = with_tensors(tied, tmp_path / "apart", **{"lm_head.weight": torch.randn(64, LLAMA["hidden_size"])})
    assert list(skeleton_of(apart).outside) == ([] if tied_in_any_case() else ["lm_head"])


def tied_in_any_case() -> bool:
    """Transformers 4 ties by the config alone."""
    import transformers

    return int(transformers.__version__.partition(".")[0]) < 5


def test_a_config_tells_what_lies_outside(untied: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((untied / "config.json").read_bytes())
    done = trim_json("plan", tmp_path, *HEAD)
    assert [(one["name"], one["shape"], one["zeros"]) for one in done["linears"]] == [("lm_head", [64, 32], 1024)]


def test_projections_beside_the_layers(tmp_path: Path) -> None:
    """OPT's embeddings are narrower than its layers: two linears take them there and back."""
    sizes: dict[str, Any] = {"hidden_size": 32, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OPTConfig(
        **sizes, vocab_size=64, max_position_embeddings=32, word_embed_proj_dim=16, do_layer_norm_before=True
    )
    model, masks = save_random(config, tmp_path / "model"), tmp_path / "masks"
    given = ("--only", "*.project_*", "--method", "magnitude", "--sparsity-type", "2:4", *COMPUTE)
    trim_json("prune", model, "-o", masks, "--save-model", tmp_path / "out", *given)
    found = MaskFile.open(masks)
    assert {name.rpartition(".")[2]: found.shape(name) for name in found.names} == {
        "project_in": (32, 16),
        "project_out": (16, 32),
    }
    expected = math.exp(own_loss(own(tmp_path / "out"), windows()))
    skeleton = skeleton_of(model)
    assert perplexity(skeleton, windows(), mask=found) == pytest.approx(expected, rel=1e-5)
    assert perplexity(skeleton, windows()) != pytest.approx(expected, rel=1e-3)
    assert trim_json("verify", tmp_path / "out")["holds"]


def test_what_is_found_outside() -> None:
    """A module that is inside as well is not outside, whatever its first name; neither is what several are made of."""
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict(
        {
            "first": shared,
            "layer": nn.Sequential(shared, nn.Linear(4, 4)),
            "single": nn.Conv2d(4, 6, 1),
            "grouped": nn.Conv2d(4, 4, 1, groups=2),
            "patches": nn.Conv2d(3, 4, 2, stride=2),
            "pieces": nn.Linear(4, 2),
            "lookup": nn.Embedding(4, 2),
            "norm": nn.LayerNorm(4),
            "twice": nn.Linear(4, 8),
        }
    )
    keys = {"single.weight": "s", "twice.weight": "t"}
    inside = set(model["layer"].modules())
    found, dense = find_outside(model, inside, keys.get, {"twice.weight": "it is one with x"}, stored=True)
    assert {name: (one.shape, one.key, one.replaceable) for name, one in found.items()} == {
        "single": ((6, 4), "s", False)
    }
    assert dense == {
        "grouped": "it is a convolution that is no 1x1",
        "patches": "it is a convolution that is no 1x1",
        "pieces": "the checkpoint holds it in pieces",
        "lookup": "it is an embedding, whose rows are looked up",
        "twice": "it is one with x",
    }
    assert list(find_outside(model, inside, lambda _: None, {}, stored=False)[0]) == ["single", "pieces", "twice"]
