"""What cannot be used, through the command line: one sentence, exit status 2 or 1, and nothing left behind."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.families import VOCABULARY, save_family
from tests.small_models import gpt2_config, llama_config, random_model, save
from tests.trim_cli import COMPUTE, Done, save_tokens, tree, trim, trim_json
from trimcli.demo import write_texts

Args = tuple[object, ...]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, `other`, `tokens.safetensors`, `calib`, `ratios.json`, `masks`, `text.txt`."""
    base = tmp_path_factory.mktemp("errors")
    save(random_model(llama_config()), base / "model")
    save(random_model(gpt2_config()), base / "other")
    (base / "model" / "tokenizer.json").unlink()
    tokens = save_tokens(base / "tokens.safetensors", vocabulary=64)
    run = ("--cache-dir", base / "cache", *COMPUTE)
    trim_json("calibrate", base / "model", "-o", base / "calib", "--tokens", tokens, *run)
    trim_json("alloc-layers", base / "model", "-o", base / "ratios.json", "--sparsity", 0.5)
    trim_json("prune", base / "model", "-o", base / "masks", "--calibration", base / "calib", "--sparsity", 0.5, *run)
    write_texts(base).measurement.rename(base / "text.txt")
    return base


def refused(status: int, message: str, *args: object) -> Done:
    """Run trim and hold what every refusal holds: the status, one sentence on stderr, nothing on stdout."""
    done = trim(*args)
    assert (done.status, done.out) == (status, ""), done
    # The plan's head may come before it.
    *_, last = done.err.splitlines()
    assert last.startswith("trim: ")
    assert last.endswith((".", "?"))
    assert message in last, last
    assert "Traceback" not in done.err
    return done


def prune_args(base: Path, tmp_path: Path, *more: object, model: Path | None = None) -> Args:
    calibration = () if "--tokens" in more or "--calibration" in more else ("--calibration", base / "calib")
    run = ("--cache-dir", tmp_path / "cache", *COMPUTE)
    return ("prune", model or base / "model", "-o", tmp_path / "masks", *calibration, *run, *more)


# --- models ----------------------------------------------------------------------------------------------


