"""Several ranks do what one does: gloo on the loopback, two and three of them."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.atomic_outputs import contents
from tests.several_ranks import FAILS, everything, recipes, torchrun
from tests.small_models import NANO
from tests.trim_cli import COMPUTE, Done, save_tokens, tree, trim, trim_json
from trimcli.demo import write_texts
from trimcli.files.masks import MaskFile

SAMPLES = 7
"""Neither two nor three ranks have as many samples each."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tokens`, `text`, and in `alone` what one process makes of them."""
    base = tmp_path_factory.mktemp("ranks")
    save_tokens(base / "tokens", vocabulary=2048, nsamples=SAMPLES, seqlen=64)
    write_texts(base).measurement.rename(base / "text.txt")
    before = Path.cwd()
    try:
        everything(str(NANO), base / "tokens", base / "text.txt", base / "alone")
    finally:
        os.chdir(before)
    return base


@pytest.fixture(scope="module", params=[2, 3])
def shared(request: pytest.FixtureRequest, base: Path) -> Path:
    """The folder in which so many ranks did the same; two ranks did it twice, in `again` besides."""
    folder = base / str(request.param)
    again = [base / "again"] if request.param == 2 else []
    done = torchrun(
        request.param, NANO, base / "tokens", base / "text.txt", folder, *again, module="tests.several_ranks"
    )
    assert done.status == 0, done.err
    assert "trim:" not in done.err
    return folder


def agreement(one: Path, other: Path) -> float:
    """The share of all weights on which two masks files agree."""
    mine, theirs = MaskFile.open(one), MaskFile.open(other)
    assert mine.names == theirs.names
    same = torch.cat([(mine.keep(name) == theirs.keep(name)).flatten() for name in mine.names])
    assert len(same) == 737_280
    return float(same.double().mean())


def test_masks_and_weights_are_those_of_one_process(base: Path, shared: Path) -> None:
    for name in recipes():
        assert agreement(base / "alone" / f"{name}.masks", shared / f"{name}.masks") >= 0.9999, name
        one, other = (load_file(place / f"{name}.model/model.safetensors") for place in (base / "alone", shared))
        gaps = [float((one[key].float() - other[key].float()).norm() / one[key].float().norm()) for key in one]
        assert max(gaps) < 0.01, name


def test_statistics_allocations_and_perplexities_are_those_of_one_process(base: Path, shared: Path) -> None:
    one, other = load_file(base / "alone/calibration"), load_file(shared / "calibration")
    assert one.keys() == other.keys()
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=1e-4), name
    for method in ("owl", "alpha", "search"):
        mine, theirs = (json.loads((place / f"{method}.json").read_text()) for place in (base / "alone", shared))
        assert mine["sparsity"] == pytest.approx(theirs["sparsity"], abs=1e-3)
    [mine], [theirs] = (
        json.loads((place / "eval.json").read_text())["perplexity"] for place in (base / "alone", shared)
    )
    assert mine == {**theirs, "value": pytest.approx(theirs["value"], rel=1e-5)}
    assert mine["windows"] == 7


@pytest.mark.parametrize("shared", [2], indirect=True)
def test_as_many_ranks_give_the_same_bytes_twice(base: Path, shared: Path) -> None:
    found: list[dict[str, Any]] = []
    for folder in (shared, base / "again"):
        files = {name: data for name, data in contents(folder).items() if not name.startswith("cache")}
        measured = json.loads(files.pop("eval.json") or b"")
        files["eval.json"] = {key: measured[key] for key in ("perplexity", "sparsity")}  # type: ignore[assignment]
        found.append(files)
    assert len(found[0]) > 30
    assert found[0] == found[1]


def test_nothing_is_left_of_the_work(shared: Path) -> None:
    assert not [name for name in tree(shared) if name.endswith(".part")]
    assert tree(shared / "cache" / "parts") == []


# --- the command line ------------------------------------------------------------------------------------


def command(base: Path, folder: Path, *more: object) -> tuple[object, ...]:
    run = ("--sparsity", 0.5, "--tokens", base / "tokens", "--cache-dir", folder / "cache", *COMPUTE)
    return ("prune", NANO, "-o", folder / "masks", *run, *more)


def sentences(done: Done) -> list[str]:
    """What `trim` said went wrong."""
    return [line for line in done.err.splitlines() if line.startswith("trim:")]


def test_a_killed_rank_ends_the_run_and_another_number_of_ranks_goes_on(base: Path, tmp_path: Path) -> None:
    failed = torchrun(2, "failing", *command(base, tmp_path), module="tests.several_ranks", **{FAILS: "1 killed"})
    assert failed.status == 1
    [said] = sentences(failed)
    assert re.search("ended, .*repeat the command", said)
    assert failed.out == ""
    assert tree(tmp_path) == [name for name in tree(tmp_path) if name.startswith("cache")]

    done = torchrun(3, *command(base, tmp_path, "--json"))
    assert done.status == 0, done.err
    assert done.document["resumed"] == 2  # one document: the first rank alone prints
    assert done.err.count("forward passes in float32 on cpu") == 1
    assert agreement(base / "alone" / "wanda.masks", tmp_path / "masks") >= 0.9999
    assert tree(tmp_path / "cache" / "parts") == []


@pytest.mark.slow
def test_what_one_rank_finds_wrong_is_said_once(base: Path, tmp_path: Path) -> None:
    failed = torchrun(3, "failing", *command(base, tmp_path), module="tests.several_ranks", **{FAILS: "2 by an error"})
    assert failed.status == 1
    assert sentences(failed) == ["trim: a shard is damaged; fetch the model anew."]
    done = trim_json(*command(base, tmp_path))
    assert done["resumed"] == 2
    assert agreement(base / "alone" / "wanda.masks", tmp_path / "masks") >= 0.9999


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of eight ranks, before it has met the others."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("verify", NANO), "trim verify works in one process and 8 ranks were started; run it without torchrun."),
        (("plan", NANO, "--sparsity", 0.5), "trim plan works in one process"),
        (
            ("prune", NANO, "-o", "masks", "--sparsity", 0.5, "--reconstruct", "layer", "--save-model", "pruned"),
            "--reconstruct layer trains in one process and 8 ranks were started; leave it out, or torchrun.",
        ),
        (("prune", NANO, "-o", "masks", "--sparsity", 0.5, "--refine", "learned"), "--refine learned trains in one"),
        (("calibrate", NANO, "-o", "calibration", "--dataset", "-"), "standard input, which 8 ranks cannot share"),
        (("eval", NANO, "--tasks", "rte"), "--tasks is measured in one process and 8 ranks were started"),
    ],
)
def test_what_ranks_cannot_share_is_refused(
    args: tuple[object, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = trim(*args, *(() if args[0] == "verify" else COMPUTE))
    assert done.status == 2
    assert said in done.err
    assert len(sentences(done)) == 1
    assert tree(tmp_path) == []
