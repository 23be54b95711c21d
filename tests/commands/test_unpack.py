import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.small_models import gpt2_config, llama_config, masks_for, random_model, save
from trimcli.commands.apply import apply_masks
from trimcli.commands.options import ApplyOptions
from trimcli.commands.unpack import load_packed, unpack
from trimcli.errors import InputError, MismatchError, OutputExists
from trimcli.files.atomic import MARK
from trimcli.files.manifest import PRUNED

FAMILIES = {
    "tied": (llama_config(tie_word_embeddings=True), torch.bfloat16),
    "untied": (llama_config(tie_word_embeddings=False), torch.float16),
    "gpt2": (gpt2_config(), torch.float32),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each family `<family>-pruned` and `<family>-packed`, in several shards."""
    base = tmp_path_factory.mktemp("unpack")
    for name, (config, dtype) in FAMILIES.items():
        dense, masks = base / f"{name}-dense", base / f"{name}-masks"
        save(random_model(config, dtype=dtype), dense, max_shard_size="20KB")
        masks_for(dense, masks, sparsity=0.625)
        apply_masks(str(dense), masks, base / f"{name}-pruned")
        apply_masks(str(dense), masks, base / f"{name}-packed", ApplyOptions(format="packed"))
    return base


@pytest.mark.parametrize("name", FAMILIES)
def test_unpacking_gives_what_the_dense_form_is(base: Path, tmp_path: Path, name: str) -> None:
    """Shard for shard, byte for byte."""
    unpack(base / f"{name}-packed", tmp_path / "unpacked")
    pruned, unpacked = base / f"{name}-pruned", tmp_path / "unpacked"
    names = {path.name for path in pruned.iterdir()}
    assert {path.name for path in unpacked.iterdir()} == names
    assert sum(name.endswith(".safetensors") for name in names) > 1
    for same in names - {MARK, "README.md"}:
        assert (unpacked / same).read_bytes() == (pruned / same).read_bytes()
    ours, theirs = (json.loads((place / MARK).read_text()) for place in (unpacked, pruned))
    assert ours["schema"] == PRUNED
    for field in ("linears", "sparsity", "pruning", "model"):
        assert ours[field] == theirs[field]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_directory_loads_as_the_model_from_pretrained_gives(base: Path, name: str) -> None:
    loaded = load_packed(base / f"{name}-packed")
    expected = AutoModelForCausalLM.from_pretrained(base / f"{name}-pruned", dtype="auto")
    assert type(loaded) is type(expected)
    assert not loaded.training
    theirs = dict(expected.named_parameters())
    for key, parameter in loaded.named_parameters():
        assert parameter.dtype == theirs[key].dtype == FAMILIES[name][1]
        assert torch.equal(parameter, theirs[key])
    assert len(theirs) == len(list(loaded.named_parameters()))
    assert loaded.generation_config.to_dict() == expected.generation_config.to_dict()
    with torch.no_grad():
        tokens = torch.arange(16).reshape(2, 8)
        assert torch.equal(loaded.float()(tokens).logits, expected.float()(tokens).logits)


def test_a_packed_directory_loads_in_another_dtype(base: Path) -> None:
    loaded = load_packed(base / "tied-packed", dtype=torch.float32, attn_implementation="eager")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert loaded.config._attn_implementation == "eager"


def test_only_packed_directories_unpack(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a packed directory"):
        unpack(base / "gpt2-dense", tmp_path / "unpacked")
    with pytest.raises(MismatchError, match=r"trim\.pruned/1.*trim\.packed/1"):
        unpack(base / "gpt2-pruned", tmp_path / "unpacked")
    with pytest.raises(InputError, match="is not a packed directory"):
        load_packed(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_replaced_only_by_force(base: Path, tmp_path: Path) -> None:
    unpack(base / "gpt2-packed", tmp_path / "unpacked")
    with pytest.raises(OutputExists):
        unpack(base / "gpt2-packed", tmp_path / "unpacked")
    unpack(base / "gpt2-packed", tmp_path / "unpacked", force=True)


def test_an_altered_file_leaves_nothing(base: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    for path in (base / "gpt2-packed").iterdir():
        (packed / path.name).write_bytes(path.read_bytes())
    last = sorted(packed.glob("*.safetensors"))[-1]
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    with pytest.raises(InputError, match="is not what was packed"):
        unpack(packed, tmp_path / "unpacked")
    with pytest.raises(InputError, match="is not what was packed"):
        load_packed(packed)
    assert {path.name for path in tmp_path.iterdir()} == {"packed"}
