"""Where and in which precision to compute."""

import os
import re
from collections import Counter

import torch

from trimcli.errors import OptionError
from trimcli.files.checkpoint import Checkpoint
from trimcli.options import one_of
from trimcli.world import ranks

# What a CPU multiplies each 16-bit dtype with, by torch's names; without, it takes a hundred times as long as float32.
UNITS = {torch.float16: ("avx512_fp16", "amx_fp16"), torch.bfloat16: ("avx512_bf16", "amx_bf16")}


# Logits held at a time: on a CPU few enough to stay in its cache, elsewhere many enough to fill the device.
LOGITS, DEVICE_LOGITS = 1 << 21, 1 << 28
# Of a logit, with what the cross-entropy makes of it, and as much again to spare.
LOGIT_BYTES = 32


def held_logits(device: torch.device) -> int:
    """How many logits to hold at a time on a device, by what of its memory is free."""
    if device.type == "cpu":
        return LOGITS
    return min(DEVICE_LOGITS, free_bytes(device) // LOGIT_BYTES)


def free_bytes(device: torch.device) -> int:
    """What tensors may still take of an accelerator's memory, within what `limit_device` left this process."""
    module = torch.get_device_module(device)
    free, total = module.mem_get_info(device)
    share = module.get_per_process_memory_fraction(device)
    return (
        int(free) if share >= 1 else max(0, min(int(free), int(share * total) - int(module.memory_allocated(device))))
    )


def limit_device(device: torch.device, nbytes: int | None) -> None:
    """Let this process's tensors take no more than `nbytes` of an accelerator's memory, or all of it: torch holds it.

    What goes beyond runs out of memory, upon which a walk goes on with smaller batches.
    """
    module = torch.get_device_module(device)
    if device.type == "cpu" or (nbytes is None and not module.is_initialized()):
        return
    _, total = module.mem_get_info(device)
    module.set_per_process_memory_fraction(1.0 if nbytes is None else min(1.0, nbytes / total), device)


def compute_dtype(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The computation's dtype: as named, or the one of most bytes; float32 where the device has no units for that."""
    if name != "auto":
        return getattr(torch, one_of("--dtype", name, ("auto", "float32", "bfloat16", "float16")))
    stored: Counter[torch.dtype] = Counter()
    for spec in checkpoint.specs().values() if checkpoint.has_weights else ():
        if spec.dtype.is_floating_point:
            stored[spec.dtype] += spec.nbytes
    wanted = stored.most_common(1)[0][0] if stored else torch.float32
    if wanted not in UNITS:
        return torch.float32
    if device.type == "cpu":
        computes = any(torch.cpu.get_capabilities().get(unit) for unit in UNITS[wanted])
    else:
        computes = wanted == torch.float16 or torch.cuda.get_device_capability(device) >= (8, 0)
    return wanted if computes else torch.float32


def compute_device(name: str) -> torch.device:
    """The compute device: as named, or for `auto` the first CUDA device where there is one. Raises OptionError.

    Of several ranks on a machine, each computes on a CUDA device of its own, in order.
    """
    if ranks() > 1:
        name = _device_of_rank(name)
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if not re.fullmatch(r"cuda:\d+", name):
        one_of("--device", name, ("auto", "cpu", "cuda", "cuda:0"))
    device = torch.device("cuda:0" if name == "cuda" else name)  # limits are set for one of a number
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise OptionError(f"--device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices; give cpu.")
    if device.type == "cuda" and ranks() > 1:
        torch.cuda.set_device(device)  # where nccl then works for this process
    return device


def _device_of_rank(name: str) -> str:
    """What one of several ranks computes on where `name` is asked for."""
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if name.startswith("cuda:"):
        raise OptionError(f"--device {name}: each of {ranks()} ranks takes a device of its own; give cuda or cpu.")
    return name
