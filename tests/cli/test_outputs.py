"""Outputs through the command line: none is an input, none is lost, and what cannot be written is told at once."""

import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_errors import refused
from tests.small_models import NANO as MODEL
from tests.small_models import llama_config, random_model, save
from tests.trim_cli import COMPUTE, save_tokens, tree, trim, trim_json
from trimcli.demo import write_texts

Args = tuple[object, ...]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, `tokens.safetensors`, `calib`, `ratios.json`, `masks`, `rows.json`, `pruned`, `packed`, `text.txt`."""
    base = tmp_path_factory.mktemp("outputs")
    save(random_model(llama_config()), base / "model")
    tokens = save_tokens(base / "tokens.safetensors", vocabulary=64)
    write_texts(base).measurement.rename(base / "text.txt")
    run = ("--cache-dir", base / "cache", *COMPUTE)
    trim_json("calibrate", base / "model", "-o", base / "calib", "--tokens", tokens, *run)
    trim_json("alloc-layers", base / "model", "-o", base / "ratios.json", "--sparsity", 0.5)
    outputs = ("-o", base / "masks", "--save-model", base / "pruned", "--stats-out", base / "rows.json")
    with_trim = ("--use-trim", "--iterations", 1, "--calibration", base / "calib", "--sparsity", 0.5)
    trim_json("prune", base / "model", *outputs, *with_trim, *run)
    trim_json("apply-masks", base / "model", base / "masks", "-o", base / "packed", "--format", "packed")
    text = (base / "text.txt", "--seqlen", 32, "--max-windows", 2)
    trim_json("eval", MODEL, "-o", base / "results.json", "--ppl", *text, *run)
    return base


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    """A copy of what was made, to be put at risk."""
    return Path(shutil.copytree(made, tmp_path / "work"))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in tree(folder) if (folder / name).is_file()}


# A command each, with what it reads, and the output that is one of these. {0} is the folder.
MASKS = "prune {0}/model --calibration {0}/calib --sparsity 0.5 -o "
ITSELF = [
    "calibrate {0}/model --tokens {0}/tokens.safetensors -o {0}/tokens.safetensors",
    "calibrate {0}/model --dataset {0}/text.txt -o {0}/text.txt",
    "calibrate {0}/model --tokens {0}/tokens.safetensors -o {0}/model/model.safetensors",
    "calibrate {0}/model --tokens {0}/tokens.safetensors -o {0}/model/config.json",
    "alloc-layers {0}/model --method owl --sparsity 0.5 --calibration {0}/calib -o {0}/calib",
    "alloc-layers {0}/model --sparsity 0.5 -o {0}/model/config.json",
    "alloc-layers {0}/model --import {0}/text.txt --method owl -o {0}/text.txt",
    "alloc-layers {0}/model --method alpha --sparsity 0.5 --metrics-cache {0}/new.json -o {0}/new.json",
    MASKS + "{0}/calib",
    MASKS + "{0}/link-to-calib",
    MASKS + "{0}/hard-link-to-calib",
    MASKS + "{0}/model/../calib",
    MASKS + "{0}/new --save-model {0}/model",
    MASKS + "{0}/new --use-trim --stats-out {0}/calib",
    MASKS.replace("--sparsity 0.5", "--ratios {0}/ratios.json") + "{0}/new --use-trim --stats-out {0}/ratios.json",
    MASKS + "{0}/model/model.safetensors",
    "alloc-layers {0}/linked --sparsity 0.5 -o {0}/pruned/config.json",
    "prune {0}/pruned --method magnitude --sparsity 0.75 -o {0}/new --save-model {0}/pruned",
    "prune {0}/model --tokens {0}/tokens.safetensors --sparsity 0.5 -o {0}/tokens.safetensors",
    "prune {0}/model --dataset {0}/text.txt --sparsity 0.5 -o {0}/text.txt",
    "prune {0}/model --method magnitude --ratios {0}/ratios.json -o {0}/ratios.json",
    "apply-masks {0}/model {0}/masks -o {0}/model",
    "apply-masks {0}/model {0}/masks -o {0}/masks",
    "apply-masks {0}/model {0}/pruned/inside -o {0}/pruned",
    "apply-masks {0}/pruned/below {0}/masks -o {0}/pruned",
    "apply-masks {0}/pruned {0}/masks -o {0}/link-to-pruned",
    "eval {0}/model --ppl {0}/text.txt -o {0}/text.txt",
    "eval {0}/model --ppl {0}/text.txt --masks {0}/masks -o {0}/masks",
    "eval {0}/model --ppl {0}/text.txt -o {0}/model/tokenizer.json",
    "eval {0}/model --ppl {0}/text.txt -o {0}/model/trim.json",
    "eval {0}/model --tasks {0}/quiz.yaml -o {0}/quiz.yaml",
    "eval {0}/model --tasks quiz --include-path {0}/quiz -o {0}/quiz/quiz.yaml",
    "eval {0}/model --tasks quiz --include-path {0}/quiz --log-samples {0}/quiz",
    "eval {0}/model --tasks quiz --ppl {0}/quiz/quiz.jsonl --log-samples {0}/quiz",
    "report {0}/results.json --format md -o {0}/results.json",
    "report {0}/rows.json --format md -o {0}/rows.safetensors",
    "report {0}/pruned --format md -o {0}/pruned/README.md",
    "unpack {0}/packed -o {0}/packed",
    "export {0}/pruned -o {0}/pruned",
    "sweep {0}/model --sparsity 0.5 --tokens {0}/tokens.safetensors -o {0}/tokens.safetensors",
    "sweep {0}/model --sparsity 0.5 --dataset {0}/text.txt -o {0}/text.txt",
    MASKS + "{0}/new --save-model {0}/pruned --cache-dir {0}/pruned/cache",
]


@pytest.mark.parametrize("line", ITSELF)
def test_no_output_is_an_input(work: Path, line: str) -> None:
    (work / "link-to-calib").symlink_to("calib")
    (work / "link-to-pruned").symlink_to("pruned")
    os.link(work / "calib", work / "hard-link-to-calib")
    (work / "linked").mkdir()  # as the hub's cache has models
    (work / "linked" / "config.json").symlink_to("../pruned/config.json")
    for name in ("quiz.yaml", "quiz/quiz.yaml", "quiz/quiz.jsonl", "pruned/inside", "pruned/cache/kept"):
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_text("mine")
    shutil.copytree(work / "model", work / "pruned" / "below")
    before = bytes_of(work)
    words = [word.format(work) for word in line.split()]
    for force in ((), ("--force",)):
        said = "would write two outputs" if "new.json" in line else "which the run reads; name another output."
        refused(2, said, *words, *force)
        assert bytes_of(work) == before
    assert not [name for name in tree(work) if name.endswith((".part", ".old"))]


def test_what_trim_wrote_beside_a_model_is_replaced(work: Path) -> None:
    results = work / "pruned" / "ratios.json"
    for sparsity in (0.5, 0.25):
        force = ("--force",) if results.exists() else ()
        trim_json("alloc-layers", work / "pruned", "-o", results, "--sparsity", sparsity, *force)
        assert json.loads(results.read_text())["target"] == sparsity
    assert trim("verify", work / "pruned").status == 0


# --- streams and special files ---------------------------------------------------------------------------


def json_commands(base: Path) -> list[Args]:
    ppl = ("--ppl", base / "text.txt", "--seqlen", 32, "--max-windows", 2, *COMPUTE)
    return [("alloc-layers", base / "model", "--sparsity", 0.5), ("eval", MODEL, *ppl)]


@pytest.mark.parametrize("stdout", ["-", "/dev/stdout"])
def test_json_is_streamed(made: Path, stdout: str) -> None:
    for args, schema in zip(json_commands(made), ("trim.layer-sparsity/1", "trim.results/1"), strict=True):
        for more in ((), ("--quiet",), ("--force",)):
            done = trim(*args, "-o", stdout, *more)
            assert (done.status, done.err) == (0, "")
            assert done.document["schema"] == schema  # one document, and no table below it
        refused(2, f"--json and -o {stdout} both write to standard output", *args, "-o", stdout, "--json")
    for form, begins in (("md", "### Results"), ("html", "<!doctype html>")):
        done = trim("report", made / "results.json", "--format", form, "-o", stdout)
        assert done.status == 0
        assert done.out.lower().startswith(begins.lower())


def test_a_pipe_receives_json(made: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    done = trim("alloc-layers", made / "model", "--sparsity", 0.5, "-o", tmp_path / "pipe")
    reader.join(60)
    assert done.status == 0
    assert json.loads(received[0])["target"] == 0.5
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_reader_that_leaves_is_told_of(made: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "trimcli", "report", str(made / "results.json"), "--format", "md", "-o", "-"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr == "trim: what was to read the output closed it; the output is not whole.\n"


def file_commands(base: Path, output: object, cache: Path) -> list[Args]:
    run = ("--cache-dir", cache, *COMPUTE)
    masks = ("--calibration", base / "calib", "--sparsity", 0.5, *run)
    return [
        ("calibrate", base / "model", "--tokens", base / "tokens.safetensors", "-o", output, *run),
        ("prune", base / "model", "-o", output, *masks),
        ("prune", base / "model", "-o", cache / "m", "--save-model", output, *masks),
        ("prune", base / "model", "-o", cache / "m", "--use-trim", "--stats-out", output, *masks),
        ("apply-masks", base / "model", base / "masks", "-o", output),
        ("unpack", base / "packed", "-o", output),
        ("export", base / "pruned", "-o", output),
        ("demo", "-o", output),
    ]


def test_what_is_no_json_is_not_streamed(made: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for args in file_commands(made, "-", tmp_path):
        refused(2, "is standard output, which takes JSON and reports alone; name a", *args)
    for args in file_commands(made, tmp_path / "pipe", tmp_path):
        message = "exists already" if args[0] == "demo" else "is a pipe, which no output replaces; name a file."
        refused(2, message, *args)
    assert tree(tmp_path) == ["pipe"]


def test_no_device_is_replaced(made: Path, tmp_path: Path) -> None:
    (tmp_path / "null").symlink_to("/dev/null")
    for null in ("/dev/null", tmp_path / "null"):
        commands = [(*args, "-o", null) for args in json_commands(made)] + file_commands(made, null, tmp_path)[:-1]
        for args in commands:
            refused(2, "is a device, which no output replaces; name a file.", *args, "--force")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert tree(tmp_path) == ["null"]


@pytest.mark.parametrize("command", ["prune", "apply-masks", "alloc-layers"])
def test_a_linked_output_is_written_where_it_leads(command: str, work: Path) -> None:
    (work / "far").mkdir()
    (work / "out").symlink_to("far/real")
    call: dict[str, Args] = {
        "prune": ("prune", work / "model", "--method", "magnitude", "--sparsity", 0.5, *COMPUTE),
        "apply-masks": ("apply-masks", work / "model", work / "masks"),
        "alloc-layers": ("alloc-layers", work / "model", "--sparsity", 0.5),
    }
    for force in ((), ("--force",)):
        trim_json(*call[command], "-o", work / "out", *force)
        assert (work / "out").readlink() == Path("far/real")
        assert [path.name for path in (work / "far").iterdir()] == ["real"]
    refused(2, "exists already; give --force", *call[command], "-o", work / "out")


# --- before the work -------------------------------------------------------------------------------------


@contextlib.contextmanager
def nobody() -> Iterator[Path]:
    """A folder that anyone may write to, while this process has no rights beyond any user's."""
    folder = Path(tempfile.mkdtemp(prefix="trim-nobody-"))
    folder.chmod(0o777)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        yield folder
    finally:
        if root:
            os.seteuid(0)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o777)
        shutil.rmtree(folder)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a model is opened."""

    def opened(*_: object, **__: object) -> None:
        pytest.fail("the work has begun")

    monkeypatch.setattr("trimcli.files.checkpoint.Checkpoint.open", opened)


@pytest.mark.usefixtures("no_work")
def test_outputs_that_cannot_be_written_are_refused_at_once(made: Path) -> None:
    with nobody() as folder:
        locked = folder / "locked"
        locked.mkdir(mode=0o555)
        (folder / "cache").mkdir()
        commands = file_commands(made, locked / "out", folder / "cache")
        commands += [(*args, "-o", locked / "out") for args in json_commands(made)]
        for args in commands:
            refused(2, f"{locked / 'out'} cannot be written in {locked} (Permission denied)", *args)
        long = "x" * 250
        refused(2, f"{long} cannot be written in", *json_commands(made)[0], "-o", folder / long)
        assert tree(folder) == ["cache", "locked"]


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("folder", [".", "./", "/", ""])
def test_a_folder_without_a_name_is_refused_at_once(folder: str, work: Path) -> None:
    pruning = ("prune", work / "model", "--calibration", work / "calib", "--sparsity", 0.5, "--save-model", folder)
    for more in ((), ("-o", work / "m"), ("--force",)):
        refused(2, "is a folder without a name of its own; name a file or directory", *pruning, *more)


@pytest.mark.usefixtures("no_work")
def test_a_file_in_the_place_of_a_directory_is_refused_at_once(work: Path) -> None:
    pruning = ("prune", work / "model", "--calibration", work / "calib", "--sparsity", 0.5, "--force")
    refused(
        2,
        "is a file where a directory is to be written",
        *pruning,
        "-o",
        work / "m",
        "--save-model",
        work / "rows.json",
    )
    refused(2, "is a directory where a file is to be written", *pruning, "-o", work / "pruned")
    (work / "mount").mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os.path, "ismount", lambda path: Path(path).name == "mount")
        refused(2, "is a mount point", *pruning, "-o", work / "m", "--save-model", work / "mount")


def test_what_may_not_be_read_is_not_called_missing() -> None:
    with nobody() as folder:
        for name in ("calib", "ratios.json", "masks"):
            (folder / name).write_text("{}")
            (folder / name).chmod(0)
        model = folder / "model"
        model.mkdir()
        (model / "config.json").write_text((MODEL / "config.json").read_text())
        (model / "model.safetensors").write_bytes((MODEL / "model.safetensors").read_bytes())
        (model / "model.safetensors").chmod(0)
        target = ("-o", folder / "out", "--sparsity", 0.5, "--cache-dir", folder / "cache", *COMPUTE)
        for name, args in (
            ("model/model.safetensors", ("prune", model, "--method", "magnitude", *target)),
            ("calib", ("prune", MODEL, "--calibration", folder / "calib", *target)),
            ("masks", ("apply-masks", MODEL, folder / "masks", "-o", folder / "out")),
            ("ratios.json", ("report", folder / "ratios.json", "--format", "md")),
        ):
            refused(2, f"there is no permission to read {folder / name}; change its rights.", *args)


Usage = namedtuple("Usage", "total used free")


def test_room_is_counted_before_the_work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = {"free": 0}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, room["free"]))

    def begun(*_: object, **__: object) -> None:
        pytest.fail("the work has begun")

    passes = pytest.MonkeyPatch()
    passes.setattr("trimcli.pipeline.passes.Passes.first", begun)
    run = ("--cache-dir", tmp_path / "cache", *COMPUTE)
    masks = ("--calibration", made / "calib", "--sparsity", 0.5, *run)
    plan: dict[str, Any] = trim_json("plan", made / "model", "--save-model", tmp_path / "out", *masks)
    both = plan["mask_bytes"] + plan["model_bytes"]
    prune = ("prune", made / "model", "-o", tmp_path / "masks", "--save-model", tmp_path / "out", *masks)
    for free in (plan["mask_bytes"] - 1, both - 1):
        room["free"] = free
        refused(1, "are to be written to it; free space or name an output on another disk.", *prune)
    passes.undo()
    for args in (
        ("apply-masks", made / "model", made / "masks", "-o", tmp_path / "out"),
        ("apply-masks", made / "model", made / "masks", "-o", tmp_path / "out", "--format", "packed"),
        ("unpack", made / "packed", "-o", tmp_path / "out"),
        ("export", made / "pruned", "-o", tmp_path / "out"),
    ):
        room["free"] = 1000
        refused(1, f"the disk of {tmp_path / 'out'} has 1000 B free", *args)
        assert not [name for name in tree(tmp_path) if not name.startswith("cache")]
    room["free"] = both
    trim_json(*prune)
