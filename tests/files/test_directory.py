import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.small_models import gpt2_config, llama_config, masks_for, random_model, save, skeleton_of
from trimcli.commands.apply import apply_masks
from trimcli.commands.options import ApplyOptions
from trimcli.commands.unpack import unpack
from trimcli.errors import InputError, OutputExists
from trimcli.files.atomic import MARK
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.directory import PrunedLinear, PrunedTensors, commands_so_far, plan_shards, write_model
from trimcli.files.manifest import COMMAND_LINE, PRUNED, manifest
from trimcli.files.masks import MaskFile, keep_digest
from trimcli.methods.masks import pack

LOADS = """
import sys, torch
from transformers import AutoModelForCausalLM
for place in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    logits = model.float()(torch.arange(16).reshape(2, 8)).logits
    assert torch.isfinite(logits).all()
    torch.save(logits, place + ".logits")
assert "trimcli" not in sys.modules
"""


def prune(directory: Path, target: Path, **options: Any) -> Path:
    masks = target.with_name(f"{target.name}.masks")
    masks_for(directory, masks, sparsity=0.5)
    apply_masks(str(directory), masks, target, ApplyOptions(**options))
    return target


def logits_of(directory: Path) -> Tensor:
    found: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    model, info = found
    assert not any(info.values()), info
    return logits(model)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.float()(torch.arange(16).reshape(2, 8)).logits
    return found


