import io
import logging

import pytest
from rich.console import Console
from tqdm import tqdm  # type: ignore[import-untyped]

from trimcli.console import RichProgress, inert, quiet_libraries


def chatter() -> None:
    print("printed")
    for _ in tqdm(range(2), disable=False):
        logging.getLogger("a_library").warning("warned")


def test_other_libraries_are_quiet_for_as_long_as_it_lasts(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with quiet_libraries():
        chatter()
        logging.getLogger("a_library").error("broken")
    assert capsys.readouterr() == ("", "")
    assert caplog.messages == ["broken"]
    chatter()
    out, err = capsys.readouterr()
    assert out == "printed\n"
    assert "2/2" in err
    assert caplog.messages == ["broken", "warned", "warned"]


@pytest.mark.parametrize("name", ["[red]x[/red]", "[/red]", "[", "a\x1b[31mb"])
def test_the_name_of_a_task_is_no_markup(name: str) -> None:
    screen = io.StringIO()
    progress = RichProgress()
    progress.console = Console(file=screen, force_terminal=True, width=120, color_system=None)
    with progress.task(f"verifying {name}", 3) as advance:
        advance()
        progress.warn(f"about {name}")
    shown = screen.getvalue()
    assert f"verifying {inert(name)}" in shown
    assert f"warning: about {inert(name)}" in shown


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8", "█ ± \u00d7 µ \u2013 · … ö"),
        ("cp1252", "# ± \u00d7 µ \u2013 · … ö"),
        ("ascii", "# +- x u - - ... \\xf6"),
    ],
)
def test_text_for_a_stream_of_any_encoding(encoding: str, shown: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    assert inert("█ ± \u00d7 µ \u2013 · … ö", stream=stream) == shown
