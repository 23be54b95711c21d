import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.small_models import gpt2_config, llama_config, masks_for, random_model, save, skeleton_of
from trimcli.commands.apply import apply_masks
from trimcli.commands.options import ApplyOptions
from trimcli.errors import InputError
from trimcli.files.atomic import MARK
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.directory import PrunedLinear, write_model
from trimcli.files.held import mask_in
from trimcli.files.manifest import PACKED, ModelFingerprint, manifest, sealed
from trimcli.files.packed import PackedReader, decode, kept_values, packed_specs
from trimcli.files.packing import PackedTensors
from trimcli.files.tensors import TensorSpec
from trimcli.methods.masks import pack

BITS = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 2, torch.float16: 2, torch.float8_e4m3fn: 1}


@given(st.sampled_from(list(BITS)), st.integers(1, 6), st.integers(1, 30), st.floats(0, 1), st.integers(0, 2**32))
def test_any_bits_survive(dtype: torch.dtype, rows: int, columns: int, share: float, seed: int) -> None:
    """Whatever is kept comes back to the bit: negative zeros and NaN payloads too."""
    generator = np.random.default_rng(seed)
    raw = generator.integers(0, 256, rows * columns * BITS[dtype], dtype=np.uint8)
    weight = torch.from_numpy(raw).view(dtype).reshape(rows, columns)
    keep = torch.from_numpy(generator.random((rows, columns)) < share)
    values = kept_values(weight, keep)
    assert values.dtype == dtype
    assert values.shape == (int(keep.sum()),)
    found = decode(pack(keep), values, columns).view(torch.uint8).reshape(rows, columns, -1)
    expected = weight.view(torch.uint8).reshape(rows, columns, -1) * keep.unsqueeze(2)
    assert torch.equal(found, expected)


def test_values_are_in_row_order() -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    keep = (weight % 5 != 0) & (weight != 11)
    assert kept_values(weight, keep).tolist() == [1, 2, 3, 4, 6, 7, 8, 9]
    assert kept_values(weight.T, keep.T).tolist() == [4, 8, 1, 9, 2, 6, 3, 7]


def test_bits_and_values_that_disagree_are_refused() -> None:
    keep = torch.tensor([[True, False, True, True]])
    with pytest.raises(ValueError, match="3"):
        decode(pack(keep), torch.ones(2), 4)
    with pytest.raises(ValueError, match="bytes a row"):
        decode(pack(keep), torch.ones(3), 9)


