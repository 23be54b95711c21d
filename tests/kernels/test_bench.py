from pathlib import Path
from typing import Any

import pytest
import torch

import trimcli.commands.export
import trimcli.kernels.bitmap.build
import trimcli.kernels.shapes
from tests.small_models import gpt2_config, llama_config, masks_for, random_model, save
from tests.trim_cli import COMPUTE, trim, trim_json
from trimcli.commands.apply import apply_masks
from trimcli.commands.export import export
from trimcli.commands.options import ApplyOptions
from trimcli.errors import OptionError, ResourceError
from trimcli.kernels.bench import Measured, Products, Rate, bench, measure, products_verdict, verdict
from trimcli.kernels.forms import Race
from trimcli.kernels.options import BenchOptions, ExportOptions
from trimcli.kernels.shapes import ShapeRace, break_even

QUICK: dict[str, Any] = {"tokens": 3, "batch": (1, 2), "repeat": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, `pruned` and `packed` (75% zeros), and `csr`, an export of it."""
    base = tmp_path_factory.mktemp("bench")
    save(random_model(llama_config()), base / "model")
    masks_for(base / "model", base / "masks", sparsity=0.75)
    apply_masks(str(base / "model"), base / "masks", base / "pruned")
    apply_masks(str(base / "model"), base / "masks", base / "packed", ApplyOptions(format="packed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trimcli.commands.export, "race", lambda *_: Race(2.0, 1.0))
        export(str(base / "pruned"), base / "csr", ExportOptions())
    return base


def on_disk(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


WEIGHTS = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 40 * 32)


def test_a_pruned_model_is_measured_dense_as_csr_and_as_bitmap(base: Path, compiled: Path) -> None:
    before = {path.name: path.read_bytes() for path in (base / "pruned").iterdir()}
    result = bench([str(base / "pruned")], BenchOptions(**QUICK))
    dense, csr, bitmap = result.measured
    assert (dense.form, csr.form, bitmap.form) == ("dense", "csr", "bitmap")
    assert (dense.sparse, csr.sparse, bitmap.sparse, csr.linears) == (0, 14, 14, 14)
    assert dense.zeros == csr.zeros == bitmap.zeros == 0.75
    assert dense.disk == on_disk(base / "pruned")
    assert csr.disk is None
    rows = 2 * (32 + 32 + 16 + 16 + 40 + 40 + 32)
    # Dense: 4 bytes a weight. CSR: value and column of what is kept, and an end for every row and one more.
    assert csr.memory - dense.memory == 8 * WEIGHTS // 4 + 4 * (rows + 14) - 4 * WEIGHTS
    # Bitmap: a bit a weight (40 inputs are 5 bytes), what is kept, and 8 bytes for every row and one more.
    assert bitmap.memory - dense.memory == WEIGHTS // 8 + 4 * WEIGHTS // 4 + 8 * (rows + 14) - 4 * WEIGHTS
    for one in result.measured:
        assert [(rate.phase, rate.batch) for rate in one.rates] == [
            ("prefill", 1),
            ("decode", 1),
            ("prefill", 2),
            ("decode", 2),
        ]
        assert all(0 < rate.slowest <= rate.median <= rate.fastest for rate in one.rates)
    assert len(result.verdicts) == 3
    assert "csr at 75.0% zeros" in result.verdicts[0]
    assert "bitmap at 75.0% zeros" in result.verdicts[1]
    products = result.products[0]
    assert {one.shape: one.count for one in products.shapes} == {(40, 32): 4, (32, 40): 2, (32, 32): 4, (16, 32): 4}
    for race in products.shapes:
        weights = race.shape[0] * race.shape[1]
        assert race.zeros == 0.75
        assert race.nbytes["dense"] == 4 * weights
        assert race.nbytes["bitmap"] == weights // 8 + weights + 8 * (race.shape[0] + 1)
        assert race.floor == {form: size / products.bandwidth for form, size in race.nbytes.items()}
        assert set(race.seconds) == {"dense", "bitmap", "csr"}
    assert before == {path.name: path.read_bytes() for path in (base / "pruned").iterdir()}


def test_a_packed_model_is_measured_by_its_own_files(base: Path, compiled: Path) -> None:
    dense, csr, bitmap = bench([str(base / "packed")], BenchOptions(**QUICK)).measured
    assert dense.disk == on_disk(base / "packed") < on_disk(base / "pruned")
    assert csr.sparse == bitmap.sparse == 14


def test_an_export_is_measured_dense_and_as_exported(base: Path, compiled: Path) -> None:
    dense, csr = bench([str(base / "csr")], BenchOptions(**QUICK)).measured
    in_memory = bench([str(base / "pruned")], BenchOptions(**QUICK)).measured
    assert (csr.form, csr.exported, csr.sparse) == ("csr", True, 14)
    assert csr.disk == on_disk(base / "csr")
    assert (dense.disk, dense.exported) == (None, False)
    assert dense.zeros == csr.zeros == 0.75
    assert (dense.memory, csr.memory) == (in_memory[0].memory, in_memory[1].memory)


def test_an_export_without_a_sparse_matrix_gains_nothing(base: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trimcli.commands.export, "race", lambda *_: Race(1.0, 2.0))
        export(str(base / "pruned"), tmp_path / "csr", ExportOptions())
    result = bench([str(tmp_path / "csr")], BenchOptions(**QUICK))
    assert result.measured[1].sparse == 0
    assert result.verdicts[0].endswith("csr as exported has no sparse matrix, so nothing is gained.")


def test_a_dense_model_is_measured_dense_alone(base: Path) -> None:
    result = bench([str(base / "model")], BenchOptions(**QUICK))
    assert [one.form for one in result.measured] == ["dense"]
    assert result.verdicts[0].endswith("was measured dense alone: none of its matrices is pruned.")


def test_transposed_matrices(tmp_path: Path, compiled: Path) -> None:
    save(random_model(gpt2_config()), tmp_path / "model")
    masks_for(tmp_path / "model", tmp_path / "masks", sparsity=0.75)
    apply_masks(str(tmp_path / "model"), tmp_path / "masks", tmp_path / "pruned")
    dense, csr, bitmap = bench([str(tmp_path / "pruned")], BenchOptions(**QUICK)).measured
    assert csr.sparse == bitmap.sparse == csr.linears == 8
    assert bitmap.memory < csr.memory < dense.memory


def test_where_nothing_can_be_compiled_csr_is_measured_alone(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(_: object) -> None:
        raise ResourceError("there is no C++ compiler; install g++.")

    monkeypatch.setattr(trimcli.kernels.bitmap.build, "load", lacking)
    with pytest.warns(UserWarning, match=r"there is no C\+\+ compiler; install g\+\+; pruned matrices are held dense"):
        result = bench([str(base / "pruned")], BenchOptions(**QUICK))
    assert [one.form for one in result.measured] == ["dense", "csr"]
    assert result.products == ()


def race_of(seconds: tuple[float, float], shape: tuple[int, int] = (8, 4), count: int = 1) -> ShapeRace:
    both = dict(zip(("dense", "bitmap"), seconds, strict=True)) | {"csr": 4.0}
    return ShapeRace(shape, count, 0.7, both, dict.fromkeys(both, 10), dict.fromkeys(both, 0.5))


@pytest.mark.parametrize(
    ("even", "end"), [(0.4, "keep bits pay from 40% zeros on."), (None, "keep bits never pay.")], ids=["pays", "never"]
)
def test_the_sentence_of_the_products(even: float | None, end: str) -> None:
    products = Products("model", (race_of((2.0, 1.0)), race_of((4.0, 2.0), (2, 4), count=3)), 20.0, even)
    said = products_verdict(products, "this CPU")
    # Dense 2 + 3 * 4, bitmap 1 + 3 * 2, csr 4 + 3 * 4; of 7 seconds, 4 * 0.5 would do.
    assert "2.00x as bitmap and 0.88x as csr of dense's speed on this CPU" in said
    assert f"as bitmap at 29% of the speed at which as many bytes are copied; at 8 x 4, {end}" in said


def test_sparsity_pays_from_where_every_higher_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def race(weight: torch.Tensor, *_: Any, **__: Any) -> ShapeRace:
        zeros = float((weight == 0).float().mean())
        return race_of((1.0, 0.5 if zeros > 0.55 or 0.25 < zeros < 0.35 else 2.0))

    monkeypatch.setattr(trimcli.kernels.shapes, "race_shape", race)
    assert break_even((100, 100), torch.float32, torch.float32) == 0.6


def test_prefill_and_decode_are_what_is_run() -> None:
    calls: list[tuple[int, ...]] = []

    class Model:
        past = 0

        def get_input_embeddings(self) -> Any:
            return torch.nn.Embedding(7, 2)

        def forward(self, input_ids: Any, logits_to_keep: int = 0, **_: Any) -> None: ...

        def __call__(self, input_ids: Any, past_key_values: Any = None, use_cache: bool = False, **more: Any) -> Any:
            assert use_cache
            self.past = (past_key_values or 0) + input_ids.shape[1]
            calls.append((*input_ids.shape, past_key_values or 0, more.get("logits_to_keep", 0)))

            class Found:
                logits = torch.zeros(*input_ids.shape, 7)
                past_key_values = self.past

            return Found

    rates = list(measure(Model(), BenchOptions(tokens=4, batch=(2,), repeat=1), torch.device("cpu"), ""))
    one_round = [(2, 4, 0, 1), (2, 1, 4, 0), (2, 1, 5, 0), (2, 1, 6, 0), (2, 1, 7, 0)]
    assert calls == 2 * one_round
    assert [rate.phase for rate in rates] == ["prefill", "decode"]
    assert all(rate.slowest == rate.median == rate.fastest for rate in rates)


def form(name: str, *rates: tuple[float, float, float], sparse: int = 2, memory: int = 100) -> Measured:
    found = (Rate(phase, 1, *rate) for phase, rate in zip(("prefill", "decode"), rates, strict=True))
    return Measured("model", name, False, sparse, 2, 0.7, None, memory, tuple(found))


@pytest.mark.parametrize(
    ("prefill", "decode", "end"),
    [
        ((21, 20, 22), (30, 30, 30), "pays here."),
        ((3, 3, 3), (11.5, 11, 12), "pays here for decode at batch 1 alone."),
        ((3, 3, 3), (2, 2, 2), "does not pay here."),
        ((10, 9, 30), (2, 2, 2), "does not pay here: nothing is faster beyond the noise."),
    ],
)
def test_the_sentence_follows_from_the_figures(
    prefill: tuple[float, float, float], decode: tuple[float, float, float], end: str
) -> None:
    dense = form("dense", (10.0, 9.0, 11.0), (10.0, 9.0, 11.0), sparse=0)
    said = verdict(dense, form("csr", prefill, decode, memory=60), "this CPU")
    assert said.endswith(f"with 0.60x the memory; sparsity {end}")
    assert f"{prefill[0] / 10:.2f}x in prefill at batch 1, {decode[0] / 10:.2f}x in decode at batch 1" in said
    assert said.startswith("model: csr at 70.0% zeros")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "--tokens 0 must be at least 1"),
        ({"repeat": 0}, "--repeat 0 must be at least 1"),
        ({"batch": ()}, "--batch names no batch size"),
        ({"batch": (1, 0)}, "--batch 0 must be at least 1"),
        ({"tokens": 17}, "beyond the 32 positions of .*model; give 16 or fewer"),
    ],
)
def test_unusable_options(base: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        bench([str(base / "model")], BenchOptions(**options))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="semi-structured matrices need a CUDA GPU")
def test_two_of_four_on_a_gpu(tmp_path: Path) -> None:
    config = llama_config(hidden_size=64, intermediate_size=128)
    save(random_model(config, dtype=torch.bfloat16), tmp_path / "model")
    masks_for(tmp_path / "model", tmp_path / "masks", pattern=(2, 4))
    apply_masks(str(tmp_path / "model"), tmp_path / "masks", tmp_path / "pruned")
    export(str(tmp_path / "pruned"), tmp_path / "semi", ExportOptions(to="semi-structured"))
    result = bench([str(tmp_path / "pruned"), str(tmp_path / "semi")], BenchOptions(**QUICK | {"device": "cuda"}))
    both = [("dense", 0), ("semi-structured", 14)]
    assert [(one.form, one.sparse) for one in result.measured] == [*both, ("bitmap", 14), *both]
    dense, semi, bitmap, _, exported = result.measured
    assert semi.memory == exported.memory < dense.memory > bitmap.memory
    assert set(result.products[0].shapes[0].seconds) == {"dense", "bitmap"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="products on a CUDA device need one")
def test_scattered_zeros_on_a_gpu(base: Path) -> None:
    found = trim_json("bench", base / "packed", "--tokens", 3, "--batch", "1,2", "--repeat", 1, "--device", "cuda")
    assert [(one["form"], one["sparse"]) for one in found["measured"]] == [("dense", 0), ("bitmap", 14)]
    assert set(found["products"][0]["shapes"][0]["seconds"]) == {"dense", "bitmap"}
    assert torch.cuda.get_device_name(0) in found["verdicts"][0]


def test_the_command(base: Path, compiled: Path) -> None:
    found = trim("bench", base / "pruned", base / "csr", "--tokens", 3, "--batch", "1", "--repeat", 1, *COMPUTE)
    assert found.status == 0
    assert "prefill b1" in " ".join(found.out.split())
    assert found.out.count("% zeros runs at these multiples of dense's speed") == 3
    assert "milliseconds of a product with one input row" in " ".join(found.out.split())
    document = trim_json("bench", base / "pruned", "--tokens", 3, "--batch", "1,2", "--repeat", 1, *COMPUTE)
    assert document["schema"] == "trim.bench/1"
    assert [one["form"] for one in document["measured"]] == ["dense", "csr", "bitmap"]
    assert document["products"][0]["shapes"][0]["shape"] == [40, 32]
    assert len(document["measured"][0]["rates"]) == 4
    wrong = trim("bench", base / "pruned", "--batch", "1,two")
    assert wrong.status == 2
    assert "'two' is not usable" in wrong.err
