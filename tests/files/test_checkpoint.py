"""Model directories in every storage form, tensor by tensor."""

import fnmatch
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.small_models import llama_config, random_model, save
from trimcli.errors import HubError, InputError
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.tensors import natural


def to_bin(source: Path, target: Path, *, shards: int = 1, **saving: object) -> Path:
    """The safetensors model of `source` as pytorch_model.bin, in `shards` files with an index if more than one."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    (target / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, target / "pytorch_model.bin", **saving)  # type: ignore[arg-type]
        return target
    weight_map = {}
    for number in range(shards):
        name = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = dict(list(tensors.items())[number::shards])
        torch.save(part, target / name)
        weight_map.update(dict.fromkeys(part, name))
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return target


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in one safetensors file, bfloat16."""
    model = random_model(llama_config(), dtype=torch.bfloat16)
    return save(model, tmp_path_factory.mktemp("checkpoint") / "single")


@pytest.fixture
def tensors(single: Path) -> dict[str, Tensor]:
    return dict(load_file(single / "model.safetensors"))


def sharded(single: Path, target: Path) -> Path:
    return save(random_model(llama_config(), dtype=torch.bfloat16), target, max_shard_size="20KB")


FORMS: dict[str, Callable[[Path, Path], Path]] = {
    "single safetensors": lambda single, target: single,
    "sharded safetensors": sharded,
    "single bin": to_bin,
    "sharded bin": lambda single, target: to_bin(single, target, shards=3),
    # What torch.save wrote before 1.6, as the oldest models on the hub still are.
    "legacy bin": lambda single, target: to_bin(single, target, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_tensors(form: str, single: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(FORMS[form](single, tmp_path / "model"))
    assert sorted(checkpoint.keys()) == sorted(tensors)
    for key, expected in tensors.items():
        assert checkpoint.spec(key).dtype == torch.bfloat16
        assert checkpoint.spec(key).shape == tuple(expected.shape)
        assert torch.equal(checkpoint.load(key), expected)
    shards = checkpoint.shards()
    assert sorted(key for keys in shards.values() for key in keys) == sorted(tensors)
    assert all((checkpoint.directory / name).is_file() for name in shards)
    assert (len(shards) > 1) == ("sharded" in form)


def test_keys_are_in_natural_order(single: Path) -> None:
    assert sorted(["layers.10.x", "layers.2.x", "embed"], key=natural) == ["embed", "layers.2.x", "layers.10.x"]
    keys = Checkpoint.open(single).keys()
    assert keys == sorted(keys, key=natural)


def test_the_config_is_read_raw(single: Path) -> None:
    assert Checkpoint.open(single).config_document == json.loads((single / "config.json").read_text())


def test_small_files_are_all_that_is_not_weights(single: Path, tmp_path: Path) -> None:
    model = sharded(single, tmp_path / "model")
    (model / "pytorch_model.bin").touch()
    (model / ".cache").touch()
    (model / "README.md").write_text("# Model\n")
    (model / "original").mkdir()
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").touch()
    names = [str(path.relative_to(model)) for path in Checkpoint.open(model).small_files()]
    beside = ["README.md", "config.json", "generation_config.json", "merges.txt", "tokenizer.json"]
    assert names == [*beside, "additional_chat_templates/tools.jinja"]


def test_a_config_is_enough_where_no_weights_are_needed(single: Path, tmp_path: Path) -> None:
    shutil.copy(single / "config.json", tmp_path)
    checkpoint = Checkpoint.open(tmp_path, weights=False)
    assert not checkpoint.has_weights
    with pytest.raises(InputError, match="without its weights"):
        checkpoint.keys()
    with pytest.raises(InputError, match="no weights"):
        Checkpoint.open(tmp_path)


def damaged_index(model: Path, weight_map: object) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda model: (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-100]),
        r"model\.safetensors is not a whole safetensors file",
    ),
    "no config": (lambda model: (model / "config.json").unlink(), r"has no config\.json"),
    "config of no JSON": (lambda model: (model / "config.json").write_text("{"), r"config\.json is not a readable"),
    "a shard missing": (lambda model: damaged_index(model, {"a": "model-1.safetensors"}), r"model-1\S+ is missing"),
    "a shard outside": (lambda model: damaged_index(model, {"a": "../x.safetensors"}), "outside the model dir"),
    "a shard outside for Windows": (
        lambda model: damaged_index(model, {"a": "..\\x.safetensors"}),
        "outside the model",
    ),
    "a directory for a shard": (lambda model: damaged_index(model, {"a": ".."}), r"index.json names the shard '\.\.'"),
    "a shard of no name": (lambda model: damaged_index(model, {"a": 5}), "index.json names the shard 5 outside"),
    "an empty index": (lambda model: damaged_index(model, {}), "has no weight_map"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage: str, single: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(single, tmp_path / "model"))
    harm, message = DAMAGE[damage]
    harm(model)
    with pytest.raises(InputError, match=message):
        Checkpoint.open(model)


def test_a_bin_file_that_would_run_code_is_refused(single: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path(tmp_path / "ran").touch, ())

    model = to_bin(single, tmp_path / "model")
    torch.save({"weight": Evil()}, model / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read as a plain weights file"):
        Checkpoint.open(model)
    assert not (tmp_path / "ran").exists()


def test_a_dtype_that_torch_lacks_is_named_where_it_is_needed(single: Path, tmp_path: Path) -> None:
    shutil.copy(single / "config.json", tmp_path)
    header = json.dumps({"odd": {"dtype": "F6_E2M3", "shape": [4, 4], "data_offsets": [0, 12]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.keys() == ["odd"]
    assert checkpoint.nbytes == 0
    with pytest.raises(InputError, match="holds odd as F6_E2M3"):
        checkpoint.spec("odd")


def test_no_such_model(tmp_path: Path) -> None:
    for missing in (tmp_path / "missing", Path("./missing"), Path("a/b/c")):
        with pytest.raises(InputError, match="there is no model directory"):
            Checkpoint.open(missing)
    with pytest.raises(InputError, match="no model directory missing"):
        Checkpoint.open("missing")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file, not a model directory"):
        Checkpoint.open(tmp_path / "file")


def test_of_two_forms_transformers_own_choice_is_read(single: Path, tmp_path: Path) -> None:
    """A directory may hold what is left of an earlier save."""
    model = sharded(single, tmp_path / "model")
    other = save(random_model(llama_config(), dtype=torch.bfloat16, seed=1), tmp_path / "other")
    shutil.copy(other / "model.safetensors", model)
    checkpoint = Checkpoint.open(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto").state_dict()
    assert all(torch.equal(checkpoint.load(key), loaded[key]) for key in sorted(checkpoint.keys()))


class FakeHub:
    """Stands for huggingface_hub.snapshot_download: copies what the patterns name, or fails."""

    def __init__(self, source: Path, target: Path, problem: Exception | None = None) -> None:
        self.source, self.target, self.problem = source, target, problem
        self.asked: list[tuple[str, str | None]] = []

    def __call__(
        self, model: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str] | None
    ) -> str:
        self.asked.append((model, revision))
        if self.problem:
            raise self.problem
        self.target.mkdir(exist_ok=True)
        for path in self.source.rglob("*"):
            name = str(path.relative_to(self.source))
            wanted = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            unwanted = any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns or [])
            if path.is_file() and wanted and not unwanted:
                (self.target / name).parent.mkdir(exist_ok=True)
                shutil.copy(path, self.target / name)
        return str(self.target)


@pytest.mark.parametrize("form", ["single safetensors", "sharded bin"])
def test_a_hub_model_is_fetched_without_other_formats(
    form: str, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(FORMS[form](single, tmp_path / "made"), tmp_path / "source"))
    (source / "onnx").mkdir()
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    for other in ("onnx/model.safetensors", "consolidated.safetensors", "consolidated.00.pth", "model.gguf"):
        (source / other).write_bytes(b"large")
    hub = FakeHub(source, tmp_path / "snapshot")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    checkpoint = Checkpoint.open("Somebody/model", revision="v1")
    assert checkpoint.id == "Somebody/model"
    assert set(hub.asked) == {("Somebody/model", "v1")}
    assert not {"onnx", "consolidated.safetensors", "consolidated.00.pth", "model.gguf"} & {
        path.name for path in checkpoint.directory.iterdir()
    }
    assert sorted(checkpoint.keys()) == sorted(load_file(single / "model.safetensors"))
    assert (checkpoint.directory / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
    shutil.rmtree(tmp_path / "snapshot")
    assert not Checkpoint.open("Somebody/model", weights=False).has_weights
    assert [path.name for path in (tmp_path / "snapshot").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("problem", "kind", "message"),
    [
        (errors.GatedRepoError, InputError, "is gated; accept its licence and set HF_TOKEN"),
        (errors.RepositoryNotFoundError, InputError, "the hub has no such model; check the spelling"),
        (errors.RevisionNotFoundError, InputError, "has no revision 'v1'; check --revision"),
        (errors.LocalEntryNotFoundError, HubError, "the model hub cannot be reached for it"),
        (ConnectionError, HubError, r"cannot be reached for it \(ConnectionError\)"),
    ],
)
def test_what_the_hub_says_is_passed_on(
    problem: type[Exception],
    kind: type[Exception],
    message: str,
    single: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = problem in (errors.GatedRepoError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
    made = problem("no", **({"response": SimpleNamespace(headers={}, request=None)} if answers else {}))
    monkeypatch.setattr("huggingface_hub.snapshot_download", FakeHub(single, tmp_path, made))
    with pytest.raises(kind, match=message):
        Checkpoint.open("Somebody/model", revision="v1")


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"there is no model directory Nobody/nothing.* cannot be reached"):
        Checkpoint.open("Nobody/nothing")
