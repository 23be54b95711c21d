import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import trimcli.commands.export
import trimcli.kernels.exported
from tests.small_models import gpt2_config, llama_config, masks_for, random_model, save
from tests.trim_cli import trim, trim_json
from trimcli.commands.apply import apply_masks
from trimcli.commands.export import export
from trimcli.commands.options import ApplyOptions
from trimcli.errors import InputError, MismatchError, OptionError, OutputExists
from trimcli.files.atomic import MARK
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.manifest import sealed
from trimcli.kernels.exported import ExportedCheckpoint, load_exported
from trimcli.kernels.forms import FormLinear, Race, SemiStructured
from trimcli.kernels.options import ExportOptions

UP, QUERY = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"
PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="semi-structured matrices need a CUDA GPU")


def pruned(folder: Path, config: Any, *, form: str = "dense", dtype: torch.dtype = torch.float32, **masks: Any) -> Path:
    save(random_model(config, dtype=dtype), folder / "model")
    masks_for(folder / "model", folder / "masks", **masks)
    apply_masks(str(folder / "model"), folder / "masks", folder / form, ApplyOptions(format=form))  # type: ignore[arg-type]
    return folder / form


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned directory, 75% of every linear zero."""
    return pruned(tmp_path_factory.mktemp("llama"), llama_config(), sparsity=0.75)


@pytest.fixture
def sparse_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trimcli.commands.export, "race", lambda *_: Race(2.0, 1.0))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=PROMPT.to(model.device)).logits
    return found.cpu().float()


def dense_logits(directory: Path) -> Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval())


def sparse_modules(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FormLinear)]


@pytest.mark.usefixtures("sparse_wins")
@pytest.mark.parametrize("config", [llama_config(attention_bias=True), gpt2_config()], ids=["llama", "gpt2"])
def test_an_export_runs_on_its_sparse_matrices(tmp_path: Path, config: Any) -> None:
    directory = pruned(tmp_path, config, sparsity=0.75)
    summary = export(str(directory), tmp_path / "csr", ExportOptions(to="csr"))
    assert summary.sparse == len(summary.linears) > 0
    model: Any = load_exported(tmp_path / "csr")
    assert sparse_modules(model) == list(summary.linears)
    torch.testing.assert_close(logits(model), dense_logits(directory), rtol=0, atol=1e-4)
    generated = model.generate(PROMPT[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    dense: Any = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(generated, dense.generate(PROMPT[:1], max_new_tokens=4, do_sample=False, pad_token_id=0))


@pytest.mark.usefixtures("sparse_wins")
def test_sixteen_bit_models_keep_their_values_and_run_in_float32(tmp_path: Path) -> None:
    directory = pruned(tmp_path, llama_config(), form="packed", dtype=torch.bfloat16, sparsity=0.75)
    export(str(directory), tmp_path / "csr", ExportOptions(to="csr", dtype="float32"))
    stored = load_file(tmp_path / "csr" / "export-00001-of-00001.safetensors")
    assert stored[f"{UP}.weight.values"].dtype == torch.bfloat16
    assert stored[f"{UP}.weight.col_indices"].dtype == torch.int32
    before, after = Checkpoint.open(directory), ExportedCheckpoint(tmp_path / "csr")
    assert after.keys() == before.keys()
    for key in before.keys():  # noqa: SIM118 - no mapping
        assert after.spec(key) == before.spec(key)
        assert torch.equal(after.load(key), before.load(key))
    model = load_exported(tmp_path / "csr", dtype="float32")
    apply_masks(str(tmp_path / "model"), tmp_path / "masks", tmp_path / "plain")
    torch.testing.assert_close(logits(model), dense_logits(tmp_path / "plain"), rtol=0, atol=1e-4)


def test_what_is_not_faster_stays_dense(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raced: list[torch.Size] = []

    def race(weight: Tensor, sparse: Tensor, dtype: torch.dtype) -> Race:
        raced.append(weight.shape)
        assert torch.equal(sparse.to_dense(), weight)
        assert dtype == torch.float32
        return Race(2.0, 1.0) if weight.shape == (40, 32) else Race(1.0, 1.0)

    monkeypatch.setattr(trimcli.commands.export, "race", race)
    summary = export(str(llama), tmp_path / "csr", ExportOptions(to="csr"))
    assert len(raced) == 14
    forms = {name: linear.form for name, linear in summary.linears.items()}
    assert {name for name, form in forms.items() if form == "csr"} == {
        name for name in forms if name.endswith(("gate_proj", "up_proj"))
    }
    document = json.loads((tmp_path / "csr" / MARK).read_text())
    assert document["linears"][QUERY]["reason"] == "not faster as csr"
    assert document["linears"][QUERY]["dense_seconds"] == document["linears"][QUERY]["sparse_seconds"] == 1.0
    assert document["linears"][UP]["zeros"] == 0.75 * 40 * 32
    assert sparse_modules(load_exported(tmp_path / "csr")) == [name for name, form in forms.items() if form == "csr"]
    torch.testing.assert_close(logits(load_exported(tmp_path / "csr")), dense_logits(llama), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("sparse_wins")
def test_what_was_not_pruned_stays_dense(tmp_path: Path) -> None:
    directory = pruned(tmp_path, llama_config(), names=[UP])
    recorded = export(str(directory), tmp_path / "recorded", ExportOptions())
    (directory / MARK).unlink()
    seen = export(str(directory), tmp_path / "seen", ExportOptions())
    for summary in (recorded, seen):
        assert [name for name, linear in summary.linears.items() if linear.form == "csr"] == [UP]
        assert summary.linears[QUERY].reason == "not pruned"
        assert summary.linears[QUERY].dense_seconds is None


@pytest.mark.usefixtures("sparse_wins")
def test_an_export_says_what_it_is(llama: Path, tmp_path: Path) -> None:
    summary = export(str(llama), tmp_path / "csr", ExportOptions())
    names = {path.name for path in (tmp_path / "csr").iterdir()}
    shard = "export-00001-of-00001.safetensors"
    assert names >= {"config.json", "tokenizer.json", "README.md", MARK, shard}
    assert summary.nbytes == (tmp_path / "csr" / shard).stat().st_size
    with safe_open(tmp_path / "csr" / shard, "pt") as handle:
        manifest = json.loads(handle.metadata()["manifest"])
    assert manifest["schema"] == "trim.export/1"
    assert manifest["to"] == "csr"
    with pytest.raises(OSError, match=r"no file named .*model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "csr")


@pytest.mark.usefixtures("sparse_wins")
def test_shards_stay_apart(tmp_path: Path) -> None:
    save(random_model(llama_config()), tmp_path / "model", max_shard_size="20KB")
    masks_for(tmp_path / "model", tmp_path / "masks")
    apply_masks(str(tmp_path / "model"), tmp_path / "masks", tmp_path / "pruned")
    export(str(tmp_path / "pruned"), tmp_path / "csr", ExportOptions())
    assert len(list((tmp_path / "csr").glob("export-*.safetensors"))) == len(
        list((tmp_path / "pruned").glob("*.safetensors"))
    )
    torch.testing.assert_close(
        logits(load_exported(tmp_path / "csr")), dense_logits(tmp_path / "pruned"), rtol=0, atol=1e-4
    )


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    directory = save(random_model(llama_config()), tmp_path / "model")
    with pytest.raises(InputError, match=r"no matrix of .*model is pruned"):
        export(str(directory), tmp_path / "csr", ExportOptions())
    assert not (tmp_path / "csr").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "crs"}, "did you mean 'csr'"),
        ({"to": "csr", "device": "cuda"}, "csr matrices are for CPUs, so --device cuda is of no use"),
        ({"to": "semi-structured", "device": "cpu"}, "on a CUDA GPU, and the device here is cpu"),
    ],
)
def test_unusable_options(llama: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        export(str(llama), tmp_path / "out", ExportOptions(**options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("sparse_wins")
def test_only_an_export_of_ours_is_replaced(llama: Path, tmp_path: Path) -> None:
    export(str(llama), tmp_path / "csr", ExportOptions())
    with pytest.raises(OutputExists, match="--force"):
        export(str(llama), tmp_path / "csr", ExportOptions())
    export(str(llama), tmp_path / "csr", ExportOptions(), force=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(OutputExists):
        export(str(llama), tmp_path / "mine", ExportOptions(), force=True)


@pytest.mark.usefixtures("sparse_wins")
def test_damaged_exports_are_refused(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "csr"
    shard, mark = out / "export-00001-of-00001.safetensors", out / MARK

    def fresh() -> None:
        export(str(llama), out, ExportOptions(), force=True)

    fresh()
    mark.write_text(mark.read_text().replace('"threads"', '"thread"'))
    with pytest.raises(InputError, match=r"trim.json was changed after trim wrote it"):
        load_exported(out)
    fresh()
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_exported(out)
    fresh()
    tensors = load_file(shard)
    tensors[f"{UP}.weight.col_indices"] += 1000
    save_file(tensors, shard)
    with pytest.raises(InputError, match=rf"{UP}.weight in .* is no csr matrix"):
        load_exported(out)
    del tensors[f"{UP}.weight.crow_indices"]
    save_file(tensors, shard)
    with pytest.raises(InputError, match=rf"lack {UP}.weight"):
        load_exported(out)
    with pytest.raises(InputError, match="is not an export"):
        load_exported(tmp_path)
    with pytest.raises(MismatchError, match=r"'trim\.export/1' is needed"):
        load_exported(llama)


@pytest.mark.usefixtures("sparse_wins")
def test_shards_outside_an_export_are_refused(llama: Path, tmp_path: Path) -> None:
    export(str(llama), tmp_path / "csr", ExportOptions())
    mark = tmp_path / "csr" / MARK
    document = json.loads(mark.read_text())
    (tmp_path / "csr" / document["shards"][0]).rename(tmp_path / "shard.safetensors")
    mark.write_text(json.dumps(sealed({**document, "shards": ["../shard.safetensors"]})))
    with pytest.raises(InputError, match=r"csr/trim\.json names the shard '\.\./shard\.safetensors' outside"):
        load_exported(tmp_path / "csr")


class OnTheCpu(SemiStructured):
    """Packs as CUTLASS does, which torch can do and undo without a GPU, but not multiply."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.backend, self.capability = torch.device("cpu"), dtype, "cutlass", (8, 0)

    def pack(self, weight: Tensor) -> Tensor:
        from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

        packed, meta = sparse_semi_structured_from_dense_cutlass(weight.to(self.dtype).contiguous())
        return self.from_parts({"packed": packed, "meta": meta}, (weight.shape[0], weight.shape[1]))


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (trimcli.commands.export, trimcli.kernels.exported):
        monkeypatch.setattr(module, "SemiStructured", OnTheCpu)


