"""What experts are given: as a loop over experts finds it, whichever kernel multiplies."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.families import CONVERTS, VOCABULARY
from tests.mixtures import EXPERTS, FUSED, MIXTURES, eager_inputs, save_mixture
from tests.small_models import skeleton_of
from trimcli.methods.recipe import Recipe
from trimcli.methods.stats import FITTING, GRAM, HELDOUT, INPUTS, SQNORM, LinearStats
from trimcli.model.skeleton import Skeleton
from trimcli.pipeline.collector import Collector
from trimcli.pipeline.walk import Walk

NEEDS = frozenset(one.name for one in (SQNORM, GRAM, INPUTS, FITTING, HELDOUT))
N, L = 6, 16
KERNELS = ("eager", "grouped_mm", "batched_mm") if CONVERTS else ("eager",)


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixture(request.param, tmp_path_factory.mktemp("mixtures") / request.param)


def tokens() -> Tensor:
    return torch.randint(2, VOCABULARY, (N, L), generator=torch.Generator().manual_seed(0))


def statistics(model: Path, kernel: str = "eager", batch_size: int = 4) -> tuple[Skeleton, dict[str, LinearStats]]:
    """Of every linear of the dense model."""
    skeleton = skeleton_of(model)
    if "llama4" not in str(model):
        skeleton.config._experts_implementation = kernel
    walk = Walk(skeleton, tokens(), batch_size=batch_size)
    found: dict[str, LinearStats] = {}
    for layer in walk.layers():
        collector = Collector(walk.groups(layer), NEEDS, N, L, skeleton.device, Recipe().options_of)
        walk.collect(layer, collector)
        found |= collector.by_linear()
        walk.advance(layer)
        if kernel in ("grouped_mm", "batched_mm") and "llama4" not in str(model):
            assert skeleton.config._experts_implementation == kernel  # as it was before
    return skeleton, found


def test_norms_and_grams_are_those_of_a_loop_over_experts(mixture: Path) -> None:
    if not CONVERTS and mixture.name not in FUSED:
        pytest.skip("transformers 4 leaves these experts apart, whose linears are hooked")
    model = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32).eval()
    expected = eager_inputs(model, tokens())
    for kernel in KERNELS:
        skeleton, found = statistics(mixture, kernel)
        modules = {module: name for name, module in skeleton.model.named_modules()}
        seen = 0
        for name, linear in skeleton.linears.items():
            if not linear.routed:
                assert found[name].tokens is None
                continue
            assert linear.expert is not None
            pair = expected[modules[linear.module]][linear.expert]
            inputs = pair[linear.parameter_name == "down_proj"]
            assert found[name].tokens == len(inputs)
            square_norms, gram = inputs.square().sum(dim=0) / N, 2 * inputs.T @ inputs / N
            torch.testing.assert_close(found[name].sqnorm, square_norms, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found[name].gram, gram, rtol=1e-4, atol=1e-5)
            seen += 1
        layers = 1 if "deepseek" in str(mixture) else 2
        assert seen == sum(linear.routed for linear in skeleton.linears.values()) >= layers * EXPERTS * 2


@pytest.mark.skipif(not CONVERTS, reason="transformers 4 has one kernel")
def test_whichever_kernel_multiplies_and_in_whatever_batches(mixture: Path) -> None:
    _, eager = statistics(mixture)
    for kernel, batch_size in (("grouped_mm", 4), ("batched_mm", 4), ("grouped_mm", 1)):
        _, found = statistics(mixture, kernel, batch_size)
        assert found.keys() == eager.keys()
        for name, one in eager.items():
            assert found[name].tokens == one.tokens
            assert found[name].tensors.keys() == one.tensors.keys()
            # Which tokens are drawn, or held out, hangs on the batches; which batches on nothing else.
            same = NEEDS if batch_size == 4 else {SQNORM.name, GRAM.name}
            for kind in same & one.tensors.keys():
                torch.testing.assert_close(found[name].tensors[kind], one.tensors[kind], rtol=1e-4, atol=1e-5)


def test_every_token_is_either_fitted_or_held_out(mixture: Path) -> None:
    skeleton, found = statistics(mixture)
    routed = [found[name] for name, linear in skeleton.linears.items() if linear.routed]
    parts = [one for one in routed if FITTING in one]
    assert parts
    for one in routed:
        assert (one.tokens >= 16) == (FITTING in one) == (HELDOUT in one)  # type: ignore[operator]
        assert (one.tokens >= N) == (INPUTS in one)  # type: ignore[operator]
    for one in parts:  # an eighth of the samples, one, is held out: two halves of other weights
        whole = (one[FITTING] * (N - 1) + one[HELDOUT]) / N
        torch.testing.assert_close(whole, one.gram, rtol=1e-4, atol=1e-5)


@pytest.fixture
def drawn() -> Tensor:
    return torch.arange(40.0).unsqueeze(1)


@pytest.mark.parametrize("sizes", [(40,), (1,) * 40, (3, 0, 30, 7)])
def test_what_is_drawn_of_an_experts_tokens_hangs_on_no_batches(drawn: Tensor, sizes: tuple[int, ...]) -> None:
    assert INPUTS.routed is not None
    whole, parts = torch.zeros(1, 8), torch.zeros(1, 8)
    INPUTS.routed.add(whole, drawn, 0, 8)
    seen = 0
    for part in drawn.split(sizes):
        INPUTS.routed.add(parts, part, seen, 8)
        seen += len(part)
    assert torch.equal(whole, parts)
    assert len(whole.unique()) == 8


def test_every_token_is_as_likely_drawn() -> None:
    """Of 40 tokens 8 are kept; over many experts' worth of draws none is kept much more often than another."""
    assert INPUTS.routed is not None
    counts = torch.zeros(40)
    for start in range(400):  # the draws of other numbers stand in for other seeds
        kept = torch.zeros(1, 8)
        tokens = torch.arange(40.0).unsqueeze(1)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(start))
        INPUTS.routed.add(kept, tokens[order], 0, 8)
        counts[kept.long().flatten()] += 1
    assert counts.sum() == 400 * 8
    assert float(counts.min()) > 40
    assert float(counts.max()) < 130
