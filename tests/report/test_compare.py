import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.report_documents import perplexity, pruning, ratios, results, task
from trimcli.errors import InputError, MismatchError
from trimcli.files.documents import write_json
from trimcli.report.compare import Table, compare, method_of
from trimcli.report.sheets import figure
from trimcli.report.terminal import comparison


def text_of(table: Table, width: int = 120) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(comparison(table))
    return captured.get()


def test_dense_comes_first_and_unknown_sparsity_last(tmp_path: Path) -> None:
    files = [
        results(tmp_path / "unknown.json", None),
        results(tmp_path / "b70.json", 0.7),
        results(tmp_path / "a70.json", 0.70001),
        results(tmp_path / "dense.json", 1e-7, pruning=None),
        results(tmp_path / "half.json", 0.5),
    ]
    table = compare(files)
    assert [row.label for row in table.rows] == ["dense", "half", "a70", "b70", "unknown"]
    assert [row.method for row in table.rows[:2]] == ["dense", "Wanda"]
    assert table.notes == ()
    assert len(compare([files[0], files[0]]).rows) == 1


@pytest.mark.parametrize(
    "other", [{"seqlen": 256}, {"windows": 10}, {"dtype": "bfloat16"}, {"tokens": 5}, {"dataset": "c4"}]
)
def test_figures_measured_another_way_have_a_column_of_their_own(tmp_path: Path, other: dict[str, Any]) -> None:
    first = results(tmp_path / "a.json", perplexity=[perplexity(10.0)], tasks={})
    second = results(tmp_path / "b.json", perplexity=[perplexity(10.0, **other)], tasks={})
    table = compare([first, second])
    assert len(table.columns) == 2
    assert [len(row.measures) for row in table.rows] == [1, 1]
    same_name = "dataset" not in other
    assert bool(table.notes) == same_name
    named = ["wiki.txt [1]", "wiki.txt [2]"] if same_name else ["wiki.txt", "c4"]
    assert list(table.titles.values()) == named
    assert compare([first, results(tmp_path / "c.json", tasks={})]).columns == table.columns[:1]


@pytest.mark.parametrize(("bos", "columns"), [("each", 2), ("none", 2), ("once", 1)])
def test_perplexities_with_bos_elsewhere_are_others(bos: str, columns: int, tmp_path: Path) -> None:
    """Files that do not say are of the published protocol, `once`."""
    first = results(tmp_path / "a.json", tasks={})
    second = results(tmp_path / "b.json", tasks={}, perplexity=[{**perplexity(30.0), "bos": bos}])
    table = compare([first, second])
    assert len(table.columns) == columns
    assert bool(table.notes) == (columns == 2)


@pytest.mark.parametrize("other", [{"n_shot": 5}, {"samples": 7}, {"version": 2.0}, {"documents": 99, "samples": 99}])
def test_tasks_too(tmp_path: Path, other: dict[str, Any]) -> None:
    first = results(tmp_path / "a.json", tasks={"quiz": task(0.5)}, perplexity=[])
    second = results(tmp_path / "b.json", tasks={"quiz": task(0.5, **other)}, perplexity=[])
    table = compare([first, second])
    assert len(table.columns) == 2
    assert "quiz was measured in more than one way" in table.notes[0]
    assert ("Measured on a part of their documents: quiz." in table.notes) == (other == {"samples": 7})


def test_other_models_are_noted(tmp_path: Path) -> None:
    path = results(tmp_path / "other.json")
    document = json.loads(path.read_text())
    document["model"] = {"id": "other/model", "structure": "another", "content": None}
    write_json(path, document, force=True)
    table = compare([results(tmp_path / "a.json"), path])
    assert table.notes == ("The runs are of different models.",)
    assert {row.model for row in table.rows} == {"tiny", "model"}
    assert " model " in text_of(table)


def test_a_pruned_directory_counts_as_its_dense_model(tmp_path: Path) -> None:
    applied = {"model": {"id": "org/tiny"}, "pruning": {**pruning(), "model": {"id": "org/tiny"}}}
    path = results(tmp_path / "pruned.json", 0.5, pruning=applied)
    document = json.loads(path.read_text())
    document["model"]["id"] = "runs/tiny-50"
    write_json(path, document, force=True)
    table = compare([results(tmp_path / "dense.json"), path])
    assert [row.model for row in table.rows] == ["tiny", "tiny"]
    assert [row.method for row in table.rows] == ["dense", "Wanda"]


