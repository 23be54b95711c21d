"""The program: help, output streams, exit statuses, and the stages one after the other."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer
from safetensors.torch import load_file

import trimcli.commands.prune
from tests.small_models import llama_config, random_model, save
from tests.trim_cli import COMPUTE, save_tokens, tree, trim, trim_json, zeros
from trimcli.cli.app import app, main
from trimcli.cli.boundary import INTERRUPTED, explain
from trimcli.demo import write_texts
from trimcli.files.manifest import COMMAND_LINE

PROGRAM: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = {name: PROGRAM.get_command(None, name) for name in PROGRAM.list_commands(None)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("cli")
    save(random_model(llama_config()), base / "model")
    save_tokens(base / "tokens.safetensors", vocabulary=64)
    return base


def prune_args(base: Path, tmp_path: Path, *more: object) -> tuple[object, ...]:
    run = ("--tokens", base / "tokens.safetensors", "--cache-dir", tmp_path / "cache", *COMPUTE)
    return ("prune", base / "model", "-o", tmp_path / "masks", "--sparsity", 0.5, *run, *more)


# --- help ------------------------------------------------------------------------------------------------


def test_the_help_names_every_command_and_where_to_start() -> None:
    shown = trim("--help")
    assert shown.status == 0
    for name, command in COMMANDS.items():
        assert name in shown.out or command.hidden
    assert "trim demo" in shown.out
    assert {"calibrate", "alloc-layers", "prune", "apply-masks", "eval", "plan", "verify", "cache"} <= set(COMMANDS)
    for topic in ("Stages, each with a file:", "Measure and check:", "More:"):
        assert shown.out.count(topic) == 1
    order = [shown.out.index(f"\n  {name} ") for name in COMMANDS]
    assert order == sorted(order)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches_with_an_example(command: str) -> None:
    shown = trim(command, "--help")
    assert shown.status == 0
    assert f"trim {command} " in COMMANDS[command].help.split("Example")[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_is_for(command: str) -> None:
    for parameter in COMMANDS[command].params:
        if getattr(parameter, "hidden", False) or parameter.name == "help":
            continue
        assert getattr(parameter, "help", None), (command, parameter.name)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_the_options_of_all(command: str) -> None:
    taken = {option for parameter in COMMANDS[command].params for option in parameter.opts}
    everywhere = {"--device", "--dtype", "--seed", "--quiet", "--json", "--force", "--cache-dir", "--revision"}
    assert everywhere | {"--trust-remote-code"} <= taken


HEAVY = {"torch", "transformers", "numpy", "safetensors", "datasets", "huggingface_hub", "lm_eval", "plotly", "jinja2"}


def started(*args: str) -> tuple[int, str, str]:
    """The program in a process of its own: exit status, stdout, stderr; it must not import anything heavy."""
    script = (
        "import sys\n"
        "from trimcli.cli.app import app\n"
        f"try:\n    app({list(args)!r}, prog_name='trim')\nexcept SystemExit as end:\n    status = end.code or 0\n"
        f"heavy = {HEAVY!r} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(status)\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "AssertionError" not in found.stderr, found.stderr
    return found.returncode, found.stdout, found.stderr


def test_help_and_start_import_no_torch() -> None:
    status, out, err = started("--help")
    assert (status, err) == (0, "")
    assert "prune" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_imports_nothing_heavy(command: str) -> None:
    """What every alternative is for, and the options of each, come from the registries: these import no torch."""
    status, out, err = started(command, "--help")
    assert (status, err) == (0, "")
    assert f"Usage: trim {command}" in out


def test_what_typer_refuses_it_refuses_at_once() -> None:
    status, out, err = started("prune", "model", "-o", "masks", "--method", "wandaa", "--sparsity", "0.5")
    assert (status, out) == (2, "")
    assert err == "trim: --method 'wandaa' is none of wanda, magnitude, obs, sparsegpt, admm; did you mean 'wanda'?\n"
    assert started("--version")[0] == 0


def test_the_version() -> None:
    from importlib.metadata import version

    assert trim("--version").out == f"trim {version('trimcli')}\n"


def test_no_arguments_show_the_help() -> None:
    shown = trim()
    assert shown.status in (0, 2)
    assert "Usage" in shown.out + shown.err


# --- streams ---------------------------------------------------------------------------------------------


def test_results_go_to_stdout_and_the_rest_to_stderr(base: Path, tmp_path: Path) -> None:
    shown = trim(*prune_args(base, tmp_path))
    assert shown.status == 0
    assert "50.0000%" in shown.out
    assert "model.layers.1" in shown.out
    assert "14 matrices" in shown.err  # the plan's head
    assert "━" not in shown.err  # no bars where stderr is no terminal
    assert "\x1b" not in shown.out + shown.err


def test_json_is_one_document(base: Path, tmp_path: Path) -> None:
    shown = trim(*prune_args(base, tmp_path, "--json"))
    document = json.loads(shown.out)
    assert document["masks"] == str(tmp_path / "masks")
    assert document["sparsity"] == 0.5
    assert document["resumed"] == 0
    assert document["peak_memory"]["anonymous"] > 0


def test_quiet_is_silent(base: Path, tmp_path: Path) -> None:
    shown = trim(*prune_args(base, tmp_path, "--quiet"))
    assert (shown.status, shown.out, shown.err) == (0, "", "")
    assert (tmp_path / "masks").is_file()
    failed = trim(*prune_args(base, tmp_path, "--quiet"))
    assert (failed.status, failed.out) == (2, "")
    assert failed.err.count("\n") == 1


def test_files_say_which_command_made_them(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = [str(arg) for arg in prune_args(base, tmp_path, "--save-model", tmp_path / "pruned")]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/trim", *args])
    assert trim(*args).status == 0
    COMMAND_LINE.set(None)
    line = shlex.join(["trim", *args])
    mark = json.loads((tmp_path / "pruned" / "trim.json").read_text())
    assert mark["command_line"] == line
    assert line in (tmp_path / "pruned" / "README.md").read_text()


# --- exit statuses ---------------------------------------------------------------------------------------


class ProblemError(Exception):
    pass


class PanicError(BaseException):
    """As libraries in Rust raise."""


@pytest.mark.parametrize(
    ("problem", "status", "sentence"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 1, "the disk is full writing /x"),
        (PermissionError(errno.EACCES, "denied", "/x"), 1, "no permission for /x (denied)"),
        (PermissionError("in use"), 1, "no permission for a file"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), 1, "no permission for /x (Read-only file system)"),
        (OSError(errno.EIO, "Input/output error"), 1, "a file cannot be used (Input/output error)"),
        (OSError(errno.EIO, "Input/output error", "/x"), 1, "/x cannot be used (Input/output error)"),
        (PanicError("in another library"), 1, "internal error, PanicError: in another library"),
        (MemoryError(), 1, "memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "memory ran out"),
        (ProblemError("odd\nmore"), 1, "internal error, ProblemError: odd; set TRIM_TRACEBACK=1"),
    ],
)
def test_what_happens_on_the_way(
    problem: BaseException, status: int, sentence: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise problem

    assert explain(problem)[0] == status
    monkeypatch.setattr(trimcli.commands.prune, "prune", fail)
    done = trim(*prune_args(base, tmp_path))
    assert (done.status, done.out) == (status, "")
    assert done.err.startswith(f"trim: {sentence}")
    assert done.err.count("\n") == 1


def test_a_traceback_on_request(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ProblemError("odd")

    monkeypatch.setattr(trimcli.commands.prune, "prune", fail)
    monkeypatch.setenv("TRIM_TRACEBACK", "1")
    with pytest.raises(AssertionError, match="odd"):
        trim(*prune_args(base, tmp_path))


# --- the stages ------------------------------------------------------------------------------------------


def test_the_stages_one_after_the_other(nano_qwen2: Path, tmp_path: Path) -> None:
    texts = write_texts(tmp_path)
    run = ("--cache-dir", tmp_path / "cache", *COMPUTE)
    drawn = ("--dataset", texts.calibration, "--nsamples", 4, "--seqlen", 64)
    calib, ratios, masks = (tmp_path / name for name in ("calib", "ratios.json", "masks"))
    made = trim_json("calibrate", nano_qwen2, "-o", calib, *drawn, *run)
    assert (made["nsamples"], made["seqlen"], made["linears"]) == (4, 64, 28)
    owl = ("--method", "owl", "--sparsity", 0.6, "--calibration", calib)
    allocated = trim_json("alloc-layers", nano_qwen2, "-o", ratios, *owl, *run)
    assert len(allocated["sparsity"]) == 28
    pruned = trim_json("prune", nano_qwen2, "-o", masks, "--calibration", calib, "--ratios", ratios, *run)
    applied = trim_json("apply-masks", nano_qwen2, masks, "-o", tmp_path / "pruned")
    assert applied["zeros"] == pruned["zeros"]
    ppl = ("--ppl", texts.measurement, "--seqlen", 64, "--max-windows", 4)
    measured = trim_json("eval", tmp_path / "pruned", *ppl, *run)
    dense = trim_json("eval", nano_qwen2, *ppl, *run)
    assert measured["perplexity"][0]["value"] > dense["perplexity"][0]["value"]
    assert measured["sparsity"]["total"] == pytest.approx(0.6, abs=1e-4)
    assert trim("verify", tmp_path / "pruned").status == 0
    stored = load_file(tmp_path / "pruned" / "model.safetensors")
    assert sum(zeros(stored[f"{name}.weight"]) for name in allocated["sparsity"]) == pruned["zeros"]
    for path in (calib, ratios, masks):
        assert path.is_file()
    assert not [path for path in tree(tmp_path) if path.endswith((".part", ".lock"))]


def test_one_go_leaves_the_stages_in_the_cache(base: Path, tmp_path: Path) -> None:
    args = prune_args(base, tmp_path, "--alloc", "owl", "--use-trim", "--iterations", 2)
    assert trim(*args).status == 0
    kinds = {entry["kind"] for entry in trim_json("cache", "--cache-dir", tmp_path / "cache")["entries"]}
    assert kinds == {"calibration", "proofs", "ratios"}
    assert trim_json(*args, "--force")["sparsity"] == pytest.approx(0.5, abs=1e-3)


def test_an_interrupt_before_a_command_begins_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for place in ("trimcli.cli.app.prepare_streams", "trimcli.cli.app.Program.resolve_command"):
        with monkeypatch.context() as patched:
            patched.setattr(place, stop)
            done = trim("verify", "x")
        assert (done.status, done.out) == (130, "")
        assert done.err == f"trim: {INTERRUPTED}\n"


def test_a_signal_that_a_library_makes_another_error_of(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swallow(sent: int, *_: Any, **__: Any) -> None:
        try:
            os.kill(os.getpid(), sent)
            time.sleep(1)
        except BaseException:
            raise ValueError("could not determine the shape") from None

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for sent, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        monkeypatch.setattr(trimcli.commands.prune, "prune", partial(swallow, sent))
        done = trim(*prune_args(base, tmp_path))
        assert done.status == status
        assert done.err == (f"trim: {INTERRUPTED}\n" if status == 130 else "")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_ctrl_c_outside_of_a_command_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trimcli.cli.app.app", stopped)
    monkeypatch.setattr("trimcli.cli.app.collect_rarely", lambda: None)  # it would go on in the tests after this
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err.startswith("trim: interrupted; repeat the command")
