"""Where and in which precision to compute."""

import re

import torch

from trimcli.errors import OptionError
from trimcli.files.checkpoint import Checkpoint
from trimcli.options import one_of


def compute_dtype(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The computation's dtype: as named, or for `auto` the checkpoint's own where the device has units for it.

    A CPU without 16-bit units multiplies float16 and bfloat16 a hundred times slower than float32, so `auto` is
    float32 there.
    """
    if name != "auto":
        return getattr(torch, one_of("--dtype", name, ("auto", "float32", "bfloat16", "float16")))
    stored = {checkpoint.spec(key).dtype for key in checkpoint.keys()[:64]} if checkpoint.has_weights else set()
    if torch.float32 in stored or torch.float64 in stored or not stored:
        return torch.float32
    wanted = torch.float16 if torch.float16 in stored else torch.bfloat16
    if device.type != "cpu":
        return wanted
    has = torch.cpu.get_capabilities()
    if wanted == torch.float16 and (has.get("avx512_fp16") or has.get("amx_fp16")):
        return torch.float16
    return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32


def compute_device(name: str) -> torch.device:
    """The compute device: as named, or for `auto` the first CUDA device where there is one. Raises OptionError."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if not re.fullmatch(r"cuda:\d+", name):
        one_of("--device", name, ("auto", "cpu", "cuda", "cuda:0"))
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"--device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices; give cpu.")
    return device
