"""Which model a checkpoint is: what changes its fingerprint, what does not, and what reading it costs."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import trimcli.model.fingerprint
from tests.small_models import edited_config, llama_config, random_model, save, skeleton_of, with_tensors
from trimcli.errors import InputError, MismatchError
from trimcli.files.cache import Cache
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.manifest import ModelFingerprint, check_masks, check_model
from trimcli.files.tensors import tensor_hash
from trimcli.model.skeleton import Skeleton

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(llama_config()), tmp_path_factory.mktemp("fingerprint") / "llama")


def test_the_fingerprint_tells_structure_from_content(llama: Path, tmp_path: Path) -> None:
    base = skeleton_of(llama).fingerprint
    copy = skeleton_of(Path(shutil.copytree(llama, tmp_path / "copy"))).fingerprint
    assert (copy.structure, copy.content) == (base.structure, base.content)

    tuned = skeleton_of(save(random_model(llama_config(), seed=1), tmp_path / "tuned")).fingerprint
    assert tuned.structure == base.structure
    assert tuned.content != base.content

    half = skeleton_of(save(random_model(llama_config(), dtype=torch.float16), tmp_path / "half")).fingerprint
    assert half.structure == base.structure
    assert half.content != base.content

    theta = skeleton_of(edited_config(llama, tmp_path / "theta", rms_norm_eps=0.5)).fingerprint
    assert theta.structure != base.structure


def test_sharding_does_not_change_the_fingerprint(llama: Path, tmp_path: Path) -> None:
    other = save(random_model(llama_config()), tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(other.glob("*.safetensors"))) > 1
    assert skeleton_of(other).fingerprint.content == skeleton_of(llama).fingerprint.content


def test_a_config_alone_has_a_structure_and_shapes_but_no_content(llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama / "config.json", tmp_path)
    skeleton = Skeleton(Checkpoint.open(tmp_path, weights=False))
    whole = skeleton_of(llama)
    assert skeleton.fingerprint.structure == whole.fingerprint.structure
    assert skeleton.fingerprint.content is None
    assert {name: one.shape for name, one in skeleton.linears.items()} == {
        name: one.shape for name, one in whole.linears.items()
    }
    with pytest.raises(InputError, match="no weights for"):
        skeleton.linears[UP].read(skeleton.checkpoint)


def flip(tensor: Tensor) -> None:
    tensor.view(torch.int32)[5, 7] ^= 1


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "an input channel": lambda weight: weight[:, 5].zero_(),
    "an output channel": lambda weight: weight[17].zero_(),
    "one weight": lambda weight: weight[3, 9].add_(1e-3),
    "one bit": flip,
    "two rows exchanged": lambda weight: weight[:2].copy_(weight[:2].flip(0).clone()),
    "the sign of a zero": lambda weight: weight[4, 4].fill_(-0.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_a_weight_shows(change: str, llama: Path, tmp_path: Path) -> None:
    weight = load_file(llama / "model.safetensors")[f"{UP}.weight"].clone()
    weight[4, 4] = 0
    base = skeleton_of(with_tensors(llama, tmp_path / "base", **{f"{UP}.weight": weight.clone()})).fingerprint
    CHANGES[change](weight)
    other = skeleton_of(with_tensors(llama, tmp_path / "other", **{f"{UP}.weight": weight})).fingerprint
    assert other.structure == base.structure
    assert other.content != base.content
    with pytest.raises(MismatchError, match="other weights of this structure"):
        check_model({"model": base.document()}, other, tmp_path)


def earlier_content(model: Path) -> str:
    """As version 0.2 wrote it."""
    written = json.loads((model.parent / "dense" / "trim.json").read_text())["model"]["content"]
    assert len(written) == 64
    return str(written)


def test_files_of_earlier_versions_know_their_model(tmp_path: Path) -> None:
    model = Path(__file__).parents[1] / "data" / "written-by-0.1" / "model"
    fingerprint = skeleton_of(model).fingerprint
    assert (fingerprint.content or "").startswith("2:")
    theirs = {"id": "m", "structure": fingerprint.structure, "content": earlier_content(model)}
    check_model({"model": theirs}, fingerprint, tmp_path)
    check_masks({"model": {**theirs, "structure": "saved anew"}}, fingerprint, tmp_path)
    other = {**theirs, "content": "0" * 64}
    for check in (check_model, check_masks):
        with pytest.raises(MismatchError, match="other weights of this structure"):
            check({"model": other}, fingerprint, tmp_path)
    # Two files, neither of which can be asked for what the other's version would say.
    recorded = ModelFingerprint(**fingerprint.document())
    check_masks({"model": theirs}, recorded, tmp_path)
    with pytest.raises(MismatchError, match="made for the model"):
        check_masks({"model": {**theirs, "structure": "another"}}, recorded, tmp_path)


# --- what is kept of it ----------------------------------------------------------------------------------


class Reads:
    """Counts the tensors that are hashed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0

        def counted(tensor: Tensor) -> str:
            self.count += 1
            return tensor_hash(tensor)

        monkeypatch.setattr(trimcli.model.fingerprint, "tensor_hash", counted)

    def of(self, model: Path) -> tuple[int, str | None]:
        self.count = 0
        content = skeleton_of(model).fingerprint.content
        return self.count, content


def test_unchanged_files_are_not_read_again(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trimcli.model.fingerprint, "SETTLED_NS", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, reads = Path(shutil.copytree(llama, tmp_path / "model")), Reads(monkeypatch)
    count, content = reads.of(model)
    assert count == len(Checkpoint.open(model).keys())
    assert reads.of(model) == (0, content)
    (kept,) = Cache().entries()
    assert kept.kind == "fingerprints"
    for garbage in ("", "[]", "{}", '{"content": "2:3"}'):
        kept.path.write_text(garbage)
        assert reads.of(model) == (count, content)
        assert reads.of(model) == (0, content)

    file = model / "model.safetensors"
    before = file.stat()
    tensors = load_file(file)
    tensors[f"{UP}.weight"][0, 0] = 1.0
    save_file(tensors, file, {"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    count, other = reads.of(model)
    assert count > 0
    assert other != content


def test_what_was_only_just_written_is_not_kept(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's times are coarse: it may change once more within the same one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, reads = Path(shutil.copytree(llama, tmp_path / "model")), Reads(monkeypatch)
    first, second = reads.of(model), reads.of(model)
    assert first == second
    assert first[0] > 0


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trimcli.model.fingerprint, "SETTLED_NS", 0)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert skeleton_of(llama).fingerprint.content == skeleton_of(llama).fingerprint.content
