import json
import math
import shlex
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from typer.testing import CliRunner

import trimcli.sweep.run
from tests.small_models import llama_config, random_model, save, skeleton_of
from tests.small_tokenizers import put_bos
from tests.trim_cli import COMPUTE, trim_json
from trimcli.cli.app import app
from trimcli.commands.evaluate import open_masks
from trimcli.commands.prune import prune
from trimcli.errors import InputError, OptionError
from trimcli.evaluation.perplexity import perplexity
from trimcli.methods.layers.alpha import AlphaOptions
from trimcli.methods.layers.auto import AutoOptions
from trimcli.methods.layers.depth import DepthOptions
from trimcli.methods.layers.dlp import DlpOptions
from trimcli.methods.layers.error import ErrorOptions
from trimcli.methods.layers.owl import OwlOptions
from trimcli.methods.layers.search import SearchOptions
from trimcli.methods.rows.options import TrimOptions
from trimcli.methods.stats import GramOptions
from trimcli.methods.updates.cg import FitOptions
from trimcli.methods.updates.obs import ObsOptions
from trimcli.options import declared
from trimcli.sweep.grid import SweepOptions, axes, settings_of
from trimcli.sweep.run import SweepPlan, held_out, sweep

SEQLEN = 20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model` and `tokens`: 12 random samples."""
    base = tmp_path_factory.mktemp("sweep")
    save(random_model(llama_config()), base / "model")
    save_tokens(base / "tokens", torch.randint(64, (12, SEQLEN), generator=torch.Generator().manual_seed(1)))
    return base


def save_tokens(path: Path, tokens: torch.Tensor) -> Path:
    save_file({"tokens": tokens.int().contiguous()}, path)
    return path


def options_for(base: Path, cache: Path, **fields: Any) -> SweepOptions:
    given: dict[str, Any] = {"sparsity": 0.5, "tokens": base / "tokens", "holdout": 4, "cache_dir": cache, **fields}
    settings = {"iterations": (2,)} if True in given.get("trim", (True,)) else {}
    return SweepOptions(**{**given, "settings": {**settings, **given.get("settings", {})}})


def test_a_choice_brings_its_own_settings() -> None:
    found = settings_of(
        SweepOptions(
            sparsity=0.5,
            settings={
                "lambda_": (0.02, 0.05),
                "hyper_m": (3.0, 5.0),
                "epsilon": (0.1, 0.3),
                "qmetric": ("cosim_flat", "mse"),
            },
        )
    )
    # Without TRIM or with one of two metrics: uniform, OWL at two by two, Alpha at two.
    assert len(found) == (1 + 4 + 2) * (1 + 2)
    assert len({tuple(sorted(one.values.items())) for one in found}) == len(found)
    for one in found:
        values = one.values
        assert ("lambda" in values) == ("hyper_m" in values) == (values["alloc"] == "owl")
        assert ("epsilon" in values) == ("mapping_type" in values) == (values["alloc"] == "alpha")
        assert ("qmetric" in values) == ("iterations" in values) == values["trim"] == (one.recipe.rows == "trim")
        assert (one.allocate is None) == (values["alloc"] == "uniform")
        if one.allocate and values["alloc"] == "owl":
            assert one.allocate.own() == OwlOptions(lambda_=values["lambda"], hyper_m=values["hyper_m"])
            assert one.allocate.allocating.needs == {"sqnorm"}
        elif one.allocate:
            assert one.allocate.own() == AlphaOptions(epsilon=values["epsilon"])
            assert one.allocate.allocating.needs == frozenset()
        if one.recipe.rows == "trim":
            assert one.recipe.options_of(one.recipe.allocating) == TrimOptions(qmetric=values["qmetric"])
            assert values["iterations"] == 10


def test_every_option_of_a_method_is_an_axis() -> None:
    values: dict[str, tuple[Any, ...]] = {
        "damping": (0.01, 0.1),
        "block_size": (8, 16),
        "mask_score": ("wanda", "obs"),
        "gram_dtype": ("float64",),
        "group": (4, 8),
        "special": (True,),
    }
    options = SweepOptions(
        sparsity=0.5, method=("sparsegpt",), alloc=("uniform", "owl"), trim=(False,), settings=values
    )
    found = settings_of(options)
    assert len(found) == 2 * 2 * 2 * (1 + 2)
    assert {(one.values["damping"], one.values["block_size"]) for one in found} == {
        (damping, size) for damping in (0.01, 0.1) for size in (8, 16)
    }
    for one in found:
        given = one.recipe.options_of(one.recipe.updating)
        assert (given.damping, given.block_size) == (one.values["damping"], one.values["block_size"])
        assert one.recipe.scoring.name == one.values["mask_score"] == given.mask_score
        assert GramOptions("float64") in one.recipe.options
        assert one.values["gram_dtype"] == "float64"
        assert ("group" in one.values) == ("special" in one.values) == (one.allocate is not None)
        if one.allocate:
            assert one.allocate.own() == OwlOptions(group=one.values["group"], special=True)


def test_the_axes_are_the_options_of_every_method_and_allocation() -> None:
    names = [one.field for kind in axes() for one in declared(kind)]
    assert len(names) == len(set(names))
    own = {one.field for one in declared(SweepOptions)}
    assert not own & set(names)
    allocating = {OwlOptions, DlpOptions, AlphaOptions, ErrorOptions, DepthOptions, SearchOptions, AutoOptions}
    assert {TrimOptions, ObsOptions, FitOptions, GramOptions, *allocating} == set(axes())


def test_a_setting_named_twice_is_tried_once() -> None:
    options = SweepOptions(sparsity=0.5, alloc=("owl", "owl"), settings={"lambda_": (0.05, 0.05)}, trim=(True, True))
    assert len(settings_of(options)) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 1.0}, "outside"),
        ({"alloc": ("owl", "alhpa")}, "did you mean 'alpha'"),
        ({"alloc": ()}, "--alloc names nothing to try"),
        ({"method": ("wnada",)}, "did you mean 'wanda'"),
        (
            {"alloc": ("alpha",), "settings": {"lambda_": (0.1,)}},
            "--lambda does nothing without --alloc owl; add it or leave --lambda out",
        ),
        (
            {"alloc": ("owl",), "settings": {"epsilon": (0.1,)}},
            "--epsilon does nothing without --alloc alpha; add it or leave --epsilon out",
        ),
        (
            {"trim": (False,), "settings": {"qmetric": ("mse",)}},
            "--qmetric does nothing without --trim on; add it or leave --qmetric out",
        ),
        (
            {"settings": {"damping": (0.1,)}},
            "--damping does nothing without a --method that takes it, such as sparsegpt; add it or leave --damping out",
        ),
        ({"settings": {"gram_dtype": ("float64",)}}, "--gram-dtype does nothing without a --method that takes it"),
        ({"trim": (False,), "input_recalc": True}, "--input-recalc does nothing without --trim on"),
        ({"settings": {"qmetric": ("cosine",)}}, "--qmetric 'cosine' is none of"),
        ({"settings": {"ww_metric": ("beta",)}}, "--ww-metric 'beta' is none of"),
        ({"settings": {"lambda_": (-1.0,)}}, "--lambda -1 is not usable"),
        ({"settings": {"special": (True,)}}, "--special does nothing without --group"),
        ({"settings": {"iterations": (0,)}}, "--iterations 0 must be at least 1"),
        ({"settings": {"lamda": (0.1,)}}, "the setting 'lamda' is none of .*; did you mean 'lambda_'"),
        ({"trim": ()}, "--trim names nothing to try"),
        ({"method": ()}, "--method names nothing to try"),
        ({"seqlen": 1}, "--seqlen 1 must be at least 2"),
        ({"numerics": "exat"}, "did you mean 'exact'"),
        ({"holdout": 0}, "--holdout 0 must be at least 1"),
        ({"nsamples": 0}, "--nsamples 0 must be at least 1"),
        ({"method": ("sparsegpt",), "propagate": False}, "--no-propagate with --method sparsegpt"),
    ],
)
def test_unusable_options(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        sweep("nowhere", SweepOptions(**{"sparsity": 0.5, **fields}))


def test_a_sweep_measures_what_prune_and_eval_would(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best one's command line, run as it is, gives the masks whose held-out perplexity the table shows."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    plans: list[SweepPlan] = []
    options = options_for(base, tmp_path / "cache", settings={"lambda_": (0.05, 0.1)})
    result = sweep(str(base / "model"), options, tmp_path / "sweep.json", announce=plans.append)
    assert list(temporary.iterdir()) == []
    assert [plans[0].settings, plans[0].nsamples, plans[0].holdout, plans[0].seqlen] == [8, 8, 4, SEQLEN]
    assert len(result.runs) == 8
    found = [run.perplexity for run in result.runs]
    assert found == sorted(found)
    assert (result.heldout, result.seqlen, result.taken_over) == (4, SEQLEN, 0)
    assert all(run.sparsity == 0.5 for run in result.runs)
    assert len(list((tmp_path / "cache" / "calibration").glob("*.safetensors"))) == 1
    document = json.loads((tmp_path / "sweep.json").read_text())
    assert document["schema"] == "trim.sweep/1"
    assert [run["perplexity"] for run in document["runs"]] == found

    skeleton = skeleton_of(base / "model")
    heldout = held_out(skeleton, options, torch.zeros(1, SEQLEN, dtype=torch.int32))
    assert result.dense.perplexity == perplexity(skeleton, heldout)
    monkeypatch.chdir(tmp_path)
    for run in (result.runs[0], *(run for run in result.runs if run.values["alloc"] == "alpha")):
        assert run.command is not None
        invoked = CliRunner().invoke(app, [*shlex.split(run.command)[1:], "--force"])
        assert invoked.exit_code == 0, invoked.output
        skeleton = skeleton_of(base / "model")
        mask = open_masks(tmp_path / "masks.safetensors", skeleton)
        assert perplexity(skeleton, heldout, mask=mask) == run.perplexity


def test_the_command_line_says_everything(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a method that changes weights, with every option that prune has in common with a sweep."""
    monkeypatch.chdir(tmp_path)
    options = options_for(
        base,
        tmp_path / "the cache",
        method=("sparsegpt",),
        alloc=("owl",),
        trim=(True,),
        settings={
            "qmetric": ("cosim_dim",),
            "forbid_negative": (True,),
            "block_size": (16,),
            "mask_score": ("wanda",),
            "gram_dtype": ("float64",),
            "hyper_m": (3.0,),
        },
        input_recalc=True,
        only=("*.mlp.*",),
        skip=("*.0.*", "*.down_proj"),
        batch_size=2,
        seed=3,
        device="cpu",
        dtype="float32",
        numerics="reference",
    )
    [run] = sweep(str(base / "model"), options).runs
    assert run.command is not None
    words = shlex.split(run.command)
    assert words[:5] == ["trim", "prune", str(base / "model"), "-o", "masks.safetensors"]
    invoked = CliRunner().invoke(app, words[1:])
    assert invoked.exit_code == 0, invoked.output
    heldout = held_out(skeleton_of(base / "model"), options, torch.zeros(1, SEQLEN, dtype=torch.int32))
    assert perplexity(skeleton_of(tmp_path / "pruned"), heldout) == run.perplexity
    assert str(tmp_path / "the cache") in words
    said = dict(zip(words, [*words[1:], ""], strict=True))
    assert (said["--method"], said["--alloc"], said["--qmetric"]) == ("sparsegpt", "owl", "cosim_dim")
    assert (said["--block-size"], said["--mask-score"], said["--gram-dtype"]) == ("16", "wanda", "float64")
    assert (said["--iterations"], said["--hyper-m"], said["--numerics"]) == ("2", "3.0", "reference")
    assert {"--use-trim", "--forbid-neg-lr", "--input-recalc"} <= set(words)
    assert [words[place + 1] for place, word in enumerate(words) if word == "--skip"] == ["*.0.*", "*.down_proj"]
    # What is as it would be anyway is left out.
    assert not {"--lambda", "--damping", "--mask-update", "--qmetric-dimwise", "--group", "--special"} & set(words)
    assert "--no-propagate" not in words


def test_without_propagation_one_calibration_serves_all(base: Path, tmp_path: Path) -> None:
    options = options_for(base, tmp_path, propagate=False, alloc=("uniform", "owl"))
    result = sweep(str(base / "model"), options)
    assert len(result.runs) == 4
    assert len(list((tmp_path / "calibration").glob("*.safetensors"))) == 1
    assert all("--no-propagate" in str(run.command) for run in result.runs)


def test_an_earlier_sweep_is_taken_over(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_for(base, tmp_path, alloc=("uniform",), trim=(False,))
    first = sweep(str(base / "model"), options)
    measured: list[str] = []

    def counted(*args: Any, **named: Any) -> Any:
        measured.append(args[2].recipe.method)
        return prune(*args, **named)

    monkeypatch.setattr(trimcli.sweep.run, "prune", counted)
    more = options_for(base, tmp_path, alloc=("uniform",), trim=(False,), method=("wanda", "magnitude"))
    second = sweep(str(base / "model"), more)
    assert measured == ["magnitude"]
    assert second.taken_over == 2
    assert first.runs[0] in second.runs
    again = sweep(str(base / "model"), options_for(base, tmp_path, alloc=("uniform",), trim=(False,), resume=False))
    assert measured == ["magnitude", "wanda"]
    assert again.taken_over == 0
    other = sweep(str(base / "model"), options_for(base, tmp_path, alloc=("uniform",), trim=(False,), holdout=3))
    assert other.taken_over == 0


def test_what_is_no_number_comes_last(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([5.0, math.inf, 7.0])
    monkeypatch.setattr(trimcli.sweep.run, "perplexity", lambda *_, **__: next(values))
    options = options_for(base, tmp_path, alloc=("uniform",), trim=(False,), method=("wanda", "magnitude"))
    for _ in range(2):  # the second from the cache
        result = sweep(str(base / "model"), options)
        assert [run.values["method"] for run in result.runs] == ["magnitude", "wanda"]
        assert result.runs[0].perplexity == 7.0
        assert math.isnan(result.runs[1].perplexity)


def test_a_sweep_on_text(nano_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out windows share no 16 tokens with those that calibrated, and the command line draws the latter."""
    from trimcli.demo import write_texts
    from trimcli.files.calibration import CalibrationFile

    text = write_texts(tmp_path).calibration
    options = SweepOptions(
        sparsity=0.5,
        alloc=("uniform",),
        trim=(False,),
        dataset=str(text),
        nsamples=24,
        seqlen=64,
        holdout=8,
        cache_dir=tmp_path / "cache",
    )
    [run] = sweep(str(nano_qwen2), options).runs
    [calibration] = (tmp_path / "cache" / "calibration").glob("*.safetensors")
    seen = CalibrationFile(calibration).tokens
    heldout = held_out(skeleton_of(nano_qwen2), options, seen)
    assert heldout.shape == (8, 64)
    assert not grams(heldout, 16) & grams(seen, 16)
    monkeypatch.chdir(tmp_path)
    invoked = CliRunner().invoke(app, shlex.split(str(run.command))[1:])
    assert invoked.exit_code == 0, invoked.output
    assert list((tmp_path / "cache" / "calibration").glob("*.safetensors")) == [calibration]
    skeleton = skeleton_of(nano_qwen2)
    assert perplexity(skeleton, heldout, mask=open_masks(tmp_path / "masks.safetensors", skeleton)) == run.perplexity


@pytest.mark.parametrize(("numerics", "bos"), [("reference", "once"), ("exact", "auto")])
def test_bos_stands_where_the_best_ones_command_line_puts_it(
    numerics: Any, bos: str, model_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a tokenizer that begins a text with BOS, 0: in each window, or nowhere in windows within a text."""
    from trimcli.demo import write_texts
    from trimcli.files.calibration import CalibrationFile

    put_bos(model_copy)
    options = SweepOptions(
        sparsity=0.5,
        alloc=("uniform",),
        trim=(False,),
        numerics=numerics,
        dataset=str(write_texts(tmp_path).calibration),
        nsamples=8,
        seqlen=32,
        holdout=4,
        cache_dir=tmp_path / "cache",
    )
    assert options.calibrate().bos == bos
    assert replace(options, tokens=Path("t")).calibrate().bos == "auto"
    result = sweep(str(model_copy), options)
    [run], where = result.runs, {"auto": "each", "once": "once"}
    assert result.document["bos"] == where[bos]
    [calibration] = (tmp_path / "cache" / "calibration").glob("*.safetensors")
    seen = CalibrationFile(calibration).tokens
    heldout = held_out(skeleton_of(model_copy), options, seen)
    for windows in (seen, heldout):
        assert windows.eq(0).sum(dim=1).tolist() == [int(bos == "auto")] * len(windows)
    monkeypatch.chdir(tmp_path)
    invoked = CliRunner().invoke(app, shlex.split(str(run.command))[1:])
    assert invoked.exit_code == 0, invoked.output
    assert list((tmp_path / "cache" / "calibration").glob("*.safetensors")) == [calibration]


def grams(tokens: torch.Tensor, length: int) -> set[tuple[int, ...]]:
    """Every run of so many tokens, the plain way."""
    return {
        tuple(row[start : start + length]) for row in tokens.tolist() for start in range(tokens.shape[1] - length + 1)
    }


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_samples_that_share_text_are_not_held_out(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    seen = torch.randint(3, (3, 24), generator=generator)
    fresh = torch.randint(3, (4, 24), generator=generator)
    for row in range(4):  # runs of 15, 16 or 17 tokens copied to anywhere
        length = data.draw(st.sampled_from([0, 15, 16, 17]))
        source, target = (data.draw(st.integers(0, 24 - length)) for _ in range(2))
        fresh[row, target : target + length] = seen[row % 3, source : source + length]
    expected = [row for row in fresh.tolist() if not grams(torch.tensor([row]), 16) & grams(seen, 16)]
    with tempfile.TemporaryDirectory() as folder:
        options = SweepOptions(
            sparsity=0.5, tokens=save_tokens(Path(folder) / "tokens", torch.cat([seen, fresh])), holdout=4
        )
        if len(expected) == 4:
            assert held_out(None, options, seen).tolist() == expected  # type: ignore[arg-type]
        else:
            with pytest.raises(InputError, match=f"gives {len(expected)} samples that share no text with the 3 "):
                held_out(None, options, seen)  # type: ignore[arg-type]


def test_a_text_too_short_to_hold_samples_out_is_refused(nano_qwen2: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("The same few words are all that there is to read in this text, again and again. " * 12)
    options = SweepOptions(
        sparsity=0.5, dataset=str(text), nsamples=16, seqlen=32, holdout=4, cache_dir=tmp_path / "cache"
    )
    with pytest.raises(
        InputError, match=r"short.txt gives \d+ samples that share no text .* --holdout 4 asks for more"
    ):
        sweep(str(nano_qwen2), options)


def test_samples_that_are_all_held_out_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--holdout 12 leaves none of the 12 samples in .*tokens"):
        sweep(str(base / "model"), options_for(base, tmp_path, holdout=12))


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["sweep", *(str(argument) for argument in arguments)])


def test_the_command(base: Path, tmp_path: Path) -> None:
    common = [base / "model", "--sparsity", 0.5, "--tokens", base / "tokens", "--holdout", 4, "--cache-dir", tmp_path]
    common += ["--alloc", "owl", "--lambda", "0.05,0.1", "--trim", "off"]
    found = run(*common)
    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    assert lines[0].split() == ["lambda", "sparsity", "perplexity", "of", "dense", "seconds"]
    assert lines[1].split()[0] == "dense"
    assert {line.split()[0] for line in lines[2:4]} == {"0.05", "0.1"}
    assert "of no test set" in found.stdout
    best = lines[2].split()[0]
    own = [] if best == "0.08" else ["--lambda", best]
    assert shlex.split(lines[-1]) == [
        *("trim", "prune", str(base / "model"), "-o", "masks.safetensors", "--cache-dir", str(tmp_path)),
        *("--sparsity", "0.5", "--method", "wanda", "--alloc", "owl", *own),
        *("--tokens", shlex.split(lines[-1])[-1]),
    ]
    assert "2 settings and the dense model: 8 samples calibrate, 4 more measure, of 20 tokens each" in found.stderr
    as_json = run(*common, "--json", "--quiet", "-o", tmp_path / "sweep.json")
    document = json.loads(as_json.stdout)
    assert len(document["runs"]) == 2
    assert json.loads((tmp_path / "sweep.json").read_text())["runs"] == document["runs"]
    for option, value in (("--lambda", "0.05,x"), ("--trim", "yes")):
        wrong = run(*common, option, value)
        assert wrong.exit_code == 2
        assert "is not usable" in wrong.stderr


def test_allocations_by_trial_are_settings_like_others(base: Path, tmp_path: Path) -> None:
    common = ("--sparsity", 0.5, "--tokens", base / "tokens", "--holdout", 4, "--cache-dir", tmp_path, *COMPUTE)
    own = ("--auto-methods", "owl,uniform", "--trial-samples", "1,2", "--search-evaluations", 10)
    found = trim_json("sweep", base / "model", "--alloc", "error,auto,search", "--trim", "off", *own, *common)
    values = [run["values"] for run in found["runs"]]
    assert sorted(one["alloc"] for one in values) == ["auto", "auto", "error", "search"]
    for one in values:
        if one["alloc"] == "auto":
            assert one["auto_methods"] == ["owl", "uniform"]
    for run in found["runs"]:
        assert run["sparsity"] == pytest.approx(0.5, abs=1e-2)
        assert ("--auto-methods owl,uniform" in run["command"]) == (run["values"]["alloc"] == "auto")