def test_main_columns_and_the_mean(tmp_path: Path) -> None:
    tasks = {"quiz": task(0.5, acc_norm=0.6, acc_norm_stderr=None), "words": {**task(0.0), "perplexity": 7.5}}
    del tasks["words"]["acc"], tasks["words"]["acc_stderr"]
    tasks["words"]["perplexity_stderr"] = 900.0
    table = compare([results(tmp_path / "a.json", tasks=tasks, mean_acc_seven=0.61)])
    names = table.titles
    assert list(names.values()) == ["wiki.txt", "quiz", "words perplexity", "mean", "quiz acc_norm"]
    assert [column.main for column in table.columns] == [True, True, True, True, False]
    shown = text_of(table)
    assert "0.5000 ± 0.0100" in shown
    assert "0.6100" in shown
    assert "900" not in shown
    assert "acc_norm" not in shown
    assert "quiz: acc, 0-shot, 50 docs, v1.0" in shown
    assert json.loads(json.dumps(table.document()))["rows"][0]["measures"][-1] == {
        "of": "quiz", "metric": "acc_norm", "setting": "0-shot, 50 docs, v1.0", "value": 0.6, "stderr": None
    }  # fmt: skip


def test_labels_are_told_apart_and_shown_as_they_are(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    same_stem = [results(tmp_path / name / "r.json", label="[red]run[/red]") for name in ("a", "b")]
    labels = [row.label for row in compare(same_stem).rows]
    assert len(set(labels)) == 2
    assert all(label.startswith("[red]run[/red] (") for label in labels)
    other_stem = [results(tmp_path / f"{name}.json", label="run") for name in ("a", "b")]
    assert [row.label for row in compare(other_stem).rows] == ["run (a)", "run (b)"]
    assert "[red]run[/red]" in text_of(compare(same_stem[:1]))
    spelled = results(tmp_path / "emoji.json", label="2:4: :M: :smile:", pruning=pruning(sparsity_type="2:4"))
    assert "2:4: :M: :smile:  Wanda 2:4 " in text_of(compare([spelled]))


def test_values_that_are_not_finite_are_said_to_be(tmp_path: Path) -> None:
    table = compare([results(tmp_path / "a.json", 0.9, perplexity=[perplexity(float("inf"))])])
    assert "not finite" in text_of(table)
    assert [figure(value, large=True) for value in (9.4321, 999.994, 1234.5, 2.5e7)] == [
        "9.43", "999.99", "1,234", "2.50e+07"
    ]  # fmt: skip


def test_methods_are_named() -> None:
    assert method_of(None) == ""
    assert method_of({"options": {}}) == ""
    assert method_of(pruning()) == "Wanda"
    assert method_of({"pruning": pruning(recipe={"variant": True})}) == "Wanda variant"
    assert method_of(pruning(recipe={"method": "sparsegpt"}, sparsity_type="2:4")) == "SparseGPT 2:4"
    everything = pruning(recipe={"method": "magnitude", "rows": {"iterations": 10}, "barber": {"threshold": 0.01}})
    everything["allocation"] = {"method": "alpha"}
    assert method_of(everything) == "Magnitude + AlphaPruning + TRIM + Barber"
    assert method_of({**pruning(), "allocation": {"method": "owl", "lambda": 0.08}}) == "Wanda + OWL"
    assert method_of({**pruning(), "allocation": {"method": "mine"}}) == "Wanda + mine"


def test_methods_are_named_where_the_manifest_names_rows_and_update() -> None:
    for recipe, name in (
        ({"method": "wanda", "rows": "even", "update": None}, "Wanda"),
        ({"method": "wanda", "rows": "trim", "update": "none"}, "Wanda + TRIM"),
        ({"method": "wanda", "rows": "variant", "update": None}, "Wanda variant"),
        ({"method": "wanda", "rows": "free", "update": "cg"}, "Wanda + free rows + cg update"),
        ({"method": "sparsegpt", "rows": "even", "update": "obs"}, "SparseGPT"),
        ({"method": "mine", "rows": "trim", "update": "obs"}, "mine + TRIM + obs update"),
        (
            {"method": "admm", "rows": "free", "update": "admm", "reconstruct": {"steps": 64}},
            "ADMM + free rows + reconstruction",
        ),
        (
            {"method": "wanda", "rows": "trim", "update": "none", "refine": {"by": "learned"}},
            "Wanda + TRIM + learned masks",
        ),
    ):
        assert method_of({"options": {"recipe": recipe}}) == name
    assert method_of(pruning(recipe={"update": {"damping": 0.01}})) == "Wanda"


def test_what_is_no_results_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"trim\.layer-sparsity/1"):
        compare([ratios(tmp_path / "ratios.json")])
    with pytest.raises(InputError, match="there is no file"):
        compare([tmp_path / "nowhere.json"])
    with pytest.raises(InputError, match="not a whole results file"):
        compare([results(tmp_path / "broken.json", perplexity=[{"dataset": "c4"}])])
