"""The calibrate stage: the file it writes, and how it goes on after an interruption."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.interrupt import InterruptAt, Interrupted
from tests.small_models import add_uncalled_linears, gpt2_config, llama_config, random_model, save, skeleton_of
from tests.trim_cli import COMPUTE, save_tokens, tree, trim, trim_json
from trimcli import CalibrateOptions, calibrate
from trimcli.demo import write_texts
from trimcli.errors import InputError, MismatchError, OptionError, OutputExists
from trimcli.files.calibration import CalibrationFile
from trimcli.files.tensors import read_manifest
from trimcli.methods.stats import INPUTS, SQNORM, STATISTICS
from trimcli.pipeline.collector import Collector
from trimcli.pipeline.walk import Walk

Q, K, O = (f"model.layers.0.self_attn.{name}_proj" for name in "qko")  # noqa: E741


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, its `tokens.safetensors`, and `calib` made from them."""
    base = tmp_path_factory.mktemp("calibrate")
    save(random_model(llama_config()), base / "model")
    save_tokens(base / "tokens.safetensors", vocabulary=64, nsamples=5)
    calibrate(str(base / "model"), base / "calib", options_for(base))
    return base


def options_for(base: Path) -> CalibrateOptions:
    return CalibrateOptions(
        tokens=base / "tokens.safetensors", device="cpu", dtype="float32", cache_dir=base / "cache", batch_size=2
    )


def test_the_file_holds_tokens_and_statistics(base: Path) -> None:
    found = CalibrationFile(base / "calib")
    tokens = load_file(base / "tokens.safetensors")["tokens"]
    assert found.tokens.dtype == torch.int32
    assert torch.equal(found.tokens, tokens)
    skeleton = skeleton_of(base / "model")
    walk = Walk(skeleton, tokens, batch_size=2)
    for layer in walk.layers():
        collector = Collector(walk.groups(layer), frozenset(STATISTICS), 5, 16, skeleton.device)
        walk.advance(layer, collector)
        for name, expected in collector.by_linear().items():
            stats = found.statistics(name)
            assert set(stats.tensors) == {"sqnorm", "inputs"}
            assert torch.equal(stats.sqnorm, expected[SQNORM])
            assert torch.equal(stats.inputs, expected[INPUTS])


def test_linears_that_share_an_input_share_the_tensor(base: Path) -> None:
    with safe_open(base / "calib", "pt") as handle:
        names = set(handle.keys())
    assert {f"{Q}.sqnorm", f"{Q}.inputs", f"{O}.sqnorm", "tokens"} <= names
    assert f"{K}.sqnorm" not in names
    assert CalibrationFile(base / "calib").manifest["shares"][K] == Q


def test_the_manifest_says_where_it_comes_from(base: Path) -> None:
    manifest = read_manifest(base / "calib", "trim.calibration/1")
    assert manifest["model"] == skeleton_of(base / "model").fingerprint.document()
    assert manifest["sources"]["tokens"]["path"] == str(base / "tokens.safetensors")
    assert (manifest["nsamples"], manifest["seqlen"], manifest["stats"]) == (5, 16, ["norms", "inputs"])
    assert manifest["compute_dtype"] == "float32"
    assert manifest["options"]["batch_size"] == 2
    assert "cache_dir" not in manifest["options"]


def test_the_batch_size_hardly_changes_the_statistics(base: Path, tmp_path: Path) -> None:
    calibrate(str(base / "model"), tmp_path / "calib", replace(options_for(base), batch_size=5))
    one, other = load_file(base / "calib"), load_file(tmp_path / "calib")
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stats", [("norms",), ("inputs",), ()])
def test_only_the_statistics_asked_for(stats: tuple[str, ...], base: Path, tmp_path: Path) -> None:
    summary = calibrate(str(base / "model"), tmp_path / "calib", replace(options_for(base), stats=stats))
    found = CalibrationFile(tmp_path / "calib")
    assert summary.stats == stats
    suffixes = {key.rpartition(".")[2] for key in load_file(tmp_path / "calib")}
    assert suffixes == {"tokens", *{"norms": ["sqnorm"], "inputs": ["inputs"]}.get("".join(stats), [])}
    other, asked = {"norms": (INPUTS, "inputs"), "inputs": (SQNORM, "norms")}.get("".join(stats), (SQNORM, "norms"))
    with pytest.raises(InputError, match=f"calibrate again with --stats including {asked}"):
        found.require(frozenset({other.name}))
    found.require(frozenset(STATISTICS[name].name for name in suffixes - {"tokens"}))


def test_text_is_drawn_with_the_seed(nano_qwen2: Path, tmp_path: Path) -> None:
    text = write_texts(tmp_path).calibration
    options = CalibrateOptions(
        dataset=str(text), nsamples=3, seqlen=20, stats=(), device="cpu", dtype="float32", cache_dir=tmp_path / "cache"
    )
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        calibrate(str(nano_qwen2), tmp_path / name, replace(options, seed=seed))
    a, b, c = (CalibrationFile(tmp_path / name).tokens for name in "abc")
    assert a.shape == (3, 20)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_an_interrupted_run_goes_on(base: Path, tmp_path: Path) -> None:
    options = replace(options_for(base), cache_dir=tmp_path / "cache")
    interrupt = InterruptAt("layer 2/2")
    with pytest.raises(Interrupted):
        calibrate(str(base / "model"), tmp_path / "calib", options, progress=interrupt)
    assert not (tmp_path / "calib").exists()
    assert [path for path in tree(tmp_path / "cache") if path.endswith("layer-00000.safetensors")]
    record = InterruptAt(None)
    calibrate(str(base / "model"), tmp_path / "calib", options, progress=record)
    assert "layer 1/2 forward" in record.seen
    assert "layer 1/2 collect" not in record.seen
    assert "layer 2/2 collect" in record.seen
    one, other = load_file(base / "calib"), load_file(tmp_path / "calib")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [path for path in tree(tmp_path / "cache") if "parts/" in path] == []


