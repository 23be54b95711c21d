"""Documents that are no whole ones: one sentence with the file and the field, and nothing written."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cli.test_errors import refused
from tests.report_documents import one_of_each, ratios, results
from tests.trim_cli import tree, trim
from trimcli.errors import UsageError
from trimcli.files.atomic import MARK
from trimcli.files.manifest import sealed
from trimcli.report.build import build_report
from trimcli.report.compare import compare

TASK = {"acc": 0.5, "acc_stderr": 0.1, "n_shot": 0, "limit": None, "version": 1, "samples": 5, "documents": 5}
# What stands in the place of a field, and what is said of it.
FIELDS: list[tuple[list[str | int], Any, str]] = [
    (["perplexity", 0, "value"], "20", "perplexity[0].value is '20', not a number"),
    (["perplexity", 0, "value"], True, "perplexity[0].value is True, not a number"),
    (["perplexity", 0, "value"], 10**400, "not a number"),
    (["perplexity", 0, "windows"], "many", "perplexity[0].windows is 'many', not a whole number"),
    (["perplexity", 0, "windows"], None, "it lacks perplexity[0].windows"),
    (["perplexity", 0, "dataset"], 3, "perplexity[0].dataset is 3, not text"),
    (["perplexity", 0], "c4", "perplexity[0] is 'c4', not an object"),
    (["perplexity"], {"c4": 5}, "perplexity is {'c4': 5}, not a list"),
    (["tasks", "quiz", "acc"], "0.5", "tasks.quiz.acc is '0.5', not a number"),
    (["tasks", "quiz", "samples"], 0.5, "tasks.quiz.samples is 0.5, not a whole number"),
    (["tasks"], [TASK], "not an object"),
    (["sparsity", "total"], "half", "sparsity.total is 'half', not a share from 0 on"),
    (["sparsity", "total"], -0.5, "sparsity.total is -0.5, not a share from 0 on"),
    (["sparsity", "linears", "model.layers.0.mlp.down_proj"], "all", "is 'all', not a share"),
    (["sparsity"], 0.5, "sparsity is 0.5, not an object"),
    (["model"], "tiny", "model is 'tiny', not an object"),
    (["pruning"], "wanda", "pruning is 'wanda', not an object"),
    (["pruning"], {"pruning": {"commands": "trim"}}, "pruning.pruning.commands is 'trim', not a list"),
    (["sources"], {"masks": "m"}, "sources.masks is 'm', not an object"),
    (["seconds"], "long", "seconds is 'long', not a number"),
    (["peak_memory", "anonymous"], "much", "peak_memory.anonymous is 'much', not a number"),
]  # fmt: skip


def put(document: Any, where: list[str | int], value: Any) -> None:
    for step in where[:-1]:
        document = document[step]
    document[where[-1]] = value


@pytest.mark.parametrize(("where", "value", "said"), FIELDS, ids=[said for *_, said in FIELDS])
def test_a_field_of_another_kind_is_named(tmp_path: Path, where: list[str | int], value: Any, said: str) -> None:
    good, bad = results(tmp_path / "good.json"), results(tmp_path / "bad.json", 0.5)
    document = json.loads(bad.read_text())
    put(document, where, value)
    bad.write_text(json.dumps(document))
    before = tree(tmp_path)
    for args in (("compare", good, bad), ("report", good, bad, "-o", tmp_path / "page.html")):
        done = refused(2, said, *args)
        assert done.err.startswith(f"trim: {bad} is not a whole results file: ")
        assert done.err.count("\n") == 1
    assert tree(tmp_path) == before


RESULT = '{"schema": "trim.results/1", "perplexity": []'
TEXTS = {
    "empty": ("", "is not a readable JSON file"),
    "cut": (RESULT, "is not a readable JSON file"),
    "a list": ("[1, 2]", "holds a list, not a JSON object"),
    "a number": ("3", "holds a int, not a JSON object"),
    "nested": ("[" * 100_000, "is nested too deep to be read"),
    "nested less": (RESULT + ', "options": ' + '{"a":' * 200 + "1" + "}" * 201, "is nested deeper than 100 levels"),
    "digits": (RESULT + ', "seconds": ' + "9" * 5000 + "}", "is not a readable JSON file"),
    "twice": (RESULT + ', "perplexity": []}', "has 'perplexity' twice in one object"),
    "twice within": (RESULT + ', "model": {"id": "a", "id": "b"}}', "has 'id' twice in one object"),
    "NaN": (RESULT + ', "seconds": NaN}', "holds NaN, which is no finite number"),
    "infinite": (RESULT + ', "seconds": -Infinity}', "holds -Infinity, which is no finite number"),
    "huge": (RESULT + ', "seconds": 1e999}', "holds 1e999, which is no finite number"),
    "no schema": ("{}", "is of schema None"),
    "schema": ('{"schema": ["trim.results/1"]}', "is of schema ['trim.results/1']"),
    "UTF-16": (RESULT.encode("utf-16").decode("latin-1"), "is not a readable JSON file"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_are_no_document(tmp_path: Path, name: str) -> None:
    text, said = TEXTS[name]
    bad = tmp_path / "bad.json"
    bad.write_bytes(text.encode("latin-1"))
    for args in (("compare", bad), ("report", bad, "-o", tmp_path / "page.html")):
        done = refused(2, said, *args)
        assert str(bad) in done.err
    assert "page.html" not in tree(tmp_path)


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (["target"], "0.5", "target is '0.5', not a share"),
        (["sparsity", "model.layers.0.mlp.down_proj"], "0.5", "is '0.5', not a share"),
        (["metric", "model.layers.0.mlp.down_proj"], [1], "is [1], not a number"),
        (["method"], 3, "method is 3, not text"),
        (["sparsity"], [0.5], "sparsity is [0.5], not an object"),
    ],
)
def test_ratios_whose_fields_are_of_another_kind(tmp_path: Path, where: list[str | int], value: Any, said: str) -> None:
    path = ratios(tmp_path / "ratios.json")
    document = json.loads(path.read_text())
    put(document, where, value)
    path.write_text(json.dumps(document))
    refused(2, said, "report", path, "--format", "md")


# --- anything at all -------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """File name -> its JSON document, of every kind; of a model directory, its `trim.json`."""
    folder = tmp_path_factory.mktemp("garbage")
    found = {}
    for path in one_of_each(folder):
        if path.is_dir() or path.suffix == ".json":
            found[path.name] = json.loads((path / MARK if path.is_dir() else path).read_text())
    assert len(found) >= 4
    return found


def places(document: Any) -> list[list[str | int]]:
    """Where every value of a document stands."""
    pairs: Any = document.items() if isinstance(document, dict) else enumerate(document)
    found: list[list[str | int]] = []
    for name, value in pairs:
        found.append([name])
        if isinstance(value, dict | list):
            found += [[name, *inner] for inner in places(value)]
    return found


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_whatever_a_document_holds_it_is_read_or_refused(
    documents: dict[str, Any], tmp_path: Path, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(documents)), "file")
    document = json.loads(json.dumps(documents[name]))
    for _ in range(data.draw(st.integers(1, 2), "changes")):
        where = data.draw(st.sampled_from(places(document)), "where")
        put(document, where, data.draw(VALUES, "value"))
    if not name.endswith(".json"):
        (tmp_path / name).mkdir(exist_ok=True)
        document = sealed(document)
    path = tmp_path / name if name.endswith(".json") else tmp_path / name / MARK
    path.write_text(json.dumps(document), encoding="utf-8")
    given_path = tmp_path / name
    reads: list[Callable[[], object]] = [lambda: compare([given_path]), lambda: build_report([given_path], "md", None)]
    reads.append(lambda: build_report([given_path], "html", tmp_path / "page.html", force=True))
    for read in reads:
        with contextlib.suppress(UsageError):
            read()


def test_what_is_whole_is_still_read(tmp_path: Path) -> None:
    assert trim("compare", results(tmp_path / "a.json"), results(tmp_path / "b.json", 0.5)).status == 0
    build_report(one_of_each(tmp_path), "html", tmp_path / "page.html")
