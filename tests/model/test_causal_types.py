"""Every causal-LM type of transformers: trim's perplexity is the model's own at any batch size, or it is refused."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.causal_survey import BATCHES, DOCUMENT, TABLE, TOLERANCE, Finding, own_loss, sample_windows, survey
from tests.causal_types import NOT_BUILT, VOCABULARY, causal_types, save_causal_type
from tests.trim_cli import COMPUTE, save_tokens, trim
from trimcli.evaluation.perplexity import perplexity
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.masks import MaskFile
from trimcli.model.skeleton import Skeleton
from trimcli.pipeline.proof import prove

KNOWN = json.loads(TABLE.read_text(encoding="utf-8"))
if transformers.__version__ != KNOWN["transformers"]:
    pytest.skip(f"the table is of transformers {KNOWN['transformers']}", allow_module_level=True)

# One of each form that has ever given trouble; the others are slow together.
QUICK = {
    "bamba",
    "bart",
    "bert+encoder",
    "deepseek_v3",
    "gemma3n_text+shared-kv",
    "gemma4_unified_text+shared-kv",
    "gptj+one-layer",
    "inkling2_text",
    "llama+one-layer",
    "mamba",
    "openai-gpt",
    "rwkv",
    "xlm",
    "zamba2+block-used-twice",
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in causal_types()],
)
def finding(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finding]:
    directory = tmp_path_factory.mktemp("types") / request.param
    yield survey(request.param, directory, tmp_path_factory.mktemp("cache"))
    shutil.rmtree(directory)


def test_right_or_refused_in_one_sentence(finding: Finding) -> None:
    if finding.refusal is None:
        assert finding.found == {size: pytest.approx(finding.own, rel=TOLERANCE) for size in BATCHES}
        return
    assert "\n" not in finding.refusal
    assert finding.refusal.endswith(".")
    assert str(finding.directory) in finding.refusal or finding.model_class in finding.refusal


def test_the_models_own_perplexity_is_one_whatever_the_batch(finding: Finding) -> None:
    assert finding.one_by_one == pytest.approx(finding.own, rel=TOLERANCE)


def test_the_verdict_is_the_tables(finding: Finding) -> None:
    assert finding.row() == KNOWN["types"][finding.type]


def test_masks_measure_what_the_directory_written_with_them_does(finding: Finding, tmp_path: Path) -> None:
    """Half of every type's weights go; an encoder's attention, which a decoder never calls, is skipped as advised."""
    if finding.refusal is not None:
        return
    masks, pruned, cache = tmp_path / "masks", tmp_path / "pruned", tmp_path / "cache"
    tokens = save_tokens(tmp_path / "tokens", vocabulary=VOCABULARY, nsamples=3)
    command: list[object] = ["prune", finding.directory, "-o", masks, "--save-model", pruned, "--sparsity", 0.5]
    command += ["--tokens", tokens, "--cache-dir", cache, *COMPUTE]
    done = trim(*command)
    if (skips := re.findall(r"--skip '([^']*)'", done.err)) and done.status:
        assert "is never called by its layer" in done.err or "is not given every token" in done.err
        done = trim(*command, *(word for glob in skips for word in ("--skip", glob)))
    assert done.status == 0, done.err
    skeleton, windows = Skeleton(Checkpoint.open(finding.directory)), sample_windows()
    prove(skeleton, cache)
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32).eval()
    assert perplexity(skeleton, windows, mask=MaskFile.open(masks)) == pytest.approx(
        math.exp(own_loss(model, windows)), rel=TOLERANCE
    )


def test_table_and_page_hold_every_type() -> None:
    assert list(KNOWN["types"]) == causal_types()
    assert set(causal_types()) >= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - NOT_BUILT.keys()
    page = DOCUMENT.read_text(encoding="utf-8")
    assert all(f"\n| {name} | " in page for name in [*causal_types(), *NOT_BUILT])


@pytest.mark.parametrize("name", NOT_BUILT)
def test_what_is_not_built_still_cannot_be(name: str, tmp_path: Path) -> None:
    assert name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    with pytest.raises((ImportError, ValueError, AttributeError, StrictDataclassError)):
        save_causal_type(name, tmp_path / name)
