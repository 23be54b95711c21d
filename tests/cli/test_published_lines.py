"""docs/coming-from.md: what stands there for the published tools' lines is run on a trained model."""

import contextlib
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.digits import digits, random_classifier
from tests.small_models import NANO
from tests.trim_cli import COMPUTE, trim, trim_json
from trimcli.demo import write_texts
from trimcli.evaluation.zeroshot import SEVEN_TASKS

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| (.*`.*) \| (.*`trim .*) \|$", re.MULTILINE)
HEAD = "| published | `trim` |"
LINE = re.compile(r"`trim ([^`]+)`")
SECTIONS = re.split(r"^## ", (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
TRIED = {section.splitlines()[0]: section for section in SECTIONS if LINE.search(section)}

TEXT = ("--dataset", "train.txt", "--nsamples", "4", "--seqlen", "32")
RUN = (*COMPUTE, "--cache-dir", "cache")


def published_rows(text: str) -> list[tuple[str, str]]:
    """The rows of a text's tables: what was published, and what it is here."""
    return ROW.findall(text)


def lines(text: str) -> list[list[str]]:
    """Every line of trim's in a text, in words, without the program's name."""
    return [shlex.split(line) for line in LINE.findall(text)]


def value(words: list[str], option: str) -> str | None:
    return words[words.index(option) + 1] if option in words else None


def shortened(words: list[str]) -> list[str]:
    """The line with little to do: few samples of local texts, few steps, two documents of a local task."""
    more: list[str] = []
    if "--images" in words and words[0] != "eval":
        more += ["--nsamples", "4"]
    elif words[0] in ("calibrate", "prune", "sweep", "finetune") and "--calibration" not in words:
        more += TEXT
    if words[0] == "sweep":
        more += ["--holdout", "2"]
    if words[0] == "finetune":
        more += ["--nsamples", "16", "--batch-size", "2"]
    if "--use-trim" in words:
        more += ["--iterations", "1"]
    if "--ppl" in words:
        more += ["--ppl", "test.txt", "--seqlen", "32", "--max-windows", "2"]
    if tasks := value(words, "--tasks"):
        assert set(tasks.split(",")) == set(SEVEN_TASKS)
        more += ["--tasks", "seasons", "--include-path", str(ROOT / "examples" / "tasks"), "--limit", "2"]
    return [*words, *more, *(RUN if words[0] != "apply-masks" else ()), "--force", "--json"]


def asked(words: list[str]) -> float | None:
    """The sparsity that a line asks for, if it says so itself."""
    if pattern := value(words, "--sparsity-type"):
        kept, group = map(int, pattern.split(":"))
        return 1 - kept / group
    return float(found) if (found := value(words, "--sparsity")) else None


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MODEL, dense, and PRUNED; texts to calibrate and to measure on; what the published tools save for MODEL.

    And CLASSIFIER, with pictures of its classes.
    """
    base = tmp_path_factory.mktemp("published")
    shutil.copytree(NANO, base / "MODEL")
    random_classifier("vit", base / "CLASSIFIER")
    for part, data in zip(("train", "val"), digits(), strict=True):
        data.first(40).save_pictures(base / "DIR" / part)
    texts = write_texts(base)
    texts.calibration.rename(base / "train.txt")
    texts.measurement.rename(base / "test.txt")
    np.save(base / "OWL_layer_ratios.npy", np.array([0.35, 0.25, 0.28, 0.32]))
    np.save(base / "alpha_peak.npy", np.loadtxt(NANO.with_name("nano-qwen2_alpha_peak.txt")))
    with contextlib.chdir(base):
        line = ("prune", "MODEL", "--method", "magnitude", "--sparsity", 0.5, "--save-model", "PRUNED")
        trim_json(*line, *RUN)
    return base


@pytest.mark.parametrize(
    "section",
    [
        pytest.param(text, id=title, marks=pytest.mark.slow if len(lines(text)) > 7 else ())
        for title, text in TRIED.items()
    ],
)
def test_every_line_does_what_it_says(section: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    for words in lines(section):
        done = trim(*shortened(words))
        assert done.status == 0, f"trim {shlex.join(words)}: {done.err}"
        if words[0] == "prune" and (sparsity := asked(words)):
            # N:M patterns round every layer's target, each by half a weight of M at most.
            close = 0.5 / int(value(words, "--group") or 50_000)
            assert done.document["sparsity"] == pytest.approx(sparsity, abs=close), shlex.join(words)


def test_every_row_stands_for_something() -> None:
    """No row is overlooked: each has its published side and a line of trim's; the README's are some of them."""
    rows = [row for section in TRIED.values() for row in published_rows(section)]
    tables = [
        line for text in TRIED.values() for line in text.splitlines() if line.startswith("| ") and HEAD not in line
    ]
    assert len(rows) == len(tables) > 20
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    short = published_rows(readme.split("### Coming from a published repository")[1].split("\n### ")[0])
    assert len(short) == 6
    assert {lines(here)[0][0] for _, here in short} == {"prune", "finetune"}
    every = [words for section in TRIED.values() for words in lines(section)]
    assert all(words in every for _, here in short for words in lines(here))


def test_the_lines_cover_what_the_published_tools_do() -> None:
    every = [words for section in TRIED.values() for words in lines(section)]
    commands = {words[0] for words in every}
    assert commands == {"calibrate", "alloc-layers", "prune", "apply-masks", "eval", "sweep", "finetune"}
    assert {value(words, "--mode") for words in every if words[0] == "finetune"} == {"lora", "full"}
    assert sum("--import" in words for words in every) == 2
    texts = [value(words, option) or "c4" for words in every for option in ("--dataset", "--ppl")]
    assert {name for given in texts for name in given.split(",")} == {"c4", "wikitext2", "ptb"}
