"""A config.json of absurd sizes is refused before memory is taken."""

import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small_models import edited_config, gpt2_config, llama_config, random_model, save
from trimcli.errors import InputError
from trimcli.files.checkpoint import Checkpoint
from trimcli.model.bounds import refuse_absurd_sizes
from trimcli.model.empty import build_empty

MOST = 2**30
ABSURD: dict[str, tuple[str, dict[str, Any], bool, str]] = {
    "layers": ("llama", {"num_hidden_layers": 10**12}, True, "says num_hidden_layers 1000000000000, which is no model"),
    "more layers than tensors": ("llama", {"num_hidden_layers": 2000}, True, "calls for more than 2,344 modules"),
    "labels": ("llama", {"num_labels": 10**10}, False, "says num_labels"),
    "layers in a config within": ("llama", {"text_config": {"num_hidden_layers": 1e9}}, True, "says num_hidden_layers"),
    "hidden size": ("llama", {"hidden_size": 10**9}, False, "which is no model's"),
    "hidden size, with weights": ("llama", {"hidden_size": 10**8}, True, "which is no model's"),
    "vocabulary": ("llama", {"vocab_size": 10**12}, True, "which is no model's"),
    "positions": ("gpt2", {"n_positions": 10**12}, True, "which is no model's|fit into no memory"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("bounds")
    save(random_model(llama_config()), base / "llama")
    save(random_model(gpt2_config()), base / "gpt2")
    return base


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_sizes(case: str, models: Path, tmp_path: Path) -> None:
    form, fields, weights, said = ABSURD[case]
    model = edited_config(models / form, tmp_path / "model", **fields)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"(fetch it anew|check the config)") as raised:
        build_empty(Checkpoint.open(model, weights=weights), torch.float32)
    assert re.search(said, str(raised.value))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST


def test_a_table_that_is_a_buffer(models: Path) -> None:
    """As causal masks are in some models: positions squared."""
    module = torch.nn.Module()
    module.register_buffer("bias", torch.empty(10**5, 10**5, dtype=torch.bool, device="meta"))
    with pytest.raises(InputError, match=r"calls for 9\.3 GiB beside the weights, which is no model's"):
        refuse_absurd_sizes(module, Checkpoint.open(models / "gpt2"))


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("form", ["llama", "gpt2"])
def test_a_sane_model_is_built(form: str, weights: bool, models: Path) -> None:
    model = build_empty(Checkpoint.open(models / form, weights=weights), torch.float32)
    assert {one.device.type for one in model.parameters()} == {"meta"}
    assert {one.device.type for one in model.buffers()} <= {"cpu"}
