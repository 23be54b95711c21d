import logging

import pytest
from tqdm import tqdm  # type: ignore[import-untyped]

from trimcli.console import quiet_libraries


def chatter() -> None:
    print("printed")
    for _ in tqdm(range(2), disable=False):
        logging.getLogger("datasets").warning("warned")


def test_other_libraries_are_quiet_for_as_long_as_it_lasts(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with quiet_libraries():
        chatter()
        logging.getLogger("datasets").error("broken")
    assert capsys.readouterr() == ("", "")
    assert caplog.messages == ["broken"]
    chatter()
    out, err = capsys.readouterr()
    assert out == "printed\n"
    assert "2/2" in err
    assert caplog.messages == ["broken", "warned", "warned"]
