"""`trim demo`: the rows it shows, the files it keeps, and the command lines it tells."""

import math
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import trimcli.demo.run
from tests.trim_cli import tree, trim, trim_json
from trimcli.demo import MODEL
from trimcli.demo.run import VARIANTS
from trimcli.files.masks import MaskFile

LABELS = ["dense", *VARIANTS]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo on a few samples."""
    for name, number in (("SAMPLES", 4), ("SEQLEN", 32), ("WINDOWS", 4)):
        monkeypatch.setattr(trimcli.demo.run, name, number)


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_the_lines_that_it_tells_do_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "kept"
    done = trim("demo", "-o", kept, "--sparsity", 0.5, "--device", "cpu")
    assert done.status == 0, done.err
    for label in LABELS:
        assert label in done.out
    assert f"all files are in {kept}" in done.out
    told = [shlex.split(line.removeprefix("$ ")) for line in done.err.splitlines() if line.startswith("$ trim ")]
    assert [words[1] for words in told] == [
        *("calibrate", "alloc-layers", "alloc-layers", *["prune"] * len(VARIANTS), "apply-masks", "verify")
    ]
    assert not [words for words in told for word in words if str(tmp_path) in word]
    monkeypatch.chdir(tmp_path)
    for text in kept.glob("*.txt"):
        (tmp_path / text.name).write_bytes(text.read_bytes())
    for words in told:
        line = [str(MODEL) if word == "MODEL" else word for word in words[1:]]
        again = trim(*line)
        assert again.status == 0, again.err
    for masks in kept.glob("masks-*.safetensors"):
        one, other = MaskFile.open(masks), MaskFile.open(tmp_path / masks.name)
        assert all(torch.equal(one.keep(name), other.keep(name)) for name in one.names), masks.name
    for pruned in kept.glob("pruned-*"):
        written, rewritten = (load_file(folder / pruned.name / "model.safetensors") for folder in (kept, tmp_path))
        assert all(torch.equal(written[name], rewritten[name]) for name in written), pruned.name


@pytest.mark.usefixtures("short")
def test_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    document = trim_json("demo", "--sparsity", 0.5, "--device", "cpu", "--seed", 1)
    assert [row["label"] for row in document["rows"]] == LABELS
    dense, *others = document["rows"]
    assert dense["sparsity"] < 1e-4
    assert all(row["sparsity"] == pytest.approx(0.5, abs=1e-4) for row in others)
    assert all(math.isfinite(row["perplexity"]) and row["perplexity"] != dense["perplexity"] for row in others)
    assert document["best"] == min(others, key=lambda row: row["perplexity"])["label"]
    assert document["packed_bytes"] < document["dense_bytes"]
    assert tree(tmp_path) == []


def test_what_cannot_be_used(tmp_path: Path) -> None:
    for message, args in (
        ("--sparsity 1.5 is outside [0, 1)", ("--sparsity", 1.5)),
        (f"{tmp_path} exists already; name another directory.", ("-o", tmp_path)),
        (
            f"the directory {tmp_path / 'no'} for the output demo does not exist; create it.",
            ("-o", tmp_path / "no" / "demo"),
        ),
    ):
        done = trim("demo", *args)
        assert (done.status, done.out) == (2, "")
        assert message in done.err
        assert done.err.count("\n") == 1
    assert tree(tmp_path) == []
