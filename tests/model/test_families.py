"""Every family: the layerwise walk is the model's own forward pass, and pruning ends in a directory that loads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.families import FAMILIES, VOCABULARY, save_family
from tests.trim_cli import COMPUTE, save_tokens, trim_json, zeros
from trimcli.evaluation.perplexity import perplexity
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.masks import MaskFile
from trimcli.model.skeleton import Skeleton
from trimcli.pipeline.walk import Walk


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of the family."""
    return save_family(request.param, tmp_path_factory.mktemp("families") / request.param)


@pytest.fixture(scope="module")
def own(family: Path) -> Any:
    """The model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokens_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokens(tmp_path_factory.mktemp("tokens") / "tokens.safetensors", vocabulary=VOCABULARY, nsamples=5)


def own_states(model: Any, skeleton: Skeleton, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(final hidden states, logits) of the model's own forward pass: what its last decoder layer gave."""
    seen: list[Tensor] = []

    def after(_: torch.nn.Module, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = model.get_submodule(skeleton.layers[-1].name).register_forward_hook(after)
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    handle.remove()
    return seen[-1], logits


def test_the_walk_is_the_models_own_forward_pass(family: Path, own: Any, tokens_file: Path) -> None:
    tokens = load_file(tokens_file)["tokens"].long()
    skeleton = Skeleton(Checkpoint.open(family))
    walk = Walk(skeleton, tokens, batch_size=2)  # a last batch of one sample
    for layer in walk.layers():
        walk.advance(layer)
    everything = slice(0, len(tokens))
    with walk.head() as head:
        logits = head(everything, slice(0, tokens.shape[1]))
    states, expected = own_states(own, skeleton, tokens)
    torch.testing.assert_close(walk.states(everything), states, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert all(parameter.device.type == "meta" for parameter in skeleton.model.parameters())


def test_perplexity_is_the_models_own(family: Path, own: Any, tokens_file: Path) -> None:
    tokens = load_file(tokens_file)["tokens"].long()
    with torch.no_grad():
        logits = own(input_ids=tokens, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    found = perplexity(Skeleton(Checkpoint.open(family)), tokens)
    assert found == pytest.approx(float(losses.exp()), rel=1e-5)


def test_pruned_end_to_end(family: Path, own: Any, tokens_file: Path, tmp_path: Path) -> None:
    masks, pruned = tmp_path / "masks.safetensors", tmp_path / "pruned"
    summary = trim_json(
        "prune", family, "-o", masks, "--sparsity", 0.5, "--tokens", tokens_file, "--save-model", pruned,
        "--cache-dir", tmp_path / "cache", *COMPUTE,
    )  # fmt: skip
    skeleton = Skeleton(Checkpoint.open(family))
    assert summary["linears"] == len(skeleton.linears) > 0
    loaded = AutoModelForCausalLM.from_pretrained(pruned)
    assert own.state_dict().keys() == loaded.state_dict().keys()
    before, after = load_file(family / "model.safetensors"), load_file(pruned / "model.safetensors")
    assert before.keys() == after.keys()
    keeps = MaskFile.open(masks)
    for name, linear in skeleton.linears.items():
        weight, dense = linear.within(after[str(linear.key)]), linear.within(before[str(linear.key)])
        assert zeros(weight) == round(0.5 * linear.numel), name
        assert torch.equal(weight, dense * keeps.keep(name)), name
    for key in before.keys() - {linear.key for linear in skeleton.linears.values()}:
        assert torch.equal(before[key], after[key]), key
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == (
        own.get_output_embeddings().weight is own.get_input_embeddings().weight
    )


def test_every_matrix_of_a_layer_is_found_or_said_to_stay_dense(family: Path) -> None:
    skeleton = Skeleton(Checkpoint.open(family))
    matrices = {
        f"{layer.name}.{name}"
        for layer in skeleton.layers
        for name, parameter in layer.module.named_parameters()
        if parameter.ndim > 1
    }
    pruned = {
        f"{layer.name}.{name}.{linear.parameter_name}"
        for layer in skeleton.layers
        for name, module in layer.module.named_modules()
        for linear in layer.linears
        if linear.module is module
    }
    assert matrices == pruned | set(skeleton.left_dense())
    reasons = {"it routes or gates", "it is no linear's"}
    assert {left.why for left in skeleton.left_dense().values()} <= reasons
