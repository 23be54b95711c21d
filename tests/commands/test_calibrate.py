"""The calibrate stage: the file it writes, and how it goes on after an interruption."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.interrupt import InterruptAt, Interrupted
from tests.small_models import gpt2_config, llama_config, random_model, save, skeleton_of
from tests.trim_cli import save_tokens, tree
from trimcli import CalibrateOptions, calibrate
from trimcli.demo import write_texts
from trimcli.errors import InputError, MismatchError, OptionError, OutputExists
from trimcli.files.calibration import CalibrationFile
from trimcli.files.tensors import read_manifest
from trimcli.methods.scores import Statistic
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
        collector = Collector(walk.groups(layer), frozenset(Statistic), 5, 16, skeleton.device)
        walk.advance(layer, collector)
        for name, expected in collector.by_linear().items():
            stats = found.statistics(name)
            assert stats.sqnorm is not None
            assert stats.inputs is not None
            assert torch.equal(stats.sqnorm, expected[Statistic.SQNORM])
            assert torch.equal(stats.inputs, expected[Statistic.INPUTS])


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
    other = {"norms": Statistic.INPUTS, "inputs": Statistic.SQNORM}.get("".join(stats), Statistic.SQNORM)
    with pytest.raises(InputError, match="calibrate again with --stats including"):
        found.require(frozenset({other}))


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
