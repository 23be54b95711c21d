"""`--max-memory` and `--max-device-memory`: what is chosen to fit, what is refused before any work, same results."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.interrupt import InterruptAt, Interrupted
from tests.simulated_device import SimulatedDevice, simulated
from tests.small_models import llama_config, random_model, save, skeleton_of
from tests.trim_cli import COMPUTE, save_tokens, tree, trim, trim_json
from trimcli import AllocateOptions, CalibrateOptions, PruneOptions, Recipe, prune
from trimcli.commands.plan import foresee
from trimcli.demo import MODEL
from trimcli.errors import ResourceError
from trimcli.files.masks import MaskFile
from trimcli.memory import Limits
from trimcli.pipeline.estimate import LIBRARIES, Memory
from trimcli.pipeline.fit import Fit
from trimcli.pipeline.plan import fit_trials
from trimcli.pipeline.recorded import Recorded

RUN: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
SAMPLES, SEQLEN, WIDTH = 64, 16, 32
STATES = SAMPLES * SEQLEN * WIDTH * 4
# Seen in a trial: weights on which masks of other batches may differ, whose scores are as good as equal.
TOLERANCE = 0.002


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("limits")
    save(random_model(llama_config(num_hidden_layers=3)), base / "model")
    save_tokens(base / "tokens", vocabulary=64, nsamples=SAMPLES, seqlen=SEQLEN)
    given = ("--tokens", base / "tokens", "--cache-dir", base / "cache", *COMPUTE)
    trim_json("calibrate", base / "model", "-o", base / "calib", *given)
    trim_json("prune", base / "model", "-o", base / "masks", "--save-model", base / "pruned", "--sparsity", 0.5, *given)
    return base


@pytest.fixture(autouse=True)
def _roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimcli.pipeline.fit.available_bytes", lambda: 1 << 40)


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """Every stream of the walks of these many samples, whose hidden states and batches can be looked at."""
    found: list[Recorded] = []
    make = Recorded.__init__

    def noted(self: Recorded, *args: Any) -> None:
        make(self, *args)
        if len(self.hidden) == SAMPLES:
            found.append(self)

    monkeypatch.setattr(Recorded, "__init__", noted)
    return found


@pytest.fixture
def sim() -> Iterator[SimulatedDevice]:
    with simulated() as device:
        yield device


def options(base: Path, folder: Path, limit: int | None = None, **fields: Any) -> PruneOptions:
    run: dict[str, Any] = {**RUN, "cache_dir": folder / "cache", "max_memory": None if limit is None else str(limit)}
    return PruneOptions(sparsity=0.5, calibrate=CalibrateOptions(tokens=base / "tokens", **run), **run, **fields)


def chosen(base: Path, folder: Path, limit: int | None = None, **fields: Any) -> Fit:
    return foresee(str(base / "model"), options(base, folder, limit, **fields)).fit


def narrowed(fit: Callable[[int], Fit], limit: int) -> dict[tuple[str, int], int]:
    """What is chosen under ever smaller limits, up to where nothing fits; with the largest limit of each choice."""
    found: dict[tuple[str, int], int] = {}
    with contextlib.suppress(ResourceError):
        while one := fit(limit):
            assert one.host_bytes <= limit
            found.setdefault((one.place, one.batch_size), limit)
            limit = one.host_bytes - 1
    return found


def test_a_limit_with_room_changes_nothing(base: Path, tmp_path: Path) -> None:
    target = ("--sparsity", 0.5, "--tokens", base / "tokens", "--cache-dir", tmp_path / "cache", *COMPUTE)
    plain = trim_json("plan", base / "model", *target)
    assert trim_json("plan", base / "model", *target, "--max-memory", "1TiB") == plain
    assert (plain["hidden_states"], plain["batch_size"], plain["why"]) == ("host", SAMPLES, [])


def test_first_files_then_smaller_batches(base: Path, tmp_path: Path) -> None:
    roomy = chosen(base, tmp_path)
    tight = chosen(base, tmp_path, roomy.host_bytes - 1)
    assert (tight.place, tight.batch_size, tight.spill_bytes) == ("files", SAMPLES, STATES)
    assert tight.host_bytes == roomy.host_bytes - STATES
    assert tight.spill == tmp_path / "cache" / "spilled"
    assert tight.why == ("hidden states (128.0 KiB) in files: --max-memory 368.8 MiB would not hold them",)
    found = narrowed(lambda limit: chosen(base, tmp_path, limit), roomy.host_bytes)
    assert list(found)[:3] == [("host", 64), ("files", 64), ("host", 32)]
    assert list(found)[-1][0] == "files"
    sizes = [size for _, size in found]
    assert sizes == sorted(sizes, reverse=True)
    assert min(sizes) < 32
    assert found["host", 32] == tight.host_bytes - 1
    smaller = chosen(base, tmp_path, found["host", 32])
    assert smaller.why == ("batches of 32, not 64: --max-memory 368.7 MiB would not hold more",)


def test_a_batch_size_that_was_given_stays(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimcli.pipeline.estimate.LIBRARIES", 0)
    assert chosen(base, tmp_path, batch_size=8).batch_size == 8
    needed = chosen(base, tmp_path, batch_size=8, spill=tmp_path / "spill").host_bytes
    assert chosen(base, tmp_path, needed, batch_size=8).place == "files"
    with pytest.raises(ResourceError, match=r"a batch's activations 80\.0 KiB.* or a smaller --batch-size"):
        chosen(base, tmp_path, needed - 1, batch_size=8)


def test_a_folder_that_was_named_is_the_one(base: Path, tmp_path: Path) -> None:
    fit = chosen(base, tmp_path, 1 << 40, spill=tmp_path / "own")
    assert (fit.place, fit.spill, fit.why) == ("files", tmp_path / "own", ())


def test_plan_says_what_was_chosen(base: Path, tmp_path: Path) -> None:
    limit = chosen(base, tmp_path).host_bytes - 1
    target = ("--sparsity", 0.5, "--tokens", base / "tokens", "--cache-dir", tmp_path / "cache", *COMPUTE)
    shown = trim("plan", base / "model", *target, "--max-memory", limit)
    assert "hidden states (128.0 KiB) in files: --max-memory 368.8 MiB would not hold them" in shown.out
    document = trim_json("plan", base / "model", *target, "--max-memory", limit)
    assert (document["hidden_states"], document["spill_bytes"]) == ("files", STATES)
    assert document["why"] == ["hidden states (128.0 KiB) in files: --max-memory 368.8 MiB would not hold them"]
    assert tree(tmp_path) == []


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(method="sparsegpt")], ids=["wanda", "sparsegpt"])
def test_the_same_masks(recipe: Recipe, base: Path, tmp_path: Path, walked: list[Recorded]) -> None:
    saved = {"save_model": tmp_path / "pruned"} if recipe.changes_weights else {}
    shared: dict[str, Any] = {"recipe": recipe, **saved}
    whole = chosen(base, tmp_path / "roomy", **shared)
    files = narrowed(lambda limit: chosen(base, tmp_path, limit, **shared), whole.host_bytes)
    masks = {}
    for place, size in (("host", 64), ("files", 64), list(files)[-1]):
        walked.clear()
        folder = tmp_path / f"{place}{size}"
        folder.mkdir()
        shared |= {"save_model": folder / "pruned"} if recipe.changes_weights else {}
        prune(str(base / "model"), folder / "masks", options(base, folder, files[place, size], **shared))
        assert [stream.batch_size for stream in walked] == [size]
        masks[place, size] = MaskFile.open(folder / "masks")
        assert tree(folder / "cache" / "spilled") == []
        assert "max_memory" not in masks[place, size].manifest["options"]
    first, second, least = masks.values()
    for name in first.names:
        assert torch.equal(first.keep(name), second.keep(name)), name
        agreement = (first.keep(name) == least.keep(name)).double().mean()
        assert agreement >= 1 - TOLERANCE, name


def test_a_run_goes_on_under_another_limit(base: Path, tmp_path: Path) -> None:
    """A limit is no part of what the stage cache goes by."""
    tight = chosen(base, tmp_path).host_bytes - 1
    whole = prune(str(base / "model"), tmp_path / "whole", options(base, tmp_path / "other"))
    with pytest.raises(Interrupted):
        prune(str(base / "model"), tmp_path / "masks", options(base, tmp_path), progress=InterruptAt("layer 3/3"))
    found = prune(str(base / "model"), tmp_path / "masks", options(base, tmp_path, tight))
    assert found.resumed == 2
    assert found.planned["hidden_states"] == "files"
    one, other = load_file(tmp_path / "whole"), load_file(tmp_path / "masks")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert whole.planned["hidden_states"] == "host"
    assert len(list((tmp_path / "cache" / "calibration").glob("*.safetensors"))) == 1


def test_calibrating_under_a_limit(base: Path, tmp_path: Path, walked: list[Recorded]) -> None:
    given = ("--tokens", base / "tokens", "--cache-dir", tmp_path / "cache", *COMPUTE)
    plain = trim_json("calibrate", base / "model", "-o", tmp_path / "one", *given)["planned"]
    tight = trim(
        "calibrate", base / "model", "-o", tmp_path / "two", *given, "--max-memory", plain["peak_host_bytes"] - 1
    )
    assert tight.status == 0, tight.err
    assert "hidden states (128.0 KiB) in files: --max-memory" in tight.err
    assert (tmp_path / "one").read_bytes()[-1000:] == (tmp_path / "two").read_bytes()[-1000:]
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert len(walked) == 2
    limit = plain["peak_host_bytes"] - STATES - 1
    small = trim_json("calibrate", base / "model", "-o", tmp_path / "three", *given, "--max-memory", limit)["planned"]
    assert small["batch_size"] == walked[-1].batch_size == SAMPLES // 2
    three = load_file(tmp_path / "three")
    assert all(torch.allclose(one[name], three[name], rtol=1e-5) for name in one)


def test_allocating_under_a_limit(base: Path, tmp_path: Path, walked: list[Recorded]) -> None:
    search = ("--method", "search", "--search-evaluations", 12, "--sparsity", 0.5, "--calibration", base / "calib")
    given = (*search, "--cache-dir", tmp_path / "cache", *COMPUTE, "--force")
    plain = trim_json("alloc-layers", base / "model", "-o", tmp_path / "ratios", *given)
    refused = trim("alloc-layers", base / "model", "-o", tmp_path / "ratios", *given, "--max-memory", "10MiB")
    assert refused.status == 1
    assert "trim: trying allocations of " in refused.err
    trials = AllocateOptions(method="search", sparsity=0.5).trials
    assert trials is not None
    limit = fit_trials(skeleton_of(base / "model"), trials, nsamples=SAMPLES, seqlen=SEQLEN).host_bytes - 1
    within = trim("alloc-layers", base / "model", "-o", tmp_path / "r", *given, "--max-memory", limit, "--json")
    assert within.document["sparsity"] == plain["sparsity"]
    assert "in files: --max-memory" in within.err


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("prune", "model", "-o", "out", "--sparsity", 0.5, "--tokens", "tokens"), "pruning model takes at least 368."),
        (("prune", "model", "-o", "out", "--sparsity", 0.5, "--tokens", "tokens", "--alloc", "owl"), "pruning model"),
        (("plan", "model", "--sparsity", 0.5, "--tokens", "tokens"), "pruning model takes at least 368."),
        (("calibrate", "model", "-o", "out", "--tokens", "tokens"), "calibrating model takes at least 368."),
        (
            ("alloc-layers", "model", "-o", "out", "--sparsity", 0.5, "--method", "alpha"),
            "the allocation alpha of model",
        ),
        (
            ("sweep", "model", "-o", "out", "--sparsity", 0.5, "--tokens", "tokens", "--holdout", 2),
            "pruning model takes",
        ),
        (
            ("eval", "nano", "-o", "out", "--ppl", "text.txt", "--seqlen", 16),
            "measuring perplexity of nano takes at least",
        ),
        (("eval", "nano", "-o", "out", "--tasks", "boolq"), "measuring zero-shot tasks, for which all of nano is in"),
        (("finetune", "pruned", "-o", "out", "--tokens", "tokens"), "training pruned takes about 36"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_cannot_fit_is_refused_before_any_work(
    words: tuple[object, ...], what: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("model", "pruned"):
        shutil.copytree(base / name, tmp_path / name)
    shutil.copytree(MODEL, tmp_path / "nano")
    shutil.copyfile(base / "tokens", tmp_path / "tokens")
    (tmp_path / "text.txt").write_text("Whatever is written down is read again one day. " * 40)
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    done = trim(*words, "--cache-dir", "cache", "--max-memory", "100MiB", *COMPUTE)
    assert done.status == 1
    assert what in done.err
    assert "--max-memory allows 100.0 MiB; give --max-memory " in done.err
    assert done.err.count("\n") == 1
    assert done.err.count(". ") == 0
    assert [name for name in tree(tmp_path) if not name.startswith("cache")] == before
    assert [path for path in tmp_path.glob("cache/**/*") if path.suffix in (".safetensors", ".json")] == []


@pytest.mark.slow
def test_perplexity_under_a_limit(base: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Whatever is written down is read again one day. " * 400)
    given = ("eval", MODEL, "--ppl", tmp_path / "text.txt", "--seqlen", 64, "--cache-dir", tmp_path / "cache", *COMPUTE)
    plain = trim_json(*given)
    planned, value = plain["planned"], plain["perplexity"][0]["value"]
    assert (planned["hidden_states"], planned["why"]) == ("host", [])
    within = trim(*given, "--json", "--max-memory", planned["peak_host_bytes"] - 1)
    tight = within.document
    assert tight["planned"]["hidden_states"] == "files"
    assert tight["perplexity"][0]["value"] == value
    assert "hidden states (" in within.err
    found, limit = [], planned["peak_host_bytes"]
    while (done := trim(*given, "--json", "--max-memory", limit)).status == 0:
        found.append(done.document)
        limit = found[-1]["planned"]["peak_host_bytes"] - 1
        assert found[-1]["perplexity"][0]["value"] == pytest.approx(value, rel=1e-6)
    assert found[-1]["planned"]["logit_tokens"] < planned["logit_tokens"]
    assert "takes at least" in done.err
    assert tree(tmp_path / "cache" / "spilled") == []


def test_bad_sizes_and_pairs(base: Path, tmp_path: Path) -> None:
    shared = ("--sparsity", 0.5, *COMPUTE)
    for flag in ("--max-memory", "--max-device-memory"):
        done = trim("prune", base / "model", "-o", tmp_path / "m", *shared, flag, "5 apples")
        assert done.status == 2
        assert f"{flag} '5 apples' is not a size; write it like 8GiB" in done.err
    done = trim("eval", base / "model", "--ppl", "text", "--sparse", "--max-memory", "8GiB")
    assert done.status == 2
    assert "--sparse with --max-memory: how much the pruned matrices take shows only when they are read" in done.err


def test_hidden_states_that_no_file_takes(base: Path, tmp_path: Path) -> None:
    """A model whose layers are called by passes of its own keeps its hidden states."""
    skeleton = skeleton_of(base / "model")
    fit = Fit(Memory(0, 1000, 500, {}), "files", 1, SEQLEN, spill=tmp_path, limited=True)
    skeleton.form, skeleton.limits = "suspended", Limits(1499)
    with pytest.raises(ResourceError, match=r"stay in memory, some 1\.5 KiB in all, and --max-memory allows 1\.5 KiB"):
        fit.hold(skeleton)
    skeleton.limits = Limits(1500)
    fit.hold(skeleton)


@pytest.mark.slow
def test_a_model_of_72_billion_weights_in_8_gibibytes(tmp_path: Path) -> None:
    config = json.loads((Path(__file__).parents[1] / "data" / "qwen2.5-3b" / "config.json").read_text())
    heads = {"num_hidden_layers": 80, "max_window_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
    sizes = {"hidden_size": 8192, "intermediate_size": 29568, "vocab_size": 152064, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps({**config, **heads, **sizes}))
    given = PruneOptions(sparsity=0.75, device="cpu", dtype="bfloat16")
    plain, limited = (foresee(str(tmp_path), replace(given, max_memory=size)) for size in (None, "8GiB"))
    states = 256 * 2048 * 8192 * 2
    assert (plain.spill_bytes, limited.spill_bytes) == (0, states)
    assert limited.host_bytes == plain.host_bytes - states < 8 << 30
    assert limited.why == ("hidden states (8.0 GiB) in files: --max-memory 8.0 GiB would not hold them",)
    with pytest.raises(
        ResourceError, match=r"takes at least 4\.8 GiB of memory, of which the work on one matrix 2\.8 GiB"
    ):
        foresee(str(tmp_path), replace(given, max_memory="4GiB"))
    gram = replace(given, recipe=Recipe(method="sparsegpt"), save_model=tmp_path / "out", max_memory="8GiB")
    with pytest.raises(ResourceError, match="of which statistics of a layer's inputs"):
        foresee(str(tmp_path), gram)


class TestDevice:
    """The accelerator's memory, on the simulated device."""

    @staticmethod
    def given(base: Path, tmp_path: Path, *limits: object) -> tuple[object, ...]:
        target = ("--sparsity", 0.5, "--tokens", base / "tokens", "--cache-dir", tmp_path / "cache")
        return (base / "model", *target, "--device", "sim:0", "--dtype", "float32", *limits)

    def test_the_hosts_memory_then_files(self, base: Path, tmp_path: Path, sim: SimulatedDevice) -> None:
        roomy = trim_json("plan", *self.given(base, tmp_path))
        assert roomy["hidden_states"] == "device"
        device, host = roomy["peak_device_bytes"], roomy["peak_host_bytes"]
        limits = ["--max-device-memory", device - 1]
        on_host = trim_json("plan", *self.given(base, tmp_path, *limits))
        assert on_host["hidden_states"] == "host"
        assert (on_host["peak_device_bytes"], on_host["peak_host_bytes"]) == (device - STATES, host + STATES)
        assert "in the host's memory: --max-device-memory" in on_host["why"][0]
        files = trim_json("plan", *self.given(base, tmp_path, *limits, "--max-memory", host + STATES - 1))
        assert files["hidden_states"] == "files"
        assert (files["peak_device_bytes"], files["peak_host_bytes"]) == (device - STATES, host)
        smaller = trim_json("plan", *self.given(base, tmp_path, "--max-device-memory", device - STATES - 1))
        assert smaller["batch_size"] == SAMPLES // 2
        refused = trim("plan", *self.given(base, tmp_path, "--max-device-memory", "10KB"))
        assert refused.status == 1
        assert "of the memory of sim:0, of which " in refused.err
        assert "--max-device-memory allows 9.8 KiB; give --max-device-memory 1MiB" in refused.err

    def test_a_prune_keeps_to_it(
        self, base: Path, tmp_path: Path, sim: SimulatedDevice, walked: list[Recorded]
    ) -> None:
        plain = trim_json("prune", *self.given(base, tmp_path), "-o", tmp_path / "one")["planned"]
        assert walked[-1].hidden.device == sim.device
        limit = plain["peak_device_bytes"] - 1
        within = trim_json("prune", *self.given(base, tmp_path, "--max-device-memory", limit), "-o", tmp_path / "two")
        assert within["planned"]["hidden_states"] == "host"
        assert walked[-1].hidden.device.type == "cpu"
        one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert sim.allowed == limit
        trim_json("plan", *self.given(base, tmp_path))
        assert sim.allowed is None


def test_the_libraries_are_part_of_it(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"of which Python and its libraries 368\.0 MiB"):
        chosen(base, tmp_path, LIBRARIES)