SEMI = {"hidden_size": 64, "intermediate_size": 128}


@pytest.mark.usefixtures("no_gpu_needed")
def test_semi_structured_matrices_are_stored_as_packed(tmp_path: Path) -> None:
    directory = pruned(tmp_path, llama_config(**SEMI), dtype=torch.bfloat16, pattern=(2, 4))
    summary = export(str(directory), tmp_path / "semi", ExportOptions(to="semi-structured", dtype="bfloat16"))
    assert summary.sparse == 14
    stored = load_file(tmp_path / "semi" / "export-00001-of-00001.safetensors")
    assert stored[f"{UP}.weight.packed"].shape == (128, 32)
    assert f"{UP}.weight" not in stored
    before, after = Checkpoint.open(directory), ExportedCheckpoint(tmp_path / "semi")
    for key in before.keys():  # noqa: SIM118 - no mapping
        assert torch.equal(after.load(key), before.load(key))
    model = load_exported(tmp_path / "semi")
    assert sparse_modules(model) == list(summary.linears)
    assert model.dtype == torch.bfloat16


@pytest.mark.usefixtures("no_gpu_needed")
def test_what_is_packed_for_one_gpu_is_not_read_on_another(tmp_path: Path) -> None:
    directory = pruned(tmp_path, llama_config(**SEMI), dtype=torch.bfloat16, pattern=(2, 4))
    export(str(directory), tmp_path / "semi", ExportOptions(to="semi-structured", dtype="bfloat16"))
    mark = tmp_path / "semi" / MARK
    document = json.loads(mark.read_text())
    document["semi_structured"]["capability"] = [9, 0]
    mark.write_text(json.dumps(sealed(document)))
    with pytest.raises(MismatchError, match=r"was packed for .*9, 0.* export it anew here"):
        load_exported(tmp_path / "semi")