def tensors(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for shard in directory.glob("*.safetensors"):
        found.update(load_file(shard))
    return found


def masked(directory: Path, masks: Path) -> Any:
    """The dense model, masked in memory by its modules' names."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    found = MaskFile.open(masks)
    for name in found.names:
        weight, keep = model.get_parameter(f"{name}.weight"), found.keep(name)
        weight.data *= keep.T if "c_" in name else keep  # GPT-2's are transposed
    return model.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense models: `tied` (one shard, bfloat16), `sharded` (untied, float32), `gpt2` (Conv1D, tied)."""
    base = tmp_path_factory.mktemp("directory")
    tied = random_model(llama_config(tie_word_embeddings=True), dtype=torch.bfloat16)
    save(tied, base / "tied")
    save(random_model(llama_config(tie_word_embeddings=False)), base / "sharded", max_shard_size="20KB")
    save(random_model(gpt2_config()), base / "gpt2", max_shard_size="40KB")
    return base


@pytest.mark.parametrize("name", ["tied", "sharded", "gpt2"])
def test_a_pruned_directory_has_the_shards_and_tensors_of_the_model(base: Path, tmp_path: Path, name: str) -> None:
    target = prune(base / name, tmp_path / "pruned")
    here = {path.name for path in target.iterdir()}
    assert here == {path.name for path in (base / name).iterdir()} | {"README.md", MARK}
    for path in (base / name).glob("*.safetensors"):
        with safe_open(path, "pt") as dense, safe_open(target / path.name, "pt") as pruned:
            assert set(dense.keys()) == set(pruned.keys())
            assert pruned.metadata() == {"format": "pt"}
    index = "model.safetensors.index.json"
    if (base / name / index).exists():
        theirs = json.loads((base / name / index).read_text())
        ours = json.loads((target / index).read_text())
        assert ours["weight_map"] == theirs["weight_map"]
        assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    for small in ("config.json", "generation_config.json", "tokenizer.json", "merges.txt"):
        assert (target / small).read_bytes() == (base / name / small).read_bytes()


@pytest.mark.parametrize("name", ["tied", "sharded", "gpt2"])
def test_only_pruned_weights_change_and_become_positive_zero(base: Path, tmp_path: Path, name: str) -> None:
    target = prune(base / name, tmp_path / "pruned")
    found = MaskFile.open(tmp_path / "pruned.masks")
    linears = {linear.key: linear for linear in skeleton_of(base / name).linears.values()}
    assert len(linears) == len(found.names)
    before, after = tensors(base / name), tensors(target)
    assert before.keys() == after.keys()
    for key, dense in before.items():
        assert after[key].dtype == dense.dtype
        expected = dense
        if key in linears:
            keep = linears[key].within(found.keep(linears[key].name))
            expected = dense.masked_fill(~keep, 0.0)
            assert not torch.equal(dense, after[key])
        assert torch.equal(after[key], expected)
        assert torch.equal(torch.signbit(after[key]), torch.signbit(expected))


def test_pruned_directories_load_where_trim_was_never_imported(base: Path, tmp_path: Path) -> None:
    names = ["tied", "sharded", "gpt2"]
    places = [str(prune(base / name, tmp_path / name)) for name in names]
    subprocess.run([sys.executable, "-c", LOADS, *places], check=True, cwd="/", capture_output=True, text=True)
    for name in names:
        found = torch.load(tmp_path / f"{name}.logits")
        expected = logits(masked(base / name, tmp_path / f"{name}.masks"))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_record_counts_what_was_written(base: Path, tmp_path: Path) -> None:
    target = prune(base / "gpt2", tmp_path / "pruned")
    document = json.loads((target / MARK).read_text())
    after = tensors(target)
    assert document["schema"] == PRUNED
    assert document["pruning"]["command"] == "prune"
    total = zeros = 0
    for name, entry in document["linears"].items():
        weight = after[entry["key"]]
        assert entry["key"] == f"{name}.weight"
        assert entry["transposed"]
        assert entry["shape"] == list(weight.T.shape)
        assert entry["zeros"] == entry["pruned"] == int((weight == 0).sum())
        assert entry["keep_sha256"] == keep_digest(pack(weight.T != 0))
        assert entry["target"] == 0.5
        total, zeros = total + weight.numel(), zeros + entry["zeros"]
    assert document["sparsity"] == zeros / total
    assert "sparsity_config" not in (target / "config.json").read_text()
    assert document["sources"]["masks"]["path"] == str(tmp_path / "pruned.masks")


def test_weights_that_were_zero_before_are_told_apart(tmp_path: Path) -> None:
    model = random_model(llama_config())
    model.model.layers[0].mlp.up_proj.weight.data[0] = 0
    model.model.layers[0].mlp.up_proj.weight.data[1] = -0.0
    save(model, tmp_path / "dense")
    masks_for(tmp_path / "dense", tmp_path / "masks", keep_of=lambda linear, weight: weight > -9)
    apply_masks(str(tmp_path / "dense"), tmp_path / "masks", tmp_path / "pruned")
    entry = json.loads((tmp_path / "pruned" / MARK).read_text())["linears"]["model.layers.0.mlp.up_proj"]
    assert entry["zeros"] == 64
    assert entry["pruned"] == 0


def test_shards_anew(base: Path, tmp_path: Path) -> None:
    target = prune(base / "sharded", tmp_path / "pruned", max_shard_size="12KB")
    shards = {path.name: load_file(path) for path in target.glob("*.safetensors")}
    count = len(shards)
    assert sorted(shards) == [f"model-{place:05d}-of-{count:05d}.safetensors" for place in range(1, count + 1)]
    assert count > 3
    sizes = [sum(tensor.nbytes for tensor in found.values()) for found in shards.values()]
    assert max(sizes) <= 12_000
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {key: shard for shard, found in shards.items() for key in found}
    assert index["metadata"]["total_size"] == sum(sizes)
    whole = prune(base / "sharded", tmp_path / "whole", max_shard_size="1GB")
    assert [path.name for path in whole.glob("model*")] == ["model.safetensors"]
    assert torch.equal(logits_of(target), logits_of(whole))


def test_a_tensor_larger_than_a_shard_has_one_to_itself(base: Path) -> None:
    checkpoint = Checkpoint.open(base / "tied")
    shards = plan_shards(checkpoint, 1)
    assert all(len(keys) == 1 for keys in shards.values())
    assert len(shards) == len(checkpoint.keys())


@pytest.mark.parametrize("size", [1, 2_000, 5_000, 9_000, 20_000, 10**9])
def test_shards_are_those_that_save_pretrained_makes_of_the_same_order(base: Path, tmp_path: Path, size: int) -> None:
    """Sizes alone are looked at: no tensor is loaded."""
    checkpoint = Checkpoint.open(base / "sharded")
    state = {key: checkpoint.load(key) for key in checkpoint.keys()}  # noqa: SIM118 - no mapping
    save_torch_state_dict(state, tmp_path, max_shard_size=size)
    expected = {path.name: set(load_file(path)) for path in tmp_path.glob("*.safetensors")}

    def fail(key: str) -> Tensor:
        raise AssertionError(key)

    checkpoint.load = fail  # type: ignore[method-assign]
    shards = plan_shards(checkpoint, size)
    assert {name: set(keys) for name, keys in shards.items()} == expected
    for keys in shards.values():
        assert keys == [key for key in state if key in keys]


def bin_model(directory: Path, config: Any, shards: int) -> Path:
    """A checkpoint as old tools write it: pickled, the tied head beside the embedding."""
    model = random_model(config)
    directory.mkdir()
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    state = model.state_dict()
    keys = list(state)
    if shards == 1:
        torch.save(state, directory / "pytorch_model.bin")
        return directory
    weight_map = {}
    for place in range(shards):
        name = f"pytorch_model-{place + 1:05d}-of-{shards:05d}.bin"
        part = keys[place::shards]
        torch.save({key: state[key].clone() for key in part}, directory / name)
        weight_map.update(dict.fromkeys(part, name))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return directory


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [llama_config, gpt2_config])
def test_a_pickled_checkpoint_becomes_safetensors(tmp_path: Path, family: Any, tied: bool) -> None:
    dense = bin_model(tmp_path / "dense", family(tie_word_embeddings=tied), 1)
    target = prune(dense, tmp_path / "pruned")
    assert {path.name for path in target.iterdir()} == {"config.json", "README.md", "model.safetensors", MARK}
    assert ("lm_head.weight" in tensors(target)) is not tied
    assert torch.equal(logits_of(target), logits(masked(dense, tmp_path / "pruned.masks")))
    assert not torch.equal(logits_of(target), logits_of(dense))


