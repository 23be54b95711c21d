import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.report_documents import (
    MODEL,
    SHAPES,
    calibration,
    mask_keeps,
    masks,
    model_directory,
    one_of_each,
    perplexity,
    pruning,
    ratios,
    results,
    row_statistics,
)
from trimcli.errors import InputError, MismatchError, OptionError, OutputExists
from trimcli.files.atomic import MARK
from trimcli.files.documents import write_json
from trimcli.files.manifest import RESULTS, manifest
from trimcli.report.build import build_report
from trimcli.report.gather import QUANTILES, gather
from trimcli.report.rows import by_kind, short_names
from trimcli.report.terminal import summary

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
FIGURES = [
    "Perplexity against sparsity",
    "Sparsity by layer",
    "Layer allocation against its metric",
    "Row sparsity",
    "Quality before and after",
    "Chosen steps",
]


def page_of(files: list[Path], tmp_path: Path) -> str:
    return build_report(files, "html", tmp_path / "report.html", force=True).text


def figures_in(page: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found
    drawn: list[dict[str, Any]] = json.loads(found[1])
    return drawn


def titles_in(page: str) -> list[str]:
    return re.findall(r"<h3>(.*?)</h3>", page)


def figure(page: str, title: str) -> dict[str, Any]:
    return figures_in(page)[titles_in(page).index(title)]


def test_a_report_of_everything(tmp_path: Path) -> None:
    page = page_of(one_of_each(tmp_path), tmp_path)
    assert page == (tmp_path / "report.html").read_text()
    assert [title for title in titles_in(page) if title in FIGURES] == [*FIGURES, "Row sparsity"]
    for what in ("results", "layer ratios", "row statistics", "masks", "pruned model", "calibration"):
        assert f'<span class="muted">{what}</span>' in page
    for said in ("trim prune a", "structure-of-tin", "trim 0.", "torch ", "took", "1.00 GiB"):
        assert said in page
    own = page.replace(re.findall(r"<script>(.*?)</script>", page, re.DOTALL)[0], "")
    assert not re.search(r"\b(src|href)=|https?://|@import|url\(", own)
    assert "default-src 'none'" in own
    assert own.index("<td>0.00%</td>") < own.index("<td>50.00%</td>")


def test_perplexity_against_sparsity(tmp_path: Path) -> None:
    other = [perplexity(30.0, dataset="c4"), perplexity(25.0)]
    files = [
        results(tmp_path / "dense.json"),
        results(tmp_path / "b.json", 0.7),
        results(tmp_path / "a.json", 0.5),
        results(tmp_path / "trim.json", 0.5, pruning=pruning(recipe={"rows": {"iterations": 10}}), perplexity=other),
        results(tmp_path / "lost.json", 0.9, perplexity=[perplexity(None)]),
    ]
    spec = figure(page_of(files, tmp_path), "Perplexity against sparsity")
    lines = {(trace["name"], trace["xaxis"]): trace for trace in spec["data"]}
    assert lines["Wanda", "x"]["x"] == [0.5, 0.7]
    assert lines["Wanda", "x"]["y"] == pytest.approx([70.0, 90.0])
    assert lines["Wanda + TRIM", "x"]["y"] == [25.0]
    assert lines["Wanda + TRIM", "x2"]["y"] == [30.0]
    assert lines["dense", "x"]["y"] == [20.0, 20.0]
    assert spec["layout"]["yaxis"]["type"] == "log"
    assert [note["text"] for note in spec["layout"]["annotations"]] == ["<b>wiki.txt</b>", "<b>c4</b>"]


def test_layers_are_weighted_by_their_matrices_sizes(tmp_path: Path) -> None:
    path = masks(tmp_path / "masks.safetensors")
    keeps = mask_keeps()
    page = page_of([path, results(tmp_path / "same.json", None)], tmp_path)
    dots, line = figure(page, "Sparsity by layer")["data"]
    layer = [keep for name, keep in keeps.items() if ".0." in name]
    expected = sum(int((~keep).sum()) for keep in layer) / sum(keep.numel() for keep in layer)
    assert line["x"] == [0, 1]
    assert line["y"] == pytest.approx([expected, expected])
    assert dots["y"] == pytest.approx([float((~keep).float().mean()) for keep in keeps.values()])


def test_a_tower_beside_the_decoder_has_a_line_of_its_own(tmp_path: Path) -> None:
    linears = {"m.layers.0.q": 0.2, "m.layers.1.q": 0.4, "v.blocks.0.q": 0.6, "v.blocks.0.p": 0.8, "head": 0.5}
    path = tmp_path / "both.json"
    write_json(path, manifest(RESULTS, "eval", {}, MODEL, label="both", sparsity={"total": 0.5, "linears": linears}))
    traces = figure(page_of([path], tmp_path), "Sparsity by layer")["data"]
    assert [(trace["name"], trace["x"]) for trace in traces[1::2]] == [
        ("both, m.layers", [0, 1]),
        ("both, v.blocks", [0]),
        ("both, in no layer", [0]),
    ]
    assert [trace["y"] for trace in traces[1::2]] == [[0.2, 0.4], [pytest.approx(0.7)], [0.5]]
    assert [trace["y"] for trace in traces[::2]] == [[0.2, 0.4], [0.6, 0.8], [0.5]]


def test_a_run_given_twice_is_drawn_once(tmp_path: Path) -> None:
    path = masks(tmp_path / "masks.safetensors", uneven=False)
    page = page_of([path, results(tmp_path / "measured.json", 0.5)], tmp_path)
    assert [trace["name"] for trace in figure(page, "Sparsity by layer")["data"]] == ["masks", "masks"]
    assert "Row sparsity" not in titles_in(page)


def test_allocations_stand_against_the_metric_behind_them(tmp_path: Path) -> None:
    metric = {name: float(index) for index, name in enumerate(SHAPES)}
    files = [
        ratios(tmp_path / "owl.json"),
        ratios(tmp_path / "owl7.json", sparsity=dict.fromkeys(SHAPES, 0.7)),
        ratios(tmp_path / "alpha.json", "alpha", metric=metric),
        ratios(tmp_path / "uniform.json", "uniform", metric=dict.fromkeys(SHAPES)),
    ]
    spec = figure(page_of(files, tmp_path), "Layer allocation against its metric")
    owl, seven, alpha = spec["data"]
    assert (owl["x"], owl["y"], owl["text"]) == ([0.9, pytest.approx(0.6)], [0.4, pytest.approx(0.6)], ["0", "1"])
    assert (owl["mode"], seven["mode"]) == ("markers", "markers+text")
    assert alpha["x"] == [0, 1, 2, 3]
    assert [spec["layout"][axis]["title"]["text"] for axis in ("xaxis", "xaxis2")] == [
        "outlier share (M = 5)",
        "tail exponent (alpha_peak)",
    ]


def test_rows_come_from_statistics_or_masks(tmp_path: Path) -> None:
    source = gather([masks(tmp_path / "masks.safetensors")]).sources[0]
    for name, values in source.row_sparsities().items():
        rows = (~mask_keeps()[name]).float().mean(dim=1).numpy()
        np.testing.assert_allclose(values, np.quantile(rows, np.linspace(0, 1, QUANTILES)), atol=1e-6)
    stats = row_statistics(tmp_path / "stats.json")
    page = page_of([stats, tmp_path / "stats.safetensors"], tmp_path)
    heat = figure(page, "Row sparsity")["data"]
    assert len(heat) == 2
    assert [len(heat[0]["z"]), len(heat[0]["z"][0])] == [2, QUANTILES]
    assert heat[0]["z"][0] == sorted(heat[0]["z"][0])
    assert page.count("<option") == 0

    alone = page_of([row_statistics(tmp_path / "bare.json", vectors=False)], tmp_path)
    assert titles_in(alone) == ["Quality before and after", "Chosen steps"]


def test_masks_of_the_same_prune_do_not_repeat_its_rows(tmp_path: Path) -> None:
    stats = row_statistics(tmp_path / "stats.json")
    path = masks(tmp_path / "masks.safetensors")
    assert titles_in(page_of([stats, path], tmp_path)).count("Row sparsity") == 2
    document = json.loads(stats.read_text())
    document["command_line"] = "trim prune"
    write_json(stats, document, force=True)
    from trimcli.files.masks import write_masks
    from trimcli.files.tensors import read_manifest

    manifest = {**read_manifest(path, "trim.masks/1"), "command_line": "trim prune"}
    keeps = mask_keeps()
    write_masks(path, manifest, SHAPES, lambda name: keeps[name], force=True)
    assert titles_in(page_of([stats, path], tmp_path)).count("Row sparsity") == 1


def test_quality_and_steps(tmp_path: Path) -> None:
    page = page_of([row_statistics(tmp_path / "stats.json"), row_statistics(tmp_path / "more.json")], tmp_path)
    even, trim = figure(page, "Quality before and after")["data"][:2]
    assert (even["y"], trim["y"]) == ([0.9, 0.9], [0.95, 0.9])
    assert "Better in 2 of 4 matrices." in page
    steps = figure(page, "Chosen steps")["data"][0]
    assert (steps["x"], steps["y"], steps["z"]) == (["q_proj", "down_proj"], [0, 1], [[0.02, 0.02], [0.0, 0.0]])
    assert page.count("<option") == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: results(folder / "dense.json"),
        lambda folder: results(folder / "bare.json", None, perplexity=[], tasks={}, pruning=None),
        lambda folder: ratios(folder / "ratios.json"),
        lambda folder: row_statistics(folder / "stats.json"),
        lambda folder: masks(folder / "masks.safetensors"),
        lambda folder: model_directory(folder / "model"),
        lambda folder: calibration(folder / "calibration.safetensors"),
    ],
)
def test_every_kind_of_file_makes_a_report_alone(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path)
    assert "Provenance" in page_of([path], tmp_path)
    report = build_report([path], "md", None)
    assert "Measured with trim " in report.text
    console = Console(width=100)
    with console.capture() as captured:
        console.print(summary(report.gathered))
    assert captured.get().strip() or not report.gathered.table.columns


