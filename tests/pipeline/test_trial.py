"""Trial losses against transformers' own forward pass of the model, masked by a slow wanda."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.families import VOCABULARY, save_family
from tests.small_models import skeleton_of
from trimcli.methods.masks import even_row_counts
from trimcli.methods.stats import LinearStats
from trimcli.model.skeleton import Skeleton
from trimcli.pipeline.proof import prove
from trimcli.pipeline.trial import divergences


def norms(skeleton: Skeleton) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.rand(linear.d_in, generator=generator) for name, linear in skeleton.linears.items()}


def samples(count: int, length: int = 9) -> Tensor:
    return torch.randint(2, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))


def slow(
    directory: Path, skeleton: Skeleton, sparsity: dict[str, float], sqnorm: dict[str, Tensor], tokens: Tensor
) -> float:
    """The mean over tokens of sum p (ln p - ln q), whole models at once."""
    dense: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    pruned: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    modules = dict(pruned.named_modules())
    for name, share in sparsity.items():
        linear = skeleton.linears[name]
        weight = linear.within(modules[name].weight.data)
        counts = even_row_counts(*linear.shape, share, "exact")
        for row, count in enumerate(counts.tolist()):
            order = (weight[row].abs() * sqnorm[name].sqrt()).argsort(stable=True)
            weight[row, order[:count]] = 0
    with torch.no_grad():
        sure, given = (model(input_ids=tokens).logits.double().log_softmax(-1) for model in (dense, pruned))
    return float((sure.exp() * (sure - given)).sum(-1).mean())


@pytest.mark.parametrize("form", ["recorded", "suspended"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt-neox", "gpt2"])
def test_losses_are_those_of_the_masked_model(
    family: str, form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save_family(family, tmp_path / "model")
    skeleton = skeleton_of(directory)
    prove(skeleton, tmp_path / "cache")
    skeleton.form = form
    monkeypatch.setattr("trimcli.model.device.LOGITS", 4 * VOCABULARY)  # a sample in pieces
    sqnorm, tokens = norms(skeleton), samples(3)
    names = list(skeleton.linears)[1:]  # the first stays dense
    candidates = [
        {name: (share + 0.01 * place) % 1 for place, name in enumerate(names)} for share in (0.0, 0.3, 0.6, 0.6)
    ]
    candidates[0] = dict.fromkeys(names, 0.0)
    found = divergences(skeleton, candidates, lambda name: LinearStats(sqnorm=sqnorm[name]), tokens)
    expected = [slow(directory, skeleton, candidate, sqnorm, tokens) for candidate in candidates]
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert 1e-3 < found[1] < found[2] == pytest.approx(found[3])
    for linear in skeleton.linears.values():
        assert linear.parameter.device.type == "meta"


def test_many_samples_make_whole_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six samples under a limit of four a batch: no batch holds two candidates."""
    directory = save_family("llama", tmp_path / "model")
    skeleton = skeleton_of(directory)
    prove(skeleton, tmp_path / "cache")
    sqnorm, tokens = norms(skeleton), samples(6)
    candidates = [dict.fromkeys(skeleton.linears, share) for share in (0.3, 0.5)]
    together = divergences(skeleton, candidates, lambda name: LinearStats(sqnorm=sqnorm[name]), tokens)
    monkeypatch.setattr("trimcli.pipeline.walk.batch_tokens", lambda device: 4 * tokens.shape[1])
    apart = divergences(skeleton, candidates, lambda name: LinearStats(sqnorm=sqnorm[name]), tokens)
    assert apart == pytest.approx(together, rel=1e-4)
