"""Artifacts that claim what is not so, by accident or on purpose: refused in a sentence."""

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.support.mutations import joined, split
from tests.cli.test_errors import refused
from tests.small_models import llama_config, masks_for, random_model, save
from tests.trim_cli import COMPUTE, save_tokens, trim, trim_json
from trimcli.errors import InputError, MismatchError
from trimcli.files.atomic import MARK
from trimcli.files.cache import Cache
from trimcli.files.calibration import CalibrationFile
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.manifest import CALIBRATION, LAYER_SPARSITY, MASKS, PACKED, PRUNED, RESULTS, sealed
from trimcli.files.masks import MaskFile
from trimcli.files.packed import PackedReader
from trimcli.files.ratios import LayerSparsity
from trimcli.files.tensors import natural

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, `tokens`, `calib`, `ratios.json`, `masks`, `pruned`, `packed`."""
    base = tmp_path_factory.mktemp("hostile")
    save(random_model(llama_config()), base / "model")
    tokens = save_tokens(base / "tokens", vocabulary=64)
    run = ("--cache-dir", base / "cache", *COMPUTE)
    trim_json("calibrate", base / "model", "-o", base / "calib", "--tokens", tokens, *run)
    trim_json("alloc-layers", base / "model", "-o", base / "ratios.json", "--sparsity", 0.5)
    masks_for(base / "model", base / "masks")
    trim_json("apply-masks", base / "model", base / "masks", "-o", base / "pruned")
    trim_json("apply-masks", base / "model", base / "masks", "-o", base / "packed", "--format", "packed")
    return base


def with_manifest(path: Path, target: Path, change: Callable[[dict[str, Any]], object], *, seal: bool = True) -> Path:
    """A copy of a safetensors artifact with its manifest changed, and sealed anew."""
    header, payload = split(path.read_bytes())
    document = json.loads(header["__metadata__"]["manifest"])
    change(document)
    header["__metadata__"]["manifest"] = json.dumps(sealed(document) if seal else document)
    target.write_bytes(joined(header, payload))
    return target


def with_mark(directory: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    shutil.copytree(directory, target)
    document = json.loads((target / MARK).read_text())
    change(document)
    (target / MARK).write_text(json.dumps(sealed(document)))
    return target


# --- later versions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", [CALIBRATION, LAYER_SPARSITY, MASKS, PRUNED, PACKED, RESULTS])
def test_a_later_version_is_said_to_be_one(schema: str, base: Path, tmp_path: Path) -> None:
    later = schema.rpartition("/")[0] + "/2"
    said = f"was made by a later version of trim ({later} where this one reads {schema}); update trim"

    def renew(document: dict[str, Any]) -> None:
        document["schema"] = later

    if schema in (PRUNED, PACKED):
        directory = with_mark(base / ("pruned" if schema == PRUNED else "packed"), tmp_path / "dir", renew)
        lines: list[tuple[object, ...]] = [("verify", directory), ("report", directory, "--format", "md")]
        lines += [("unpack", directory, "-o", tmp_path / "out")] if schema == PACKED else []
    elif schema in (CALIBRATION, MASKS):
        name, out = ("calib" if schema == CALIBRATION else "masks"), tmp_path / "out"
        path = with_manifest(base / name, tmp_path / name, renew)
        prune = ("prune", base / "model", "-o", out, "--sparsity", 0.5, "--calibration", path, *COMPUTE)
        lines = [prune if schema == CALIBRATION else ("apply-masks", base / "model", path, "-o", out)]
    else:
        path = tmp_path / "later.json"
        path.write_text(json.dumps({**json.loads((base / "ratios.json").read_text()), "schema": later}))
        lines = [("report", path, "--format", "md")]
    for line in lines:
        refused(2, said, *line)
    assert not (tmp_path / "out").exists()


def test_another_kind_is_no_later_version(base: Path) -> None:
    with pytest.raises(MismatchError, match="give the right file"):
        CalibrationFile(base / "masks")


# --- edited by hand --------------------------------------------------------------------------------------


def test_a_calibration_edited_by_hand_is_told(base: Path, tmp_path: Path) -> None:
    path = with_manifest(base / "calib", tmp_path / "calib", lambda found: found.update(bos="each"), seal=False)
    with pytest.raises(InputError, match="was changed after trim wrote it; calibrate again"):
        CalibrationFile(path)
    without = with_manifest(base / "calib", tmp_path / "old", lambda found: found.pop("manifest_sha256"), seal=False)
    assert CalibrationFile(without).nsamples == 4  # as earlier versions wrote them


# --- manifests that lie ----------------------------------------------------------------------------------

LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "shape has 1 values, not 2": lambda found: found["linears"][UP].update(shape=[3]),
    "it lacks linears": lambda found: found.pop("linears"),
    "zeros is -1": lambda found: found["linears"][UP].update(zeros=-1),
    "options.recipe is 3": lambda found: found["options"].update(recipe=3),
    "commands is 'trim', not a list": lambda found: found.update(commands="trim"),
    "command_line is ['trim'], not text": lambda found: found.update(command_line=["trim"]),
    "allocation.method is [1]": lambda found: found.update(allocation={"method": [1]}),
}


@pytest.mark.parametrize("said", LIES)
def test_masks_whose_manifest_lies(said: str, base: Path, tmp_path: Path) -> None:
    path = with_manifest(base / "masks", tmp_path / "masks", LIES[said])
    done = refused(2, "is not a whole masks file", "apply-masks", base / "model", path, "-o", tmp_path / "out")
    assert said in done.err


def test_masks_that_say_another_number_of_zeros(base: Path, tmp_path: Path) -> None:
    def lie(found: dict[str, Any]) -> None:
        found["linears"][UP]["zeros"] += 1

    path = with_manifest(base / "masks", tmp_path / "masks", lie)
    for form in ("dense", "packed"):
        line = ("apply-masks", base / "model", path, "-o", tmp_path / "out", "--format", form)
        refused(2, f"the mask of {UP} in {path} was altered", *line)


def test_masks_of_another_dtype(base: Path, tmp_path: Path) -> None:
    header, payload = split((base / "masks").read_bytes())
    header[f"{UP}.keep"]["dtype"] = "F8_E4M3"
    (tmp_path / "masks").write_bytes(joined(header, payload))
    with pytest.raises(InputError, match=f"lacks the mask of {UP}"):
        MaskFile.open(tmp_path / "masks")
    done = trim("verify", tmp_path / "masks")
    assert (done.status, "the file holds no mask of shape" in done.err) == (1, True)


PACKS: dict[str, Callable[[dict[str, Any]], object]] = {
    "dtype is 'load', not a dtype": lambda found: entry(found).update(dtype="load"),
    "it lacks packed.tensors": lambda found: found["packed"].pop("tensors"),
    "lacks model.layers.0.mlp.up_proj.weight": lambda found: entry(found).update(shape=[40, 2**30]),
    "lists no tensor for model.layers.0.mlp.up_proj": lambda found: found["linears"][UP].update(key="x"),
    "which is no shard": lambda found: found["packed"]["shards"].update(
        dict.fromkeys(found["packed"]["shards"], "config.json")
    ),
}  # fmt: skip


def entry(document: dict[str, Any]) -> Any:
    return document["packed"]["tensors"][f"{UP}.weight"]


@pytest.mark.parametrize("said", PACKS)
def test_packed_directories_that_lie(said: str, base: Path, tmp_path: Path) -> None:
    directory = with_mark(base / "packed", tmp_path / "packed", PACKS[said])
    with pytest.raises(InputError) as raised:
        PackedReader(directory)
    assert said in str(raised.value)
    refused(2, said, "unpack", directory, "-o", tmp_path / "out")


def test_keep_bits_of_another_dtype(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "packed", tmp_path / "packed")
    [shard] = (tmp_path / "packed").glob("*.safetensors")
    header, payload = split(shard.read_bytes())
    header[f"{UP}.weight.keep"]["dtype"] = "I8"
    shard.write_bytes(joined(header, payload))
    refused(2, f"lacks {UP}.weight", "verify", tmp_path / "packed")


def test_calibration_without_its_tensors(base: Path, tmp_path: Path) -> None:
    found = load_file(base / "calib")
    with safe_open(base / "calib", "pt") as handle:
        metadata = handle.metadata()
    stored = CalibrationFile(base / "calib").manifest["shares"][UP]
    for name, other in ((f"{stored}.sqnorm", torch.ones(32, 2)), (f"{stored}.inputs", None)):
        tensors = {key: tensor for key, tensor in found.items() if key != name}
        save_file(tensors | ({} if other is None else {name: other}), tmp_path / "calib", metadata=metadata)
        with pytest.raises(InputError, match=f"holds no whole (norms|inputs) of {UP}"):
            CalibrationFile(tmp_path / "calib").statistics(UP, 32)
    with pytest.raises(InputError, match="holds no whole norms"):
        CalibrationFile(base / "calib").statistics(UP, 33)
    for tokens in (None, torch.zeros(4), torch.zeros(0, 3, dtype=torch.int32)):
        rest = {key: tensor for key, tensor in found.items() if key != "tokens"}
        save_file(rest | ({} if tokens is None else {"tokens": tokens}), tmp_path / "calib", metadata=metadata)
        with pytest.raises(InputError, match="holds no samples of tokens"):
            CalibrationFile(tmp_path / "calib")


def test_calibration_with_nan_reaches_no_ratios(base: Path, tmp_path: Path) -> None:
    found = load_file(base / "calib")
    with safe_open(base / "calib", "pt") as handle:
        metadata = handle.metadata()
    stored = CalibrationFile(base / "calib").manifest["shares"][UP]
    found[f"{stored}.sqnorm"][3] = torch.nan
    save_file(found, tmp_path / "calib", metadata=metadata)
    line = ("--sparsity", 0.5, "--calibration", tmp_path / "calib", *COMPUTE)
    owl = ("alloc-layers", base / "model", "-o", tmp_path / "out", "--method", "owl", *line)
    refused(2, "hold NaN or infinite values", *owl)
    refused(2, "hold NaN", "prune", base / "model", "-o", tmp_path / "out", "--no-propagate", *line)


def test_ratios_whose_commands_are_none(base: Path, tmp_path: Path) -> None:
    document = json.loads((base / "ratios.json").read_text())
    (tmp_path / "ratios.json").write_text(json.dumps({**document, "command_line": ["trim"]}))
    with pytest.raises(InputError, match=r"command_line is \['trim'\], not text"):
        LayerSparsity.load(tmp_path / "ratios.json")


def test_names_with_thousands_of_digits_are_sorted() -> None:
    names = ["a." + "9" * 5000, "a.10", "a.2", "a.b", "a.010", "a.²"]
    assert sorted(names, key=natural)[:3] == ["a.2", "a.10", "a.010"]
    assert sorted(names, key=natural)[3] == names[0]


# --- model directories -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "additional_chat_templates"])
def test_a_link_out_of_the_directory_is_refused(name: str, base: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(base / "model", tmp_path / "model"))
    secret = tmp_path / "secret"
    if name == "additional_chat_templates":
        secret.mkdir()
        (secret / "a.jinja").write_text("secret")
    else:
        shutil.move(model / name, secret)
    (model / name).symlink_to(secret)
    line = ("apply-masks", model, base / "masks", "-o", tmp_path / "out", "--other-weights")
    refused(2, "is a link out of the model directory", *line)
    assert not (tmp_path / "out").exists()


def test_links_inside_and_into_the_hub_cache_are_followed(base: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--org--name"
    snapshot = home / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for number, path in enumerate((base / "model").iterdir()):
        shutil.copy(path, home / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert Checkpoint.open(snapshot).keys() == Checkpoint.open(base / "model").keys()
    (tmp_path / "linked").symlink_to(snapshot)
    assert Checkpoint.open(tmp_path / "linked").keys()


def bin_of(base: Path, folder: Path, found: Any) -> Path:
    folder.mkdir()
    shutil.copy(base / "model" / "config.json", folder)
    torch.save(found, folder / "pytorch_model.bin")
    return folder


def test_a_pickled_tensor_that_claims_more_than_its_file(base: Path, tmp_path: Path) -> None:
    model = bin_of(base, tmp_path / "model", {"a": torch.zeros(1).expand(100_000, 100_000)})
    with pytest.raises(InputError, match="a is no plain tensor, or claims more than the file holds"):
        Checkpoint.open(model)
    with pytest.raises(InputError, match="holds a list, not tensors by name"):
        Checkpoint.open(bin_of(base, tmp_path / "list", [torch.zeros(1)]))
    with pytest.raises(InputError, match="is no plain tensor"):
        Checkpoint.open(bin_of(base, tmp_path / "sparse", {"a": torch.zeros(2, 2).to_sparse()}))


def test_a_compressed_pickled_file(base: Path, tmp_path: Path) -> None:
    path = bin_of(base, tmp_path / "model", {"a": torch.zeros(10_000)}) / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    with pytest.raises(InputError, match="its parts are compressed"):
        Checkpoint.open(path.parent)


class Harmful:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harm"),))


def test_nothing_is_unpickled(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = bin_of(base, tmp_path / "model", {"a": torch.zeros(1)})
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(InputError, match="cannot be read as a plain weights file"):
        Checkpoint.open(model)
    assert not (tmp_path / "harm").exists()


# --- the cache -------------------------------------------------------------------------------------------


def test_clearing_takes_what_is_the_caches_alone(tmp_path: Path) -> None:
    for name in ("Documents/letter.txt", "parts/mine/notes", "ratios/0123.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    own = Cache(tmp_path).file("ratios", "a", ".json")
    own.write_text("{}")
    assert trim_json("cache", "--clear", "--cache-dir", tmp_path)["freed"] == 2
    assert not own.exists()
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"Documents/letter.txt", "parts/mine/notes", "ratios/0123.json"}


@pytest.mark.parametrize("damage", ["cut", "facts", "a value"])
def test_a_damaged_part_is_made_anew(damage: str, tmp_path: Path) -> None:
    with Cache(tmp_path).parts("key") as parts:
        for index in range(2):
            parts.write(index, {"a": torch.arange(8.0)}, {"rows": {}, "remarks": []})
        assert parts.finished() == 2
        path = parts.directory / "layer-00001.safetensors"
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-4])
    elif damage == "facts":
        path.write_bytes(data.replace(b"remarks", b"remarkx"))
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with Cache(tmp_path).parts("key") as parts:
        assert parts.finished() == 1
        parts.write(1, {"a": torch.arange(8.0)}, {"rows": {}, "remarks": []})
        assert parts.finished() == 2
    assert path.read_bytes() == data


def test_a_packed_directory_that_leaves_out_what_may_be_absent(base: Path, tmp_path: Path) -> None:
    """A tensor stored as it is needs no `kept`, a matrix no target, pattern or count of what its mask took."""

    def shorten(found: dict[str, Any]) -> None:
        for one in found["packed"]["tensors"].values():
            if one["kept"] is None:
                del one["kept"]
        for one in found["linears"].values():
            for name in ("target", "pattern", "pruned"):
                one.pop(name, None)

    directory = with_mark(base / "packed", tmp_path / "packed", shorten)
    assert trim("verify", directory).status == 0
    assert trim("unpack", directory, "-o", tmp_path / "out").status == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (base / "pruned" / "model.safetensors").read_bytes()


TRAINED = {"phase": "one", "steps": 2, "tokens": 64, "loss": [[1, 2.0]], "heldout": [[0, 3.0], [2, 2.5]], "best": 2}
TRAININGS: dict[str, tuple[Any, str | None]] = {
    "whole": ({"mode": "full", "phases": [TRAINED]}, None),
    "of no phase": ({"mode": "full", "phases": []}, None),
    "whose best was not measured": ({"mode": "full", "phases": [{**TRAINED, "best": 7}]}, None),
    "without phases": ({"mode": "full"}, "it lacks training.phases"),
    "of another kind": ("long", "training is 'long', not an object"),
}


@pytest.mark.parametrize("case", TRAININGS)
def test_what_a_packed_directory_says_of_its_training(case: str, base: Path, tmp_path: Path) -> None:
    training, said = TRAININGS[case]
    directory = with_mark(base / "packed", tmp_path / "packed", lambda found: found.update(training=training))
    line = ("unpack", directory, "-o", tmp_path / "out")
    if said is not None:
        refused(2, said, *line)
        return
    assert trim(*line).status == 0
    assert ("Fine-tuned (full)" in (tmp_path / "out" / "README.md").read_text()) is (case == "whole")