@pytest.mark.usefixtures("no_gpu_needed")
def test_matrices_that_are_not_two_of_four_are_named(tmp_path: Path) -> None:
    options = ExportOptions(to="semi-structured", dtype="bfloat16")
    directory = pruned(tmp_path, llama_config(**SEMI), sparsity=0.5)
    with pytest.raises(InputError, match=r"not 2:4 .*: model.layers.0.self_attn.q_proj, .* and 11 more; prune with"):
        export(str(directory), tmp_path / "semi", options)
    (directory / MARK).unlink()
    with pytest.raises(InputError, match=r"no matrix of .* is 2:4 and of a shape that the kernels take"):
        export(str(directory), tmp_path / "semi", options)


@pytest.mark.usefixtures("no_gpu_needed")
def test_shapes_that_the_kernels_do_not_take_stay_dense(tmp_path: Path) -> None:
    directory = pruned(tmp_path, llama_config(hidden_size=64, intermediate_size=40), pattern=(2, 4))
    options = ExportOptions(to="semi-structured", dtype="bfloat16")
    summary = export(str(directory), tmp_path / "semi", options)
    reasons = {name.rpartition(".")[2]: linear.reason for name, linear in summary.linears.items()}
    assert reasons["q_proj"] is None
    assert reasons["up_proj"] == reasons["down_proj"] == "a shape that the kernels do not take"


