"""What stages are said to need of memory."""

from pathlib import Path

import pytest
import torch

from tests.small_models import llama_config, save_random
from trimcli.files.checkpoint import Checkpoint
from trimcli.model.skeleton import Skeleton
from trimcli.pipeline.estimate import embedding_bytes, head_bytes


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