def test_a_sharded_pickled_checkpoint_keeps_its_shards(tmp_path: Path) -> None:
    dense = bin_model(tmp_path / "dense", llama_config(), 3)
    target = prune(dense, tmp_path / "pruned")
    shards = {f"model-{place:05d}-of-00003.safetensors" for place in (1, 2, 3)}
    beside = {"config.json", "README.md", "model.safetensors.index.json", MARK}
    assert {path.name for path in target.iterdir()} == shards | beside
    assert torch.equal(logits_of(target), logits(masked(dense, tmp_path / "pruned.masks")))


def test_an_existing_model_card_is_kept(base: Path, tmp_path: Path) -> None:
    save(AutoModelForCausalLM.from_pretrained(base / "tied"), tmp_path / "dense")
    (tmp_path / "dense" / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    target = prune(tmp_path / "dense", tmp_path / "pruned")
    first = (target / "README.md").read_text()
    assert first.startswith("---\nlicense: mit\n---\n# Mine\n\n<!-- trim:begin -->\n## Pruned with trim")
    again = (prune(target, tmp_path / "again") / "README.md").read_text()
    assert again.count("<!-- trim:begin -->") == 1
    assert again.startswith("---\nlicense: mit\n---\n# Mine\n")


UNPACKS = """
import locale, sys
from pathlib import Path
from trimcli.commands.unpack import unpack
assert locale.getencoding().lower() not in ("utf-8", "utf8"), locale.getencoding()
unpack(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_texts_are_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    card, tokenizer = "# Mine, für Löwen\n", '{"a": "für"}'
    save(random_model(llama_config()), tmp_path / "dense")
    (tmp_path / "dense" / "README.md").write_text(card, encoding="utf-8")
    (tmp_path / "dense" / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    masks_for(tmp_path / "dense", tmp_path / "masks", remarks=["für"])
    apply_masks(str(tmp_path / "dense"), tmp_path / "masks", tmp_path / "packed", ApplyOptions(format="packed"))
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", UNPACKS, str(tmp_path / "packed"), str(tmp_path / "unpacked")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("packed", "unpacked"):
        readme = (tmp_path / name / "README.md").read_bytes()
        assert readme.startswith(card.encode())
        assert readme.count(b"trim:begin") == 1
        assert json.loads((tmp_path / name / MARK).read_bytes())["pruning"]["remarks"] == ["für"]
        assert (tmp_path / name / "tokenizer.json").read_bytes() == tokenizer.encode()


def write(base: Path, target: Path, weight_of: Any, **options: Any) -> None:
    checkpoint = Checkpoint.open(base / "sharded")
    key = "model.layers.0.mlp.up_proj.weight"
    linears = {key.removesuffix(".weight"): PrunedLinear(key, (40, 32), False, 0)}
    document = manifest(PRUNED, "prune", {}, None, commands=[])
    write_model(PrunedTensors(checkpoint, weight_of, linears), target, document, **options)


def test_changed_weights_are_written_as_given(base: Path, tmp_path: Path) -> None:
    """What a prune that updates weights hands over, under the checkpoint's names."""
    key = "model.layers.0.mlp.up_proj.weight"
    weight = torch.randn(40, 32)
    weight[:, ::2] = 0
    write(base, tmp_path / "pruned", {key: weight}.get)
    after, before = tensors(tmp_path / "pruned"), tensors(base / "sharded")
    assert torch.equal(after.pop(key), weight)
    assert all(torch.equal(after[other], before[other]) for other in after)
    document = json.loads((tmp_path / "pruned" / MARK).read_text())
    assert document["linears"]["model.layers.0.mlp.up_proj"]["zeros"] == 640
    assert document["linears"]["model.layers.0.mlp.up_proj"]["target"] is None


def test_a_failure_on_the_way_leaves_nothing(base: Path, tmp_path: Path) -> None:
    def fails(key: str) -> Tensor | None:
        if key.startswith("model.layers.1"):
            raise InputError("no more")
        return None

    with pytest.raises(InputError, match="no more"):
        write(base, tmp_path / "pruned", fails)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_replaced_only_by_force_and_only_if_trim_made_it(base: Path, tmp_path: Path) -> None:
    target = tmp_path / "pruned"
    write(base, target, {}.get)
    with pytest.raises(OutputExists, match="--force"):
        write(base, target, {}.get)
    (target / "old").touch()
    write(base, target, {}.get, force=True)
    assert not (target / "old").exists()
    (target / MARK).unlink()
    with pytest.raises(OutputExists, match="trim did not make"):
        write(base, target, {}.get, force=True)
    with pytest.raises(InputError, match="does not exist"):
        write(base, tmp_path / "no" / "pruned", {}.get)


def test_commands_are_gathered_in_order() -> None:
    calibrate = {"command_line": "trim calibrate m"}
    prune = {"command_line": "trim prune m", "commands": ["trim calibrate m", "trim prune m"]}
    token = COMMAND_LINE.set("trim apply-masks m")
    try:
        found = commands_so_far(calibrate, prune, {"command_line": None})
    finally:
        COMMAND_LINE.reset(token)
    assert found == ["trim calibrate m", "trim prune m", "trim apply-masks m"]


def test_a_folder_of_chat_templates_goes_along(tmp_path: Path) -> None:
    """Into the pruned directory, the packed one, and the one unpacked from that."""
    dense = save(random_model(llama_config()), tmp_path / "model")
    template = dense / "additional_chat_templates" / "tools.jinja"
    template.parent.mkdir()
    template.write_text("{{ tools }}")
    (template.parent / "notes.bin").touch()
    targets = [prune(dense, tmp_path / form, format=form) for form in ("dense", "packed")]
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    for target in (*targets, tmp_path / "unpacked"):
        assert [path.name for path in (target / template.parent.name).iterdir()] == ["tools.jinja"]
        assert (target / template.parent.name / "tools.jinja").read_text() == "{{ tools }}"


def test_unused_tensors_in_odd_dtypes_are_carried_through(base: Path, tmp_path: Path) -> None:
    """What the model does not load is no reason to refuse, and stays to the bit."""
    dense = Path(shutil.copytree(base / "tied", tmp_path / "dense"))
    dtypes = ["uint16", "uint32", "uint64", "complex64", "float8_e8m0fnu", "float4_e2m1fn_x2"]
    odd = {f"unused.{name}": torch.arange(64, dtype=torch.uint8).view(getattr(torch, name)) for name in dtypes}
    odd["unused.nan"] = torch.full((4,), torch.nan)
    save_file({**load_file(dense / "model.safetensors"), **odd}, dense / "model.safetensors", {"format": "pt"})
    before = skeleton_of(base / "tied").linears.keys()
    assert skeleton_of(dense).linears.keys() == before
    target = prune(dense, tmp_path / "pruned")
    after = tensors(target)
    for name, tensor in odd.items():
        assert after[name].dtype == tensor.dtype
        assert after[name].shape == tensor.shape
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8))


def test_a_needed_tensor_in_an_odd_dtype_is_named(base: Path, tmp_path: Path) -> None:
    dense = Path(shutil.copytree(base / "tied", tmp_path / "dense"))
    found = load_file(dense / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight"
    save_file({**found, key: found[key].to(torch.complex64)}, dense / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"holds model\.layers\.0\.mlp\.up_proj\.weight as complex64"):
        skeleton_of(dense)
