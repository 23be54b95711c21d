import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.small_models import gpt2_config, llama_config, masks_for, random_model, save, skeleton_of
from trimcli.commands.apply import apply_masks
from trimcli.commands.options import ApplyOptions, VerifyOptions
from trimcli.commands.verify import VerifyReport, verify
from trimcli.errors import CheckFailed, InputError, MismatchError
from trimcli.files.atomic import MARK
from trimcli.files.manifest import sealed
from trimcli.files.masks import MaskFile

UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dense` at 50% (`masks`, `pruned`, `packed`) and 2:4 (`masks24`, `pruned24`); GPT-2 as `gpt2-*`."""
    base = tmp_path_factory.mktemp("verify")
    save(random_model(llama_config()), base / "dense")
    save(random_model(gpt2_config()), base / "gpt2-dense")
    masks_for(base / "dense", base / "masks")
    masks_for(base / "dense", base / "masks24", pattern=(2, 4))
    masks_for(base / "gpt2-dense", base / "gpt2-masks", sparsity=0.75)
    apply_masks(str(base / "dense"), base / "masks", base / "pruned")
    apply_masks(str(base / "dense"), base / "masks24", base / "pruned24")
    apply_masks(str(base / "dense"), base / "masks", base / "packed", ApplyOptions(format="packed"))
    apply_masks(str(base / "gpt2-dense"), base / "gpt2-masks", base / "gpt2-pruned")
    return base


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies of what is in `base`, to damage."""

    def copied(name: str) -> Path:
        source, target = base / name, tmp_path / name
        if source.is_file():
            target.write_bytes(source.read_bytes())
            return target
        target.mkdir()
        for path in source.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        return target

    return copied


def change(directory: Path, linear: str, edit: Callable[[Tensor], object]) -> None:
    """Edit a matrix on disk."""
    shard = directory / "model.safetensors"
    tensors = load_file(shard)
    edit(tensors[f"{linear}.weight"])
    save_file(tensors, shard, {"format": "pt"})


def edit_record(directory: Path, edit: Callable[[Any], None], *, seal: bool = False) -> None:
    document = json.loads((directory / MARK).read_text())
    edit(document)
    (directory / MARK).write_text(json.dumps(sealed(document) if seal else document))


def fails(report: VerifyReport, message: str) -> None:
    assert len(report.failures) == 1, report.failures
    with pytest.raises(CheckFailed, match=message):
        report.check()


@pytest.mark.parametrize("name", ["pruned", "packed", "masks", "pruned24", "masks24", "gpt2-pruned", "gpt2-masks"])
def test_what_trim_wrote_holds(base: Path, name: str) -> None:
    report = verify(base / name)
    report.check()
    assert report.failures == []
    assert report.document()["holds"] is True
    assert report.sparsity == (0.75 if "gpt2" in name else 0.5)
    assert set(report.layers.values()) == {report.sparsity}
    assert len(report.linears) == (8 if "gpt2" in name else 14)


def test_the_report_is_what_the_weights_are(base: Path) -> None:
    masks_for(base / "gpt2-dense", base / "ragged", keep_of=lambda linear, weight: weight > 0.02)
    apply_masks(str(base / "gpt2-dense"), base / "ragged", base / "gpt2-ragged")
    skeleton = skeleton_of(base / "gpt2-ragged")
    reports = {place: verify(base / place) for place in ("gpt2-ragged", "ragged")}
    rows = {}
    for name, linear in skeleton.linears.items():
        zero = (linear.read(skeleton.checkpoint) == 0).numpy()
        rows[name] = zero.mean(axis=1)
        for report in reports.values():
            found = next(entry for entry in report.linears if entry.name == name)
            assert found.zeros == zero.sum()
            assert found.sparsity == zero.mean()
            assert found.shape == zero.shape
            assert found.layer == ".".join(name.split(".")[:3])
            spread = (found.row_min, found.row_median, found.row_max)
            assert spread == (rows[name].min(), np.median(rows[name]), rows[name].max())
    together = np.concatenate(list(rows.values()))
    expected, _ = np.histogram(np.round(together, 12), bins=np.round(np.linspace(0, 1, 21), 12))
    for report in reports.values():
        assert report.row_histogram == expected.tolist()
        zeros = sum((linear.read(skeleton.checkpoint) == 0).sum() for linear in skeleton.linears.values())
        assert report.zeros == zeros
        assert report.layers.keys() == {"transformer.h.0", "transformer.h.1"}


def test_a_plain_model_claims_nothing(base: Path) -> None:
    report = verify(base / "gpt2-dense")
    report.check()
    assert report.schema is None
    assert report.document()["holds"] is None
    assert report.sparsity == 0
    assert report.row_histogram == [sum(entry.shape[0] for entry in report.linears)] + [0] * 19


def test_one_revived_weight_is_caught(copy: Callable[[str], Path]) -> None:
    def revive(weight: Tensor) -> None:
        weight.view(-1)[(weight.view(-1) == 0).nonzero()[7]] = 0.5

    directory = copy("pruned")
    change(directory, UP, revive)
    fails(verify(directory), f"pruned does not hold: {UP}: 639 weights are zero where 640 are recorded")


def test_one_more_zero_is_caught(copy: Callable[[str], Path]) -> None:
    def zero(weight: Tensor) -> None:
        weight.view(-1)[weight.view(-1).nonzero()[7]] = 0

    directory = copy("pruned")
    change(directory, DOWN, zero)
    fails(verify(directory), f"{DOWN}: 641 weights are zero where 640 are recorded")


def test_moved_zeros_are_caught(copy: Callable[[str], Path]) -> None:
    def move(weight: Tensor) -> None:
        flat = weight.view(-1)
        gone, kept = (flat == 0).nonzero()[0].item(), flat.nonzero()[0].item()
        flat[int(gone)], flat[int(kept)] = flat[int(kept)].item(), 0.0

    directory = copy("pruned")
    change(directory, UP, move)
    fails(verify(directory), f"{UP}: as many weights are zero as recorded, but others")


def test_a_broken_group_is_caught(copy: Callable[[str], Path]) -> None:
    """Even where the record was made to agree."""

    def swap(weight: Tensor) -> None:
        row = weight[3]
        row[row[:4].nonzero()[0]] = 0
        row[4:8] = torch.tensor([1.0, 0.0, 2.0, 3.0])

    directory = copy("pruned24")
    change(directory, UP, swap)
    report = verify(directory)
    assert report.failures == [
        f"{UP}: as many weights are zero as recorded, but others",
        f"{UP}: 1 of 320 groups break 2:4, the first in row 3, columns 4 to 7",
    ]
    with pytest.raises(CheckFailed, match=r"but others; .* 1 of 320 groups break 2:4"):
        report.check()


def test_an_edited_manifest_is_caught(copy: Callable[[str], Path]) -> None:
    directory = copy("pruned")

    def options(document: Any) -> None:
        document["pruning"]["options"]["sparsity"] = 0.6

    edit_record(directory, options)
    fails(verify(directory), "trim.json is not what trim wrote: its manifest was edited")


@pytest.mark.parametrize("field", ["shape", "zeros", "keep_sha256", "target", "pattern", "key", "pruned"])
def test_a_claim_that_is_none_is_named(field: str, copy: Callable[[str], Path]) -> None:
    directory = copy("pruned")

    def garbage(document: Any) -> None:
        document["linears"][UP][field] = {"a": "[red]"}

    edit_record(directory, garbage)
    with pytest.raises(InputError, match=rf"{MARK} is not a whole manifest file: linears\.{UP}\.{field} is "):
        verify(directory)


def test_an_edited_packed_manifest_is_caught(copy: Callable[[str], Path]) -> None:
    directory = copy("packed")

    def zeros(document: Any) -> None:
        document["linears"][UP]["zeros"] = 639

    edit_record(directory, zeros)
    fails(verify(directory), "its manifest was edited")


def test_an_edited_and_resealed_manifest_disagrees_with_the_tensors(copy: Callable[[str], Path]) -> None:
    directory = copy("pruned")

    def claims(document: Any) -> None:
        document["linears"][UP]["zeros"] = 768
        document["linears"][DOWN].update(target=0.6, pattern=[1, 4])
        document["linears"]["model.layers.9.mlp.up_proj"] = {
            **document["linears"][UP],
            "key": "model.layers.9.mlp.up_proj.weight",
        }

    edit_record(directory, claims, seal=True)
    failures = verify(directory).failures
    assert failures[0] == f"{UP}: 640 weights are zero where 768 are recorded"
    assert "groups break 1:4" in failures[1]
    assert failures[2] == f"{DOWN}: 640 weights were pruned where the target 0.6 asks for 768"
    assert "holds no tensor model.layers.9.mlp.up_proj.weight" in failures[3]
    with pytest.raises(CheckFailed, match="and 1 more"):
        verify(directory).check()


def test_targets_bind_exact_numerics_alone(base: Path, tmp_path: Path) -> None:
    def floors(linear: Any, weight: Tensor) -> Tensor:
        return weight.abs().argsort(dim=1).argsort(dim=1) >= int(linear.d_in * 0.49)

    for numerics, holds in (("exact", False), ("reference", True)):
        masks = tmp_path / numerics
        masks_for(base / "dense", masks, sparsity=0.49, keep_of=floors, numerics=numerics)
        assert bool(verify(masks).failures) is not holds


def test_zeros_of_the_dense_model_do_not_count_towards_the_target(tmp_path: Path) -> None:
    model = random_model(llama_config())
    model.model.layers[0].mlp.up_proj.weight.data[:, :20] = 0
    save(model, tmp_path / "dense")
    masks_for(
        tmp_path / "dense",
        tmp_path / "masks",
        keep_of=lambda linear, weight: torch.arange(linear.d_in) < linear.d_in / 2 + 0 * weight,
    )
    apply_masks(str(tmp_path / "dense"), tmp_path / "masks", tmp_path / "pruned")
    report = verify(tmp_path / "pruned", VerifyOptions(masks=tmp_path / "masks"))
    report.check()
    entry = next(entry for entry in report.linears if entry.name == UP)
    assert entry.kept_zeros == 40 * 16
    assert entry.zeros == 40 * 32


@pytest.mark.parametrize("name", ["pruned", "packed"])
def test_a_directory_is_held_against_masks(base: Path, tmp_path: Path, name: str) -> None:
    verify(base / name, VerifyOptions(masks=base / "masks")).check()
    masks_for(
        base / "dense",
        tmp_path / "inverted",
        keep_of=lambda linear, weight: ~MaskFile.open(base / "masks").keep(linear.name),
    )
    report = verify(base / name, VerifyOptions(masks=tmp_path / "inverted"))
    assert f"{UP}: 640 weights are not zero where the masks take them" in report.failures
    assert len(report.failures) == 14


def test_masks_must_cover_what_was_pruned(base: Path, tmp_path: Path) -> None:
    masks_for(base / "dense", tmp_path / "some", names=[UP])
    report = verify(base / "pruned", VerifyOptions(masks=tmp_path / "some"))
    assert len(report.failures) == 13
    apply_masks(str(base / "dense"), tmp_path / "some", tmp_path / "pruned")
    report = verify(tmp_path / "pruned", VerifyOptions(masks=base / "masks"))
    assert len(report.failures) == 13
    assert f"{DOWN} has a mask but was not pruned" in report.failures


def test_masks_of_another_model_are_refused(base: Path) -> None:
    for name in ("pruned", "packed", "dense"):
        with pytest.raises(MismatchError, match=r"made for the model .*gpt2-dense"):
            verify(base / name, VerifyOptions(masks=base / "gpt2-masks"))


def test_masks_of_other_weights_are_refused_unless_the_directory_says_so(base: Path, tmp_path: Path) -> None:
    save(random_model(llama_config(), seed=1), tmp_path / "tuned")
    apply_masks(str(tmp_path / "tuned"), base / "masks", tmp_path / "pruned", ApplyOptions(other_weights=True))
    verify(tmp_path / "pruned", VerifyOptions(masks=base / "masks")).check()
    masks_for(tmp_path / "tuned", tmp_path / "masks")
    with pytest.raises(MismatchError, match="other weights"):
        verify(base / "pruned", VerifyOptions(masks=tmp_path / "masks"))


def test_a_model_trained_on_is_held_against_its_masks(base: Path, copy: Callable[[str], Path]) -> None:
    """Fine-tuning drops `trim.json`; the masks still say what must be zero."""
    directory = copy("pruned")
    (directory / MARK).unlink()
    report = verify(directory, VerifyOptions(masks=base / "masks"))
    report.check()
    assert report.document()["holds"] is True
    change(directory, UP, lambda weight: weight.view(-1).fill_(1))
    fails(verify(directory, VerifyOptions(masks=base / "masks")), f"{UP}: 640 weights are not zero")


def rewrite_masks(path: Path, edit: Callable[[dict[str, Tensor], Any], None]) -> None:
    tensors = load_file(path)
    with safe_open(path, "pt") as handle:
        document = json.loads(handle.metadata()["manifest"])
    edit(tensors, document)
    save_file(tensors, path, {"format": "pt", "manifest": json.dumps(document)})


def test_altered_masks_are_caught(copy: Callable[[str], Path]) -> None:
    def revive(tensors: dict[str, Tensor], document: Any) -> None:
        tensors[f"{UP}.keep"][0, 0] = 255

    def group(tensors: dict[str, Tensor], document: Any) -> None:
        tensors[f"{UP}.keep"][0, 0] = 0b11100001

    def manifest(tensors: dict[str, Tensor], document: Any) -> None:
        document["sparsity"] = 0.9

    def drop(tensors: dict[str, Tensor], document: Any) -> None:
        del tensors[f"{UP}.keep"]

    path = copy("masks")
    rewrite_masks(path, revive)
    revived = verify(path).failures
    assert "weights are zero where 640 are recorded" in revived[0]
    assert "the target 0.5 asks for 640" in revived[1]
    path = copy("masks24")
    rewrite_masks(path, group)
    assert f"{UP}: 1 of 320 groups break 2:4, the first in row 0, columns 0 to 3" in verify(path).failures
    path = copy("masks")
    rewrite_masks(path, manifest)
    fails(verify(path), "its manifest is not what trim wrote")
    path = copy("masks")
    rewrite_masks(path, drop)
    fails(verify(path), rf"{UP}: the file holds no mask of shape \[40, 32\]")


def test_an_altered_packed_file_is_caught(copy: Callable[[str], Path]) -> None:
    directory = copy("packed")
    shard = next(directory.glob("*.safetensors"))
    tensors = load_file(shard)
    tensors[f"{UP}.weight.values"][0] = 1
    save_file(tensors, shard, {"format": "pt"})
    fails(verify(directory), f"{UP}.weight in .* is not what was packed")


def test_what_cannot_be_read_is_an_input_error(base: Path, tmp_path: Path, copy: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match="there is no file"):
        verify(tmp_path / "none")
    with pytest.raises(InputError, match="cannot be held against masks"):
        verify(base / "masks", VerifyOptions(masks=base / "masks"))
    directory = copy("pruned")
    (directory / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes()[:-4])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        verify(directory)
    (directory / MARK).write_text(json.dumps({"schema": "trim.results/1"}))
    with pytest.raises(MismatchError, match=r"trim\.results/1"):
        verify(directory)
