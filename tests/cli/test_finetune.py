"""`trim finetune` as it is seen: its plan, its lines, its summary, and nothing of the libraries behind it."""

import json
from pathlib import Path

import pytest

from tests.cli.test_errors import refused
from tests.finetuned import pruned_model
from tests.small_models import gpt2_config, llama_config
from tests.trim_cli import trim, trim_json
from trimcli.files.atomic import MARK

USUAL = ("--steps", 4, "--batch-size", 4, "--accumulate", 1, "--every", 2, "--lr", 0.01, "--device", "cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("finetune")
    pruned_model(llama_config(), base)
    return base


def line(home: Path, tmp_path: Path, *more: object) -> tuple[object, ...]:
    return ("finetune", home / "pruned", "-o", tmp_path / "out", "--tokens", home / "tokens", *USUAL, *more)


@pytest.mark.parametrize("mode", ["lora", "full", "admm"])
def test_what_it_says(mode: str, home: Path, tmp_path: Path) -> None:
    done = trim(*line(home, tmp_path, "--mode", mode))
    assert done.status == 0, done.err
    plan, weights, *steps = done.err.splitlines()
    learned = ", 2 of them to learn the masks" if mode == "admm" else ""
    seen = "(0.52 times 31 samples, 2 held out)"
    course = f"4 steps{learned}, 256 tokens in samples of 16 {seen}"
    assert plan == f"{home / 'pruned'}, {mode}: {course}"
    assert f"teacher {home / 'dense'}; about" in weights
    assert "MiB on cpu" in weights
    ends = ["1 of 2", "2 of 2", "1 of 2", "2 of 2"] if mode == "admm" else ["2 of 4", "4 of 4"]
    ends = ["2 of 2", "2 of 2"] if mode == "admm" else ends
    assert [one.split(":")[0] for one in steps] == [f"step {end}" for end in ends]
    assert "75.0000% of 14 linears" in done.out
    assert "loads as any other" not in done.out


def test_json_is_one_document_and_quiet_is_silent(home: Path, tmp_path: Path) -> None:
    document = trim_json(*line(home, tmp_path))
    assert document["mode"] == "lora"
    assert document["zeros"] == 0.75 * 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 40 * 32)
    assert document["after"] < document["before"]
    assert document["peak_memory"]["anonymous"] > 0
    done = trim(*line(home, tmp_path, "--quiet", "--force"))
    assert (done.status, done.out, done.err) == (0, "", "")


def test_a_plain_adapter_comes_with_a_word_of_warning(home: Path, tmp_path: Path) -> None:
    done = trim(*line(home, tmp_path, "--merge", "none"))
    assert done.status == 0, done.err
    assert "merge_and_unload would fill them" in done.out
    assert json.loads((tmp_path / "out" / MARK).read_text())["schema"] == "trim.adapter/1"
    assert trim(*line(home, tmp_path, "--merge", "none", "--force")).status == 0


def test_texts(nano_qwen2: Path, tmp_path: Path) -> None:
    """A text by the model's own tokenizer, and one that is shorter than two blocks."""
    from trimcli.demo import write_texts

    texts = write_texts(tmp_path)
    trim_json("prune", nano_qwen2, "-o", tmp_path / "masks", "--method", "magnitude", "--sparsity", 0.5)
    trim_json("apply-masks", nano_qwen2, tmp_path / "masks", "-o", tmp_path / "pruned")
    args = ("finetune", tmp_path / "pruned", "-o", tmp_path / "out", "--mode", "full", *USUAL, "--seqlen", 32)
    found = trim_json(*args, "--dataset", texts.calibration, "--nsamples", 40, "--lr", 1e-3)
    assert found["after"] < found["before"]
    assert trim("verify", tmp_path / "out").status == 0
    (tmp_path / "short.txt").write_text("A few words.")
    before = sorted(tmp_path.iterdir())
    refused(2, "short.txt holds", *args, "--dataset", tmp_path / "short.txt", "--force")
    refused(
        2,
        "--seqlen 9999 is beyond the 512 positions",
        *args,
        "--dataset",
        texts.calibration,
        "--seqlen",
        9999,
        "--force",
    )
    assert sorted(tmp_path.iterdir()) == before


def test_refusals_are_one_sentence(home: Path, tmp_path: Path) -> None:
    refused(2, "dense has no trim.json", *("finetune", home / "dense", *line(home, tmp_path)[2:]))
    refused(2, "the run reads; name another output", *line(home, tmp_path, "-o", home / "pruned", "--force"))
    refused(2, "--mode 'fully' is none of lora, full, admm", *line(home, tmp_path, "--mode", "fully"))
    refused(2, "--lr 0 must be a positive number", *line(home, tmp_path, "--lr", 0))
    refused(2, "--targets 'x' matches no linear", *line(home, tmp_path, "--targets", "x"))
    other = pruned_model(gpt2_config(), tmp_path / "other")
    refused(2, "made for the model", *line(home, tmp_path, "--masks", other.parent / "masks"))
    assert not (tmp_path / "out").exists()


def test_the_report_shows_the_curves(home: Path, tmp_path: Path) -> None:
    trim_json(*line(home, tmp_path, "--mode", "admm"))
    page = trim("report", tmp_path / "out", "-o", tmp_path / "report.html")
    assert page.status == 0, page.err
    text = (tmp_path / "report.html").read_text()
    assert "<h2>Training</h2>" in text
    assert "Loss by step" in text
    table = trim("report", tmp_path / "out", "--format", "md").out
    assert "### Training" in table
    rows = [row for row in table.splitlines() if "| admm |" in row or "| full |" in row]
    assert len(rows) == 2
