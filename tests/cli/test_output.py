"""What commands print: tables and facts that read as they stand, JSON without NaN, sizes for people."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from trimcli.cli.output import bar, emit_json, facts, memory, rows_table, show, size, spread

ODD = ["N:M: kept", "2:4, 3:8:", ":smile:", "[bold]x[/bold]", "[0, 1)", r"C:\models\[x]", "a:m:b"]


@pytest.mark.parametrize("text", ODD)
def test_text_is_printed_as_it_stands(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    show(rows_table(("name", text), [(text, "1"), ("x", text)], f"about {text}"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == f"about {text}"
    assert [text in line for line in lines[1:]] == [True, True, True]
    facts({text: text, "left out": None, "path": Path(text)})
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == [*text.split(), *text.split()]
    assert out[1].split() == ["path", *str(Path(text)).split()]
    assert len(out) == 2
    show(text)
    assert capsys.readouterr().out == f"{text}\n"


def test_a_table_in_a_pipe_is_as_wide_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    name = "a.very.long.name.of.a.linear" * 9
    show(rows_table(("linear", "zeros"), [(name, "1,024")]))
    assert capsys.readouterr().out.splitlines()[1].split() == [name, "1,024"]


def test_json_has_no_nan_and_paths_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    document: dict[str, Any] = {
        "a": math.nan,
        "b": [math.inf, 1.5],
        "path": Path("x/y"),
        "set": (1, 2),
        "ä": frozenset({3}),
    }
    emit_json(document)
    out = capsys.readouterr().out
    assert json.loads(out) == {"a": None, "b": [None, 1.5], "path": "x/y", "set": [1, 2], "ä": [3]}
    assert "ä" in out


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 30, "3.0 GiB"),
     (3 << 42, "12288.0 GiB")],
)  # fmt: skip
def test_sizes(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


def test_small_words() -> None:
    assert memory({"anonymous": 1024, "device": 2 << 20}) == "1.0 KiB anonymous, 2.0 MiB device"
    assert [bar(share, 4) for share in (0, 0.5, 1)] == ["", "██", "████"]
    assert spread([0.5, 0.5]) == "0.5000"
    assert spread([0.25, 0.75, 0.5]) == "0.2500 to 0.7500"


def test_text_stands_to_the_left_and_numbers_to_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("a", "7", "csr", "█"), ("bcdef", "1,024", "dense", "██")]
    show(rows_table(("name", "zeros", "form", ""), rows, words=["form"]))
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "name   zeros  form",
        "a          7  csr    █",
        "bcdef  1,024  dense  ██",
    ]