def truncate(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def change(model: Path, **tensors: torch.Tensor) -> None:
    found = {**load_file(model / "model.safetensors"), **tensors}
    save_file(found, model / "model.safetensors", metadata={"format": "pt"})


def spoil(value: float) -> Callable[[Path], None]:
    def harm(model: Path) -> None:
        weight = load_file(model / "model.safetensors")[UP].clone()
        weight[2, 3] = value
        change(model, **{UP: weight})

    return harm


def overflow(model: Path) -> None:
    names = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")]
    tensors = load_file(model / "model.safetensors")
    change(model, **{name: tensors[name] * 1e25 for name in names})


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "model.safetensors is not a whole safetensors file"),
    "no config": (lambda model: (model / "config.json").unlink(), "has no config.json, so it is not a model directory"),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), "has a config.json but no weights"),
    "NaN weight": (spoil(float("nan")), f"the tensor {UP}"),
    "infinite weight": (spoil(float("inf")), f"the tensor {UP}"),
    "infinite activations": (overflow, "the outputs of model.layers.0 hold NaN or infinite values"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_models(damage: str, base: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(base / "model", tmp_path / "model"))
    harm, message = DAMAGED[damage]
    harm(model)
    before = tree(tmp_path)
    tokens = ("--tokens", base / "tokens.safetensors")
    refused(
        2,
        message,
        *prune_args(base, tmp_path, *tokens, "--sparsity", 0.5, "--save-model", tmp_path / "out", model=model),
    )
    refused(2, message, "calibrate", model, "-o", tmp_path / "c", *tokens, "--cache-dir", tmp_path / "cache", *COMPUTE)
    if "activations" not in damage:
        run = ("-o", tmp_path / "masks", "--cache-dir", tmp_path / "cache", *COMPUTE)
        refused(2, message, "prune", model, *run, "--method", "magnitude", "--sparsity", 0.5)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)  # where finished layers wait
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", ["calibrate", "alloc-layers", "prune", "plan", "eval", "apply-masks"])
def test_no_such_model(command: str, base: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    rest: dict[str, Args] = {
        "calibrate": ("-o", tmp_path / "out"),
        "alloc-layers": ("-o", tmp_path / "out", "--sparsity", 0.5),
        "prune": ("-o", tmp_path / "out", "--sparsity", 0.5),
        "plan": ("--sparsity", 0.5),
        "eval": ("--ppl", base / "text.txt", "-o", tmp_path / "out"),
        "apply-masks": (base / "masks", "-o", tmp_path / "out"),
    }
    refused(2, f"there is no model directory {missing}", command, missing, *rest[command])
    refused(2, "is a file, not a model directory", command, base / "calib", *rest[command])
    (tmp_path / "empty").mkdir()
    refused(2, "has no config.json", command, tmp_path / "empty", *rest[command])
    assert tree(tmp_path) == ["empty"]


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    for args in (
        ("plan", "Nobody/nothing", "--sparsity", 0.5),
        ("prune", "Nobody/nothing", "-o", tmp_path / "masks", "--sparsity", 0.5),
        ("calibrate", "Nobody/nothing", "--revision", "main", "-o", tmp_path / "calib"),
    ):
        refused(1, "the model hub cannot be reached", *args)
    assert tree(tmp_path) == []


def test_a_data_hub_that_cannot_be_reached(nano_qwen2: Path, tmp_path: Path) -> None:
    args = ("calibrate", nano_qwen2, "-o", tmp_path / "calib", "--cache-dir", tmp_path / "cache", *COMPUTE)
    refused(1, "give a local file", *args, "--dataset", "wikitext2")
    refused(1, "give a local file", "eval", nano_qwen2, "--ppl", "ptb", "-o", tmp_path / "results")
    assert tree(tmp_path) == []


# --- texts and tokens ------------------------------------------------------------------------------------


def test_a_missing_tokenizer(base: Path, tmp_path: Path) -> None:
    args = ("-o", tmp_path / "out", *COMPUTE)
    refused(2, "the tokenizer in", "calibrate", base / "model", "--dataset", base / "text.txt", *args)
    refused(2, "the tokenizer in", "eval", base / "model", "--ppl", base / "text.txt", *args)
    assert tree(tmp_path) == []


def test_a_text_that_is_too_short(nano_qwen2: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Only a few words.")
    args = ("-o", tmp_path / "out", "--seqlen", 32, *COMPUTE)
    refused(2, "short.txt holds", "calibrate", nano_qwen2, "--dataset", tmp_path / "short.txt", *args)
    refused(2, "short.txt holds", "eval", nano_qwen2, "--ppl", tmp_path / "short.txt", *args)
    assert tree(tmp_path) == ["short.txt"]


def test_tokens_that_do_not_fit(base: Path, tmp_path: Path) -> None:
    save_tokens(tmp_path / "foreign", vocabulary=5000)
    save_tokens(tmp_path / "long", vocabulary=64, seqlen=40)
    save_file({"x": torch.zeros(2)}, tmp_path / "none")
    save_file({"tokens": torch.zeros(2, 3)}, tmp_path / "floats")
    before = tree(tmp_path)
    for name, message in (
        ("foreign", "is outside the vocabulary of"),
        ("long", "samples of 40 tokens are longer than the 32 positions"),
        ("none", "no tensor `tokens`"),
        ("floats", "an integer tensor of shape"),
        ("missing", "there is no file"),
    ):
        refused(2, message, *prune_args(base, tmp_path, "--tokens", tmp_path / name, "--sparsity", 0.5))
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        assert tree(tmp_path) == before


# --- files of other stages -------------------------------------------------------------------------------


def test_files_of_another_model(base: Path, tmp_path: Path) -> None:
    other = base / "other"
    made_for = "was made for the model"
    refused(2, made_for, *prune_args(base, tmp_path, "--calibration", base / "calib", "--sparsity", 0.5, model=other))
    magnitude = ("prune", other, "-o", tmp_path / "masks", "--method", "magnitude", *COMPUTE)
    refused(2, "is not for the linears of", *magnitude, "--ratios", base / "ratios.json")
    refused(2, made_for, "apply-masks", other, base / "masks", "-o", tmp_path / "out")
    owl = ("alloc-layers", other, "-o", tmp_path / "r", "--method", "owl", "--sparsity", 0.5)
    refused(2, made_for, *owl, "--calibration", base / "calib")
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert tree(tmp_path) == []


def test_files_that_are_missing_damaged_or_of_another_kind(base: Path, tmp_path: Path) -> None:
    (tmp_path / "half").write_bytes((base / "calib").read_bytes()[:-10])
    (tmp_path / "text.json").write_text("{")
    ratios = json.loads((base / "ratios.json").read_text())
    ratios["sparsity"]["model.layers.0.mlp.up_proj"] = 1.5
    (tmp_path / "beyond.json").write_text(json.dumps(ratios))
    before = tree(tmp_path)
    magnitude = ("prune", base / "model", "-o", tmp_path / "m", "--method", "magnitude", *COMPUTE)
    for message, args in (
        ("there is no file", prune_args(base, tmp_path, "--calibration", tmp_path / "none", "--sparsity", 0.5)),
        (
            "is not a whole safetensors file",
            prune_args(base, tmp_path, "--calibration", tmp_path / "half", "--sparsity", 0.5),
        ),
        ("is of schema 'trim.masks/1'", prune_args(base, tmp_path, "--calibration", base / "masks", "--sparsity", 0.5)),
        ("there is no file", (*magnitude, "--ratios", tmp_path / "none.json")),
        ("is not a readable JSON file", (*magnitude, "--ratios", tmp_path / "text.json")),
        ("outside 0..1", (*magnitude, "--ratios", tmp_path / "beyond.json")),
        ("is of schema 'trim.calibration/1'", ("apply-masks", base / "model", base / "calib", "-o", tmp_path / "o")),
        ("there is no file", ("apply-masks", base / "model", tmp_path / "none", "-o", tmp_path / "o")),
    ):
        refused(2, message, *args)
        assert tree(tmp_path) == before


# --- outputs ---------------------------------------------------------------------------------------------


def test_outputs_that_exist(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "mine").write_text("mine")
    before = tree(tmp_path)
    exists, foreign = "exists already; give --force", "is a directory that trim did not make"
    run = ("--cache-dir", tmp_path / "cache", *COMPUTE)
    tokens = ("--tokens", base / "tokens.safetensors")
    for message, args in (
        (exists, ("calibrate", base / "model", "-o", tmp_path / "file", *tokens, *run)),
        (exists, ("alloc-layers", base / "model", "-o", tmp_path / "file", "--sparsity", 0.5)),
        (exists, ("prune", base / "model", "-o", tmp_path / "file", *tokens, *run, "--sparsity", 0.5)),
        (foreign, prune_args(base, tmp_path, "--sparsity", 0.5, "--save-model", tmp_path / "dir")),
        (foreign, prune_args(base, tmp_path, "--sparsity", 0.5, "--save-model", tmp_path / "dir", "--force")),
        (foreign, ("apply-masks", base / "model", base / "masks", "-o", tmp_path / "dir", "--force")),
        (exists, ("apply-masks", base / "model", base / "masks", "-o", tmp_path / "file")),
        (foreign, ("calibrate", base / "model", "-o", tmp_path / "dir", *tokens, *run, "--force")),
        ("does not exist; create it", ("calibrate", base / "model", "-o", tmp_path / "no" / "c", *tokens, *run)),
    ):
        refused(2, message, *args)
        assert tree(tmp_path) == before
    assert (tmp_path / "file").read_text() == (tmp_path / "dir" / "mine").read_text() == "mine"


def test_force_replaces(base: Path, tmp_path: Path) -> None:
    run = ("--sparsity", 0.5, "--save-model", tmp_path / "out")
    assert trim(*prune_args(base, tmp_path, *run)).status == 0
    again = ("--sparsity", 0.75, "--save-model", tmp_path / "out")
    refused(2, "exists already; give --force", *prune_args(base, tmp_path, *again))
    assert trim_json(*prune_args(base, tmp_path, *again, "--force"))["sparsity"] == 0.75
    assert json.loads((tmp_path / "out" / "trim.json").read_text())["sparsity"] == 0.75
    assert not [path for path in tree(tmp_path) if path.endswith((".part", ".old", ".lock"))]


# --- options ---------------------------------------------------------------------------------------------

S: Args = ("--sparsity", 0.5)
OPTIONS: list[tuple[str, Args]] = [
    ("--sparsity 1.0 is outside [0, 1)", ("--sparsity", 1)),
    ("--sparsity -0.5 is outside [0, 1)", ("--sparsity", -0.5)),
    ("--sparsity nan is outside [0, 1)", ("--sparsity", "nan")),
    ("no target was given", ()),
    ("did you mean 'wanda'?", ("--method", "wandaa", *S)),
    ("did you mean 'reference'?", ("--numerics", "refrence", *S)),
    ("did you mean 'float32'?", ("--dtype", "flot32", *S)),
    ("did you mean 'cuda'?", ("--device", "cdua", *S)),
    ("did you mean 'cosim_flat'?", ("--use-trim", "--qmetric", "cosim_flt", *S)),
    ("did you mean 'cosim'?", ("--use-trim", "--qmetric-dimwise", "cosine", *S)),
    ("did you mean 'owl'?", ("--alloc", "owll", *S)),
    ("did you mean 'alpha_peak'?", ("--alloc", "alpha", "--ww-metric", "alpha_peek", *S)),
    ("did you mean 'block'?", ("--alloc", "alpha", "--mapping-type", "blok", *S)),
    ("did you mean 'wanda'?", ("--method", "sparsegpt", "--mask-score", "wandaa", *S)),
    ("did you mean 'once'?", ("--method", "sparsegpt", "--mask-update", "onc", *S)),
    ("did you mean 'float32'?", ("--gram-dtype", "float3", *S)),
    ("did you mean 'output1'?", ("--prune-barber", "--prune-granularity", "output", *S)),
    ("did you mean 'WD'?", ("--prune-barber", "--prune-metric", "WDD", *S)),
    ("did you mean unstructured?", ("--sparsity-type", "unstructred", *S)),
    ("neither 'unstructured' nor N:M", ("--sparsity-type", "4:2")),
    ("--threshold 2.0", ("--prune-barber", "--threshold", 2, *S)),
    ("--iterations 0", ("--use-trim", "--iterations", 0, *S)),
    ("--damping -1", ("--method", "sparsegpt", "--damping", -1, *S)),
    ("--block-size 0", ("--method", "sparsegpt", "--block-size", 0, *S)),
    ("--batch-size 0", ("--batch-size", 0, *S)),
    ("--lambda -1", ("--alloc", "owl", "--lambda", -1, *S)),
    ("nothing matches", ("--only", "nothing", *S)),
    ("do not divide into groups of 7", ("--sparsity-type", "3:7")),
    ("2 kept of 4 implies 0.5", ("--sparsity-type", "2:4", "--sparsity", 0.6)),
    ("--ratios with --sparsity", ("--ratios", "r.json", *S)),
    ("--ratios with --sparsity-type", ("--ratios", "r.json", "--sparsity-type", "2:4")),
    ("--ratios with --alloc", ("--ratios", "r.json", "--alloc", "owl")),
    ("--alloc with --sparsity-type", ("--alloc", "owl", "--sparsity-type", "2:4")),
    ("--no-propagate with --method sparsegpt", ("--no-propagate", "--method", "sparsegpt", *S)),
    ("--no-propagate with --prune-barber", ("--no-propagate", "--prune-barber", *S)),
    ("--no-propagate with --input-recalc", ("--no-propagate", "--use-trim", "--input-recalc", *S)),
    ("--input-recalc without --use-trim", ("--input-recalc", *S)),
    ("--use-trim with an N:M pattern", ("--use-trim", "--sparsity-type", "2:4")),
    ("--use-variant with --use-trim", ("--use-variant", "--use-trim", *S)),
    ("--stats-out without --use-trim", ("--stats-out", "rows.json", *S)),
    ("--stats-out without --use-trim", ("--rows", "free", "--stats-out", "rows.json", *S)),
    ("--method sparsegpt without --save-model", ("--method", "sparsegpt", *S)),
    ("--calibration with --nsamples", ("--calibration", "c", "--nsamples", 3, *S)),
]


@pytest.mark.parametrize(("message", "options"), OPTIONS, ids=[" ".join(map(str, args)) for _, args in OPTIONS])
def test_options_that_cannot_be_used(message: str, options: Args, base: Path, tmp_path: Path) -> None:
    args = prune_args(base, tmp_path, *options)
    refused(2, message, *args)
    assert tree(tmp_path) == []
    if "--stats-out" not in options and "sparsegpt" not in options:
        planned = [arg for arg in args[2:] if arg not in ("-o", tmp_path / "masks")]
        refused(2, message, "plan", base / "model", *planned)


def test_barber_refuses_side_by_side_blocks_before_the_first_pass(tmp_path: Path) -> None:
    """Phi runs attention and MLP in parallel."""
    model = save_family("phi", tmp_path / "phi")
    tokens = save_tokens(tmp_path / "tokens", vocabulary=VOCABULARY)
    args = ("--tokens", tokens, "--cache-dir", tmp_path / "cache", "--prune-barber", *S, *COMPUTE)
    refused(2, "--prune-barber cannot work on model.layers.0", "prune", model, "-o", tmp_path / "masks", *args)
    assert not [path for path in tree(tmp_path / "cache") if "parts/" in path]


def test_options_and_commands_that_do_not_exist(base: Path) -> None:
    for message, args in (
        ("No such option: --sparsityy", ("prune", base / "model", "-o", "x", "--sparsityy", 0.5)),
        ("No such command 'prun'; did you mean 'prune'?", ("prun", base / "model")),
        ("Invalid value for '--sparsity'", ("prune", base / "model", "-o", "x", "--sparsity", "half")),
        ("Missing option '--output'", ("calibrate", base / "model")),
        ("no output was given; give -o FILE for the masks", ("prune", base / "model")),
        ("Missing argument 'MODEL'", ("prune",)),
        ("Option '--sparsity' requires an argument", ("prune", base / "model", "-o", "x", "--sparsity")),
        ("Option '--use-trim' does not take a value", ("prune", base / "model", "-o", "x", "--use-trim=1")),
        ("--format 'pdf' is none of html, md; see trim report --help.", ("report", base / "model", "--format", "pdf")),
        ("--dtype 'flot32' is none of auto, float32, bfloat16, float16; did you mean 'float32'?",
         ("eval", base / "model", "--dtype", "flot32")),
        ("--method 'wandaa' is none of wanda, magnitude, obs, sparsegpt, admm; did you mean 'wanda'?",
         ("plan", base / "model", "--method", "wandaa", "--sparsity", 0.5)),
        ("--method 'owll' is none of uniform, owl, dlp, alpha, error, depth, search, auto; did you mean 'owl'?",
         ("alloc-layers", base / "model", "-o", "x", "--method", "owll", "--sparsity", 0.5)),
        ("--stats 'norm' is none of norms, inputs; did you mean 'norms'?",
         ("calibrate", base / "model", "-o", "x", "--stats", "norm")),
        ("--alloc 'alhpa' is none of uniform, owl, dlp, alpha, error, depth, search, auto; did you mean 'alpha'?",
         ("sweep", base / "model", "--sparsity", 0.5, "--alloc", "owl,alhpa")),
        ("No such option: --nsmples", ("calibrate", base / "model", "-o", "x", "--nsmples", 3)),
        ("unexpected extra argument(s) (more)", ("cache", "more")),
    ):  # fmt: skip
        done = refused(2, message, *args)
        assert done.err.count("\n") == 1, done.err


# --- the machine -----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.name != "posix" or os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system takes root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(base: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = "the disk is full"
    cache = ("--cache-dir", tmp_path / "cache")
    tokens = save_tokens(tmp_path / "tokens", vocabulary=64, nsamples=200, seqlen=32)
    trim_json("calibrate", base / "model", "-o", tmp_path / "calib", "--tokens", tokens, *cache, *COMPUTE)
    calls: dict[str, Args] = {
        "calibrate": ("calibrate", base / "model", "-o", small_disk / "calib", "--tokens", tokens, *cache, *COMPUTE),
        "prune": (
            "prune", base / "model", "-o", small_disk / "masks", "--save-model", small_disk / "out", *S,
            "--calibration", base / "calib", *cache, *COMPUTE,
        ),
        "the cache": (
            "prune", base / "model", "-o", tmp_path / "masks", "--stats-out", tmp_path / "r.json", "--use-trim", *S,
            "--calibration", tmp_path / "calib", "--save-model", tmp_path / "out", "--method", "sparsegpt",
            "--cache-dir", small_disk / "cache", *COMPUTE,
        ),
        "apply-masks": ("apply-masks", base / "model", base / "masks", "-o", small_disk / "out"),
    }  # fmt: skip
    for name in ("prune", "apply-masks"):
        refused(1, f"the disk of {small_disk / 'out'} has 64.0 KiB free", *calls[name])
    # It fills while they run.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    for args in calls.values():
        refused(1, full, *args)
        assert [path for path in tree(small_disk) if "cache" not in path] == []
        assert not [path for path in tree(tmp_path) if path.endswith(".part")]
        assert not {"masks", "out", "r.json"} & {path.name for path in tmp_path.iterdir()}
    # With room again the interrupted prune ends without another pass.
    call: list[Any] = list(calls["prune"])
    elsewhere = [tmp_path / arg.name if isinstance(arg, Path) and arg.parent == small_disk else arg for arg in call]
    assert trim_json(*elsewhere)["resumed"] == 2
