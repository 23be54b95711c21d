"""Perplexity layer by layer against the whole model's."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.families import CONVERTS
from tests.small_models import gpt2_config, llama_config, masks_for, random_model, save, skeleton_of
from trimcli import apply_masks
from trimcli.errors import InputError
from trimcli.evaluation.perplexity import perplexity
from trimcli.files.masks import MaskFile
from trimcli.model.skeleton import DecoderLayer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(llama_config()), tmp_path_factory.mktemp("perplexity") / "llama")


def windows(count: int, seqlen: int = 12) -> Tensor:
    return torch.randint(0, 64, (count, seqlen), generator=torch.Generator().manual_seed(0))


def whole(model: Path, tokens: Tensor) -> float:
    """Exp of the mean over windows of the mean cross-entropy: the whole model at once, in float64 from the logits."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = loaded(tokens, use_cache=False).logits.double()
    losses = [
        -logits[row, :-1].log_softmax(-1).gather(1, tokens[row, 1:, None]).mean().item() for row in range(len(tokens))
    ]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_it_is_the_whole_models(batch_size: int | None, llama: Path) -> None:
    tokens = windows(7)
    assert perplexity(skeleton_of(llama), tokens, batch_size=batch_size) == pytest.approx(
        whole(llama, tokens), rel=1e-5
    )


def test_conv1d(tmp_path: Path) -> None:
    model = save(random_model(gpt2_config()), tmp_path / "gpt2")
    assert perplexity(skeleton_of(model), windows(3)) == pytest.approx(whole(model, windows(3)), rel=1e-5)


@pytest.mark.parametrize(
    "limits",
    [
        {"model.device.LOGITS": 64 * 5, "evaluation.perplexity.TOKENS": 1},  # a window in pieces of 5, 5 and 1
        {"model.device.LOGITS": 64, "evaluation.perplexity.TOKENS": 22},  # two windows together
        {"evaluation.perplexity.ROUND_BYTES": 4000},  # two windows a round
    ],
)
def test_in_pieces_and_rounds(limits: dict[str, int], llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = windows(5)
    for name, value in limits.items():
        monkeypatch.setattr(f"trimcli.{name}", value)
    assert perplexity(skeleton_of(llama), tokens) == pytest.approx(whole(llama, tokens), rel=1e-5)


def test_masks_give_what_the_applied_directory_gives(llama: Path, tmp_path: Path) -> None:
    masks_for(llama, tmp_path / "masks", sparsity=0.7)
    apply_masks(str(llama), tmp_path / "masks", tmp_path / "pruned")
    tokens = windows(4)
    skeleton = skeleton_of(llama)
    dense = perplexity(skeleton, tokens)
    masked = perplexity(skeleton, tokens, mask=MaskFile.open(tmp_path / "masks"))
    assert masked == perplexity(skeleton_of(tmp_path / "pruned"), tokens) != dense
    assert masked == pytest.approx(whole(tmp_path / "pruned", tokens), rel=1e-5)
    assert perplexity(skeleton, tokens) == dense  # the masks left nothing behind


def test_a_damaged_model_is_infinitely_perplexed(tmp_path: Path) -> None:
    model = random_model(llama_config())
    model.lm_head.weight.data *= 1e6
    assert perplexity(skeleton_of(save(model, tmp_path / "model")), windows(2)) == math.inf


def test_activations_that_are_not_finite_are_refused_by_layer(
    nano_qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = skeleton_of(nano_qwen2)
    layer = skeleton.layers[2]
    load = skeleton.load_layer

    def overflowing(which: DecoderLayer) -> None:
        load(which)
        if which is layer:
            which.linears[-1].weight.fill_(3e38)

    monkeypatch.setattr(skeleton, "load_layer", overflowing)
    with pytest.raises(InputError, match=r"outputs of model\.layers\.2 hold NaN or infinite values"):
        perplexity(skeleton, torch.randint(2, 90, (2, 16)))


def test_a_tied_config_over_a_head_of_its_own(llama: Path, tmp_path: Path) -> None:
    """What merging a LoRA adapter leaves: measured, and written, as transformers reads it."""
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tokens = windows(5)
    value = perplexity(skeleton_of(model), tokens)
    assert value == pytest.approx(whole(model, tokens), rel=1e-5)
    if CONVERTS:  # transformers 4 drops the file's own head
        assert value == pytest.approx(whole(llama, tokens), rel=1e-5)
    masks_for(model, tmp_path / "masks")
    apply_masks(str(model), tmp_path / "masks", tmp_path / "pruned")
    masked = perplexity(skeleton_of(model), tokens, mask=MaskFile.open(tmp_path / "masks"))
    assert masked == pytest.approx(whole(tmp_path / "pruned", tokens), rel=1e-5)
    assert masked != pytest.approx(value, rel=1e-3)


def with_nan(source: Path, target: Path, name: str, row: int) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    tensors[name][row] = math.nan
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_only_embeddings_that_are_used_must_be_finite(llama: Path, tmp_path: Path) -> None:
    model = with_nan(llama, tmp_path / "model", "model.embed_tokens.weight", 63)
    tokens = windows(5).clamp(max=62)
    assert perplexity(skeleton_of(model), tokens) == pytest.approx(whole(llama, tokens), rel=1e-5)
    tokens[1, 2] = 63
    with pytest.raises(InputError, match=r"the outputs of model\.layers\.0 hold NaN"):
        perplexity(skeleton_of(model), tokens)
