"""Every stage on an accelerator, simulated: what the CPU gives, with copies and waits that no size multiplies."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.families import CONVERTS
from tests.simulated_device import Counts, SimulatedDevice
from tests.small_models import llama_config, masks_for, random_model, save
from tests.trim_cli import save_tokens, trim_json
from trimcli.demo import measurement_text
from trimcli.evaluation import perplexity as evaluation
from trimcli.evaluation.perplexity import perplexity
from trimcli.files.checkpoint import Checkpoint
from trimcli.files.masks import MaskFile
from trimcli.files.ratios import LayerSparsity
from trimcli.methods import masks, ranking
from trimcli.methods.masks import unpack
from trimcli.methods.rows import search
from trimcli.model.skeleton import Skeleton
from trimcli.pipeline.proof import prove
from trimcli.pipeline.recorded import Recorded
from trimcli.pipeline.walk import Walk

# Two layers of seven matrices each. The larger model has more of everything that a method goes through.
SIZES: Mapping[str, Mapping[str, int]] = {
    "small": {"hidden_size": 8, "intermediate_size": 12},
    "large": {"hidden_size": 16, "intermediate_size": 24},
}
MATRICES = 14
HALF = ("--sparsity", 0.5)
GROUPS = ("--sparsity-type", "2:4")
SPARSEGPT = ("--method", "sparsegpt", "--block-size", 4)
# A set number of iterates: as many products whatever the weights.
TRIM = ("--use-trim", "--qmetric", "pass", "--iterations", 3)
BARBER = (*HALF, "--prune-barber", "--threshold", 0.5, "--prune-granularity")

# Options of a prune, and the copies to the host, copies to the device and other waits that a matrix may cost, with its
# share of what a layer costs. To the host go a matrix's mask and new weights, the Gram's facts, and, once for each of
# TRIM's five products (dense, uniform, three iterates), the sums of its rows.
PRUNES: dict[str, tuple[tuple[object, ...], int, int, int]] = {
    "magnitude": ((*HALF, "--method", "magnitude"), 1, 2, 1),
    "magnitude, reference": ((*HALF, "--method", "magnitude", "--numerics", "reference"), 1, 2, 1),
    "wanda": (HALF, 1, 4, 3),
    "wanda 2:4": (GROUPS, 1, 4, 3),
    "variant": ((*HALF, "--use-variant"), 1, 4, 3),
    "no propagation": ((*HALF, "--no-propagate"), 1, 5, 1),
    "trim": ((*HALF, *TRIM), 7, 9, 3),
    "trim, inputs again": ((*HALF, *TRIM, "--input-recalc"), 7, 9, 4),
    "sparsegpt": ((*HALF, *SPARSEGPT), 3, 4, 4),
    "sparsegpt, reference": ((*HALF, *SPARSEGPT, "--numerics", "reference"), 3, 4, 4),
    "sparsegpt 2:4": ((*GROUPS, *SPARSEGPT), 3, 4, 4),
    "sparsegpt by wanda": ((*HALF, *SPARSEGPT, "--mask-score", "wanda", "--mask-update", "block"), 3, 4, 4),
    "sparsegpt with trim": ((*HALF, *SPARSEGPT, *TRIM), 9, 11, 6),
    "barber 2:4": ((*GROUPS, "--prune-barber"), 2, 8, 5),
    "barber by block": ((*BARBER, "block"), 2, 9, 14),
    "barber by layer": ((*BARBER, "layer"), 2, 9, 14),
    "barber by output1": ((*BARBER, "output1"), 2, 9, 5),
    "barber by input1": ((*BARBER, "input1"), 2, 9, 5),
}


@dataclass(frozen=True)
class Home:
    """A folder with a model and what its stages start from: tokens, and the calibration file that the CPU made."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def run(self, command: str, *options: object, device: str = "cpu") -> Any:
        """Run a command on the model, computing in float32."""
        where = ("--device", device, "--dtype", "float32", "--cache-dir", self.folder / f"cache-{device}")
        return trim_json(command, self.model, *options, *where)

    def prune(self, output: Path, *options: object, device: str = "cpu") -> None:
        """Prune with the calibration file."""
        saved = ("--save-model", output.with_suffix(".model")) if "sparsegpt" in options else ()
        given = ("--calibration", self.folder / "calib", *saved)
        self.run("prune", "-o", output, *given, *options, device=device)

    def on(self, device: torch.device) -> Skeleton:
        """The model's skeleton on a device."""
        return Skeleton(Checkpoint.open(self.model), device=device)