@NO_GPU
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_semi_structured_export_runs(tmp_path: Path, dtype: torch.dtype) -> None:
    directory = pruned(tmp_path, llama_config(**SEMI, attention_bias=True), dtype=dtype, pattern=(2, 4))
    summary = export(str(directory), tmp_path / "semi", ExportOptions(to="semi-structured"))
    assert summary.sparse == 14
    model = load_exported(tmp_path / "semi")
    dense = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval().to("cuda")
    torch.testing.assert_close(logits(model), logits(dense), rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("sparse_wins")
def test_the_command(llama: Path, tmp_path: Path) -> None:
    found = trim("export", llama, "--to", "csr", "-o", tmp_path / "csr")
    assert found.status == 0
    assert any(
        line.startswith(UP) and "75.00% zeros" in line and line.endswith("csr") for line in found.out.splitlines()
    )
    assert "14 of 14 as csr" in found.out
    document = trim_json("export", llama, "--to", "csr", "-o", tmp_path / "csr", "--force")
    assert document["sparse"] == 14
    assert document["linears"][UP]["form"] == "csr"
    assert trim("export", llama, "--to", "csr", "-o", tmp_path / "csr", "--quiet").status == 2


def test_the_command_says_when_nothing_is_gained(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trimcli.commands.export, "race", lambda *_: Race(1.0, 2.0))
    found = trim("export", llama, "--to", "csr", "-o", tmp_path / "csr")
    assert "no matrix is faster as csr on this machine: nothing is gained" in found.out
    assert "(not faster as csr)" in found.out