def test_nothing_that_files_say_becomes_code(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>{{ 1234567*7 }}<b>"
    datasets = [perplexity(9.0, dataset=f"{evil}1"), perplexity(9.0, dataset="x")]
    fields: dict[str, Any] = {"perplexity": datasets, "label": evil}
    files = [
        results(tmp_path / "a.json", **fields),
        results(tmp_path / "b.json", 0.5, **fields),
        ratios(tmp_path / "c.json", sparsity={f"l.0.{evil}": 0.1}, metric={f"l.0.{evil}": 1.0}, method=evil),
        row_statistics(tmp_path / f"{evil.replace('/', '')}.json", command_line=evil),
    ]
    page = page_of(files, tmp_path)
    assert "<img" not in page
    assert "8641969" not in re.sub(r"<script.*?</script>|<style.*?</style>", "", page, flags=re.DOTALL)
    drawn = json.dumps(figures_in(page))
    assert "<img" not in drawn
    assert "&lt;img" in drawn
    text = build_report(files, "md", None).text
    assert "<img" not in text.replace(evil, "")
    assert text.count("\n| ") == sum(line.startswith("| ") for line in text.splitlines())


def test_markdown_tables(tmp_path: Path) -> None:
    text = build_report(one_of_each(tmp_path), "md", tmp_path / "card.md").text
    assert text == (tmp_path / "card.md").read_text()
    assert "| dense | dense | 0.00% | 20.00 | 0.5000 ± 0.0100 | 0.6000 |" in text
    assert "| pruned | Wanda | 50.00% | 70.00 | 0.5000 ± 0.0100 | 0.6000 |" in text
    assert "| stats | 2 of 4 | 0.900000 | 0.925000 |" in text
    assert "| ratios, owl | layer ratios | 4 | 50.00% | 40.00% to 60.00% |" in text
    assert "- wiki.txt: perplexity, 1,000 \u00d7 128 of 128,017 tokens, float32" in text
    assert "```sh\ntrim prune org/tiny -o masks.safetensors\n" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(line.endswith(" |") for line in rows)


def test_the_terminal_shows_the_other_files_too(tmp_path: Path) -> None:
    report = build_report(one_of_each(tmp_path), "md", None)
    console = Console(width=120)
    with console.capture() as captured:
        console.print(summary(report.gathered))
    shown = captured.get()
    assert re.search(r"ratios, owl +layer ratios +4 +50\.00% +40\.00% to 60\.00%", shown)
    assert re.search(r"masks +masks +4 +1\d\.\d\d%", shown)
    assert re.search(r"calibration +calibration", shown)


def test_experts_share_a_panel_and_names_are_as_short_as_they_can() -> None:
    values = {"m.1.mlp.experts.0.up": 1.0, "m.1.mlp.experts.1.up": 3.0, "m.0.mlp.experts.0.up": 5.0, "m.0.proj": 7.0}
    assert by_kind(values) == {"mlp.experts.*.up": {0: 5.0, 1: 2.0}, "proj": {0: 7.0}}
    pairs = {"m.0.experts.0.up": (1.0, 2.0), "m.0.experts.1.up": (3.0, 6.0)}
    assert by_kind(pairs) == {"experts.*.up": {0: [2.0, 4.0]}}
    assert short_names(["attn.c_attn", "attn.c_proj", "mlp.c_proj"]) == ["c_attn", "attn.c_proj", "mlp.c_proj"]


def test_what_cannot_be_reported_is_refused(tmp_path: Path) -> None:
    good = results(tmp_path / "good.json")
    output = tmp_path / "report.html"
    with pytest.raises(OptionError, match="'pdf'"):
        build_report([good], "pdf", output)
    with pytest.raises(OptionError, match="needs files"):
        build_report([], "html", output)
    with pytest.raises(OptionError, match="needs --output"):
        build_report([good], "html", None)
    with pytest.raises(InputError, match="there is no file"):
        build_report([tmp_path / "nowhere.json"], "html", output)
    with pytest.raises(InputError, match="there is no file"):
        build_report([tmp_path / "nowhere.safetensors"], "html", output)
    (tmp_path / "foreign.json").write_text('{"schema": "other/1"}')
    with pytest.raises(MismatchError, match="other/1"):
        build_report([good, tmp_path / "foreign.json"], "html", output)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="trim did not write it"):
        build_report([tmp_path / "empty"], "html", output)
    whole = masks(tmp_path / "masks.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-5])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        build_report([tmp_path / "cut.safetensors"], "html", output)
    directory = model_directory(tmp_path / "model")
    document = json.loads((directory / MARK).read_text())
    write_json(directory / MARK, {**document, "sparsity": 0.99}, force=True)
    with pytest.raises(InputError, match="was changed after trim wrote it"):
        build_report([directory], "html", output)
    halved = json.loads(ratios(tmp_path / "ratios.json").read_text())
    del halved["target"]
    write_json(tmp_path / "ratios.json", halved, force=True)
    with pytest.raises(InputError, match="lacks target"):
        build_report([tmp_path / "ratios.json"], "html", output)
    assert not output.exists()
    build_report([good], "html", output)
    with pytest.raises(OutputExists):
        build_report([good], "html", output)
    build_report([good], "html", output, force=True)


def browse(page: Path, fragment: str, profile: Path) -> tuple[str, str]:
    """The DOM of a page after its scripts ran, and what it wrote to the console."""
    assert BROWSER
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --enable-logging=stderr --v=0 --virtual-time-budget=10000 "
        f"--window-size=1200,4000 --user-data-dir={profile} --dump-dom"
    )
    done = subprocess.run(
        [BROWSER, *flags.split(), f"{page.as_uri()}{fragment}"], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_draws_it_in_both_themes_without_complaint(tmp_path: Path) -> None:
    page_of(one_of_each(tmp_path), tmp_path)
    for theme, background in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(22, 27, 34)")):
        dom, said = browse(tmp_path / "report.html", f"#{theme}", tmp_path / theme)
        assert said == ""
        assert f'data-theme="{theme}"' in dom
        assert dom.count('class="plot-container') == dom.count("<h3>") - 1  # one choice of two is hidden
        assert f"background: {background}" in dom

    faulty = tmp_path / "faulty.html"
    faulty.write_text("<script>missing()</script>")
    assert "missing is not defined" in browse(faulty, "", tmp_path / "faulty")[1]
