"""What stages are said to need of memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small_models import llama_config, save_random
from trimcli.files.checkpoint import Checkpoint
from trimcli.methods.recipe import Recipe
from trimcli.model.skeleton import Skeleton
from trimcli.pipeline.estimate import embedding_bytes, head_bytes, pruning


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_stay_in_their_file_take_no_memory(tied: bool, tmp_path: Path) -> None:
    model = Checkpoint.open(save_random(llama_config(tie_word_embeddings=tied), tmp_path))
    stored, narrower = Skeleton(model), Skeleton(model, dtype=torch.bfloat16)
    assert (embedding_bytes(stored), head_bytes(stored)) == (0, 0)
    with stored.filled_on_use():
        filled = stored.model.get_input_embeddings().weight
        assert filled.data_ptr() == model.load("model.embed_tokens.weight").data_ptr()
    weights = stored.model.get_input_embeddings().weight.numel()
    assert (embedding_bytes(narrower), head_bytes(narrower)) == (2 * weights, 2 * weights)


def test_a_matrix_counts_by_what_its_method_takes(tmp_path: Path) -> None:
    directory = save_random(llama_config(hidden_size=64, intermediate_size=8192), tmp_path)

    def planned(dtype: torch.dtype = torch.float32, **fields: Any) -> int:
        skeleton = Skeleton(Checkpoint.open(directory), dtype=dtype)
        chosen = list(skeleton.linears.values())
        return pruning(skeleton, chosen, Recipe(**fields), nsamples=1, seqlen=4, batch_size=1).host

    weights = 64 * 8192
    layer = sum(one.numel() for one in Skeleton(Checkpoint.open(directory)).layers[0].module.parameters())
    assert planned(rows="variant") - planned() == 12 * weights
    assert planned(rows="trim") > planned()
    # A layer in half the bytes, its matrix once more in float32.
    assert planned(torch.bfloat16) - planned() == 4 * weights - 2 * layer
    # Nothing is loaded or gathered, and the matrix is read as it is stored.
    norms = 4 * 8192
    assert planned(method="magnitude") == planned() - norms + 4 * weights - 4 * layer
