"""Every name on every stream: other encodings, markup, and what terminals obey."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report_documents import results, task
from tests.small_models import llama_config, random_model, save
from tests.trim_cli import COMPUTE, save_tokens, trim, trim_json
from trimcli.console import well_formed

ROOT = Path(__file__).parents[2]
NAME = "Löwe \U0001f981 [red]"
EMOJI = "# Ein Löwe \U0001f981\n"
# How python spells a stream's encoding, and what is there of the names.
SETTINGS = {
    "ascii": {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    "cp1252": {"LC_ALL": "C", "PYTHONIOENCODING": "cp1252"},
    "locale": {"LC_ALL": "C", "PYTHONIOENCODING": ""},
    "utf-8": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8"},
}
# The narrowest, and the others where time allows.
EACH = ["ascii", *(pytest.param(one, marks=pytest.mark.slow) for one in ("utf-8", "cp1252", "locale"))]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a name of its own: `model` with a README, `calib`, results of two runs."""
    base = tmp_path_factory.mktemp("encodings") / NAME
    base.mkdir()
    save(random_model(llama_config()), base / "model")
    (base / "model" / "README.md").write_text(EMOJI, encoding="utf-8")
    tokens = save_tokens(base / "tokens.safetensors", vocabulary=64)
    trim_json("calibrate", base / "model", "-o", base / "calib", "--tokens", tokens, *COMPUTE)
    results(base / "dense.json", label=NAME)
    results(base / "pruned.json", 0.5, label="[/red]", tasks={"quiz | `x`": task(0.5)})
    return base


def trim_in(setting: str, *args: object) -> tuple[str, str]:
    """What a process of its own prints, decoded, on stdout and stderr; it must succeed."""
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", **SETTINGS[setting]}
    command = [sys.executable, "-m", "trimcli", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    encoding = {"locale": "ascii"}.get(setting, setting)
    out, err = done.stdout.decode(encoding), done.stderr.decode(encoding)
    assert done.returncode == 0, err
    return out, err


# What is asked of each command, by setting, beside that it ends well.
LION = {"ascii": "L\\xf6we \\U0001f981 [red]", "cp1252": "Löwe \\U0001f981 [red]", "utf-8": NAME}
LION["locale"] = LION["ascii"]
BAR = {setting: "█" if setting == "utf-8" else "#" for setting in SETTINGS}


@pytest.mark.parametrize("setting", EACH)
def test_a_run_ends_well_whatever_the_encoding(setting: str, made: Path, tmp_path: Path) -> None:
    out = tmp_path / NAME
    out.mkdir()
    target = ("--calibration", made / "calib", "--sparsity", 0.5, "--cache-dir", tmp_path / "cache", *COMPUTE)
    shown, said = trim_in(setting, "prune", made / "model", "-o", out / "masks", "--save-model", out / "model", *target)
    assert BAR[setting] * 12 in shown
    assert f"{LION[setting]}/masks" in shown
    assert "matrices" in said
    # The files are the same everywhere.
    readme = (out / "model" / "README.md").read_text(encoding="utf-8")
    assert readme.startswith(EMOJI)
    assert NAME in readme
    assert str(out / "masks") in json.loads((out / "model" / "trim.json").read_text(encoding="utf-8"))["command_line"]
    verified, _ = trim_in(setting, "verify", out / "model")
    assert BAR[setting] * 12 in verified


@pytest.mark.parametrize("setting", EACH)
def test_tables_and_json_in_every_encoding(setting: str, made: Path, tmp_path: Path) -> None:
    files = (made / "dense.json", made / "pruned.json")
    table, _ = trim_in(setting, "compare", *files)
    plus = "+-" if setting in ("ascii", "locale") else "±"
    assert LION[setting] in table
    assert f"0.5000 {plus} 0.0100" in table
    assert "[/red]" in table
    document, _ = trim_in(setting, "compare", *files, "--json")
    assert [row["label"] for row in json.loads(document)["rows"]] == [NAME, "[/red]"]
    report, _ = trim_in(setting, "report", *files, "-o", tmp_path / f"{NAME}.html")
    assert f"{LION[setting]}.html" in report
    page = (tmp_path / f"{NAME}.html").read_text(encoding="utf-8")
    assert NAME in page
    stream, _ = trim_in("utf-8", "report", *files, "--format", "md", "-o", "-")
    assert "Löwe \U0001f981" in stream


def test_help_and_errors_in_ascii(made: Path) -> None:
    assert "Example" in trim_in("ascii", "prune", "--help")[0]
    environment = {**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "trimcli", "compare", str(made / "no.json"), "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    shown = str(made / "no.json").encode("ascii", "backslashreplace").decode()
    assert done.stderr == f"trim: there is no file {shown}; check the path.\n"


def test_bytes_that_are_no_text_in_a_name(made: Path, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xff.json"))
    odd.write_bytes((made / "dense.json").read_bytes())
    page = tmp_path / "page.html"
    for command in ("compare", "report"):
        for more in (("-o", page), ("--format", "md")) if command == "report" else ((), ("--json",)):
            assert trim(command, odd, *more).status == 0
    assert "r\\xff.json" in page.read_text(encoding="utf-8")
    assert well_formed("r\udcff L\udcc3\udcb6we \ud800") == "r\\udcff L\\udcc3\\udcb6we \\ud800"
    assert well_formed("r\udcff L\udcc3\udcb6we") == "r\\xff Löwe"


OBEYED = "\x1b[31mred\x1b[0m \x07\x9b1m \u202egpj.exe\u2066 \u2028\r"


def test_what_a_terminal_obeys_is_shown(tmp_path: Path) -> None:
    folder = tmp_path / OBEYED
    folder.mkdir()
    path = results(folder / "run.json", label=OBEYED)
    inside = r"\x1b[31mred\x1b[0m \x07\x9b1m \u202egpj.exe\u2066 \u2028\r"
    report = ("report", path, "-o", folder / "report.md", "--format", "md")
    for args, shown in (
        (("compare", path), inside),
        (report, inside),
        (("report", path, "--format", "md"), r"\x1b\[31mred"),
        (("compare", folder / "none.json"), inside),
        (("cache", "--cache-dir", folder), inside),
    ):
        done = trim(*args)
        said = done.out + done.err
        assert shown in said, args
        assert not {one for one in said if one in OBEYED and not one.isalnum()} - set("[ ;."), args
    assert trim_json("compare", path)["rows"][0]["label"] == OBEYED
    assert not set("\x1b\x07\x9b\u202e\u2066\u2028\r") & set(trim("compare", path, "--json").out)


def test_names_that_look_like_markup(made: Path, tmp_path: Path) -> None:
    for name in ("[red]", "[", "a[b"):
        folder = tmp_path / name
        folder.mkdir()
        target = ("--calibration", made / "calib", "--sparsity", 0.5, "--cache-dir", tmp_path / "cache", *COMPUTE)
        done = trim("prune", made / "model", "-o", folder / "masks", *target)
        assert done.status == 0
        assert f"{folder / 'masks'} (" in done.out
        assert f"{folder / 'none'}" in trim("verify", folder / "none").err
