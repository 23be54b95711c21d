"""What runs take of memory against what `trim plan` says, on a model whose matrices are as large as a small real one's.

A process of its own each: what the C library keeps of freed blocks depends on all that went before.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.small_models import llama_config, random_model, save
from tests.trim_cli import COMPUTE, save_tokens

SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 10, "num_attention_heads": 9}
SAMPLES, SEQLEN, VOCABULARY = 32, 256, 32768


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("peak")
    config = llama_config(
        **SHAPE, num_key_value_heads=3, vocab_size=VOCABULARY, max_position_embeddings=SEQLEN, tie_word_embeddings=True
    )
    save(random_model(config, dtype=torch.float16), base / "model")
    save_tokens(base / "tokens", vocabulary=VOCABULARY, nsamples=SAMPLES, seqlen=SEQLEN)
    return base


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="elsewhere what is mapped counts, too")
@pytest.mark.parametrize(
    "recipe",
    [
        ("--method", "wanda"),
        ("--preset", "reference"),
        ("--preset", "fast"),
        ("--preset", "balanced"),
        ("--preset", "best", "--reconstruct-steps", 8, "--alloc", "auto"),
    ],
    ids=lambda recipe: recipe[1],
)
def test_a_run_keeps_to_the_memory_that_is_planned(recipe: tuple[object, ...], base: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "trimcli", "prune", base / "model", "--sparsity", 0.6, *recipe, "--json"]
    words += ["--tokens", base / "tokens", "--save-model", tmp_path / "pruned", "--cache-dir", tmp_path / "cache"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, (*words, *COMPUTE))], capture_output=True, text=True, env=environment, check=True)
    found = json.loads(done.stdout)
    assert found["peak_memory"]["anonymous"] <= 1.02 * found["planned"]["peak_host_bytes"]
