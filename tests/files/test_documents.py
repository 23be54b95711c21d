import os
import subprocess
import sys
from pathlib import Path

import pytest

from trimcli.errors import InputError, MismatchError
from trimcli.files.atomic import MARK
from trimcli.files.documents import read_json, read_mark, write_json

TEXT = "Löwe \u2013 \U0001f981"
ROUND_TRIP = """
import locale, sys
from pathlib import Path
from trimcli.files.documents import read_json, write_json
assert locale.getencoding().lower() not in ("utf-8", "utf8"), locale.getencoding()
write_json(Path(sys.argv[2]), read_json(Path(sys.argv[1])))
"""


def test_a_document_is_the_same_bytes_whatever_the_locale(tmp_path: Path) -> None:
    write_json(tmp_path / "here.json", {"text": TEXT, "lines": "a\nb"})
    assert TEXT.encode() in (tmp_path / "here.json").read_bytes()
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", ROUND_TRIP, str(tmp_path / "here.json"), str(tmp_path / "there.json")]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "there.json").read_bytes() == (tmp_path / "here.json").read_bytes()
    assert read_json(tmp_path / "there.json") == {"text": TEXT, "lines": "a\nb"}


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    document = {"a": [1.5, float("nan"), (float("inf"), 2)], "3": {"b": -float("inf")}}
    write_json(tmp_path / "document.json", document)
    assert read_json(tmp_path / "document.json") == {"a": [1.5, None, [None, 2]], "3": {"b": None}}


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, InputError, "there is no file"),
        (b"{", InputError, "is not a readable JSON file"),
        (b'{"text": "\xff"}', InputError, "is not a readable JSON file"),
        (b"[1]", InputError, "holds a list, not a JSON object"),
        (b'{"schema": "other/1"}', MismatchError, "is of schema 'other/1' where 'trim.results/1' is needed"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, content: bytes | None, error: type[Exception], message: str
) -> None:
    path = tmp_path / "document.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message) as raised:
        read_json(path, "trim.results/1")
    assert str(path) in str(raised.value)


def test_a_directory_that_trim_did_not_make_has_an_empty_record(tmp_path: Path) -> None:
    assert read_mark(tmp_path) == {}
    write_json(tmp_path / MARK, {"schema": "trim.pruned/1"})
    assert read_mark(tmp_path) == {"schema": "trim.pruned/1"}
