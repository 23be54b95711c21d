"""Pruned and rounded together, from the command line to a model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PretrainedConfig

from tests.small_models import gpt2_config, llama_config, random_model, save
from tests.trim_cli import COMPUTE, save_tokens, trim
from trimcli import load_packed, load_sparse
from trimcli.errors import InputError
from trimcli.files.masks import MaskFile

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": llama_config(hidden_size=128, intermediate_size=256),
    "gpt2": gpt2_config(n_embd=128),
}


def written(config: PretrainedConfig, base: Path, *options: object) -> Path:
    """`model` in bfloat16, its `masks`, `pruned` and `packed`."""
    save(random_model(config, dtype=torch.bfloat16), base / "model")
    save_tokens(base / "tokens", vocabulary=64, nsamples=4, seqlen=32)
    how = ("--method", "sparsegpt", "--tokens", base / "tokens", "--cache-dir", base / "cache", *COMPUTE)
    done = trim("prune", base / "model", "-o", base / "masks", "--save-model", base / "pruned", *how, *options)
    assert done.status == 0, done.err
    done = trim("apply-masks", base / "pruned", base / "masks", "-o", base / "packed", "--format", "packed")
    assert done.status == 0, done.err
    return base


@pytest.fixture(scope="module", params=[("llama", 4), ("llama", 8), ("gpt2", 4)], ids=lambda one: f"{one[0]}-{one[1]}")
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, wbits = request.param
    folder = tmp_path_factory.mktemp(family)
    (folder / "wbits").write_text(str(wbits))
    return written(CONFIGS[family], folder, "--sparsity", 0.7, "--wbits", wbits, "--group-size", 64)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([[3, 1, 4, 1, 5, 9]])).logits
    return found


def test_masks_tell_what_was_rounded(base: Path) -> None:
    masks, wbits = MaskFile.open(base / "masks"), int((base / "wbits").read_text())
    assert masks.manifest["options"]["recipe"]["options"]["obs"]["wbits"] == wbits
    for name in masks.names:
        entry, grid = masks.entry(name), masks.grid(name)
        assert (entry["wbits"], entry["group_size"]) == (wbits, 64)
        assert grid is not None
        assert grid.scales.shape == (entry["shape"][0], entry["shape"][1] // 64)
    assert trim("verify", base / "masks").status == 0


def test_the_packed_form_is_the_written_directory_to_the_bit(base: Path, tmp_path: Path) -> None:
    assert trim("unpack", base / "packed", "-o", tmp_path / "again").status == 0
    again, pruned = tensors(tmp_path / "again"), tensors(base / "pruned")
    assert again.keys() == pruned.keys()
    assert all(torch.equal(again[name], pruned[name]) for name in pruned)
    for kind in ("pruned", "packed"):
        assert trim("verify", base / kind, "--masks", base / "masks").status == 0
    expected = logits(AutoModelForCausalLM.from_pretrained(base / "pruned", dtype=torch.float32).eval())
    assert torch.equal(logits(load_packed(base / "packed", dtype=torch.float32)), expected)


def test_it_runs_sparse(base: Path, compiled: Path) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(base / "pruned", dtype=torch.float32).eval())
    found = logits(load_sparse(base / "packed", dtype=torch.float32))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_integers_that_were_altered_are_noticed(base: Path, tmp_path: Path) -> None:
    file = next((base / "packed").glob("*.safetensors"))
    stored = load_file(file)
    key = next(name for name in stored if name.endswith(".integers"))
    stored[key][5] ^= 16
    for path in (base / "packed").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(stored, tmp_path / file.name)
    with pytest.raises(InputError, match=f"{key.removesuffix('.integers')} in .* is not what was packed"):
        load_packed(tmp_path)
    del stored[key]
    save_file(stored, tmp_path / file.name)
    with pytest.raises(InputError, match="lacks"):
        load_packed(tmp_path)


def test_other_weights_than_were_rounded_are_not_packed(base: Path, tmp_path: Path) -> None:
    found = tensors(base / "pruned")
    key = next(name for name in found if name.endswith(("down_proj.weight", "mlp.c_proj.weight")))
    row, column = (found[key] != 0).nonzero()[0].tolist()
    found[key][row, column] *= 1.0625
    for path in (base / "pruned").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(found, tmp_path / "model.safetensors", metadata={"format": "pt"})
    done = trim("apply-masks", tmp_path, base / "masks", "-o", tmp_path / "packed", "--format", "packed")
    assert done.status == 2
    assert "are not those that its masks were made with; use what prune --save-model wrote" in " ".join(
        done.err.split()
    )
    assert not (tmp_path / "packed").exists()


def test_at_seventy_percent_and_four_bits_it_takes_a_seventh(tmp_path: Path) -> None:
    config = llama_config(hidden_size=256, intermediate_size=512)
    written(config, tmp_path, "--sparsity", 0.7, "--wbits", 4, "--group-size", 128)
    document = json.loads((tmp_path / "packed" / "trim.json").read_text())
    names, parts = {entry["key"] for entry in document["linears"].values()}, ("keep", "integers", "scales", "zeros")
    file = next((tmp_path / "packed").glob("*.safetensors"))
    with safe_open(file, "pt") as handle:
        packed = sum(handle.get_tensor(f"{name}.{part}").nbytes for name in names for part in parts)
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as handle:
        dense = sum(handle.get_tensor(name).nbytes for name in names)
    # A bit for keep, 0.3 * 4 for integers, (16 + 8) / 128 for scales and zeros, of 16.
    assert packed / dense == pytest.approx((1 + 1.2 + 24 / 128) / 16, rel=1e-3)


def test_four_bits_alone(tmp_path: Path) -> None:
    written(CONFIGS["llama"], tmp_path, "--sparsity", 0, "--wbits", 4, "--group-size", 64)
    document = json.loads((tmp_path / "packed" / "trim.json").read_text())
    assert all(document["packed"]["tensors"][one["key"]]["wbits"] == 4 for one in document["linears"].values())
    assert trim("verify", tmp_path / "packed").status == 0
    name = "model.layers.0.mlp.up_proj.weight"
    for row in tensors(tmp_path / "pruned")[name].float():
        assert all(len(group.unique()) <= 16 for group in row.split(64))


def test_methods_that_round_nothing_refuse_it(tmp_path: Path, nano_qwen2: Path) -> None:
    done = trim("prune", nano_qwen2, "-o", tmp_path / "masks", "--sparsity", 0.5, "--wbits", 4)
    assert done.status == 2
    assert "--wbits 4 with --method wanda: it belongs to obs, as in sparsegpt" in " ".join(done.err.split())
    assert "--wbits" in trim("prune", "--help").out