def test_values_that_cannot_be_used(base: Path, tmp_path: Path) -> None:
    for fields, message in (
        ({"stats": ("norm",)}, "--stats 'norm' is none of norms, inputs; did you mean 'norms'"),
        ({"nsamples": 0}, "--nsamples 0 must be at least 1"),
        ({"batch_size": 0}, "--batch-size 0 must be at least 1"),
        ({"seqlen": 1}, "--seqlen 1 must be at least 2"),
    ):
        with pytest.raises(OptionError, match=message):
            calibrate(str(base / "model"), tmp_path / "calib", CalibrateOptions(**fields))
    assert list(tmp_path.iterdir()) == []


def test_only_and_skip(base: Path, tmp_path: Path) -> None:
    model, options = str(base / "model"), options_for(base)
    whole = CalibrationFile(base / "calib")
    summary = calibrate(
        model, tmp_path / "some", replace(options, only=("*.layers.1.*", "*.q_proj", "*.k_proj"), skip=("*.1.mlp.*",))
    )
    expected = [f"model.layers.1.self_attn.{one}_proj" for one in "qkvo"] + [Q, K]
    found = CalibrationFile(tmp_path / "some")
    assert summary.linears == len(expected)
    assert set(found.manifest["shares"]) == set(expected)
    for name in expected:
        for one in (SQNORM, INPUTS):
            assert torch.equal(found.statistics(name)[one], whole.statistics(name)[one])
    for name in (O, "model.layers.1.mlp.up_proj"):
        with pytest.raises(InputError, match=f"holds no statistics of {name}"):
            found.statistics(name)
    with pytest.raises(OptionError, match=r"nothing matches: of 14 linears \(such as model\.layers\.0\.self_attn"):
        calibrate(model, tmp_path / "none", replace(options, only=("*.attn.*",)))
    with pytest.warns(UserWarning, match=r"--skip '\*\.attn\.\*' matches none of the 14 linears"):
        calibrate(model, tmp_path / "all", replace(options, skip=("*.attn.*",)))
    assert sorted(load_file(tmp_path / "all")) == sorted(load_file(base / "calib"))


def test_a_run_with_other_linears_does_not_take_over(base: Path, tmp_path: Path) -> None:
    options = replace(options_for(base), cache_dir=tmp_path / "cache")
    with pytest.raises(Interrupted):
        calibrate(str(base / "model"), tmp_path / "calib", options, progress=InterruptAt("layer 2/2"))
    record = InterruptAt(None)
    calibrate(str(base / "model"), tmp_path / "calib", replace(options, skip=("*.q_proj",)), progress=record)
    assert "layer 1/2 collect" in record.seen
    assert Q not in CalibrationFile(tmp_path / "calib").manifest["shares"]


def test_a_linear_that_its_layer_never_calls_can_be_skipped(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = set(skeleton_of(base / "model").linears)
    add_uncalled_linears(monkeypatch)
    model = save(random_model(llama_config()), tmp_path / "model")
    spare = "model.layers.0.mlp.spare"
    assert spare in skeleton_of(model).linears
    run = ("--tokens", base / "tokens.safetensors", "--cache-dir", tmp_path / "cache", *COMPUTE)
    done = trim("calibrate", model, "-o", tmp_path / "calib", *run)
    assert (done.status, done.out) == (1, "")
    assert done.err == f"trim: {spare} is never called by its layer, so it has no inputs; name it in --skip.\n"
    assert not (tmp_path / "calib").exists()
    for globs in (("--skip", "*.spare"), ("--only", "*.self_attn.*", "--only", "*_proj")):
        made = trim_json("calibrate", model, "-o", tmp_path / "calib", *globs, *run, "--force")
        assert made["linears"] == 14
        found = CalibrationFile(tmp_path / "calib")
        assert set(found.manifest["shares"]) == called
        with pytest.raises(InputError, match=f"holds no statistics of {spare}"):
            found.statistics(spare)
    # Tokens alone need no linear to be called.
    trim_json("calibrate", model, "-o", tmp_path / "tokens", "--stats", "", *run)


def test_an_existing_file_stays_without_force(base: Path) -> None:
    before = (base / "calib").read_bytes()
    with pytest.raises(OutputExists, match="give --force to replace it"):
        calibrate(str(base / "model"), base / "calib", options_for(base))
    assert (base / "calib").read_bytes() == before


def test_the_file_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    found = CalibrationFile(base / "calib")
    found.check(skeleton_of(base / "model").fingerprint)
    save(random_model(llama_config(), seed=1), tmp_path / "tuned")
    save(random_model(gpt2_config()), tmp_path / "other")
    with pytest.raises(MismatchError, match="other weights of this structure"):
        found.check(skeleton_of(tmp_path / "tuned").fingerprint)
    with pytest.raises(MismatchError, match=r"made for the model .*model.* not for .*other"):
        found.check(skeleton_of(tmp_path / "other").fingerprint)
    with pytest.raises(InputError, match=r"holds no statistics of transformer\.h\.0"):
        found.statistics("transformer.h.0.attn.c_attn")


def test_a_file_of_another_kind_is_refused(base: Path) -> None:
    with pytest.raises(MismatchError, match="carries no trim manifest"):
        CalibrationFile(base / "tokens.safetensors")
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        CalibrationFile(base / "model" / "config.json")
