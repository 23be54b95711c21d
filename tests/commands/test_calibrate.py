"""The calibrate stage: the file it writes, and how it goes on after an interruption."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.interrupt import InterruptAt, Interrupted
from tests.small_models import add_uncalled_linears, gpt2_config, llama_config, random_model, save, skeleton_of
from tests.small_tokenizers import put_bos
from tests.trim_cli import COMPUTE, save_tokens, tree, trim, trim_json
from trimcli import CalibrateOptions, calibrate
from trimcli.demo import write_texts
from trimcli.errors import InputError, MismatchError, OptionError, OutputExists
from trimcli.files.calibration import CalibrationFile
from trimcli.files.tensors import read_manifest
from trimcli.methods.stats import INPUTS, SQNORM, STATISTICS, stored_statistics
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
        needs = frozenset(one.name for one in stored_statistics().values())
        collector = Collector(walk.groups(layer), needs, 5, 16, skeleton.device)
        walk.advance(layer, collector)
        for name, expected in collector.by_linear().items():
            stats = found.statistics(name, skeleton.linears[name].d_in)
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
    assert manifest["bos"] is None  # the samples were given
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
        ({"bos": "all"}, "--bos 'all' is none of auto, each, once, none"),
        ({"tokens": Path("t"), "bos": "each"}, "--bos with --tokens: they are samples already"),
        ({"tokens": Path("t"), "pack": True}, "--pack with --tokens"),
        ({"tokens": Path("t"), "chat": True}, "--chat with --tokens"),
        ({"tokens": Path("t"), "self_share": 0.5}, "--self-share with --tokens"),
        ({"images": Path("t"), "self_share": 0.5}, "--self-share with --images"),
        ({"self_share": 0.1, "nsamples": 4}, "--self-share 0.1 of --nsamples 4 is not one sample"),
        ({"tokens": Path("-"), "dataset": "-"}, "- is named twice"),
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
            assert torch.equal(found.statistics(name, 32)[one], whole.statistics(name, 32)[one])
    for name in (O, "model.layers.1.mlp.up_proj"):
        with pytest.raises(InputError, match=f"holds no statistics of {name}"):
            found.statistics(name, 32)
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
    what = f"trim: {spare} is never called by its layer, so it has no inputs"
    assert done.err == f"{what}; leave it dense with --skip '*.mlp.spare'.\n"
    assert not (tmp_path / "calib").exists()
    for globs in (("--skip", "*.spare"), ("--only", "*.self_attn.*", "--only", "*_proj")):
        made = trim_json("calibrate", model, "-o", tmp_path / "calib", *globs, *run, "--force")
        assert made["linears"] == 14
        found = CalibrationFile(tmp_path / "calib")
        assert set(found.manifest["shares"]) == called
        with pytest.raises(InputError, match=f"holds no statistics of {spare}"):
            found.statistics(spare, 32)
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
        found.statistics("transformer.h.0.attn.c_attn", 32)


def test_a_file_of_another_kind_is_refused(base: Path) -> None:
    with pytest.raises(MismatchError, match="carries no trim manifest"):
        CalibrationFile(base / "tokens.safetensors")
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        CalibrationFile(base / "model" / "config.json")


# --- texts as models were trained on them ----------------------------------------------------------------

DRAWN = ("--nsamples", 4, "--seqlen", 20, *COMPUTE)


@pytest.fixture
def with_bos(model_copy: Path) -> Path:
    """The embedded model with a tokenizer that begins a text with BOS, 0."""
    return put_bos(model_copy)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_texts(tmp_path).calibration


@pytest.mark.parametrize(("bos", "resolved"), [("auto", "each"), ("each", "each"), ("once", "once"), ("none", "none")])
def test_the_file_says_where_bos_stands(bos: str, resolved: str, with_bos: Path, text: Path, tmp_path: Path) -> None:
    trim_json("calibrate", with_bos, "-o", tmp_path / "calib", "--dataset", text, "--stats", "", "--bos", bos, *DRAWN)
    found = CalibrationFile(tmp_path / "calib")
    assert found.manifest["bos"] == resolved
    assert found.tokens.shape == (4, 20)
    assert found.tokens.eq(0).sum(dim=1).tolist() == [int(resolved == "each")] * 4


def test_a_tokenizer_without_bos_keeps_the_published_samples(nano_qwen2: Path, text: Path, tmp_path: Path) -> None:
    for bos in ("auto", "once", "none"):
        trim_json("calibrate", nano_qwen2, "-o", tmp_path / bos, "--dataset", text, "--stats", "", "--bos", bos, *DRAWN)
    auto, once, none = (CalibrationFile(tmp_path / bos) for bos in ("auto", "once", "none"))
    assert [one.manifest["bos"] for one in (auto, once, none)] == ["once", "once", "none"]
    assert torch.equal(auto.tokens, once.tokens)
    assert torch.equal(auto.tokens, none.tokens)


def cached(cache: Path) -> list[CalibrationFile]:
    return [CalibrationFile(path) for path in sorted((cache / "calibration").glob("*.safetensors"))]


def test_reference_numerics_keep_the_published_protocol(with_bos: Path, text: Path, tmp_path: Path) -> None:
    """On the way of a prune, unless it is asked for otherwise; the cache holds one file for each way."""
    drawn = ("--dataset", text, "--sparsity", 0.5, "--cache-dir", tmp_path / "cache", *DRAWN)
    seen: set[Path] = set()
    for more, bos in (
        (("--numerics", "reference"), "once"),
        ((), "each"),
        (("--numerics", "reference", "--bos", "none"), "none"),
        (("--bos", "once"), "once"),
        (("--numerics", "reference", "--bos", "each"), "each"),
    ):
        known = {one.manifest["bos"] for one in cached(tmp_path / "cache")}
        trim_json("prune", with_bos, "-o", tmp_path / "masks", "--force", *drawn, *more)
        assert read_manifest(tmp_path / "masks")["bos"] == bos
        fresh = [one for one in cached(tmp_path / "cache") if one.path not in seen]
        assert [one.manifest["bos"] for one in fresh] == ([] if bos in known else [bos])
        seen |= {one.path for one in fresh}
    by_bos = {one.manifest["bos"]: one.tokens for one in cached(tmp_path / "cache")}
    trim_json("calibrate", with_bos, "-o", tmp_path / "calib", "--dataset", text, "--bos", "once", *DRAWN)
    assert torch.equal(by_bos["once"], CalibrationFile(tmp_path / "calib").tokens)
    assert by_bos["each"][:, 0].tolist() == [0] * 4


def test_the_cache_follows_the_tokenizer(with_bos: Path, nano_qwen2: Path, text: Path, tmp_path: Path) -> None:
    """Both models have the same weights: `auto` is each of the one, once of the other."""
    drawn = ("--dataset", text, "--sparsity", 0.5, "--cache-dir", tmp_path / "cache", *DRAWN)
    for model in (nano_qwen2, with_bos):
        trim_json("prune", model, "-o", tmp_path / "masks", "--force", *drawn)
    assert sorted(one.manifest["bos"] for one in cached(tmp_path / "cache")) == ["each", "once"]


def test_a_calibration_on_the_way_is_the_file_of_the_same_options(nano_qwen2: Path, tmp_path: Path) -> None:
    documents = "".join(f'{{"text": "Row {number} is short."}}\n' for number in range(30)).encode()
    how = ("--dataset", "-", "--pack", *DRAWN)
    trim_json("calibrate", nano_qwen2, "-o", tmp_path / "calib", *how, stdin=documents)
    pruned = (
        "prune",
        nano_qwen2,
        "-o",
        tmp_path / "masks",
        "--force",
        "--sparsity",
        0.5,
        "--cache-dir",
        tmp_path / "c",
    )
    trim_json(*pruned, *how, stdin=documents)
    [made] = cached(tmp_path / "c")
    assert torch.equal(made.tokens, CalibrationFile(tmp_path / "calib").tokens)
    assert made.manifest["options"]["pack"] is True
    trim_json(*pruned, *how, stdin=documents)
    assert len(cached(tmp_path / "c")) == 1
    trim_json(*pruned, *how, stdin=documents.replace(b"short", b"brief"))
    assert len(cached(tmp_path / "c")) == 2, "what standard input holds is part of the key"
    refused = trim(*pruned, "--calibration", tmp_path / "calib", "--pack")
    assert (refused.status, refused.out) == (2, "")
    assert refused.err.startswith("trim: --calibration with --pack: the calibration file holds its samples")


def test_tokens_from_standard_input(base: Path, tmp_path: Path) -> None:
    sent = (base / "tokens.safetensors").read_bytes()
    run = ("--tokens", "-", "--cache-dir", tmp_path / "cache", *COMPUTE)
    trim_json("calibrate", base / "model", "-o", tmp_path / "calib", "--batch-size", 2, *run, stdin=sent)
    one, other = load_file(base / "calib"), load_file(tmp_path / "calib")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    manifest, known = (CalibrationFile(path).manifest for path in (tmp_path / "calib", base / "calib"))
    assert manifest["options"]["tokens"] == "-"
    assert manifest["sources"]["tokens"]["sha256"] == known["sources"]["tokens"]["sha256"]
    pruned = ("prune", base / "model", "-o", tmp_path / "masks", "--force", "--sparsity", 0.5, *run)
    trim_json(*pruned, stdin=sent)
    trim_json(*pruned, stdin=sent)
    assert len(cached(tmp_path / "cache")) == 1
    save_tokens(tmp_path / "other", vocabulary=64, nsamples=5, seed=1)
    trim_json(*pruned, stdin=(tmp_path / "other").read_bytes())
    assert len(cached(tmp_path / "cache")) == 2
    assert trim_json("plan", base / "model", "--sparsity", 0.5, *run, stdin=sent)
    broken = trim("calibrate", base / "model", "-o", tmp_path / "x", *run, stdin=b"no tensors")
    assert (broken.status, broken.out) == (2, "")
    assert "standard input is not a whole safetensors file" in broken.err
    twice = trim("calibrate", base / "model", "-o", tmp_path / "x", *run, "--dataset", "-", stdin=sent)
    assert (twice.status, twice.err.split(",")[0]) == (2, "trim: - is named twice")


def test_each_needs_a_bos(tmp_path: Path, model_copy: Path, text: Path) -> None:
    config = model_copy / "tokenizer_config.json"
    config.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}))
    done = trim("calibrate", model_copy, "-o", tmp_path / "calib", "--dataset", text, "--bos", "each", *DRAWN)
    assert (done.status, done.out) == (2, "")
    expected = f"trim: --bos each needs a BOS token, and the tokenizer in {model_copy} has none; leave --bos out.\n"
    assert done.err == expected
    assert not (tmp_path / "calib").exists()