def test_bytes_of_a_packed_matrix() -> None:
    weight = torch.randn(10, 24, dtype=torch.float32).bfloat16()
    keep = torch.rand(10, 24) > 0.7
    made = pack(keep).nbytes + kept_values(weight, keep).nbytes
    specs = list(packed_specs(TensorSpec(torch.bfloat16, (10, 24)), {"kept": int(keep.sum())}).values())
    assert specs == [TensorSpec.of(pack(keep)), TensorSpec.of(kept_values(weight, keep))]
    assert sum(spec.nbytes for spec in specs) == made


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dense`, a bfloat16 Llama of several shards; `pruned` to 70%, and the same `packed`."""
    base = tmp_path_factory.mktemp("packed")
    model = random_model(llama_config(tie_word_embeddings=True, hidden_size=64), dtype=torch.bfloat16)
    save(model, base / "dense", max_shard_size="40KB")
    masks_for(base / "dense", base / "masks", sparsity=0.7)
    apply_masks(str(base / "dense"), base / "masks", base / "pruned")
    apply_masks(str(base / "dense"), base / "masks", base / "packed", ApplyOptions(format="packed"))
    return base


def test_a_packed_directory_reads_like_the_pruned_one(directories: Path) -> None:
    packed, pruned = Checkpoint.open(directories / "packed"), Checkpoint.open(directories / "pruned")
    assert packed.keys() == pruned.keys()
    assert packed.shards().keys() == pruned.shards().keys()
    for key in sorted(pruned.keys()):
        assert packed.spec(key) == pruned.spec(key)
        assert torch.equal(packed.load(key).view(torch.int16), pruned.load(key).view(torch.int16))


def test_packed_matrices_take_the_kept_share_and_a_sixteenth(directories: Path) -> None:
    """At 16 bits: (1 - s) + 1/16 of the dense matrices."""
    skeleton = skeleton_of(directories / "dense")
    keys = {linear.key for linear in skeleton.linears.values()}
    dense = sum(linear.numel * 2 for linear in skeleton.linears.values())
    stored = 0
    for shard in (directories / "packed").glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            stored += tensor.nbytes if name.rpartition(".")[0] in keys else 0
    zeros = json.loads((directories / "packed" / MARK).read_text())["sparsity"]
    assert stored / dense == pytest.approx(1 - zeros + 1 / 16, rel=1e-2)


def test_nothing_takes_a_packed_directory_for_a_model(directories: Path) -> None:
    names = {path.name for path in (directories / "packed").iterdir()}
    assert {"config.json", "tokenizer.json", "merges.txt", "README.md", MARK} < names
    assert not any(name.startswith("model") for name in names)
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(directories / "packed")


def test_shards_are_safetensors_with_the_documented_tensors(directories: Path) -> None:
    record = json.loads((directories / "packed" / MARK).read_text())["packed"]
    key = "model.layers.0.mlp.up_proj.weight"
    entry = record["tensors"][key]
    assert entry["dtype"] == "bfloat16"
    with safe_open(directories / "packed" / entry["shard"], "pt") as handle:
        bits, values = handle.get_tensor(f"{key}.keep"), handle.get_tensor(f"{key}.values")
        assert handle.metadata() == {"format": "pt"}
    keep = torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=entry["shape"][1])).bool()
    weight = Checkpoint.open(directories / "pruned").load(key)
    assert torch.equal(keep, weight != 0)
    assert torch.equal(values, weight[keep])
    assert entry["kept"] == len(values)


def test_conv1d_is_packed_as_stored(tmp_path: Path) -> None:
    save(random_model(gpt2_config()), tmp_path / "dense")
    masks_for(tmp_path / "dense", tmp_path / "masks", sparsity=0.75)
    apply_masks(str(tmp_path / "dense"), tmp_path / "masks", tmp_path / "pruned")
    apply_masks(str(tmp_path / "dense"), tmp_path / "masks", tmp_path / "packed", ApplyOptions(format="packed"))
    reader = PackedReader(tmp_path / "packed")
    pruned = Checkpoint.open(tmp_path / "pruned")
    assert all(torch.equal(reader.load(key), pruned.load(key)) for key in sorted(pruned.keys()))
    key = "transformer.h.0.attn.c_attn.weight"
    assert reader.spec(key).shape == (32, 96)
    assert reader.document["packed"]["tensors"][key]["kept"] == 8 * 96
    assert reader.document["linears"]["transformer.h.0.attn.c_attn"]["shape"] == [96, 32]


@pytest.mark.parametrize(
    ("shape", "transposed", "pruned"),
    [((3, 5, 6), False, (0, 2)), ((3, 5, 6), True, (0, 1, 2)), ((8, 6, 1, 1), False, (None,))],
)
def test_stacks_and_single_places_are_packed_in_one(
    shape: tuple[int, ...], transposed: bool, pruned: tuple[int | None, ...], tmp_path: Path
) -> None:
    """Matrices of a stack that were not pruned keep all of their weights, zeros among them."""
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    dense.view(-1)[::7] = 0
    (tmp_path / "dense").mkdir()
    save_file(
        {"stack": dense, "other": dense.clone()}, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"}
    )
    (tmp_path / "dense" / "config.json").write_text("{}")
    checkpoint, after = Checkpoint.open(tmp_path / "dense"), dense.clone()
    d_out, d_in = shape[-1:-3:-1] if transposed else shape[-2:] if len(shape) == 3 else shape[:2]
    linears, keeps = {}, {}
    for place in pruned:
        name = f"stack.{place}"
        keeps[name] = torch.rand(d_out, d_in, generator=torch.Generator().manual_seed(1)) > 0.6
        gone = int((~keeps[name]).sum())
        linears[name] = PrunedLinear("stack", (d_out, d_in), transposed, gone, place=place)
        linears[name].within(after).masked_fill_(~keeps[name], 0)
    made = PackedTensors(checkpoint, {"stack": after}.get, linears, keeps.__getitem__)
    document = manifest(PACKED, "apply-masks", {}, ModelFingerprint("dense", "structure"))
    write_model(made, tmp_path / "packed", document)
    reader = PackedReader(tmp_path / "packed")
    assert reader.document["packed"]["tensors"]["stack"]["kept"] == dense.numel() - sum(
        linear.pruned for linear in linears.values()
    )
    assert reader.document["packed"]["tensors"]["other"]["kept"] is None
    assert reader.nbytes("stack") < reader.nbytes("other")
    assert torch.equal(reader.load("stack"), after)
    packed = Checkpoint.open(tmp_path / "packed")
    for name, entry in reader.document["linears"].items():
        found = mask_in(packed, entry)
        assert found is not None
        assert torch.equal(found, keeps[name])


def test_a_matrix_that_would_not_shrink_stays_as_it_is(tmp_path: Path) -> None:
    save(random_model(llama_config(), dtype=torch.bfloat16), tmp_path / "dense")
    masks_for(tmp_path / "dense", tmp_path / "masks", sparsity=0.03)
    apply_masks(str(tmp_path / "dense"), tmp_path / "masks", tmp_path / "packed", ApplyOptions(format="packed"))
    reader = PackedReader(tmp_path / "packed")
    assert all(entry["kept"] is None for entry in reader.document["packed"]["tensors"].values())
    dense = Checkpoint.open(tmp_path / "dense")
    key = "model.layers.0.mlp.up_proj.weight"
    assert int((reader.load(key) == 0).sum()) == 40
    assert torch.equal(reader.load("lm_head.weight"), dense.load("lm_head.weight"))


@pytest.fixture
def packed(directories: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    target = tmp_path / "packed"
    target.mkdir()
    for path in (directories / "packed").iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def shard_of(directory: Path, key: str) -> Path:
    record = json.loads((directory / MARK).read_text())["packed"]
    return directory / record["tensors"][key]["shard"]


@pytest.mark.parametrize("part", ["keep", "values"])
def test_one_altered_bit_is_refused(packed: Path, part: str) -> None:
    key = "model.layers.1.mlp.down_proj.weight"
    shard = shard_of(packed, key)
    tensors = load_file(shard)
    tensors[f"{key}.{part}"].view(torch.uint8).reshape(-1)[3] ^= 1
    save_file(tensors, shard, {"format": "pt"})
    reader = PackedReader(packed)
    reader.load("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(InputError, match=f"{key} .* is not what was packed"):
        reader.load(key)


def test_an_altered_dense_tensor_is_refused(packed: Path) -> None:
    key = "model.embed_tokens.weight"
    shard = shard_of(packed, key)
    tensors = load_file(shard)
    tensors[key][0, 0] += 1
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(InputError, match=f"{key} .* is not what was packed"):
        PackedReader(packed).load(key)


def test_a_truncated_or_missing_shard_is_refused(packed: Path) -> None:
    shard = shard_of(packed, "model.layers.1.mlp.down_proj.weight")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        Checkpoint.open(packed)
    shard.unlink()
    with pytest.raises(InputError, match="there is no file"):
        Checkpoint.open(packed)


def test_a_shard_without_its_tensor_is_refused(packed: Path) -> None:
    key = "model.layers.1.mlp.down_proj.weight"
    shard = shard_of(packed, key)
    tensors = load_file(shard)
    del tensors[f"{key}.values"]
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(InputError, match=f"lacks {key}"):
        Checkpoint.open(packed)


OUTSIDE = ["../x.safetensors", "/x.safetensors", "below/x.safetensors", "below\\x.safetensors", "C:x", "..", ""]


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("field", ["the shard itself", "the dense shard", "the shard of a tensor"])
def test_shards_outside_the_directory_are_refused(packed: Path, field: str, outside: str) -> None:
    document = json.loads((packed / MARK).read_text())
    record = document["packed"]
    name = next(iter(record["shards"]))
    if field == "the dense shard":  # unpacking would write it
        record["shards"][name] = outside
    else:
        entries = [entry for entry in record["tensors"].values() if entry["shard"] == name]
        for entry in entries:
            entry["shard"] = outside
        if field == "the shard itself":
            record["shards"] = {
                outside if other == name else other: is_for for other, is_for in record["shards"].items()
            }
            for place in {"../x.safetensors", "below/x.safetensors", "below\\x.safetensors"} & {outside}:
                (packed / place).parent.mkdir(exist_ok=True)
                (packed / name).rename(packed / place)
    (packed / MARK).write_text(json.dumps(sealed(document)))
    with pytest.raises(InputError, match=re.escape(f"{packed / MARK} names the shard {outside!r} outside")):
        Checkpoint.open(packed)


def test_an_edited_record_is_refused(packed: Path) -> None:
    text = (packed / MARK).read_text()
    (packed / MARK).write_text(text.replace('"zeros": ', '"zeros": 1', 1))
    with pytest.raises(InputError, match="changed after trim wrote it"):
        Checkpoint.open(packed)