walks = pytest.mark.skipif(not CONVERTS, reason="transformers 4 makes its masks with vmap, which knows no such device")


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Home]:
    found = {}
    for size, config in SIZES.items():
        home = found[size] = Home(tmp_path_factory.mktemp(size))
        save(random_model(llama_config(**config)), home.model)
        save_tokens(home.folder / "tokens", vocabulary=64, nsamples=2, seqlen=8)
        home.run("calibrate", "-o", home.folder / "calib", "--tokens", home.folder / "tokens")
    return found


@pytest.fixture
def _several_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rows and pieces of windows so small that there are several; steps so large that all iterates differ."""
    monkeypatch.setattr(masks, "_BLOCK", 128)
    monkeypatch.setattr(ranking, "_SMALLEST_BLOCK", 128)
    monkeypatch.setattr(search, "_STEPS", (0.16,))
    monkeypatch.setattr("trimcli.model.device.LOGITS", 1)
    monkeypatch.setattr(evaluation, "TOKENS", 4)


def counted(sim: SimulatedDevice, homes: Mapping[str, Home], run: Callable[[str, Home], object]) -> Counts:
    """What `run` costs, of which the size of the model must not be a part."""
    found = {}
    for size, home in homes.items():
        prove(home.on(sim.device), home.folder / f"cache-{sim.device}")  # once a model: no part of a run's cost
        with sim.counting() as found[size]:
            run(size, home)
    assert found["small"] == found["large"]
    return found["small"]


def bits(path: Path) -> dict[str, Tensor]:
    """The masks of a file."""
    return {key: unpack(packed, 8 * packed.shape[1]) for key, packed in load_file(path).items()}


# --- the device itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mix",
    [
        lambda there: there + torch.ones(3),
        lambda there: torch.ones(3).add_(there),
        lambda there: torch.zeros(()).add_(there.sum()),
        lambda there: torch.cat([there, torch.ones(3)]),
        lambda there: torch.arange(9)[there.long()],
        lambda there: there.index_select(0, torch.tensor([0])),
        lambda there: there.numpy(),
    ],
)
def test_devices_do_not_mix(mix: Callable[[Tensor], object], sim: SimulatedDevice) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        mix(torch.ones(3, device=sim.device))


@pytest.mark.parametrize(
    ("what", "counts"),
    [
        (lambda there: (there * torch.tensor(2.0) + 1).relu_(), Counts()),
        (lambda there: there.__setitem__(there > 1, 0.0), Counts()),
        (lambda there: there.masked_fill(there > 1, 0.0), Counts()),
        (lambda there: there.cpu(), Counts(to_host=1)),
        (lambda there: there.tolist(), Counts(to_host=1)),
        (lambda there: torch.empty(3).copy_(there), Counts(to_host=1)),
        (lambda there: there.copy_(torch.ones(3)), Counts(to_device=1)),
        (lambda there: torch.tensor([1, 2]).to(there.device), Counts(to_device=1)),
        (lambda there: there[torch.tensor([1, 2])], Counts(to_device=1)),
        (lambda there: there.sum().item(), Counts(waits=1)),
        (lambda there: bool(there.any()), Counts(waits=1)),
        (lambda there: there[there > 1], Counts(waits=1)),
        (lambda there: there.nonzero(), Counts(waits=1)),
        (lambda there: torch.equal(there, there), Counts(waits=1)),
        (lambda there: there.repeat_interleave(there.long()), Counts(waits=1)),
        (lambda there: there.masked_fill(there > 1, there.sum()), Counts(waits=1)),
        (lambda there: there.__setitem__(there > 1, there.sum()), Counts(waits=1)),
        (lambda there: torch.linalg.eigvalsh(torch.outer(there, there)), Counts(waits=1)),
    ],
)
def test_what_counts(what: Callable[[Tensor], object], counts: Counts, sim: SimulatedDevice) -> None:
    there = torch.ones(3, device=sim.device)
    with sim.counting() as found:
        what(there)
    assert found == counts


def test_memory_is_what_is_still_held(sim: SimulatedDevice) -> None:
    before = sim.live
    there = torch.zeros(100, device=sim.device)
    view = there[50:]
    del there
    assert sim.live == before + 400
    sim.limit = before + 500
    with pytest.raises(torch.OutOfMemoryError, match="sim:0 out of memory"):
        view.repeat(2)
    sim.limit = None
    del view
    assert sim.live == before
    graph = torch.ones(100, device=sim.device, requires_grad=True).square()
    assert sim.live == before + 800, "autograd holds what the gradient needs"
    graph.sum().backward()


# --- the stages ------------------------------------------------------------------------------------------


@walks
@pytest.mark.usefixtures("_several_of_all")
@pytest.mark.parametrize("name", PRUNES)
def test_prune(name: str, homes: dict[str, Home], sim: SimulatedDevice, tmp_path: Path) -> None:
    """The masks are the CPU's to the bit, although attention and TRIM's products sum in another order there."""
    options, to_host, to_device, waits = PRUNES[name]
    found = counted(sim, homes, lambda size, home: home.prune(tmp_path / size, *options, device="sim:0"))
    assert found.to_host <= MATRICES * to_host
    assert found.to_device <= MATRICES * to_device
    assert found.waits <= MATRICES * waits
    homes["small"].prune(tmp_path / "cpu", *options)
    expected, masked = bits(tmp_path / "cpu"), bits(tmp_path / "small")
    assert expected.keys() == masked.keys()
    assert all(torch.equal(keep, expected[key]) for key, keep in masked.items())
    if "sparsegpt" in options:
        weights = load_file(tmp_path / "cpu.model" / "model.safetensors")
        for key, weight in load_file(tmp_path / "small.model" / "model.safetensors").items():
            torch.testing.assert_close(weight, weights[key], rtol=1e-4, atol=1e-5)


@walks
@pytest.mark.usefixtures("_several_of_all")
def test_calibrate(homes: dict[str, Home], sim: SimulatedDevice, tmp_path: Path) -> None:
    def calibrate(size: str, home: Home) -> None:
        given = ("--tokens", home.folder / "tokens", "--batch-size", 1)
        home.run("calibrate", "-o", tmp_path / size, *given, device="sim:0")

    found = counted(sim, homes, calibrate)
    assert found.waits <= 2 * MATRICES
    expected = load_file(homes["small"].folder / "calib")
    for key, value in load_file(tmp_path / "small").items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


@walks
@pytest.mark.usefixtures("_several_of_all")
@pytest.mark.parametrize("method", ["owl", "alpha"])
def test_allocate(method: str, homes: dict[str, Home], sim: SimulatedDevice, tmp_path: Path) -> None:
    def allocate(home: Home, output: Path, device: str) -> Any:
        given = ("--hyper-m", 2, "--calibration", home.folder / "calib") if method == "owl" else ()
        return home.run("alloc-layers", "-o", output, "--method", method, *HALF, *given, device=device)

    found = counted(sim, homes, lambda size, home: allocate(home, tmp_path / size, "sim:0"))
    assert found.waits + found.to_host <= 10 * MATRICES
    allocate(homes["small"], tmp_path / "cpu", "cpu")
    mine, theirs = (LayerSparsity.load(tmp_path / size).sparsity for size in ("small", "cpu"))
    assert mine == pytest.approx(theirs, rel=1e-6)
    assert len(set(mine.values())) > 1


@walks
@pytest.mark.usefixtures("sim")
def test_trials(homes: dict[str, Home], tmp_path: Path) -> None:
    home, found = homes["small"], {}
    given = ("--method", "auto", *HALF, "--trial-samples", 2, "--calibration", home.folder / "calib")
    for device in ("cpu", "sim:0"):
        done = home.run("alloc-layers", "-o", tmp_path / device[:3], *given, device=device)
        found[device] = done["parameters"]["losses"]
    assert found["sim:0"] == pytest.approx(found["cpu"], rel=1e-4)
    assert min(found["cpu"].values()) > 0


@walks
@pytest.mark.usefixtures("_several_of_all")
def test_perplexity(homes: dict[str, Home], sim: SimulatedDevice, tmp_path: Path) -> None:
    """One copy to the host for all windows; besides, transformers waits in each forward pass of its own, 13 here."""
    windows = load_file(homes["small"].folder / "tokens")["tokens"]
    files = {size: MaskFile.open(masks_for(home.model, tmp_path / size)) for size, home in homes.items()}
    values = {}

    def measure(size: str, home: Home) -> None:
        values[size] = perplexity(home.on(sim.device), windows, mask=files[size], batch_size=1)

    found = counted(sim, homes, measure)
    assert found.to_host == 1
    assert found.waits <= 13 + 4
    for size, home in homes.items():
        expected = perplexity(home.on(torch.device("cpu")), windows, mask=files[size], batch_size=1)
        assert values[size] == pytest.approx(expected, rel=1e-5)


@walks
def test_the_embedded_model(nano_qwen2: Path, sim: SimulatedDevice, tmp_path: Path) -> None:
    """A pruned directory and the masks behind it, measured by the command line, on either device."""
    tokens = save_tokens(tmp_path / "tokens", vocabulary=2048, nsamples=2)
    (tmp_path / "text.txt").write_text(measurement_text()[:4000])
    common = ("--dtype", "float32", "--cache-dir", tmp_path / "cache")

    def measured(model: Path, device: str, *options: object) -> float:
        given = ("--ppl", tmp_path / "text.txt", "--seqlen", 32, "--max-windows", 3)
        document = trim_json("eval", model, *given, *options, "--device", device, *common)
        return float(document["perplexity"][0]["value"])

    written = ("-o", tmp_path / "masks", "--save-model", tmp_path / "pruned")
    trim_json("prune", nano_qwen2, *written, *HALF, "--tokens", tokens, "--device", "sim:0", *common)
    values = [measured(nano_qwen2, device, "--masks", tmp_path / "masks") for device in ("cpu", "sim:0")]
    values += [measured(tmp_path / "pruned", device) for device in ("cpu", "sim:0")]
    assert values == pytest.approx([values[0]] * 4, rel=1e-5)


# --- memory ----------------------------------------------------------------------------------------------


def walked(home: Home, device: torch.device, batch_size: int) -> Walk:
    """Four samples through all layers."""
    tokens = torch.randint(64, (4, 8), generator=torch.Generator().manual_seed(0))
    walk = Walk(home.on(device), tokens, batch_size=batch_size)
    for layer in walk.layers():
        walk.advance(layer)
    return walk


@walks
def test_recovery_finds_the_failed_batch_gone(homes: dict[str, Home], sim: SimulatedDevice) -> None:
    """What half a batch takes is there, but not besides what the whole one held when its memory ran out."""
    home, peaks = homes["large"], {}
    expected = walked(home, torch.device("cpu"), 4).states(slice(0, 4))
    for batch_size in (2, 4):
        sim.reset()
        walked(home, sim.device, batch_size)
        peaks[batch_size] = sim.peak
    assert peaks[2] < peaks[4]
    sim.limit = peaks[2] + 1024
    with pytest.warns(UserWarning, match="out of memory at model.layers.0: going on with a batch size of 2"):
        walk = walked(home, sim.device, 4)
    assert walk.batch_size == 2
    assert sim.emptied == 1
    torch.testing.assert_close(walk.states(slice(0, 4)).cpu(), expected, rtol=1e-5, atol=1e-6)


@walks
def test_hidden_states_that_do_not_fit_stay_on_the_cpu(homes: dict[str, Home], sim: SimulatedDevice) -> None:
    before = walked(homes["small"], sim.device, 2).stream
    sim.total = sim.live + 2000
    after = walked(homes["small"], sim.device, 2).stream
    assert isinstance(before, Recorded)
    assert isinstance(after, Recorded)
    assert before.hidden.device == sim.device
    assert after.hidden.device.type == "cpu"
    assert torch.equal(after.hidden, before.hidden.cpu())
