"""Standard input in the place of a file."""

import gc
import io
import sys
from pathlib import Path

import pytest

from trimcli.errors import OptionError
from trimcli.text.stdin import check_stdin, file_of


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def stream(content: bytes, kind: type[io.TextIOWrapper] = io.TextIOWrapper) -> io.TextIOWrapper:
    return kind(io.BytesIO(content), encoding="utf-8")


def test_a_file_is_itself() -> None:
    assert file_of("a.txt") == file_of(Path("a.txt")) == Path("a.txt")


def test_it_is_read_once_and_its_copy_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (b"one \xff", b"two"):
        monkeypatch.setattr(sys, "stdin", stream(content))
        path = file_of("-")
        assert path.read_bytes() == content
        assert file_of(Path("-")) == path
    monkeypatch.undo()
    gc.collect()
    assert not path.parent.exists()


def test_a_terminal_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", stream(b"typed", Terminal))
    for act in (lambda: check_stdin(["a.txt", "-"]), lambda: file_of("-")):
        with pytest.raises(OptionError, match="- reads standard input, which is a terminal; pipe something into it"):
            act()
    check_stdin(["a.txt", None])
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(OptionError, match="pipe something into it"):
        check_stdin(["-"])


def test_twice_is_refused() -> None:
    with pytest.raises(OptionError, match="- is named twice, and standard input can be read once"):
        check_stdin(["-", Path("-")])
