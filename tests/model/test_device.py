"""Where and in which dtype a model is computed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from trimcli.errors import OptionError
from trimcli.files.checkpoint import Checkpoint
from trimcli.model.device import compute_device, compute_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def checkpoint(directory: Path, **tensors: Tensor) -> Checkpoint:
    (directory / "config.json").write_text("{}")
    save_file(tensors, directory / "model.safetensors")
    return Checkpoint.open(directory)


def test_what_is_named_is_taken(nano_qwen2: Path) -> None:
    assert compute_dtype("bfloat16", Checkpoint.open(nano_qwen2), CPU) == BF16
    assert compute_device("cpu") == CPU
    with pytest.raises(OptionError, match=r"--dtype 'flot32' is none of .*did you mean 'float32'"):
        compute_dtype("flot32", Checkpoint.open(nano_qwen2), CPU)
    for name in ("cdua", "mps", "cuda:99"):
        with pytest.raises(OptionError, match=f"--device '{name}'"):
            compute_device(name)


def test_a_cuda_device_without_a_number_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a device without an index, which torch sets no limit of memory for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [compute_device(name).index for name in ("cuda", "auto", "cuda:1")] == [0, 0, 1]
    with pytest.raises(OptionError, match="--device 'cuda:2': this machine has 2 CUDA devices"):
        compute_device("cuda:2")


@pytest.mark.parametrize(
    ("stored", "units", "expected"),
    [
        (F32, ("avx512_bf16", "avx512_fp16"), F32),
        (F16, ("avx512_fp16",), F16),
        (F16, ("amx_fp16",), F16),
        (F16, ("avx512_bf16", "amx_bf16"), F32),
        (F16, (), F32),
        (BF16, ("avx512_bf16",), BF16),
        (BF16, ("amx_bf16",), BF16),
        (BF16, ("avx512_fp16", "amx_fp16"), F32),
        (BF16, (), F32),
    ],
)
def test_auto_on_a_cpu(
    stored: torch.dtype, units: tuple[str, ...], expected: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own where the CPU has units for it; another 16-bit dtype has not its range or its digits."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(units, True))
    model = checkpoint(tmp_path, weight=torch.zeros(4, 4, dtype=stored))
    assert compute_dtype("auto", model, CPU) == expected


@pytest.mark.parametrize(
    ("stored", "capability", "expected"),
    [(F32, (9, 0), F32), (F16, (7, 0), F16), (BF16, (8, 0), BF16), (BF16, (9, 0), BF16), (BF16, (7, 5), F32)],
)
def test_auto_on_a_cuda_device(
    stored: torch.dtype,
    capability: tuple[int, int],
    expected: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before Ampere there are no units for bfloat16, and float16 overflows where it does not."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    model = checkpoint(tmp_path, weight=torch.zeros(4, 4, dtype=stored))
    assert compute_dtype("auto", model, CUDA) == expected


def test_auto_follows_most_of_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the first tensors, nor most tensors: a few scales in float32 make no float32 model; integers do not count."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    scales = {f"a{index}": torch.ones(2) for index in range(70)}
    table, weight = torch.zeros(99, 99, dtype=torch.int64), torch.zeros(40, 40, dtype=BF16)
    assert compute_dtype("auto", checkpoint(tmp_path, **scales, table=table, weight=weight), CUDA) == BF16
    assert compute_dtype("auto", checkpoint(tmp_path, **scales, weight=weight[:4].clone()), CUDA) == F32


def test_auto_without_weights_is_float32(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert compute_dtype("auto", Checkpoint.open(tmp_path, weights=False), CPU) == F32
