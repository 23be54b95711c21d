import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.families import CONVERTS
from tests.small_models import gpt2_config, llama_config, masks_for, random_model, save, skeleton_of
from trimcli.commands.apply import apply_masks
from trimcli.commands.options import ApplyOptions, VerifyOptions
from trimcli.commands.verify import verify
from trimcli.errors import InputError, MismatchError, OptionError, OutputExists, TrimError
from trimcli.files.atomic import MARK
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.manifest import COMMAND_LINE
from trimcli.files.masks import MaskFile

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dense`, its `masks`, `tuned`: the same model with other weights, and `other`: another model."""
    base = tmp_path_factory.mktemp("apply")
    save(random_model(llama_config()), base / "dense")
    save(random_model(llama_config(), seed=1), base / "tuned")
    save(random_model(gpt2_config()), base / "other")
    masks_for(base / "dense", base / "masks", sparsity=0.75)
    return base


def test_the_summary_says_what_was_written(base: Path, tmp_path: Path) -> None:
    dense = apply_masks(str(base / "dense"), base / "masks", tmp_path / "dense")
    packed = apply_masks(str(base / "dense"), base / "masks", tmp_path / "packed", ApplyOptions(format="packed"))
    on_disk = {
        name: sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors"))
        for name in ("dense", "packed")
    }
    assert (dense.nbytes, packed.nbytes) == (on_disk["dense"], on_disk["packed"])
    checkpoint = Checkpoint.open(base / "dense")
    assert (
        dense.dense_bytes == packed.dense_bytes == sum(checkpoint.load(key).nbytes for key in sorted(checkpoint.keys()))
    )
    assert packed.nbytes < 0.6 * dense.nbytes
    assert dense.sparsity == packed.sparsity == 0.75
    assert dense.linears == packed.linears == 14
    assert dense.zeros == packed.zeros == 0.75 * 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 40 * 32)


def test_masks_for_some_linears_leave_the_others_dense(base: Path, tmp_path: Path) -> None:
    masks_for(base / "dense", tmp_path / "masks", names=[UP])
    assert apply_masks(str(base / "dense"), tmp_path / "masks", tmp_path / "pruned").linears == 1
    before, after = Checkpoint.open(base / "dense"), Checkpoint.open(tmp_path / "pruned")
    changed = [key for key in sorted(before.keys()) if not torch.equal(before.load(key), after.load(key))]
    assert changed == [f"{UP}.weight"]


def test_masks_of_another_model_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"made for the model .*dense.* not for .*other"):
        apply_masks(str(base / "other"), base / "masks", tmp_path / "pruned")
    with pytest.raises(MismatchError, match="other weights of this structure"):
        apply_masks(str(base / "tuned"), base / "masks", tmp_path / "pruned")
    assert list(tmp_path.iterdir()) == []


def test_other_weights_are_accepted_on_request(base: Path, tmp_path: Path) -> None:
    apply_masks(str(base / "tuned"), base / "masks", tmp_path / "pruned", ApplyOptions(other_weights=True))
    key = f"{UP}.weight"
    weight = Checkpoint.open(base / "tuned").load(key)
    expected = weight * MaskFile.open(base / "masks").keep(UP)
    assert torch.equal(Checkpoint.open(tmp_path / "pruned").load(key), expected)


def saved_anew(source: Path, target: Path, **fields: object) -> Path:
    """The model with another config, as another version of transformers writes it."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    theta = config.pop("rope_parameters", {}).get("rope_theta", 10000.0)
    (target / "config.json").write_text(json.dumps({**config, "rope_theta": theta, **fields}))
    return target


def test_a_config_that_was_saved_anew_is_no_other_model(base: Path, tmp_path: Path) -> None:
    """Without a word where the weights are the same, and as other weights where they are not."""
    same = saved_anew(base / "dense", tmp_path / "same")
    if CONVERTS:  # transformers 4 writes the config in this way itself
        assert skeleton_of(same).fingerprint.structure != skeleton_of(base / "dense").fingerprint.structure
    apply_masks(str(same), base / "masks", tmp_path / "pruned")
    verify(tmp_path / "pruned", VerifyOptions(masks=base / "masks")).check()
    tuned = saved_anew(base / "tuned", tmp_path / "tuned")
    with pytest.raises(MismatchError, match="made for the model" if CONVERTS else "made for other weights"):
        apply_masks(str(tuned), base / "masks", tmp_path / "no")
    apply_masks(str(tuned), base / "masks", tmp_path / "other", ApplyOptions(other_weights=True))
    verify(tmp_path / "other", VerifyOptions(masks=base / "masks")).check()


def test_masks_fit_a_model_whose_vocabulary_grew(base: Path, tmp_path: Path) -> None:
    save(random_model(llama_config(vocab_size=80), seed=1), tmp_path / "grown")
    with pytest.raises(MismatchError, match="made for the model"):
        apply_masks(str(tmp_path / "grown"), base / "masks", tmp_path / "pruned")
    apply_masks(str(tmp_path / "grown"), base / "masks", tmp_path / "pruned", ApplyOptions(other_weights=True))
    verify(tmp_path / "pruned", VerifyOptions(masks=base / "masks")).check()
    (tmp_path / "pruned" / MARK).unlink()
    verify(tmp_path / "pruned", VerifyOptions(masks=base / "masks")).check()


def test_other_weights_are_of_matrices_of_the_same_shape(base: Path, tmp_path: Path) -> None:
    save(random_model(llama_config(intermediate_size=48)), tmp_path / "wider")
    for model, name in ((tmp_path / "wider", r"mlp\.gate_proj"), (base / "other", r"model\.layers\.0")):
        with pytest.raises(MismatchError, match=f"{name}.*, which .* does not have; give its own model"):
            apply_masks(str(model), base / "masks", tmp_path / "pruned", ApplyOptions(other_weights=True))


def test_a_mask_for_a_linear_the_model_lacks_is_refused(base: Path, tmp_path: Path) -> None:
    document = MaskFile.open(base / "masks").manifest
    keep = torch.ones(3, 5, dtype=torch.bool)
    from trimcli.files.masks import write_masks

    for name, shape in ((UP, (3, 5)), ("model.layers.9.mlp.up_proj", (3, 5))):
        write_masks(tmp_path / "masks", {**document, "linears": {}}, {name: shape}, lambda _: keep, force=True)
        with pytest.raises(MismatchError, match=f"{name}, which .*dense does not have"):
            apply_masks(str(base / "dense"), tmp_path / "masks", tmp_path / "pruned")


def test_masks_alone_do_not_carry_changed_weights(base: Path, tmp_path: Path) -> None:
    masks_for(base / "dense", tmp_path / "masks", sparsity=0.75, changes_weights=True)
    for form in ("dense", "packed"):
        with pytest.raises(MismatchError, match=r"changed the kept weights too.* --save-model"):
            apply_masks(str(base / "dense"), tmp_path / "masks", tmp_path / form, ApplyOptions(format=form))
        assert not (tmp_path / form).exists()


def test_a_model_with_changed_weights_can_be_packed(base: Path, tmp_path: Path) -> None:
    """The directory that prune wrote has the zeros already: its masks pack it."""
    masks_for(base / "dense", tmp_path / "masks", sparsity=0.75, changes_weights=True)
    masks_for(base / "dense", tmp_path / "same", sparsity=0.75)
    apply_masks(str(base / "tuned"), tmp_path / "same", tmp_path / "saved", ApplyOptions(other_weights=True))
    options = ApplyOptions(format="packed")
    packed = apply_masks(str(tmp_path / "saved"), tmp_path / "masks", tmp_path / "packed", options)
    assert packed.sparsity == 0.75
    found, saved = Checkpoint.open(tmp_path / "packed"), Checkpoint.open(tmp_path / "saved")
    assert all(torch.equal(found.load(key), saved.load(key)) for key in sorted(saved.keys()))


def test_a_packed_model_is_a_model(base: Path, tmp_path: Path) -> None:
    """Masks apply to a packed directory as to any."""
    options = ApplyOptions(format="packed")
    apply_masks(str(base / "dense"), base / "masks", tmp_path / "packed", options)
    masks_for(tmp_path / "packed", tmp_path / "masks", sparsity=0.875)
    again = apply_masks(str(tmp_path / "packed"), tmp_path / "masks", tmp_path / "again")
    assert again.sparsity == 0.875
    assert {path.name for path in (tmp_path / "again").glob("*.safetensors")} == {"model.safetensors"}


def test_the_commands_that_led_here_are_kept(base: Path, tmp_path: Path) -> None:
    commands = ["trim calibrate m -o c", "trim prune m -o masks"]
    masks_for(base / "dense", tmp_path / "masks", commands=commands)
    token = COMMAND_LINE.set("trim apply-masks m masks -o pruned")
    try:
        apply_masks(str(base / "dense"), tmp_path / "masks", tmp_path / "pruned")
    finally:
        COMMAND_LINE.reset(token)
    document = json.loads((tmp_path / "pruned" / MARK).read_text())
    assert document["commands"] == [*commands, "trim apply-masks m masks -o pruned"]
    assert "\n".join(document["commands"]) in (tmp_path / "pruned" / "README.md").read_text()


def test_not_finite_weights_are_refused(tmp_path: Path) -> None:
    model = random_model(llama_config())
    save(model, tmp_path / "dense")
    masks_for(tmp_path / "dense", tmp_path / "masks")
    model.model.layers[0].mlp.up_proj.weight.data[3, 3] = float("nan")
    save(model, tmp_path / "dense")
    with pytest.raises(InputError, match=f"{UP}.weight .* NaN or infinite"):
        apply_masks(str(tmp_path / "dense"), tmp_path / "masks", tmp_path / "pruned", ApplyOptions(other_weights=True))
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "masks"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"format": "pakced"}, OptionError, "did you mean 'packed'"),
        ({"max_shard_size": "5 apples"}, OptionError, "--max-shard-size '5 apples' is not a size"),
    ],
)
def test_unusable_options(
    base: Path, tmp_path: Path, options: dict[str, str], error: type[TrimError], message: str
) -> None:
    with pytest.raises(error, match=message):
        apply_masks(str(base / "dense"), base / "masks", tmp_path / "pruned", ApplyOptions(**options))  # type: ignore[arg-type]


def test_an_existing_output_is_kept(base: Path, tmp_path: Path) -> None:
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "mine").touch()
    for force in (False, True):
        with pytest.raises(OutputExists):
            apply_masks(str(base / "dense"), base / "masks", tmp_path / "pruned", force=force)
